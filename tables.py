"""The tables of the documents: markdown from results.json, and the texts of `values`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from arms import MAIN_ARMS
from schema import KEYS, ReportError, Study
from values import MISSING, NONE, PLACES, Interval, label_of, subject, text_of, title_of

# the published small study's one compressor belongs to its Model 3, whose protocol this arm repeats
PUBLISHED_AS = {"published_small": "dual_engram"}
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
        ("equivalent (margin)", "equivalence"),
        ("McNemar p, by seed", "mcnemar"),
        ("method", "method"),
    ),
    "claims": (
        ("claim", "claim"),
        ("published", "published"),
        ("ours", "ours"),
        ("random compressors, middle 95 %", "control_band"),
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
        ("the same, errors exchanged", "share_exchanged"),
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
        ("adjusted p", "p_adjusted"),
    ),
}
_CLUSTERED = (  # column, list of `analysis`, path of `flat` in it; cells are ARIs or differences
    ("Model 3's engram", "controls", "A4/trained/dual_engram/engram"),
    ("random compressors, middle 95 %", "controls", "A1/random compressor/dual_engram/engram"),
    ("trained - random (P1)", "contrasts", "P1"),
    ("its own predictions", "controls", "A0/predictions/dual_engram/logits"),
    ("engram - predictions (E3)", "contrasts", "E3"),
    ("with - without next-token loss, excess ARI (P2)", "contrasts", "P2"),
    ("engram without labels", "controls", "A4/trained/lm_only_engram/engram"),
    ("random compressors there", "controls", "A1/random compressor/lm_only_engram/engram"),
)
_LABELS = {"controls": 4}  # columns that say what a row is; a row without figures is left out
_OTHERS = ("provenance", *ANALYSES)
_NAME = re.compile(rf"((?:{'|'.join(KEYS)})(?:/\S+)?)-({'|'.join((*KINDS, *_OTHERS))})")


def table(name: str, studies: Mapping[str, Study], shown: Mapping[str, str]) -> str:
    """A named table as markdown, under a line that says what was measured on what.

    Rows and columns that would hold nothing are left out; a study without results keeps its
    published columns beside one that says so.

    Args:
        name: KEY-KIND, KEY-provenance or one of ACROSS.
        shown: what `values` returned for the same studies.
    Raises:
        ReportError: the name means no table.
    """
    if name in ACROSS:
        return ACROSS[name](studies)
    if not (parts := _NAME.fullmatch(name)):
        kinds = " ".join((*KINDS, *_OTHERS))
        known = f"KEY-KIND, KEY {' '.join(KEYS)} or KEY/FOLDER, KIND {kinds}"
        raise ReportError(f"there is no table {name!r}. Expected {' or '.join(ACROSS)} or {known}.")
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


def _scales(studies: Mapping[str, Study]) -> dict[str, Mapping]:
    """`analysis` by scale, wherever the three models were trained on a study's own data set."""
    found = {}
    for study in studies.values():
        results = study.results or {"rows": {}}
        data, whole = results.get("dataset"), set(MAIN_ARMS) <= results["rows"].keys()
        if whole and data["own"] and results.get("analysis", {}).get("claims"):
            scale = f"{data['name']}, {data['train_rows']:,} texts, {results['backbone']}"
            found[scale] = results["analysis"]
    return found


def _verdicts(studies: Mapping[str, Study]) -> str:
    """Every claim's verdict and interval at every scale."""
    scales = _scales(studies).items()
    found = {scale: {row["id"]: row for row in analysis["claims"]} for scale, analysis in scales}
    if not found:
        return f"{MISSING.capitalize()}.\n"
    titles = {id: row["claim"] for claims in found.values() for id, row in claims.items()}

    def cell(row: Mapping | None) -> str:
        if row is None:
            return NONE
        found = row.get("turns_on") or row["ours"]  # results of an older analysis lack the first
        shown = _cell(found, "turns_on")
        where = f" on {found['where']}" if found.get("where") else ""
        return row["verdict"] + (f": {shown}{where}" if shown != NONE else "")

    rows = [
        [title, *(cell(claims.get(id)) for claims in found.values())]
        for id, title in titles.items()
    ]
    caption = (
        "What each verdict turns on: mean [95 % interval] (seeds); the first row's is an ARI, the "
        "others' are differences, of ARI, AMI, cosine, accuracy, rank or share of a gradient."
    )
    return f"{caption}\n\n{markdown(['claim', *found], rows)}"


