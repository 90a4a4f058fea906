"""The rows of the controls table: what was measured of every run, as intervals over seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from measures import ClusterCounts, Metrics
from scores import Run, Scores

if TYPE_CHECKING:
    from analysis import Settings

FLOOR = "untrained"  # its engram is a random compressor on an untrained network: A6
BAND_METRICS = ("ari", "cluster_accuracy", "cosine_gap", "centred_cosine_gap")


def control_rows(
    runs: Sequence[Run],
    scores: Scores,
    bands: Mapping[tuple[str, int], Mapping],
    counts: Mapping[tuple[str, int], ClusterCounts],
    settings: Settings,
) -> Iterator[dict]:
    """The rows of the controls table, one a (control, arm, representation).

    Args:
        scores: what was measured of every run, by quantity.
        bands: by (arm, seed), draws of random compressors and the trained one's metrics.
        counts: by (arm, seed), the engram's own number of clusters.
    """

    def row(control, name, arm, quantity, representation="engram", metrics=("ari",), **extra):
        return {
            "control": control,
            "name": name,
            "arm": arm,
            "representation": representation,
            **{metric: scores.interval(arm, f"{quantity}.{metric}") for metric in metrics},
            **extra,
            "seeds": {
                str(seed): {
                    metric: scores.seeds(arm, f"{quantity}.{metric}").get(seed)
                    for metric in metrics
                }
                for seed in sorted(scores.seeds(arm, f"{quantity}.{metrics[0]}"))
            },
        }

    own = ("ari", "excess_ari", *(m for m in Metrics.__annotations__ if m != "ari"))
    for arm in dict.fromkeys(run.arm for run in runs):
        floor = arm == FLOOR
        if not floor:
            yield row("A0", "predictions", arm, "predictions", "logits")
        banded = {s: band for (a, s), band in bands.items() if a == arm}
        if banded:
            yield _band_row(arm, banded, settings)
        if not floor:
            if scores.seeds(arm, "initial.ari"):
                metrics = ("ari", "excess_ari", "relative_distance", "cosine")
                yield row("A2", "initial weights", arm, "initial", metrics=metrics)
            for name, quantity in (("PCA", "pca"), ("whitened PCA", "whitened")):
                if scores.seeds(arm, f"{quantity}.ari"):
                    yield row("A3", name, arm, quantity, metrics=("ari", "excess_ari"))
        held = dict.fromkeys(n for run in runs if run.arm == arm for n in run.representations)
        for name in held:
            metrics = (*own, "stability") if name == "engram" else own
            restarts = settings.layer_restarts if name.startswith("layer") else settings.restarts
            control, title = ("A6", "untrained") if floor else ("A4", "trained")
            yield row(control, title, arm, name, name, metrics, restarts=restarts)
        if not floor:
            for name in ("spherical k-means", "Gaussian mixture", "Ward"):
                if scores.seeds(arm, f"{name}.ari"):
                    yield row("A7", name, arm, name)
            counted = {str(s): asdict(c) for (a, s), c in counts.items() if a == arm}
            if counted:
                yield {
                    "control": "A7",
                    "name": "best number of clusters",
                    "arm": arm,
                    "representation": "engram",
                    "ari": None,
                    "seeds": counted,
                }
    for arm, quantity in scores.values:
        name, _, metric = quantity.partition(".")
        if metric == "length_correlation":
            yield {"ari": None} | row("A10", "text length", arm, name, name, (metric,))
    modes = dict.fromkeys(
        (arm, q.split(".")[0]) for arm, q in scores.values if q.endswith(".lm_loss")
    )
    for arm, mode in modes:
        metrics = ("accuracy", "lm_loss")
        yield {"ari": None} | row("A9", f"{mode} engram", arm, mode, "prefix", metrics)


def _band_row(arm: str, banded: Mapping[int, dict], settings: Settings) -> dict:
    """Random compressors' mean and 2.5th and 97.5th percentile in each seed, averaged over seeds.

    Averaged, not pooled: pooled draws would add the spread between seeds to the band.
    """
    seeds = {}
    for seed, band in sorted(banded.items()):
        seeds[str(seed)] = {"trained": band["trained"]}
        for name, draws in band["draws"].items():
            low, high = np.quantile(draws, [0.025, 0.975])
            seeds[str(seed)][name] = {"mean": draws.mean(), "low": low, "high": high}
            if band["trained"]:
                below = (draws < band["trained"][name]) + 0.5 * (draws == band["trained"][name])
                seeds[str(seed)][name]["percentile"] = 100 * below.mean()
    row = {"control": "A1", "name": "random compressor", "arm": arm, "representation": "engram"}
    for name in BAND_METRICS:
        row[name] = {
            part: float(np.mean([s[name][part] for s in seeds.values()]))
            for part in ("mean", "low", "high")
        } | {"n_seeds": len(seeds)}
        if all(band["trained"] for band in banded.values()):
            percentiles = [s[name]["percentile"] for s in seeds.values()]
            row[name]["trained_percentile"] = float(np.mean(percentiles))
    return row | {
        "draws": settings.band_draws,
        "restarts": settings.band_restarts,
        "seeds": seeds,
    }
