"""What the gradient audits of a run say (control B14): means over steps, intervals over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np

from contrasts import M3
from inference import interval

LOSSES = ("cls", "lm")
DIRECTIONS = ("classes", "exchanged", "spread", "mean")


def _mean(audits: list[dict], *path: str) -> float | None:
    """A run's mean of a figure of its records."""
    found = []
    for record in audits:
        for key in path:
            record = record.get(key) if record else None
        found += [record] if record is not None else []
    return float(np.mean(found)) if found else None


def summary(rows: Mapping[str, Mapping]) -> list[dict]:
    """The audits of results.json's rows: means over a run's records, intervals over seeds.

    Returns:
        a row for each arm and site; the compressor's has the shares, and `excess`, those along the
        class means less the same once the texts' errors are exchanged.
    """
    out = []
    for arm, by_seed in rows.items():
        runs = [run["audits"] for run in by_seed.values() if run.get("audits")]
        if not runs:
            continue

        def over_seeds(*path: str, runs=runs) -> dict | None:
            found = [x for audits in runs if (x := _mean(audits, *path)) is not None]
            return asdict(interval(np.array(found))) if found else None

        for site in runs[0][0]["norm"]:
            row = {"id": f"{arm}/{site}", "arm": arm, "site": site}
            row |= {f"norm_{loss}": over_seeds("norm", site, loss) for loss in LOSSES}
            row["cosine"] = over_seeds("cosine", site)
            if site == "compressor":
                row |= {f"share_{kind}": over_seeds("share", kind, "both") for kind in DIRECTIONS}
                row["share_uniform"] = over_seeds("share", "uniform")
                row["by_loss"] = {
                    loss: {kind: over_seeds("share", kind, loss) for kind in DIRECTIONS}
                    for loss in LOSSES
                }
                pairs = [
                    [_mean(audits, "share", kind, "both") for kind in DIRECTIONS[:2]]
                    for audits in runs
                ]
                excess = np.array([a - b for a, b in pairs if None not in (a, b)])
                row["excess"] = asdict(interval(excess)) if len(excess) else None
            out.append(row)
    return out


def evidence(rows: list[dict], dataset: Mapping) -> dict:
    """What the audit of Model 3 says to the rules of claims.py, for studies of the same data."""
    found = [row["excess"] for row in rows if row["id"] == f"{M3}/compressor"]
    texts = dataset.get("train_rows")
    where = f"{texts:,} training texts" if texts else "other texts"
    of = {"slug": dataset.get("slug"), "where": where}
    return {"gradient_mechanism": found[0] | of} if found and found[0] else {}