def _clusters(studies: Mapping[str, Study]) -> str:
    """What the engram's clusters stand beside, at every scale."""
    rows = []
    for scale, analysis in _scales(studies).items():
        found = {
            kind: {label_of(row): row for row in analysis.get(kind, [])}
            for kind in ("controls", "contrasts")
        }
        cells = []
        for _, kind, label in _CLUSTERED:
            row = found[kind].get(label)
            cells.append(_cell(row["ari"] if row and kind == "controls" else row, "ari"))
        rows.append([scale, *cells])
    if not rows:
        return f"{MISSING.capitalize()}.\n"
    caption = f"ARI, and differences of it: mean [95 % interval] (seeds); {NONE}: not measured."
    header = ["scale", *(title for title, *_ in _CLUSTERED)]
    return f"{caption}\n\n{markdown(header, rows)}"


ACROSS = {"all-verdicts": _verdicts, "all-clusters": _clusters}  # tables across results folders


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """A table of text cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


_BANDS = dict.fromkeys(
    ("controls", "two-labels"), "; of random compressors the middle 95 % of the draws in a seed"
)


def _analysis(results: Mapping, kind: str) -> str:
    """One of the lists of `analysis`, columns that hold nothing left out."""
    columns, listed = ANALYSES[kind], results["analysis"].get(kind, [])
    # the primary contrasts are adjusted together, measured or not, and are all shown
    listed = [r for r in listed if r.get("family") != "exploratory" or r.get("n_seeds") != 0]
    rows = [[_cell(row.get(key) if key else row, key) for _, key in columns] for row in listed]
    if kind in _LABELS:
        rows = [row for row in rows if set(row[_LABELS[kind] :]) != {NONE}]
    kept = [i for i in range(len(columns)) if any(row[i] != NONE for row in rows)]
    body = markdown([columns[i][0] for i in kept], ([row[i] for i in kept] for row in rows))
    return f"{subject(results)}; means with 95 % intervals{_BANDS.get(kind, '')}.\n\n{body}"


def _cell(value, key: str) -> str:
    """A JSON value of `analysis` as a table shows it."""
    if value is None:
        return NONE
    if key == "arm":
        return title_of(value)
    if key == "representation":
        return PLACES.get(value, value)
    if key == "mcnemar":
        each = sorted(found["p"] for found in value.values())
        return " to ".join(dict.fromkeys(_cell(p, "p") for p in (each[0], each[-1])))
    if isinstance(value, Mapping):
        if value.get("n_seeds") == 0:
            return NONE
        if "equivalent" in value:
            return f"{'yes' if value['equivalent'] else 'no'} (±{text_of(value['margin'])})"
        mean = value.get("mean", value.get("estimate"))
        low, high = value.get("low"), value.get("high")
        if mean is None and low is not None:
            return f"{text_of(low)} to {text_of(high)}"
        if "mean" in value and mean is None:
            return NONE
        if mean is None:
            found = {k: _cell(v, "") for k, v in value.items() if v is not None}
            return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in found.items()) or NONE
        return str(Interval(mean, low, high, value.get("n_seeds", value.get("n", 1))))
    if isinstance(value, float):
        return f"< {0.001:.3f}" if key in ("p", "p_adjusted") and value < 0.001 else text_of(value)
    return str(value)


def _provenance(results: Mapping) -> str:
    run = results["provenance"]
    dirty = " with uncommitted changes" if run["dirty"] else ""
    seconds = run["wall_seconds"]
    hours, minutes = divmod(round(seconds / 60), 60)
    short = f"{minutes} min" if minutes > 1 else f"{seconds:.0f} s"
    machine = _machine(run)
    rows = []
    for one in (*run.get("earlier", []), run):
        # bits belong to a machine: say which commands ran on another one
        place = _machine(one) or "a machine that was not written down"
        other = f" on {place}" if place != machine else ""
        label = f"command at commit `{(one['commit'] or 'none')[:12]}`"
        rows.append([label, f"`{' '.join(one['argv'])}`{other}"])
    rows += [
        ["last started", f"{run['started']}{dirty}"],
        ["wall time", f"{hours} h {minutes} min" if hours else short],
        ["hardware", machine],
        ["versions", ", ".join(f"{k} {v}" for k, v in run["versions"].items())],
    ]
    return f"{subject(results)}\n\n{markdown(['', 'run'], rows)}"


def _machine(run: Mapping) -> str:
    """The hardware of one command; empty where an older run did not write it down."""
    return "; ".join(f"{k}: {v}" for k, v in run.get("hardware", {}).items())
