"""The runs of features.npz, and every quantity measured on them by arm and seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np

from inference import Statistic, crossed, interval, resample

MODES = "predicted/"  # before a mode of A9, in the names of features


@dataclass(frozen=True)
class Run:
    """One arm and seed.

    Args:
        predictions: (N,) int, codes of the labels; -1 for a class that no item has.
        representations: (N, width) float32 each, by name.
        tap: the representation that the compressor read, or would have.
        initial: (N, E), the engram that the compressor's initial weights give on the final tap.
        weights: final and initial W, (E, in) each.
        by_mode: predictions under other engrams (A9), by mode.
    """

    arm: str
    seed: int
    predictions: np.ndarray
    representations: dict[str, np.ndarray]
    tap: str | None = None
    initial: np.ndarray | None = None
    weights: tuple[np.ndarray, np.ndarray] | None = None
    by_mode: dict[str, np.ndarray] = field(default_factory=dict)

    def answers(self, quantity: str) -> np.ndarray | None:
        """The predictions of which "accuracy" or "<mode>.accuracy" is the share that is right."""
        mode, _, metric = quantity.rpartition(".")
        if metric != "accuracy":
            return None
        return self.by_mode.get(mode) if mode else self.predictions


def read_runs(features: Mapping[str, np.ndarray]) -> tuple[np.ndarray, list[Run]]:
    """Labels (N,) as codes 0..C-1 and the runs that have logits, by arm and seed.

    An array with a value that is not finite is left out.

    Raises:
        ValueError: runs without labels, or on another number of items.
    """
    names = sorted(
        {tuple(key.split("/")[:2]) for key in features if key.endswith("/logits")},
        key=lambda name: (name[0], int(name[1])),
    )
    if names and "labels" not in features:
        raise ValueError("features hold runs but no 'labels'. Write the (N,) labels beside them.")
    classes, labels = np.unique(features.get("labels", np.zeros(0, int)), return_inverse=True)
    runs = []
    for arm, seed in names:
        here = f"{arm}/{seed}/"
        parts = {k[len(here) :]: v for k, v in features.items() if k.startswith(here)}
        predicted = {"": np.asarray(parts["logits"]).argmax(1)}
        predicted |= {k[len(MODES) :]: x for k, x in parts.items() if k.startswith(MODES)}
        if wrong := {len(x) for x in predicted.values()} - {len(labels)}:
            raise ValueError(
                f"{arm}/{seed} has {wrong.pop()} items, the labels {len(labels)}. "
                "Write every run on the same items."
            )
        for mode, x in predicted.items():
            codes = np.searchsorted(classes, x).clip(max=len(classes) - 1)
            predicted[mode] = np.where(classes[codes] == x, codes, -1)
        predictions = predicted.pop("")
        layers = parts.get("layers", np.zeros((0, 0, 0)))
        found = {n: parts[n] for n in ("engram", "intermediate", "pooled") if n in parts}
        found |= {f"layer {i}": layers[:, i] for i in range(layers.shape[1])}
        found = {n: x.astype(np.float32) for n, x in found.items() if np.isfinite(x).all()}
        tap = initial = weights = None
        if "engram" not in parts:
            tap = "intermediate" if "intermediate" in found else None
        elif "engram" in found and {"W", "b"} <= parts.keys():
            tap = _tap(found, parts["W"], parts["b"])
        if tap and {"W0", "b0"} <= parts.keys():
            initial = np.tanh(found[tap] @ parts["W0"].T + parts["b0"])
            weights = parts["W"], parts["W0"]
        runs.append(Run(arm, int(seed), predictions, found, tap, initial, weights, predicted))
    return labels, runs


def _tap(found: Mapping[str, np.ndarray], weight: np.ndarray, bias: np.ndarray) -> str | None:
    """What the compressor read: of equal widths, the one that gives the engram back."""
    width = weight.shape[1]
    fits = [n for n in ("intermediate", "pooled") if n in found and found[n].shape[1] == width]
    errors = [np.abs(np.tanh(found[n] @ weight.T + bias) - found["engram"]).mean() for n in fits]
    return fits[int(np.argmin(errors))] if fits else None


@dataclass
class Scores:
    """Every quantity by (arm, quantity) and seed: its value and its item-resampled draws."""

    weights: np.ndarray
    seed: int
    values: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)
    draws: dict[tuple[str, str], dict[int, np.ndarray]] = field(default_factory=dict)

    def add(self, run: Run, name: str, value: float, draws: Statistic | np.ndarray | None = None):
        """Keep a finite value, and its draws: those given, or a statistic's under the weights."""
        if value is None or not math.isfinite(value):
            return
        self.values.setdefault((run.arm, name), {})[run.seed] = float(value)
        if isinstance(draws, Statistic):
            draws = resample(draws, self.weights)
        if draws is not None:
            self.draws.setdefault((run.arm, name), {})[run.seed] = draws

    def seeds(self, arm: str, name: str) -> dict[int, float]:
        return self.values.get((arm, name), {})

    def pair(self, first: tuple[str, str], second: tuple[str, str] | float):
        """Seeds both have, their differences (S,) and crossed draws of the mean difference."""
        ours = self.seeds(*first)
        constant = isinstance(second, float)
        theirs = dict.fromkeys(ours, second) if constant else self.seeds(*second)
        seeds = sorted(ours.keys() & theirs.keys())
        values = np.array([ours[s] - theirs[s] for s in seeds])
        held, other = self.draws.get(first, {}), {} if constant else self.draws.get(second, {})
        if not seeds or not all(s in held and (constant or s in other) for s in seeds):
            return seeds, values, None
        columns = [held[s] - (second if constant else other[s]) for s in seeds]
        return seeds, values, crossed(np.column_stack(columns), self.seed)

    def interval(self, arm: str, name: str) -> dict:
        """Mean over seeds: crossed bootstrap where items were resampled, else Student's t."""
        _, values, draws = self.pair((arm, name), 0.0)
        return asdict(interval(values, draws))
