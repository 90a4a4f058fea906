"""Texts with two independent labels: one movie sentence (sentiment), then one news text (topic)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from common import UserError
from data import SPLIT_SEED, Dataset, Split, content_sha256

TASKS = ("sentiment", "topic")


@dataclass(frozen=True)
class Pairs:
    """The same texts under each task's labels; `sha256` is of both."""

    tasks: Mapping[str, Dataset]
    sha256: str


def _cut(text: str, words: int) -> str:
    return " ".join(text.split()[:words])


def pair(
    name: str, first: Split, second: Split, rows: int | None, words: int, seed: int = SPLIT_SEED
) -> tuple[Split, Split]:
    """Join texts of two splits; every combination of their labels has the same number of texts.

    Equal cells make the labels independent exactly. No source text is used twice. The order is
    fixed, first before second, so that it is not one more label to cluster by.

    Args:
        rows: texts at most, rounded down to whole cells; None for as many as there are.
        words: each part is cut at so many white-space words, so that neither pushes the other out.
    Returns:
        The joint texts, in an order drawn from `seed`, with the labels of first and of second.
    Raises:
        UserError: too few texts for one in each cell.
    """
    classes, others = (int(split.labels.max()) + 1 for split in (first, second))
    counts = [np.bincount(split.labels, minlength=1) for split in (first, second)]
    each = min(int(counts[0].min()) // others, int(counts[1].min()) // classes)
    if rows is not None:
        each = min(each, rows // (classes * others))
    if each < 1:
        raise UserError(
            f"{name}: {classes * others} combinations of labels need a text each; --limit-train, "
            "--limit-eval or the data give too few."
        )
    rng = np.random.default_rng([seed, *name.encode()])
    left = [rng.permutation(np.flatnonzero(first.labels == c)) for c in range(classes)]
    right = [rng.permutation(np.flatnonzero(second.labels == d)) for d in range(others)]
    joint = [
        (left[c][d * each + i], right[d][c * each + i])
        for c in range(classes)
        for d in range(others)
        for i in range(each)
    ]
    a, b = np.array(joint)[rng.permutation(len(joint))].T
    texts = tuple(
        f"{_cut(first.texts[i], words)} {_cut(second.texts[j], words)}"
        for i, j in zip(a, b, strict=True)
    )
    return Split(name, texts, first.labels[a]), Split(name, texts, second.labels[b])


def unseen(train: Split, evaluation: Split, words: int) -> Split:
    """The training texts that, cut and lower-cased, are no evaluation text."""
    known = {_cut(text, words).lower() for text in evaluation.texts}
    kept = [i for i, text in enumerate(train.texts) if _cut(text, words).lower() not in known]
    return Split(train.name, tuple(train.texts[i] for i in kept), train.labels[kept])


def build(
    sentiment: Dataset,
    topic: Dataset,
    words: int,
    limit_train: int | None = None,
    limit_eval: int | None = None,
) -> Pairs:
    """Both splits of the two-label data set; training texts come from training files only."""
    sources, notes = (sentiment, topic), []
    for source in sources:
        notes += [f"{source.name}: {note}" for note in source.notes]
    train = [unseen(source.train, source.evaluation, words) for source in sources]
    for source, part in zip(sources, train, strict=True):
        if dropped := len(source.train.texts) - len(part.texts):
            notes.append(f"{source.name}: {dropped:,} training texts that are evaluation texts out")
    trained = pair("train", *train, limit_train, words)
    evaluated = pair("evaluation", *(s.evaluation for s in sources), limit_eval, words)
    parts = zip(TASKS, sources, trained, evaluated, strict=True)
    tasks = {
        task: dataclasses.replace(
            source,
            name=f"{sentiment.name} + {topic.name}",
            slug="two-labels",
            source=" + ".join(s.source for s in sources),
            own=False,
            train=train_split,
            evaluation=evaluation_split,
            notes=tuple(notes),
            sha256=content_sha256(train_split, evaluation_split),
        )
        for task, source, train_split, evaluation_split in parts
    }
    both = "\t".join(tasks[task].sha256 for task in TASKS)
    return Pairs(tasks, hashlib.sha256(both.encode()).hexdigest())


_WORDS = {
    "sentiment": (("dull", "weak", "clumsy"), ("bright", "warm", "clever")),
    "topic": (("treaty", "vote"), ("goal", "match"), ("shares", "profit"), ("chip", "orbit")),
}


def generated(task: str, train_rows: int = 240, eval_rows: int = 64) -> Dataset:
    """Made-up source texts of a task for --smoke: a class word, and a number that makes it new."""
    words, rng = _WORDS[task], np.random.default_rng(0)
    splits, at = [], 0
    for name, rows in (("train", train_rows), ("validation", eval_rows)):
        labels = rng.permutation(np.arange(rows) % len(words))
        texts = [f"so {rng.choice(words[c])} it is number{at + i}" for i, c in enumerate(labels)]
        splits.append(Split(name, tuple(texts), labels))
        at += rows
    return Dataset(
        name=f"generated {task}",
        slug="smoke",
        source="generated",
        own=False,
        class_names=tuple(group[0] for group in words),
        train=splits[0],
        evaluation=splits[1],
        notes=("generated sentences: no number here means anything",),
        sha256=content_sha256(*splits),
    )
