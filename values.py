"""Every number the documents show, by name, as text; nothing here reads a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from arms import ARMS, MAIN_ARMS
from schema import Study

TITLES = {name: arm.title for name, arm in ARMS.items()} | {
    # the two-label test's conditions: what is trained on, and with what
    "sentiment-classification_engram": "sentiment",
    "sentiment-dual_engram": "sentiment + LM",
    "topic-classification_engram": "topic",
    "topic-dual_engram": "topic + LM",
    "neither-lm_only_engram": "neither: LM only",
    "neither-untrained": "neither: untrained",
}
# what a representation is called
PLACES = {"intermediate": "classifier layer", "pooled": "pooled state", "layer 0": "embedding"}
MISSING = "not measured"
NONE = "-"  # the figure does not exist


@dataclass(frozen=True)
class Interval:
    """Mean over n seeds with its 95 % Student t interval; low and high are None for one seed."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:.3f} (n = {self.n})"
        seeds = "1 seed" if self.n == 1 else f"{self.n} seeds"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] ({seeds})"


def interval(values: list[float]) -> Interval:
    """Mean and 95 % Student t interval of one value a seed."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Interval(mean, None, None, n)
    half = float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def in_order(arms: Iterable[str]) -> list[str]:
    """Arms as they are declared, those of nobody's last."""
    order = {name: i for i, name in enumerate(TITLES)}
    return sorted(arms, key=lambda arm: (order.get(arm, len(order)), arm))


def title_of(arm: str) -> str:
    """What figures and tables call an arm."""
    return TITLES.get(arm, arm.replace("_", " "))


def subject(results: Mapping) -> str:
    """Data set, its sizes, the backbone and flags off their defaults, for figures and tables."""
    data = results["dataset"]
    # a two-label data set is its script's, though none of the studies'
    foreign = "" if data["own"] or "tasks" in data else " (not the data set of this script's study)"
    items = f"{data['eval_rows']:,} {data['eval_split']} items"
    rows = f"{data['train_rows']:,} training texts"
    # what --limit-train and --limit-eval left is said by the counts
    departures = [x for x in results.get("departures", []) if not x.startswith("limit-")]
    departures = "".join(f"; {choice}" for choice in departures)
    return f"{data['name']}{foreign}: {items}, {rows}; {results['backbone']}{departures}"


def is_comparable(results: Mapping, published: Mapping | None) -> bool:
    """Whether published figures are of this data set and this backbone."""
    if not published or not results["dataset"]["own"]:
        return False
    backbone = published["protocol"].get("backbone", "from scratch")
    return backbone.split("/")[-1] in results["backbone"]


METRICS = {
    **{name: ("final", name) for name in ("accuracy", "cls_loss", "lm_loss", "predictions_ari")},
    "train_accuracy": ("epochs", -1, "train_accuracy"),
    **{
        name: ("engram", name)
        for name in (
            *("ari", "ami", "excess_ari", "cluster_accuracy"),
            *("cosine_within", "cosine_between"),
            *("centred_cosine_within", "centred_cosine_between"),
        )
    },
    "train_fitted_ari": ("engram", "train_fitted", "ari"),
    **{
        f"{mode}_{name}": ("final", "modes", mode, name)
        for mode in ("zero", "own", "shuffled", "mean", "no_prefix")
        for name in ("accuracy", "lm_loss")
    },
}


def values(studies: Mapping[str, Study]) -> dict[str, str]:
    """Every number the documents can show, as text, by name.

    KEY.ARM.METRIC: mean, interval and seeds of ours. KEY.published.ARM.FIELD: as published, a
    curve's last epoch; `best` is its best. KEY.eval_rows, KEY.train_rows. KEY.analysis.PATH.
    Where a metric does not apply to an arm the text is NONE.
    """
    out = {}
    for key, study in studies.items():
        out |= {f"{key}.{name}": text for name, text in _measured(study.results).items()}
        if not study.results or is_comparable(study.results, study.published):
            published = _published(study.published or {})
            out |= {f"{key}.published.{name}": text for name, text in published.items()}
    return out


def _measured(results: Mapping | None) -> dict[str, str]:
    out, rows = {}, results["rows"] if results else {}
    for arm in dict.fromkeys((*MAIN_ARMS, *rows)):
        runs = list(rows.get(arm, {}).values())
        absent = NONE if runs else MISSING
        for name, path in METRICS.items():
            found = [x for run in runs if (x := _dig(run, path)) is not None]
            out[f"{arm}.{name}"] = str(interval(found)) if found else absent
        for name in ("parameters_trainable", "parameters_total"):
            out[f"{arm}.{name}"] = f"{runs[0][name]:,}" if runs else MISSING
    for name in ("train_rows", "eval_rows"):
        out[name] = f"{results['dataset'][name]:,}" if results else MISSING
    return out | dict(flat(results["analysis"], "analysis") if results else ())


def _published(published: Mapping) -> dict[str, str]:
    out, arms = {}, published.get("arms", {})
    for arm, fields in arms.items():
        last = {name: x[-1] if isinstance(x, list) else x for name, x in fields.items()}
        out |= dict(flat(last, arm, "{:,}".format))
        if curve := fields.get("val_accuracy"):
            out[f"{arm}.best"] = str(max(curve))
    ranks = published.get("effective_rank", {})
    return out | dict(flat(ranks, "effective_rank", "{:,}".format))


def _dig(value, path: tuple):
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def text_of(x: float) -> str:
    if isinstance(x, int):
        return f"{x:,}"
    return f"{x:.1e}" if 0 < abs(x) < 0.0005 else f"{x:.3f}"


def flat(value, name: str, text: Callable = text_of) -> Iterator[tuple[str, str]]:
    """(name, text) of every leaf below a JSON value; {mean, low, high, n_seeds} is one leaf.

    An element of a list is named by its `id`, or by its control, name, arm and representation, or
    where that does not tell all elements apart by its position.
    """
    if isinstance(value, list):
        parts = dict(zip(map(label_of, value), value, strict=True))
        value = parts if len(parts) == len(value) and None not in parts else dict(enumerate(value))
    if isinstance(value, dict) and value.get("mean") is not None and "low" in value:
        low, high, seeds = value["low"], value.get("high"), value.get("n_seeds") or 1
        yield name, str(Interval(value["mean"], low, high, seeds))
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from flat(part, f"{name}.{str(key).replace(' ', '_')}", text)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, text(value)
    else:
        yield name, str(value)


def label_of(element) -> str | None:
    """What names an element of a list of `analysis`."""
    if not isinstance(element, dict):
        return None
    parts = [element.get(key) for key in ("control", "name", "arm", "representation")]
    return element.get("id") or "/".join(filter(None, parts)) or None
