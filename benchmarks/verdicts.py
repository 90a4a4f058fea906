"""Do the rules of claims.py give the verdict that was planted? Measured on made-up networks.

    python benchmarks/verdicts.py [--draws 100] [--processes 2]

Each draw makes the features of SEEDS seeds of every arm from a known law, runs the whole analysis,
and compares the verdicts with what was planted. Writes benchmarks/verdicts.json, which FINDINGS.md
prints: per scenario and claim how often the verdict came out as planted, and how often a primary
contrast with no true difference came out significant. About 15 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from analysis import Settings, analyse
from inference import ALPHA
from rules import OPEN, REFUTED, SUPPORTED

SEEDS, ITEMS, POOLED, TAP, ENGRAM = 5, 400, 24, 48, 128
# smaller than the study's, so that 400 analyses take minutes; verdicts.json holds them
SETTINGS = Settings(
    restarts=3,
    layer_restarts=1,
    band_restarts=1,
    band_draws=20,
    resamples=1000,
    cosine_resamples=200,
    band_cosine_draws=3,
    stability_refits=2,
    silhouette_items=100,
    cluster_items=120,
    probe_items=0,
    rank_items=400,
    mixture_dims=3,
    most_clusters=3,
)
NEVER = (REFUTED, OPEN)  # nothing was planted, but so few items need not show equivalence
PLANTED = {
    "class beyond the classifier": {
        "clusters_at_all": (SUPPORTED,),
        "because_of_objective": (SUPPORTED,),
        "zero_supervision": (SUPPORTED,),
        "most_salient": (OPEN,),
        "cosine_gap": (SUPPORTED,),
        "dual_gain_sst2": (SUPPORTED,),
        "engram_delta": (SUPPORTED,),
        "rank_collapse": (SUPPORTED,),
        "small_engram_hurts": (REFUTED,),
        "any_task": (OPEN,),
        "keep_lm_head": (SUPPORTED,),
    },
    "random projection": {
        "clusters_at_all": (SUPPORTED,),
        "because_of_objective": (REFUTED,),
        "zero_supervision": (REFUTED,),
        "cosine_gap": (REFUTED,),
        "dual_gain_sst2": NEVER,
        "engram_delta": NEVER,
        "rank_collapse": NEVER,
        "engram_leaves_rank": (SUPPORTED,),
        "small_engram_hurts": NEVER,
        "any_task": (REFUTED,),
        "keep_lm_head": NEVER,
    },
    "another label": {
        "clusters_at_all": (REFUTED,),
        "because_of_objective": (REFUTED,),
        "zero_supervision": (REFUTED,),
        "most_salient": (REFUTED,),
        "cosine_gap": (REFUTED,),
        "any_task": (REFUTED,),
    },
    "nothing": {
        "clusters_at_all": (REFUTED,),
        "because_of_objective": (REFUTED,),
        "zero_supervision": (REFUTED,),
        "most_salient": (REFUTED,),
        "cosine_gap": NEVER,
        "dual_gain_sst2": NEVER,
        "engram_delta": NEVER,
        "rank_collapse": NEVER,
        "keep_lm_head": NEVER,
    },
}
# primary contrasts without a true difference: what is significant there is a false positive
NULL = {
    "random projection": ("P1", "P2", "P3", "P5", "P6"),
    "another label": ("P3", "P5", "P6"),
    "nothing": ("P1", "P2", "P3", "P5", "P6"),
}


def planted(scenario: str, draw: int) -> tuple[dict[str, np.ndarray], dict]:
    """Features and results of made-up networks of a scenario.

    A tap holds the class along one direction (not in "nothing"), the logits read it, and a code is
    built by the scenario. Every seed has its own directions, noise and slightly better or worse
    classifier, every item its own difficulty that all networks share.
    """
    rng = np.random.default_rng([draw, *scenario.encode()])
    labels = rng.permutation(np.arange(ITEMS) % 2)
    rival = np.empty(ITEMS, int)  # as many of each class: independent by construction
    for label in (0, 1):
        rival[labels == label] = rng.permutation(np.arange(ITEMS // 2) % 2)
    sign, hard = 2.0 * labels - 1, rng.normal(size=ITEMS)
    favour, informative = scenario == "class beyond the classifier", scenario != "nothing"
    features, rows = {"labels": labels}, {}
    for seed in range(SEEDS):
        for arm in (
            *("classification", "dual", "dual_engram", "classification_engram"),
            *("lm_only_engram", "classification_tuned", "dual_tuned", "untrained"),
        ):
            here = f"{arm}/{seed}/"
            skill = rng.normal(0.9, 0.05)
            if favour:
                skill += {"dual_engram": 0.8, "dual": 0.3, "dual_tuned": 0.5}.get(arm, 0)
            knows = informative and arm not in ("untrained", "lm_only_engram")
            evidence = skill * sign * knows + 0.7 * hard + 0.7 * rng.normal(size=ITEMS)
            features[here + "logits"] = np.stack([-evidence, evidence], 1).astype(np.float32)
            width = np.ones(POOLED)
            if favour and arm == "classification":
                width[POOLED // 3 :] = 0.2  # the collapse: most directions lose their variance
            pooled = rng.normal(size=(ITEMS, POOLED)) * width
            if arm in ("classification", "dual", "dual_engram", "untrained"):
                features[here + "pooled"] = pooled.astype(np.float16)
            if "engram" not in arm and arm != "untrained":
                continue
            direction = rng.normal(size=TAP)
            tap = np.outer(evidence, 4 * direction / np.linalg.norm(direction))
            tap = (tap + rng.normal(size=(ITEMS, TAP))).astype(np.float16)
            weights = {k: rng.uniform(-1, 1, s) / np.sqrt(TAP) for k, s in _SHAPES.items()}
            code = np.tanh(tap @ weights["W"].T + weights["b"])
            carries = sign if favour else 2.0 * rival - 1
            owed = {"dual_engram", "lm_only_engram"}
            if arm in owed and (favour or scenario == "another label"):
                axis = rng.choice([-1.0, 1.0], ENGRAM)
                code = np.tanh(np.outer(carries, axis) + 0.7 * rng.normal(size=code.shape))
            if arm != "classification_engram":  # P2 needs its code only; its A1 is left out
                features |= {here + k: v.astype(np.float32) for k, v in weights.items()}
            features[here + "intermediate"] = tap
            features[here + "engram"] = code.astype(np.float16)
        used = 0.1 * favour  # what another text's engram costs
        rows[str(seed)] = {
            "final": {
                "modes": {
                    mode: {"accuracy": 0.8 - cost + rng.normal(0, 0.003), "lm_loss": None}
                    for mode, cost in (("own", 0.0), ("shuffled", used))
                }
            }
        }
    results = {"dataset": {"slug": "sst2", "name": scenario}, "backbone": "from scratch, made up"}
    return features, results | {"rows": {"dual_engram": rows}}


_SHAPES = {"W0": (ENGRAM, TAP), "b0": (ENGRAM,), "W": (ENGRAM, TAP), "b": (ENGRAM,)}


def run(case: tuple[str, int]) -> tuple[str, dict[str, str], dict[str, tuple]]:
    """Scenario, verdicts by claim, and (raw, adjusted) p of the primary contrasts by id."""
    scenario, draw = case
    found = analyse(*planted(scenario, draw), seed=draw, settings=SETTINGS)
    primary = {c["id"]: c for c in found["contrasts"] if c["family"] == "primary"}
    return (
        scenario,
        {row["id"]: row["verdict"] for row in found["claims"]},
        {name: (row["p"], row["p_adjusted"]) for name, row in primary.items()},
    )


def tally(outcomes: Iterator[tuple]) -> dict:
    """Counts of verdicts as planted and of false positives, from what `run` returned."""
    verdicts, wrong = {}, {}
    for scenario, claims, contrasts in outcomes:
        for claim, wanted in PLANTED[scenario].items():
            cell = verdicts.setdefault((scenario, claim), {"draws": 0, "as_planted": 0})
            cell["draws"] += 1
            cell["as_planted"] += claims[claim] in wanted
            cell.setdefault("verdicts", {}).setdefault(claims[claim], 0)
            cell["verdicts"][claims[claim]] += 1
        nulls = {name: contrasts[name] for name in NULL.get(scenario, ())}
        for name, (raw, adjusted) in nulls.items():
            cell = wrong.setdefault((scenario, name), {"draws": 0, "raw": 0, "adjusted": 0})
            cell["draws"] += 1
            cell["raw"] += raw < ALPHA
            cell["adjusted"] += adjusted < ALPHA
        if nulls:
            cell = wrong.setdefault((scenario, "any"), {"draws": 0, "raw": 0, "adjusted": 0})
            cell["draws"] += 1
            cell["raw"] += any(raw < ALPHA for raw, _ in nulls.values())
            cell["adjusted"] += any(adjusted < ALPHA for _, adjusted in nulls.values())
    return {
        "verdicts": [
            {
                "scenario": scenario,
                "claim": claim,
                "planted": " or ".join(PLANTED[scenario][claim]),
                **cell,
            }
            for (scenario, claim), cell in verdicts.items()
        ],
        "false_positives": [
            {"scenario": scenario, "contrast": name, **cell}
            for (scenario, name), cell in wrong.items()
        ],
    }


def show(report: Mapping) -> str:
    """The report as two plain tables."""
    lines = [f"{'scenario':28} {'claim':21} {'planted':28} as planted"]
    lines += [
        f"{r['scenario']:28} {r['claim']:21} {r['planted']:28} {r['as_planted']}/{r['draws']}"
        for r in report["verdicts"]
    ]
    lines += ["", f"{'no true difference in':28} {'contrast':9} {'p < .05':>9} {'adjusted':>9}"]
    lines += [
        f"{r['scenario']:28} {r['contrast']:9} {r['raw']:>5}/{r['draws']} "
        f"{r['adjusted']:>5}/{r['draws']}"
        for r in report["false_positives"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=100, help="draws a scenario (default 100)")
    parser.add_argument("--processes", type=int, default=2, help="at a time (default 2)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("verdicts.json"), help="file written"
    )
    options = parser.parse_args()
    started = time.monotonic()
    cases = [(scenario, draw) for draw in range(options.draws) for scenario in PLANTED]
    with ProcessPoolExecutor(options.processes) as pool:
        report = tally(pool.map(run, cases, chunksize=4))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    settings = asdict(SETTINGS) | {
        "seeds": SEEDS,
        "items": ITEMS,
        "tap_width": TAP,
        "engram_width": ENGRAM,
    }
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(UTC).date().isoformat(),
        "wall_seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "draws": options.draws,
        "settings": settings,
        **report,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(show(report))


if __name__ == "__main__":
    main()
