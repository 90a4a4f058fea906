"""What is wrong with a table's columns, texts and labels: one line that names the first bad row."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from common import UserError
from sources import Table, reject

TEXT_NAMES = ("text", "sentence", "content", "review", "comment", "document", "body", "title")
LABEL_NAMES = ("label", "labels", "class", "target", "sentiment", "category", "class index")
SURROGATE = re.compile(r"[\ud800-\udfff]")


def columns(
    table: Table, own: tuple[str, str], text: str | None, label: str | None
) -> tuple[Sequence, Sequence, str]:
    """The texts, the labels and the label column's name.

    Args:
        own: the text and label columns of the script's own data set, looked for first.
        text, label: given by flag; None to find them by the usual names.
    Raises:
        UserError: a column is not there, or holds no rows.
    """
    by_name = {name.lower(): name for name in table.columns}

    def find(given: str | None, usual: Iterable[str]) -> str | None:
        if given is not None:
            return given if given in table.columns else None
        return next((by_name[name] for name in usual if name in by_name), None)

    text_name = find(text, (own[0], *TEXT_NAMES))
    label_name = find(label, (own[1], *LABEL_NAMES))
    if text_name is None or label_name is None:
        raise UserError(
            f"{table.name} has columns {', '.join(table.columns) or 'none'}; need "
            f'"{text or own[0]}" and "{label or own[1]}". Pass '
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


def check_texts(name: str, values: Sequence, drop_empty: bool) -> list[str]:
    """Texts without trailing white space; UserError names the first that is none."""
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

    reject(name, map(problem, values))
    return [value.rstrip() for value in values]


def check_labels(
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
    reject(name, map(problem, values, numbers), hint)
    return np.array(numbers).astype(np.int64) - offset


def two_classes(where: str, labels: np.ndarray) -> None:
    """Refuse rows of one class."""
    if len(np.unique(labels)) < 2:
        held = f"all {len(labels):,} rows have label {labels[0]}" if len(labels) else "no text left"
        raise UserError(f"{where}: {held}; two classes are needed.")
