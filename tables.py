"""Every number the documents show, by name, and the tables made of them.

Nothing here reads a file: `values` turns results.json and published.json into texts, and `table`
puts those texts into markdown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from arms import ARMS, MAIN_ARMS
from schema import KEYS, ReportError, Study

TITLES = {name: arm.title for name, arm in ARMS.items()} | {
    # the two-label test's conditions: what is trained on, and with what
    "sentiment-classification_engram": "sentiment",
    "sentiment-dual_engram": "sentiment + LM",
    "topic-classification_engram": "topic",
    "topic-dual_engram": "topic + LM",
    "neither-lm_only_engram": "neither: LM only",
    "neither-untrained": "neither: untrained",
}
# the published small study's one compressor belongs to its Model 3, whose protocol this arm repeats
PUBLISHED_AS = {"published_small": "dual_engram"}
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


def title_of(arm: str) -> str:
    """What figures and tables call an arm."""
    return TITLES.get(arm, arm.replace("_", " "))


def subject(results: Mapping) -> str:
    """Data set, its sizes, the backbone and flags off their defaults, for figures and tables."""
    data = results["dataset"]
    foreign = "" if data["own"] else " (not the study's data set)"
    items = f"{data['eval_rows']:,} {data['eval_split']} items"
    rows = f"{data['train_rows']:,} training texts"
    departures = "".join(f"; {choice}" for choice in results.get("departures", []))
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
    return out | dict(_flat(results["analysis"], "analysis") if results else ())


def _published(published: Mapping) -> dict[str, str]:
    out, arms = {}, published.get("arms", {})
    for arm, fields in arms.items():
        last = {name: x[-1] if isinstance(x, list) else x for name, x in fields.items()}
        out |= dict(_flat(last, arm, "{:,}".format))
        if curve := fields.get("val_accuracy"):
            out[f"{arm}.best"] = str(max(curve))
    ranks = published.get("effective_rank", {})
    return out | dict(_flat(ranks, "effective_rank", "{:,}".format))


def _dig(value, path: tuple):
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _text(x: float) -> str:
    if isinstance(x, int):
        return f"{x:,}"
    return f"{x:.1e}" if 0 < abs(x) < 0.0005 else f"{x:.3f}"


def _flat(value, name: str, text: Callable = _text) -> Iterator[tuple[str, str]]:
    """(name, text) of every leaf below a JSON value; {mean, low, high, n_seeds} is one leaf.

    An element of a list is named by its `id`, or by its control, name, arm and representation, or
    where that does not tell all elements apart by its position.
    """
    if isinstance(value, list):
        parts = dict(zip(map(_label, value), value, strict=True))
        value = parts if len(parts) == len(value) and None not in parts else dict(enumerate(value))
    if isinstance(value, dict) and value.get("mean") is not None and "low" in value:
        low, high, seeds = value["low"], value.get("high"), value.get("n_seeds") or 1
        yield name, str(Interval(value["mean"], low, high, seeds))
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{str(key).replace(' ', '_')}", text)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, text(value)
    else:
        yield name, str(value)


def _label(element) -> str | None:
    if not isinstance(element, dict):
        return None
    parts = [element.get(key) for key in ("control", "name", "arm", "representation")]
    return element.get("id") or "/".join(filter(None, parts)) or None


_ACCURACY = (
    ("ours, last epoch", "{arm}.accuracy"),
    ("ours, in training", "{arm}.train_accuracy"),
)
_PUBLISHED = (
    ("published, best epoch", "published.{theirs}.best"),
    ("published, last epoch", "published.{theirs}.val_accuracy"),
)
_CLUSTERS = (
    ("ARI", "{arm}.ari"),
    ("prediction ARI", "{arm}.predictions_ari"),
    ("excess ARI", "{arm}.excess_ari"),
    ("cluster accuracy", "{arm}.cluster_accuracy"),
)
KINDS = {
    "accuracy": (*_PUBLISHED, *_ACCURACY),
    "engram": (
        ("published ARI", "published.{theirs}.ari"),
        ("published cluster accuracy", "published.{theirs}.cluster_accuracy"),
        ("published cosine within", "published.{theirs}.cosine_within"),
        ("published cosine between", "published.{theirs}.cosine_between"),
        *_CLUSTERS,
        ("cosine within", "{arm}.cosine_within"),
        ("cosine between", "{arm}.cosine_between"),
    ),
    "parameters": (
        ("published", "published.{theirs}.parameters"),
        ("trained", "{arm}.parameters_trainable"),
        ("total", "{arm}.parameters_total"),
    ),
    "losses": (
        ("published LM loss", "published.{theirs}.val_lm_loss"),
        ("classification loss", "{arm}.cls_loss"),
        ("LM loss", "{arm}.lm_loss"),
    ),
    "modes": tuple(
        (mode.replace("_", " "), f"{{arm}}.{mode}_accuracy")
        for mode in ("zero", "own", "shuffled", "mean", "no_prefix")
    ),
    "arms": (*_ACCURACY, *_CLUSTERS),
}
ANALYSES = {  # kind: columns of the list of that name in `analysis`
    "controls": (
        ("control", "control"),
        ("what", "name"),
        ("arm", "arm"),
        ("representation", "representation"),
        ("ARI", "ari"),
        ("excess ARI", "excess_ari"),
        ("cluster accuracy", "cluster_accuracy"),
        ("centred cosine gap", "centred_cosine_gap"),
        ("effective rank", "effective_rank"),
        ("linear probe", "probe_accuracy"),
        ("first direction with text length", "length_correlation"),
    ),
    "contrasts": (
        ("", "id"),
        ("family", "family"),
        ("contrast", "name"),
        ("difference", ""),
        ("p", "p"),
        ("adjusted p", "p_adjusted"),
        ("equivalent", "equivalence"),
        ("method", "method"),
    ),
    "claims": (
        ("claim", "claim"),
        ("published", "published"),
        ("ours", "ours"),
        ("control band", "control_band"),
        ("contrast", "contrast"),
        ("adjusted p", "p_adjusted"),
        ("verdict at this scale", "verdict"),
        ("because", "because"),
        ("what would decide it", "would_decide"),
    ),
    "gradients": (
        ("arm", "arm"),
        ("gradient at", "site"),
        ("norm, classification", "norm_cls"),
        ("norm, next token", "norm_lm"),
        ("cosine of the two", "cosine"),
        ("share along the class means", "share_classes"),
        ("along permuted labels' means", "share_spread"),
        ("along the features' mean", "share_mean"),
        ("of a direction at random", "share_uniform"),
    ),
    "tuning": (
        ("arm", "arm"),
        ("learning rate", "rate"),
        ("dev texts", "dev_rows"),
        ("dev accuracy", "dev_accuracy"),
        ("taken", "chosen"),
    ),
    "two-labels": (
        ("trained on", "arm"),
        ("representation", "representation"),
        ("AMI sentiment, k = 2", "ami_sentiment"),
        ("AMI topic, k = 4", "ami_topic"),
        ("AMI trained - other", "difference"),
        ("probe of sentiment", "probe_sentiment"),
        ("probe of topic", "probe_topic"),
    ),
    "kept": (
        ("trained on", "task"),
        ("probe of the other label", "name"),
        ("difference", "difference"),
        ("p", "p"),
    ),
}
_LABELS = {"controls": 4}  # columns that say what a row is; a row without figures is left out
_OTHERS = ("provenance", *ANALYSES)
_NAME = re.compile(rf"((?:{'|'.join(KEYS)})(?:/\S+)?)-({'|'.join((*KINDS, *_OTHERS))})")


def table(name: str, studies: Mapping[str, Study], shown: Mapping[str, str]) -> str:
    """A named table as markdown, under a line that says what was measured on what.

    Rows and columns that would hold nothing are left out; a study without results keeps its
    published columns beside one that says so.

    Args:
        name: KEY-KIND or KEY-provenance.
        shown: what `values` returned for the same studies.
    Raises:
        ReportError: the name means no table.
    """
    if not (parts := _NAME.fullmatch(name)):
        kinds = " ".join((*KINDS, *_OTHERS))
        known = f"KEY-KIND, KEY {' '.join(KEYS)} or KEY/FOLDER, KIND {kinds}"
        raise ReportError(f"there is no table {name!r}. Expected {known}.")
    key, kind = parts.groups()
    results = studies[key].results if key in studies else None
    if kind in _OTHERS and not results:
        return f"{MISSING.capitalize()}.\n"
    if kind == "provenance":
        return _provenance(results)
    if kind in ANALYSES:
        return _analysis(results, kind)
    measured, columns = results["rows"] if results else {}, KINDS[kind]
    rows = ["dual_engram"] if kind == "engram" else list(MAIN_ARMS)
    rows += [arm for arm in measured if kind == "arms" or arm in PUBLISHED_AS]
    if results:
        caption = f"{subject(results)}; ours: mean [95 % Student t interval] (seeds)."
    else:
        caption = f"This project's run: {MISSING}."
        columns = (*(c for c in columns if c[1].startswith("published.")), ("ours", "-"))
    cells = {}
    for arm in rows:
        names = {"arm": arm, "theirs": PUBLISHED_AS.get(arm, arm)}
        cells[arm] = [shown.get(f"{key}.{path.format(**names)}", NONE) for _, path in columns]
    if not results:
        cells = {arm: [*line[:-1], MISSING] for arm, line in cells.items()}
    cells = {arm: line for arm, line in cells.items() if set(line) - {NONE, MISSING}}
    kept = [i for i in range(len(columns)) if any(line[i] != NONE for line in cells.values())]
    header = ["arm", *(columns[i][0] for i in kept)]
    body = [[title_of(arm), *(line[i] for i in kept)] for arm, line in cells.items()]
    return f"{caption}\n" + (f"\n{markdown(header, body)}" if body else "")


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """A table of text cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _analysis(results: Mapping, kind: str) -> str:
    """One of the lists of `analysis`, columns that hold nothing left out."""
    columns, listed = ANALYSES[kind], results["analysis"].get(kind, [])
    rows = [[_cell(row.get(key) if key else row, key) for _, key in columns] for row in listed]
    if kind in _LABELS:
        rows = [row for row in rows if set(row[_LABELS[kind] :]) != {NONE}]
    kept = [i for i in range(len(columns)) if any(row[i] != NONE for row in rows)]
    body = markdown([columns[i][0] for i in kept], ([row[i] for i in kept] for row in rows))
    return f"{subject(results)}; means with 95 % intervals.\n\n{body}"


