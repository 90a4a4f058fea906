"""Two labels that are independent: which of them do the clusters of a representation follow?

Every representation is clustered at each label's number of classes and scored against both, and a
linear probe reads both from it. Random compressors of what a run's own compressor read stand beside
it. Items and seeds are resampled together, the clustering and the probe's predictions fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from sklearn import config_context
from sklearn.metrics.cluster import expected_mutual_information
from threadpoolctl import threadpool_limits

import measures
from clustering import kmeans
from inference import (
    Statistic,
    adjust,
    difference_p,
    interval,
    item_weights,
    resample,
    share_statistic,
)
from pairs import TASKS
from scores import Run, Scores, read_runs

REPRESENTATIONS = ("engram", "intermediate", "pooled")
DUAL, SINGLE = "dual_engram", "classification_engram"


@dataclass(frozen=True)
class Settings:
    """restarts: of k-means; band_draws: random compressors a run, with band_restarts each."""

    restarts: int = 20
    band_draws: int = 20
    band_restarts: int = 3
    resamples: int = 1000


SMOKE = Settings(restarts=2, band_draws=2, band_restarts=1, resamples=50)


def _entropy(counts: np.ndarray) -> np.ndarray:
    """(..., n) counts -> (...) nats."""
    shares = counts / counts.sum(-1, keepdims=True)
    return -(shares * np.log(np.where(shares > 0, shares, 1))).sum(-1)


def _expected(table: np.ndarray) -> float:
    """E[MI] in nats of a table of counts; empty rows and columns add nothing and are left out."""
    table = table[table.sum(1) > 0][:, table.sum(0) > 0].astype(np.int64)
    return expected_mutual_information(table, int(table.sum()))


def ami_of_tables(tables: np.ndarray) -> np.ndarray:
    """Adjusted mutual information of contingency tables (..., C, k) of counts -> (...).

    (MI - E[MI]) / ((H(classes) + H(clusters)) / 2 - E[MI]).
    Source: Vinh, Epps & Bailey 2010; the expectation is scikit-learn's.
    """
    tables = np.asarray(tables, np.float64)
    rows, columns = _entropy(tables.sum(-1)), _entropy(tables.sum(-2))
    flat = tables.reshape(*tables.shape[:-2], -1)
    mutual = rows + columns - _entropy(flat)
    expected = [_expected(table) for table in tables.reshape(-1, *tables.shape[-2:])]
    expected = np.array(expected).reshape(mutual.shape)
    most = (rows + columns) / 2 - expected
    small = np.abs(most) < 1e-12  # both partitions trivial and equal, which scikit-learn scores 1
    return np.where(small, 1.0, (mutual - expected) / np.where(small, 1, most))


def ami_statistic(labels: np.ndarray, partitions: np.ndarray, k: int) -> Statistic:
    """Mean AMI of partitions (N,) or (J, N), codes 0..k-1, with labels (N,)."""
    partitions, classes = np.atleast_2d(partitions), int(labels.max()) + 1

    def of_counts(counts):
        return ami_of_tables(counts.reshape(*counts.shape[:-1], classes, k))

    return Statistic(labels * k + partitions, classes * k, of_counts)


def _value(statistic: Statistic) -> np.ndarray:
    """(J,) the statistic of each of its partitions on all items."""
    counts = np.stack([np.bincount(codes, minlength=statistic.cells) for codes in statistic.codes])
    return statistic.of_counts(counts[None].astype(np.float64))[0]


def _measure(representations: list[np.ndarray], labels: Mapping, seed: int, restarts: int) -> dict:
    """Statistics by name over J representations of the same items."""
    out = {}
    for k in sorted({int(y.max()) + 1 for y in labels.values()}):
        clusters = np.stack([kmeans(x, k, seed, restarts).clusters for x in representations])
        for task, y in labels.items():
            out[f"ami_{task}_{k}"] = ami_statistic(y, clusters, k)
    for task, y in labels.items():
        right = [measures.probe_predictions(x, y) == y for x in representations]
        out[f"probe_{task}"] = share_statistic(np.stack(right))
    return out


def _other(task: str) -> str:
    return next(other for other in TASKS if other != task)


def score(features: Mapping[str, np.ndarray], seed: int = 0, settings: Settings | None = None):
    """AMI and probes of every run against both labels.

    Args:
        features: arrays by key: each of TASKS (N,) labels 0..C-1, and runs named TASK-ARM/SEED.
    Returns:
        {"settings", "two-labels": rows by run and representation, "kept": contrasts,
        "evidence"}, JSON values.
    """
    settings = settings or Settings()
    labels = {task: np.asarray(features[task]) for task in TASKS}
    k = {task: int(y.max()) + 1 for task, y in labels.items()}
    _, runs = read_runs({**features, "labels": labels[TASKS[0]]})
    scores = Scores(item_weights(len(labels[TASKS[0]]), settings.resamples, seed), seed)
    bands: dict[tuple[str, str], list[np.ndarray]] = {}
    checks = config_context(assume_finite=True, skip_parameter_validation=True)
    with threadpool_limits(1), checks:
        for run in runs:
            for name in REPRESENTATIONS:
                found = _measure([run.representations[name]], labels, run.seed, settings.restarts)
                _keep(scores, bands, run, name, found, k)
            rng = np.random.default_rng([seed, run.seed])
            tap, width = run.representations[run.tap], run.representations["engram"].shape[1]
            drawn = [
                measures.random_compressor(tap, width, rng) for _ in range(settings.band_draws)
            ]
            found = _measure(drawn, labels, run.seed, settings.band_restarts)
            _keep(scores, bands, run, "random", found, k)
    conditions = list(dict.fromkeys(run.arm for run in runs))
    rows = [
        _row(scores, bands, condition, name, k)
        for condition in conditions
        for name in ("engram", "random", "intermediate", "pooled")
    ]
    return {
        "settings": asdict(settings) | {"seed": seed, "items": len(labels[TASKS[0]])},
        "two-labels": rows,
        "kept": adjust(list(_kept(scores, conditions))),
        "evidence": evidence(rows),
    }


def _keep(scores: Scores, bands: dict, run: Run, name: str, found: Mapping, k: Mapping) -> None:
    """Store values and draws, and each draw's, of a representation (or of J random ones)."""
    values = {quantity: _value(statistic) for quantity, statistic in found.items()}
    for quantity, statistic in found.items():
        # of random compressors the band is shown, and only the probe is compared with
        drawn = statistic if name != "random" or quantity.startswith("probe") else None
        if drawn and quantity.startswith("ami"):
            # chance is taken out for independent items: a resample's copies agree with each other
            drawn = resample(statistic, scores.weights)
            drawn += values[quantity].mean() - drawn.mean()
        scores.add(run, f"{name}.{quantity}", values[quantity].mean(), drawn)
    task = run.arm.split("-")[0]
    if task in TASKS:
        own, rival = (f"ami_{t}_{k[t]}" for t in (task, _other(task)))
        values["difference"] = values[own] - values[rival]
        drawn = [scores.draws.get((run.arm, f"{name}.{q}"), {}) for q in (own, rival)]
        drawn = drawn[0][run.seed] - drawn[1][run.seed] if all(drawn) else None
        scores.add(run, f"{name}.difference", values["difference"].mean(), drawn)
    for quantity, each in values.items():
        bands.setdefault((run.arm, f"{name}.{quantity}"), []).append(each)


