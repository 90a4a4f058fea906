"""The comparisons, fixed in advance as data, the six primary ones first; and how one is tested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from inference import (
    ACCURACY_MARGIN,
    ARI_MARGIN,
    RANK_MARGIN,
    difference_p,
    equivalence,
    exchange_p,
    interval,
    mcnemar,
)
from scores import Run, Scores

M1, M2, M3, B1, B2 = (
    *("classification", "dual", "dual_engram"),
    *("classification_engram", "lm_only_engram"),
)


@dataclass(frozen=True)
class Contrast:
    """first - second, paired by seed.

    Args:
        first, second: (arm, quantity); second may be a number.
        margin: within +- this the difference counts as none; a share of second where `relative`.
        band: the metric whose random compressors second averages; p is then the exchange test's.
        slug: the one data set that it is about.
    """

    id: str
    name: str
    first: tuple[str, str]
    second: tuple[str, str] | float
    margin: float | None
    band: str | None = None
    relative: bool = False
    slug: str | None = None

    @property
    def family(self) -> str:
        return "primary" if self.id.startswith("P") else "exploratory"


def _same(id: str, name: str, quantity: str, first: str, second: str, margin, **more) -> Contrast:
    return Contrast(
        id, f"{name}, {quantity}", (first, quantity), (second, quantity), margin, **more
    )


def _beside(id: str, name: str, arm: str, first: str, second: str, **more) -> Contrast:
    return Contrast(id, name, (arm, first), (arm, second), ARI_MARGIN, **more)


def _used(id: str, name: str, arm: str, quantity: str, margin: float | None) -> Contrast:
    """A9: does exchanging the engram at evaluation change this?"""
    return Contrast(id, name, (arm, f"own.{quantity}"), (arm, f"shuffled.{quantity}"), margin)


GAINS = {"P3": "sst2", "P4": "ag-news"}  # the dual gain at tuned rates, by its data set's slug
_RANK = {"quantity": "pooled.effective_rank", "margin": RANK_MARGIN, "relative": True}
_ACCURACY = {"quantity": "accuracy", "margin": ACCURACY_MARGIN}
_TUNED = {"first": "dual_tuned", "second": "classification_tuned"} | _ACCURACY
CONTRASTS = (
    _beside("P1", "trained - random compressor, ARI", M3, "trained.ari", "random.ari", band="ari"),
    _same("P2", "Model 3 - Model 1 + engram", "engram.excess_ari", M3, B1, ARI_MARGIN),
    _same("P3", "Model 2 - Model 1, tuned rates, SST-2", **_TUNED, slug=GAINS["P3"]),
    _same("P4", "Model 2 - Model 1, tuned rates, AG News", **_TUNED, slug=GAINS["P4"]),
    _same("P5", "Model 3 - Model 2", first=M3, second=M2, **_ACCURACY),
    _same("P6", "Model 2 - Model 1", first=M2, second=M1, **_RANK),
    _same("E1", "Model 2 - Model 1, the recipe's rate", first=M2, second=M1, **_ACCURACY),
    _same("E2", "Model 3 - Model 1, the recipe's rate", first=M3, second=M1, **_ACCURACY),
    Contrast("E3", "engram - predictions, ARI", (M3, "engram.excess_ari"), 0.0, ARI_MARGIN),
    _beside("E4", "trained - initial weights, ARI", M3, "engram.ari", "initial.ari"),
    _beside("E5", "engram - PCA, ARI", M3, "engram.ari", "pca.ari"),
    _beside("E6", "engram - whitened PCA, ARI", M3, "engram.ari", "whitened.ari"),
    _beside(  # a cosine gap lives on the scale of an ARI, so it takes the ARI's margin
        "E7",
        "trained - random compressor, centred cosine gap",
        M3,
        "engram.centred_cosine_gap",
        "random.centred_cosine_gap",
        band="centred_cosine_gap",
    ),
    _beside("E8", "LM only: trained - random, ARI", B2, "trained.ari", "random.ari", band="ari"),
    _same("E9", "Model 3 - Model 2", first=M3, second=M2, **_RANK),
    _same("E26", "Model 1 - untrained", first=M1, second="untrained", **_RANK),
    _same("E10", "Model 3 - untrained", "engram.ari", M3, "untrained", ARI_MARGIN),
    # at the same depth; the excess takes the arms' accuracies out
    _same("E11", "Model 2 - Model 1", "intermediate.excess_ari", M2, M1, ARI_MARGIN),
    _same("E12", "Model 3 - Model 1", "intermediate.excess_ari", M3, M1, ARI_MARGIN),
    _same("E13", "Model 2 - Model 1", "pooled.excess_ari", M2, M1, ARI_MARGIN),
    _same("E14", "Model 3 - Model 1", "pooled.excess_ari", M3, M1, ARI_MARGIN),
    _used("E15", "own - shuffled engram, accuracy", M3, "accuracy", ACCURACY_MARGIN),
    _used("E16", "own - shuffled engram, LM loss", M3, "lm_loss", None),
    # positive controls: where they move nothing, E15 and E16 cannot tell that nothing is used
    *(
        _used(id, f"{fed}: own - shuffled engram, {what}", f"{M3}_{arm}", quantity, margin)
        for id, fed, arm, what, quantity, margin in (
            ("E27", "same-class engram", "same_class", "accuracy", "accuracy", ACCURACY_MARGIN),
            ("E28", "same-class engram", "same_class", "LM loss", "lm_loss", None),
            ("E29", "own engram fed back", "self", "LM loss", "lm_loss", None),
        )
    ),
    # what is fed back, and what each objective says (E17 is against the published figure)
    *(
        _same(id, f"{name} - Model 3", "engram.ari", f"{M3}_{arm}", M3, ARI_MARGIN)
        for id, name, arm in (
            ("E18", "same-class engram", "same_class"),
            ("E19", "own engram", "self"),
            ("E20", "detached engram", "detached"),
            ("E21", "zero engram", "off"),
            ("E22", "shuffled LM targets", "shuffled_targets"),
            ("E23", "shuffled labels", "shuffled_labels"),
        )
    ),
    _same("E24", "LM gradient stopped - Model 1", first="dual_stopped", second=M1, **_ACCURACY),
    _same(
        "E25", "twice the epochs - Model 1", first="classification_longer", second=M1, **_ACCURACY
    ),
)


def against_published(published: Mapping) -> tuple[Contrast, ...]:
    """The contrasts that need a published figure: E17, the engram's cluster accuracy."""
    value = published_figure(published, M3, "cluster_accuracy")
    if value is None:
        return ()
    quantity = (M3, "engram.cluster_accuracy")
    name = "cluster accuracy - published"
    return (Contrast("E17", name, quantity, float(value), ACCURACY_MARGIN),)