def _cell(value, key: str) -> str:
    """A JSON value of `analysis` as a table shows it."""
    if value is None:
        return NONE
    if key == "arm":
        return title_of(value)
    if isinstance(value, Mapping):
        if value.get("n_seeds") == 0:
            return NONE
        if "equivalent" in value:
            return f"{'yes' if value['equivalent'] else 'no'} (within {_text(value['margin'])})"
        mean = value.get("mean", value.get("estimate"))
        low, high = value.get("low"), value.get("high")
        if mean is None and low is not None:
            return f"{_text(low)} to {_text(high)}"
        if "mean" in value and mean is None:
            return NONE
        if mean is None:
            found = {k: _cell(v, "") for k, v in value.items() if v is not None}
            return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in found.items()) or NONE
        return str(Interval(mean, low, high, value.get("n_seeds", value.get("n", 1))))
    if isinstance(value, float):
        return f"< {0.001:.3f}" if key in ("p", "p_adjusted") and value < 0.001 else _text(value)
    return str(value)


def _provenance(results: Mapping) -> str:
    run = results["provenance"]
    dirty = " with uncommitted changes" if run["dirty"] else ""
    seconds = run["wall_seconds"]
    hours, minutes = divmod(round(seconds / 60), 60)
    short = f"{minutes} min" if minutes > 1 else f"{seconds:.0f} s"
    rows = [
        [f"command at commit `{(one['commit'] or 'none')[:12]}`", f"`{' '.join(one['argv'])}`"]
        for one in (*run.get("earlier", []), run)
    ]
    rows += [
        ["last started", f"{run['started']}{dirty}"],
        ["wall time", f"{hours} h {minutes} min" if hours else short],
        ["hardware", "; ".join(f"{k}: {v}" for k, v in run["hardware"].items())],
        ["versions", ", ".join(f"{k} {v}" for k, v in run["versions"].items())],
    ]
    return f"{subject(results)}\n\n{markdown(['', 'run'], rows)}"
