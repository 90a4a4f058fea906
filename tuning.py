"""Each arm at its own best learning rate, chosen on a part of the training texts (control B11).

Two arms at one rate are compared at a rate that may suit one of them. A tuned arm tries every rate
of a grid on a dev split cut from the training data, never on the reported set, and is then trained
on all of it at the best.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from inference import interval

RUN = 5  # words in a row that two texts share only if one sentence is the parent of both
SHARE = 0.1  # of the training texts


def _runs(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    for start in range(len(words) - length + 1):
        yield tuple(words[start : start + length])


def held_out(texts: Sequence[str], seed: int, share: float = SHARE) -> np.ndarray:
    """Which texts are the dev split: (N,) bool, so that no dev text is known from training.

    SST-2's training texts are phrases, nested in and overlapping with each other. Texts that share
    RUN words in a row are of one group, and groups are held out whole, drawn at random until they
    hold `share` of the texts. Of these, texts shorter than RUN words that a training text contains
    go back to training.
    """
    words = [text.split() for text in texts]
    first: dict[tuple[str, ...], int] = {}
    links = [
        (first.setdefault(run, item), item)
        for item, own in enumerate(words)
        for run in _runs(own, min(RUN, len(own)))  # a short text: itself
    ]
    one, other = np.array(links).T
    graph = coo_array((np.ones(len(links)), (one, other)), shape=(len(texts),) * 2)
    _, group = connected_components(graph, directed=False)
    sizes = np.bincount(group)
    order = np.random.default_rng(seed).permutation(len(sizes))
    chosen = order[np.cumsum(sizes[order]) <= share * len(texts)]
    dev = np.isin(group, chosen)
    inside = {
        run
        for own, out in zip(words, dev, strict=True)
        if not out
        for length in range(1, RUN)
        for run in _runs(own, length)
    }
    return dev & np.array([len(own) >= RUN or tuple(own) not in inside for own in words])


def trial_name(arm: str, rate: float) -> str:
    return f"{arm}@{rate:g}"


def choose(trials: Mapping[str, Mapping[str, float]]) -> float:
    """The rate of the best mean dev accuracy over seeds, the smaller of equals.

    Args:
        trials: {rate: {seed: accuracy}}.
    """
    means = {float(rate): float(np.mean(list(of.values()))) for rate, of in trials.items()}
    return min(means, key=lambda rate: (-means[rate], rate))


def summary(tuning: Mapping[str, Mapping]) -> list[dict]:
    """Rows of results.json's `tuning`: each arm and rate, its dev accuracy, which was chosen.

    Args:
        tuning: {arm: {"dev_rows", "trials": {rate: {seed: accuracy}}, "chosen"}}.
    """
    return [
        {
            "id": trial_name(arm, float(rate)),
            "arm": arm,
            "rate": float(rate),
            "dev_rows": found["dev_rows"],
            "dev_accuracy": asdict(interval(np.array(list(of.values())))),
            "chosen": "yes" if float(rate) == found.get("chosen") else "no",
        }
        for arm, found in tuning.items()
        for rate, of in sorted(found["trials"].items(), key=lambda item: float(item[0]))
    ]