def published_figure(published: Mapping, arm: str, field: str) -> float | None:
    """A published figure of an arm, of a curve its last epoch."""
    value = (published.get("arms") or {}).get(arm, {}).get(field)
    return value[-1] if isinstance(value, list) else value


def evaluate(
    spec: Contrast,
    scores: Scores,
    bands: Mapping[tuple[str, int], Mapping],
    runs: list[Run],
    labels: np.ndarray,
    slug: str | None,
) -> dict:
    """One row of the contrasts table, before adjustment; without its arms it is "not measured".

    Args:
        bands: by (arm, seed), `draws` of each metric of random compressors (J,) and those metrics
            of the `trained` one.
        runs, labels: for McNemar's test of each seed pair. slug: the data set's.
    """
    row = {
        "id": spec.id,
        "name": spec.name,
        "family": spec.family,
        "estimate": None,
        "low": None,
        "high": None,
        "p": None,
        "p_adjusted": None,
        "method": "not measured",
        "n_seeds": 0,
        "n_items": None,
        "equivalence": None,
        "seeds": {},
    }
    seeds, values, draws = scores.pair(spec.first, spec.second)
    if not seeds or (spec.slug and spec.slug != slug):
        return row
    found, margin = interval(values, draws), spec.margin
    if spec.relative:
        margin *= float(np.mean([scores.seeds(*spec.second)[s] for s in seeds]))
    if draws is None:
        how = "Student t over seeds, items fixed"
    elif len(seeds) > 1:
        how = "crossed bootstrap over seeds and items, or Student t over seeds where wider"
    else:
        how = "item bootstrap"
    if spec.band:
        drawn = [bands[spec.first[0], s] for s in seeds]
        trained = np.array([band["trained"][spec.band] for band in drawn])
        p = exchange_p(trained, np.stack([band["draws"][spec.band] for band in drawn]), scores.seed)
        how += "; p: exchange of the trained with random compressors"
    else:
        p = difference_p(values, draws)
        if draws is not None and len(seeds) > 1:
            how += "; p: the larger of the two"
    row |= {
        "estimate": found.mean,
        "low": found.low,
        "high": found.high,
        "p": p,
        "method": how,
        "n_seeds": len(seeds),
        "n_items": len(labels),
        "equivalence": margin and equivalence(values, draws, margin),
        "seeds": dict(zip(map(str, seeds), values.tolist(), strict=True)),
    }
    if row["equivalence"]:
        row["equivalence"] = asdict(row["equivalence"])
    if tests := _mcnemar(spec, seeds, runs, labels):
        row["mcnemar"] = tests
    return row


def _mcnemar(spec: Contrast, seeds: list[int], runs: list[Run], labels: np.ndarray) -> dict:
    """By seed, where both quantities are accuracies whose single answers were kept."""
    if isinstance(spec.second, float):
        return {}
    run_of, tests = {(run.arm, run.seed): run for run in runs}, {}
    for seed in seeds:
        held = [(run_of.get((arm, seed)), name) for arm, name in (spec.first, spec.second)]
        given = [run and run.answers(name) for run, name in held]
        if all(answers is not None for answers in given):
            tests[str(seed)] = asdict(mcnemar(*(answers == labels for answers in given)))
    return tests


def lent(contrasts: list[dict], train_rows: int | None) -> dict[str, dict]:
    """Measured rows of GAINS, by id, for studies of the same backbone on other data or more texts.

    Each is about one data set, so no single run can measure both; a borrowed row says where it is
    from.
    """
    where = f"{train_rows:,} training texts" if train_rows else "other texts"
    return {
        row["id"]: row | {"where": where, "name": f"{row['name']}, {where}"}
        for row in contrasts
        if row["id"] in GAINS and row["n_seeds"]
    }
