"""What the files of benchmarks/ say, as named numbers and as tables: one entry of data for each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schema import ReportError, count, is_number, mismatches, positive, read_json
from tables import markdown
from values import MISSING, NONE, title_of

SMALL_COSTS = (
    *("published_seconds", "ours_seconds", "ratio", "ratio_low", "ratio_high"),
    *("published_peak_mb", "ours_peak_mb"),
)
QLORA_COSTS = {
    "tokens_per_s": "real tokens/s",
    "examples_per_s": "texts/s",
    "ms_per_step": "ms a step",
    "ours_times_faster": "ours, times faster",
    "peak_mib": "peak MiB",
    "last_loss": "loss",
    "hours": "hours a study, extrapolated",
}
CONTENDERS = {
    "published": "published recipe",
    "trainer": "Trainer, dynamic padding",
    "ours": "ours",
    "products": "its products with frozen weights alone: a bound",
}


@dataclass(frozen=True)
class Benchmark:
    """One file of benchmarks/.

    Args:
        file: its path in the checkout.
        schema: of its JSON, as `schema.mismatches` takes it.
        values: (name without the benchmark's, text) of every number in it.
        table: caption, header and rows, from the JSON and those texts by name.
    """

    file: str
    schema: dict
    values: Callable[[Mapping], Iterator[tuple[str, str]]]
    table: Callable[[Mapping, Mapping[str, str]], tuple[str, list[str], list[list[str]]]]


def _small_rows(found: Mapping) -> Iterator[tuple[str, Mapping]]:
    for row in found["rows"]:
        jobs = row.get("jobs", 1)  # older rows: one process
        yield f"{row['arm']}.threads_{row['threads']}" + f".jobs_{jobs}" * (jobs > 1), row


def _small_values(found: Mapping) -> Iterator[tuple[str, str]]:
    for name, row in _small_rows(found):
        for cost in SMALL_COSTS:  # to two digits: a ratio of 6.99 is not 7
            yield f"{name}.{cost}", f"{row[cost]:,.{0 if cost.endswith('_mb') else 2}f}"


def _small_table(found: Mapping, shown: Mapping[str, str]) -> tuple:
    seconds = ["published (s)", "ours (s)", "ratio", "lowest", "highest"]
    rows = [
        [
            *(title_of(row["arm"]), str(row.get("jobs", 1)), str(row["threads"])),
            *(shown[f"{name}.{c}"] for c in SMALL_COSTS),
        ]
        for name, row in _small_rows(found)
    ]
    caption = f"{found['machine']}, {found['date']}; median of {found['rounds']} rounds"
    if "texts" in found:
        caption += f"; an epoch is {found['texts']:,} of {found['dataset']}'s texts"
    header = ["one epoch", "jobs", "threads", *seconds, "published (MB)", "ours (MB)"]
    return f"{caption}; MB: peak memory of the process.", header, rows


_CASE = ("dataset", "backbone", "machine")


def _case_name(case: Mapping) -> str:
    slugs = (re.sub(r"[^a-z0-9]+", "", case[key].lower()) for key in _CASE)
    return ".".join((*slugs, case["arm"]))


def _told(cases: list[Mapping]) -> tuple[str, list[str]]:
    """What all cases share, for a caption; and the keys of _CASE that need a column."""
    differing = [key for key in _CASE if key == "dataset" or len({c[key] for c in cases}) > 1]
    shared = [cases[0][key] for key in _CASE if key not in differing]
    return ", ".join([*shared, *sorted({case["date"] for case in cases})]), differing


def _qlora_cases(found: Mapping) -> Iterator[tuple[str, Mapping, str, Mapping]]:
    """(name, case, contender, its figures)."""
    for case in found["cases"]:
        for contender in CONTENDERS:
            if row := case["rows"].get(contender):
                steps = case.get("full_steps")  # older cases have none
                hours = {"hours": row["ms_per_step"] * steps / 3.6e6} if steps else {}
                yield f"{_case_name(case)}.{contender}", case, contender, row | hours


def _qlora_values(found: Mapping) -> Iterator[tuple[str, str]]:
    for name, _, _, row in _qlora_cases(found):
        for cost in QLORA_COSTS:
            digits = 3 if cost == "last_loss" else 0 if cost == "ms_per_step" else 1
            value = row.get(cost)
            yield f"{name}.{cost}", NONE if value is None else f"{value:,.{digits}f}"


def _qlora_table(found: Mapping, shown: Mapping[str, str]) -> tuple:
    kept = [c for c in QLORA_COSTS if any(r.get(c) is not None for *_, r in _qlora_cases(found))]
    told, differing = _told(found["cases"])
    header = [*differing, "cut at", "arm", "contender", *(QLORA_COSTS[cost] for cost in kept)]
    rows = [
        [
            *(case[key] for key in differing),
            *(f"{case['max_tokens']} tokens", title_of(case["arm"])),
            *(CONTENDERS[contender], *(shown[f"{name}.{cost}"] for cost in kept)),
        ]
        for name, case, contender, _ in _qlora_cases(found)
    ]
    sizes = {
        f"{c['rounds']} rounds of {c['steps']} step{'s' * (c['steps'] > 1)}" for c in found["cases"]
    }
    caption = f"{told}; batches of 16; medians ({'; '.join(sorted(sizes))})"
    extrapolated = "hours: the full training set's steps at the measured time of one"
    return f"{caption}; loss: mean of the last round's steps; {extrapolated}.", header, rows


def _passes(found: Mapping) -> Iterator[tuple[str, Mapping, Mapping]]:
    """(name, case, point) of every pass that was timed."""
    for case in found["cases"]:
        for point in case.get("passes", {}).get("points", []):
            yield f"{_case_name(case)}.{point['tokens']}", case, point


def _passes_values(found: Mapping) -> Iterator[tuple[str, str]]:
    for name, _, point in _passes(found):
        yield f"{name}.ms", f"{point['ms']:,.0f}"
    for case in found["cases"]:
        for part, digits in (("fixed_ms", 0), ("ms_per_token", 2)):
            value = case.get("passes", {}).get(part)
            yield f"{_case_name(case)}.{part}", NONE if value is None else f"{value:,.{digits}f}"


def _passes_table(found: Mapping, shown: Mapping[str, str]) -> tuple:
    timed = [case for case in found["cases"] if case.get("passes")]
    if not timed:
        return "", [], []
    told, differing = _told(timed)
    parts = ("fixed_ms", "ms_per_token")
    rows = [
        [
            *(case[key] for key in differing),
            *(title_of(case["arm"]), f"{point['tokens']:,}", shown[f"{name}.ms"]),
            *(shown[f"{_case_name(case)}.{part}"] for part in parts),
        ]
        for name, case, point in _passes(found)
    ]
    header = [*differing, "arm", "real tokens", "ms", "line: fixed ms", "line: ms a token"]
    return f"{told}; one forward and backward pass of ours.", header, rows


FAULT_OUTCOMES = {
    "injected": "injected",
    "recovered": "recovered bit for bit (out of memory: to 1e-2)",
    "refused": "refused with a message",
    "silently_wrong": "silently wrong",
    "lost_epochs": "lost finished epochs",
}


CHECKPOINT_COSTS = (
    "save_seconds",
    "load_seconds",
    "step_seconds",
    "resume_seconds",
    "saving_share",
    "resume_share",
)


def _faults_values(found: Mapping) -> Iterator[tuple[str, str]]:
    for outcome in FAULT_OUTCOMES:
        for row in found["rows"]:
            name = f"{row['path']}.{row['fault'].replace(' ', '_')}"
            yield f"{name}.{outcome}", f"{row[outcome]:,}"
        yield f"all.{outcome}", f"{sum(row[outcome] for row in found['rows']):,}"
    cost = found["checkpoint"]
    yield "save_ms", f"{1000 * cost['save_seconds']:,.0f}"
    yield "load_ms", f"{1000 * cost['load_seconds']:,.0f}"
    yield "step_ms", f"{1000 * cost['step_seconds']:,.0f}"
    yield "checkpoint_mb", f"{cost['bytes'] / 1e6:,.1f}"
    yield "resume_s", f"{cost['resume_seconds']:,.1f}"
    yield "saving_percent", f"{100 * cost['saving_share']:.2f}"
    yield "resume_percent", f"{100 * cost['resume_share']:.2f}"


def _faults_table(found: Mapping, shown: Mapping[str, str]) -> tuple:
    names = {(row["path"], row["fault"]): f"{row['path']}.{row['fault']}" for row in found["rows"]}
    rows = [
        [*words, *(shown[f"{name.replace(' ', '_')}.{outcome}"] for outcome in FAULT_OUTCOMES)]
        for words, name in [*names.items(), (("both", "all"), "all")]
    ]
    caption = (
        f"{found['machine']}, {found['date']}, seed {found['seed']}. A checkpoint of Model 3 at "
        f"the published small size ({shown['checkpoint_mb']} MB) takes {shown['save_ms']} ms to "
        f"save and {shown['load_ms']} ms to load, a step {shown['step_ms']} ms: a save an "
        f"epoch is {shown['saving_percent']} % of the time. A rerun takes {shown['resume_s']} s "
        f"from command to next step, {shown['resume_percent']} % of the small study's time. "
        "After out of memory weights are compared to 1e-2: smaller parts draw other dropout."
    )
    return caption, ["path", "fault", *FAULT_OUTCOMES.values()], rows


def _no_values(found: Mapping) -> Iterator[tuple[str, str]]:
    yield from ()


def _verdicts_table(found: Mapping, shown: Mapping[str, str]) -> tuple:
    size = found["settings"]
    caption = (
        f"{found['draws']} draws a law, each {size['seeds']} seeds of {size['items']} made-up "
        f"items, {size['band_draws']} random compressors, {size['resamples']:,} resamples; "
        f"{found['cpu_seconds'] / 60:.0f} min of one core, {found['date']}."
    )
    rows = []
    for row in found["verdicts"]:
        claim, came = row["claim"].replace("_", " "), f"{row['as_planted']} of {row['draws']}"
        rows.append([row["scenario"], claim, row["planted"], came, NONE])
    for row in found["false_positives"]:
        wrong = f"{row['adjusted']} of {row['draws']} (unadjusted {row['raw']})"
        rows.append([row["scenario"], row["contrast"], "no difference", NONE, wrong])
    return caption, ["law", "claim or contrast", "planted", "came out so", "false positives"], rows


def _analysis_table(found: Mapping, shown: Mapping[str, str]) -> tuple:
    header = ["arms", "items", "engram width", "one core (s)", "passed (s)", "asked (s)"]
    names = ("arms", "items", "engram_width", "cpu_seconds", "wall_seconds", "limit_seconds")
    return f"{found['machine']}, {found['date']}.", header, [[f"{found[n]:,}" for n in names]]


BENCHMARKS = {
    "benchmark-faults": Benchmark(
        "benchmarks/faults.json",
        {
            **{"machine": str, "date": str, "seed": count},
            "checkpoint": dict.fromkeys(CHECKPOINT_COSTS, positive),
            "rows": [{"path": str, "fault": str, **dict.fromkeys(FAULT_OUTCOMES, count)}],
        },
        _faults_values,
        _faults_table,
    ),
    "benchmark-verdicts": Benchmark(
        "benchmarks/verdicts.json",
        {"draws": count, "cpu_seconds": positive, "verdicts": [{"as_planted": count}]}
        | {"false_positives": [{"raw": count, "adjusted": count}]},
        _no_values,
        _verdicts_table,
    ),
    "benchmark-analysis": Benchmark(
        "benchmarks/analysis_time.json",
        {"items": count, "cpu_seconds": positive, "wall_seconds": positive},
        _no_values,
        _analysis_table,
    ),
    "benchmark-small": Benchmark(
        "benchmarks/small.json",
        {
            **{"machine": str, "date": str, "rounds": count},
            "rows": [{"arm": str, "threads": count, **dict.fromkeys(SMALL_COSTS, positive)}],
        },
        _small_values,
        _small_table,
    ),
    **{
        f"benchmark-{name}-{kind}": Benchmark(
            f"benchmarks/qlora-{kind}.json",
            {
                "cases": [
                    {
                        **dict.fromkeys(("dataset", "backbone", "arm", "machine", "date"), str),
                        **dict.fromkeys(("max_tokens", "steps", "rounds"), count),
                        "rows": {"*": {"tokens_per_s": positive, "last_loss": (is_number,)}},
                    }
                ]
            },
            values,
            table,
        )
        for name, values, table in (
            ("qlora", _qlora_values, _qlora_table),
            ("passes", _passes_values, _passes_table),
        )
        for kind in ("cpu", "gpu")
    },
}


def read_benchmarks(root: Path) -> dict[str, Any]:
    """The JSON of every benchmark by name, None where there is none."""
    return {name: read_json(root / entry.file) for name, entry in BENCHMARKS.items()}


def benchmark_mismatches(benchmarks: Mapping[str, Any]) -> Iterator[str]:
    """A line for each place where a file departs from its schema."""
    for name, entry in BENCHMARKS.items():
        if benchmarks[name] is not None:
            yield from mismatches(benchmarks[name], entry.schema, entry.file)


def benchmark_values(benchmarks: Mapping[str, Any]) -> dict[str, str]:
    """Every number of the benchmarks as text, by name."""
    return {
        f"{name}.{what}": text
        for name, entry in BENCHMARKS.items()
        if benchmarks[name] is not None
        for what, text in entry.values(benchmarks[name])
    }


def benchmark_table(name: str, benchmarks: Mapping[str, Any], shown: Mapping[str, str]) -> str:
    """A benchmark's table as markdown, from the texts of `benchmark_values`.

    Raises:
        ReportError: no benchmark has that name.
    """
    if name not in BENCHMARKS:
        raise ReportError(f"there is no benchmark {name!r}. Expected {' '.join(BENCHMARKS)}.")
    if benchmarks[name] is None:
        return f"{MISSING.capitalize()}.\n"
    short = {k.removeprefix(f"{name}."): v for k, v in shown.items() if k.startswith(f"{name}.")}
    caption, header, rows = BENCHMARKS[name].table(benchmarks[name], short)
    if not rows:
        return f"{MISSING.capitalize()}.\n"
    return f"{caption}\n\n{markdown(header, rows)}"