def _row(scores: Scores, bands: Mapping, condition: str, name: str, k: Mapping) -> dict:
    """One representation of one condition; the random compressors' is their band, not their mean's.

    Of a band low and high are its 2.5th and 97.5th percentile in each seed, averaged over seeds.
    """
    task = condition.split("-")[0]

    def cell(quantity):
        found = scores.interval(condition, f"{name}.{quantity}")
        if name == "random" and found["mean"] is not None:
            each = bands[condition, f"random.{quantity}"]
            low, high = np.mean([np.quantile(x, [0.025, 0.975]) for x in each], 0)
            found |= {"low": float(low), "high": float(high)}
        return found if found["mean"] is not None else None

    row = {"arm": condition, "representation": "random compressor" if name == "random" else name}
    row |= {f"ami_{t}": cell(f"ami_{t}_{k[t]}") for t in TASKS}
    row |= {"difference": cell("difference")}
    row |= {f"probe_{t}": cell(f"probe_{t}") for t in TASKS}
    row["probe_other"] = row[f"probe_{_other(task)}"] if task in TASKS else None
    row["at_every_k"] = {f"{t}_{c}": cell(f"ami_{t}_{c}") for t in TASKS for c in k.values()}
    seeds = scores.seeds(condition, f"{name}.probe_{TASKS[0]}")
    quantities = [f"ami_{t}_{k[t]}" for t in TASKS] + [f"probe_{t}" for t in TASKS]
    row["seeds"] = {
        str(s): {q: scores.seeds(condition, f"{name}.{q}")[s] for q in quantities} for s in seeds
    }
    return row


def _kept(scores: Scores, conditions: list[str]):
    """What each objective keeps of the label that was not trained: probe contrasts."""
    for task in TASKS:
        probe = f"probe_{_other(task)}"
        dual, single = f"{task}-{DUAL}", f"{task}-{SINGLE}"
        asked = [
            (f"with - without LM, {name}", (dual, f"{name}.{probe}"), (single, f"{name}.{probe}"))
            for name in REPRESENTATIONS
        ] + [
            (f"engram - random compressor, {words}", (c, f"engram.{probe}"), (c, f"random.{probe}"))
            for c, words in ((dual, "with LM"), (single, "without LM"))
        ]
        for name, first, second in asked:
            if not {first[0], second[0]} <= set(conditions):
                continue
            _, values, draws = scores.pair(first, second)
            yield {
                "id": f"{task}: {name}",
                "task": task,
                "name": name,
                "family": "exploratory",
                "difference": asdict(interval(values, draws)),
                "p": difference_p(values, draws),
            }


def evidence(rows: list[dict]) -> dict:
    """What this test says to the rules of claims.py: {claim id: interval}, above 0 in favour.

    most_salient: AMI(task) - AMI(other) of the engram trained with both losses, each label at its
    own k, the smaller mean, the smaller low and the smaller high of the two tasks: the code must
    follow the task whichever label that is. Nothing else in claims.py asks for two labels. Empty
    until both tasks are trained.
    """
    found = [
        row["difference"]
        for row in rows
        if row["representation"] == "engram" and row["arm"] in [f"{t}-{DUAL}" for t in TASKS]
    ]
    if len(found) < len(TASKS):
        return {}
    smaller = {key: min(row[key] for row in found) for key in ("mean", "low", "high", "n_seeds")}
    return {"most_salient": smaller | {"where": "the two-label test's texts"}}
