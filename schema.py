"""What a results folder holds: its schema, and its files read and replaced.

Needs neither torch nor matplotlib, so that a checkout can be checked in a second.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

KEYS = {"small": "results", "7b": "results_7b", "agnews": "results_agnews"}


class ReportError(ValueError):
    """A document or results folder that cannot be used: one line, with what to do."""


@dataclass(frozen=True)
class Study:
    """A results folder: its path and its two JSON files, None where there is none."""

    path: Path
    results: dict | None
    published: dict | None


def is_number(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def fraction(x) -> bool:
    return is_number(x) and 0 <= x <= 1


def positive(x) -> bool:
    return is_number(x) and x >= 0


def count(x) -> bool:
    return positive(x) and isinstance(x, int)


_EVALUATION = {"accuracy": fraction, "cls_loss": positive, "lm_loss": (positive,)}
_RUN = {
    "parameters_trainable": count,
    "parameters_total": count,
    "epochs": [
        {
            **dict.fromkeys(("epoch", "train_tokens"), count),
            **dict.fromkeys(("train_accuracy", "eval_accuracy"), fraction),
            **dict.fromkeys(("train_cls_loss", "eval_cls_loss", "train_seconds"), positive),
            **dict.fromkeys(("train_lm_loss", "eval_lm_loss"), (positive,)),
        }
    ],
    "final": {**_EVALUATION, "predictions_ari": is_number, "modes": {"*": _EVALUATION}},
    "engram": (
        {
            **dict.fromkeys(("ari", "ami", "excess_ari"), is_number),
            # null where a class has no pair of items
            **dict.fromkeys(("cosine_within", "cosine_between"), (is_number,)),
            **dict.fromkeys(("centred_cosine_within", "centred_cosine_between"), (is_number,)),
            "cluster_accuracy": fraction,
            "mapping": {"*": count},
            "recall_per_class": [fraction],
            "train_fitted": {"ari": is_number, "cluster_accuracy": fraction},
        },
    ),
}
SCHEMA = {
    "schema_version": lambda x: x == 1,
    **dict.fromkeys(("experiment", "backbone", "fingerprint"), str),
    "dataset": {
        **dict.fromkeys(("name", "slug", "source", "eval_split", "sha256"), str),
        **dict.fromkeys(("train_rows", "eval_rows"), count),
        "classes": [str],
        "notes": [str],
        "own": bool,
    },
    "config": dict,
    "provenance": {
        "commit": (str,),
        "dirty": (bool,),
        "argv": [str],
        "versions": {"*": (str,)},
        "hardware": dict,
        "started": str,
        "wall_seconds": positive,
    },
    "rows": {"*": {"*": _RUN}},
    "analysis": dict,
}


def mismatches(value, spec, where: str) -> Iterator[str]:
    """Yield a line for each place where a JSON value departs from a spec.

    A spec is a type, a predicate, [spec of each element], {key: spec} or {"*": spec of every
    value} (further keys are free), or (spec,): that or null.
    """
    if isinstance(spec, tuple):
        if value is not None:
            yield from mismatches(value, spec[0], where)
    elif isinstance(spec, type) or not callable(spec):
        kind = spec if isinstance(spec, type) else type(spec)
        if not isinstance(value, kind):
            yield f"{where} is {str(value)[:40]!r}, expected a {kind.__name__}"
        elif isinstance(spec, list):
            for index, element in enumerate(value):
                yield from mismatches(element, spec[0], f"{where}[{index}]")
        elif isinstance(spec, dict):
            for key, part in spec.items():
                if key != "*" and key not in value:
                    yield f"{where}.{key} is missing"
                for name in value if key == "*" else {key} & value.keys():
                    yield from mismatches(value[name], part, f"{where}.{name}")
    elif not spec(value):
        expected = spec.__name__.strip("_").replace("<lambda>", "known value")
        yield f"{where} is {str(value)[:40]!r}, expected a {expected}"


def read_json(path: Path) -> dict | None:
    """A JSON file without NaN or Infinity; None if there is no such file."""

    def refuse(token: str):
        raise ReportError(f"{path} holds {token}, which is not JSON. Write null for it.")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise ReportError(f"{path} is not JSON ({error}). Restore it or run again.") from None


def read_study(folder: Path) -> Study:
    """The study in a folder."""
    results, published = (read_json(folder / f"{name}.json") for name in ("results", "published"))
    return Study(folder, results, published)


def read_studies(root: Path) -> dict[str, Study]:
    """Every study by key: the three of KEYS, measured or not, and measured subfolders, nested too.

    A subfolder's key is its path under a study's: 7b/SmolLM2-135M-Instruct/subset-2048.
    """
    found = {}
    for key, name in KEYS.items():
        found[key] = read_study(root / name)
        for path in sorted((root / name).glob("*/**/results.json")):
            folder = path.parent
            found[f"{key}/{folder.relative_to(root / name).as_posix()}"] = read_study(folder)
    return found


def evidence_beside(folder: Path) -> dict:
    """What a folder's results.json, its subfolders' and, in a study's folder, its neighbours' say.

    For the claims' rules: {claim id: {mean, low, high, n_seeds}} and {contrast id: row}; of several
    the one with most seeds. What names a data set's `slug` counts for that data set only, and
    nothing for another backbone.
    """
    found, own, backbone = {}, None, None
    around = [folder]
    if (folder.parent / "results.json").exists():
        around.insert(0, folder.parent)
    others = [path for place in around for path in sorted(place.glob("*/results.json"))]
    for path in (folder / "results.json", *others):
        results = read_json(path) or {}
        own = own or results.get("dataset", {}).get("slug")
        backbone = backbone or results.get("backbone")
        if results.get("backbone") != backbone:  # a small one never stands in for 7B
            continue
        for claim, interval in results.get("analysis", {}).get("evidence", {}).items():
            known = found.get(claim, {"n_seeds": 0})
            if interval.get("slug", own) == own and interval["n_seeds"] >= known["n_seeds"]:
                found[claim] = interval
    return found


def features_of(folder: Path) -> Mapping:
    """Arrays of features.npz by key, each read when asked for; empty if there is no file."""
    path = folder / "features.npz"
    try:
        return np.load(path) if path.exists() else {}
    except (BadZipFile, ValueError, EOFError) as error:
        raise ReportError(f"{path} is damaged ({error}). Restore it or run again.") from None
