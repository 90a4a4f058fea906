"""Figures and tables of every results folder: no number in the documents is typed by hand.

    python report.py                      draw every figure, render both documents
    python report.py results/             the same, drawing that folder's figures only
    python report.py --tables-only        render the documents, draw nothing
    python report.py --analyse results/   repeat its analysis from features.npz, draw, render
    python report.py --check              exit 1 when a table, a figure or a number is stale

A table stands between `<!-- table:NAME -->` and `<!-- end -->`, each on a line of its own; a number
in a sentence between `<!-- v:NAME -->` and `<!-- /v -->`. NAME of a table is KEY-KIND, KEY one of
KEYS or a subfolder's (`7b/SmolLM2-135M`), KIND one of KINDS or `provenance`; or one of ACROSS or
of BENCHMARKS.
NAME of a number is a key of `values` (`--names` lists them).
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import figures
from benchmark_tables import (
    benchmark_mismatches,
    benchmark_table,
    benchmark_values,
    read_benchmarks,
)
from drawing import written
from files import write_atomic, write_json
from schema import (
    SCHEMA,
    ReportError,
    Study,
    evidence_beside,
    features_of,
    mismatches,
    read_studies,
    read_study,
)
from tables import table
from values import values

ROOT = Path(__file__).resolve().parent
DOCUMENTS = ("README.md", "FINDINGS.md")


def _digest(results: Mapping) -> str:
    """Digest of what the figures show; each PNG keeps it, so a stale one can be told."""
    shown = [results[k] for k in ("rows", "dataset", "backbone")]
    shown += [results["analysis"].get("controls"), results.get("departures")]
    if rivals := results["analysis"].get("two-labels"):  # other folders keep their digest
        shown.append(rivals)
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:32]


def draw(folder: Path) -> list[Path]:
    """Draw the figures of a results folder from its results.json, features.npz, published.json.

    Returns:
        the PNG and SVG files written, each replaced in one step.
    Raises:
        ReportError: there is no results.json, or a file is damaged.
    """
    folder = Path(folder)
    study, features = read_study(folder), features_of(folder)
    if study.results is None:
        raise ReportError(f"{folder} holds no results.json. Give a results folder.")
    drawn = []
    digest = _digest(study.results)
    for name, figure in figures.draw(study.results, features, study.published):
        for path in (folder / name, (folder / name).with_suffix(".svg")):
            write_atomic(path, written(figure, path.suffix[1:], digest))
            drawn.append(path)
    return drawn


def analyse(folder: Path) -> None:
    """Repeat the analysis of a folder from features.npz and store it in results.json."""
    # here: they load torch, which --check must not need
    import rivals
    from analysis import analyse as run

    study, features = read_study(folder), features_of(folder)
    results = study.results
    if results is None or not features:
        raise ReportError(f"{folder} lacks results.json or features.npz. Run the experiment first.")
    if "two-labels" in results["analysis"]:
        results["analysis"] |= rivals.score(dict(features))
    else:
        seen = results | {"evidence": evidence_beside(folder)}
        results["analysis"] = run(dict(features), seen, published=study.published)
    write_json(folder / "results.json", results)


# the first alternative that matches wins: a marker inside code is an example, not a marker
_MARKERS = re.compile(
    r"(?P<code>^```.*?^```[ \t]*$|`[^`\n]+`)"
    r"|^<!-- table:(?P<table>\S+) -->\n(?P<body>(?:(?!<!-- table:).)*?)^<!-- end -->"
    r"|<!-- v:(?P<value>\S+) -->(?P<text>[^<]*)<!-- /v -->"
    r"|(?P<stray><!-- (?:table:|v:|/v|end)[^>]*-->)",
    re.MULTILINE | re.DOTALL,
)
_UNCHECKED = re.compile(
    r"\[[^\]]*\]\([^)]*\)|https?://\S+"  # links, with their text
    r"|^#+ +[\d.]+"  # a heading's own number
    r"|\d+(?:\.\d+){2,}",  # versions such as 0.50.2
    re.MULTILINE,
)
_DECIMAL = re.compile(r"(?<![\w.])\d[\d,]*\.\d+")


@dataclass
class Rendering:
    """A document rendered: its new text, what was stale in the old one, what cannot be rendered.

    `shown` are the decimals that stand in markers, `prose` the text outside of them.
    """

    text: str
    prose: str
    stale: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    shown: set[str] = field(default_factory=set)


def render(text: str, studies: Mapping[str, Study], benchmarks: Mapping) -> Rendering:
    """Fill the marked tables and numbers of a document; what cannot be filled is left as it is."""
    known = values(studies) | benchmark_values(benchmarks)
    out = Rendering(text, "")

    def fill(match: re.Match) -> str:
        whole, name = match.group(), match["table"] or match["value"]
        if match["stray"]:
            out.broken.append(f"{whole} has no partner. Close the marker, or put it in backticks.")
        if not name:
            return whole
        if match["table"]:
            try:
                old = match["body"]
                if name.startswith("benchmark-"):
                    new = benchmark_table(name, benchmarks, known)
                else:
                    new = table(name, studies, known)
            except ReportError as error:
                out.broken.append(str(error))
                return whole
            filled = f"<!-- table:{name} -->\n{new}<!-- end -->"
        else:
            if name not in known:
                near = difflib.get_close_matches(name, known, 3)
                out.broken.append(f"there is no value {name!r}. Nearest: {', '.join(near)}.")
                return whole
            old, new = match["text"], known[name]
            filled = f"<!-- v:{name} -->{new}<!-- /v -->"
        out.shown.update(_DECIMAL.findall(new))
        if old != new:
            out.stale.append(name)
        return filled

    out.text = _MARKERS.sub(fill, text)
    blank = re.compile(f"{_MARKERS.pattern}|{_UNCHECKED.pattern}", re.MULTILINE | re.DOTALL)
    out.prose = blank.sub(lambda match: "\n" * match.group().count("\n") or " ", text)
    return out


def _renderings(root: Path) -> dict[str, Rendering]:
    studies, benchmarks = read_studies(root), read_benchmarks(root)
    texts = {n: (root / n).read_text(encoding="utf-8") for n in DOCUMENTS if (root / n).exists()}
    return {name: render(text, studies, benchmarks) for name, text in texts.items()}


def check(root: Path) -> list[str]:
    """A line for each thing in a checkout that is stale, missing or cannot be true.

    Covers the schema of results.json and of the benchmarks, figures (drawn from these results?),
    marked tables and numbers, and decimals in prose that no rendered table or number holds.
    """
    try:
        studies, benchmarks = read_studies(root), read_benchmarks(root)
        problems = [
            line
            for study in studies.values()
            if study.results is not None
            for line in mismatches(study.results, SCHEMA, f"{study.path}/results.json")
        ]
        problems += benchmark_mismatches(benchmarks)
        if problems:
            return problems  # nothing can be rendered from these
        for study in studies.values():
            if study.results is not None:
                problems += _stale_figures(study)
        renderings = _renderings(root)
    except ReportError as error:
        return [str(error)]
    shown = set().union(*(r.shown for r in renderings.values()))
    for name, rendering in renderings.items():
        problems += [f"{name}: {line}" for line in rendering.broken]
        problems += [f"{name}: {what} is stale. Run report.py." for what in rendering.stale]
        for number, line in enumerate(rendering.prose.splitlines(), 1):
            problems += [
                f"{name}:{number}: {decimal} is in no rendered table or number. Put it between "
                "<!-- v:NAME --> and <!-- /v -->, or in backticks if it is not a result."
                for decimal in _DECIMAL.findall(line)
                if decimal not in shown
            ]
    return problems


def _stale_figures(study: Study) -> Iterator[str]:
    digest = _digest(study.results).encode()
    for name in figures.expected(study.results, features_of(study.path)):
        for path in (study.path / name, (study.path / name).with_suffix(".svg")):
            if not path.exists():
                yield f"{path} is missing. Run report.py."
            elif digest not in path.read_bytes():
                yield f"{path} was drawn from other results. Run report.py."


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="*", type=Path, help="draw only these results folders")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    only.add_argument("--analyse", type=Path, metavar="DIR", help="repeat this folder's analysis")
    only.add_argument("--tables-only", action="store_true", help="draw no figure")
    only.add_argument("--names", action="store_true", help="list every value's name and text")
    options = parser.parse_args(argv)
    try:
        if options.check:
            problems = check(root)
            print("\n".join(problems) or "report: everything is up to date")
            return int(bool(problems))
        studies = read_studies(root)
        if options.names:
            known = values(studies) | benchmark_values(read_benchmarks(root))
            for name, text in known.items():
                print(f"{name}\t{text}")
            return 0
        folders = options.folders or [s.path for s in studies.values() if s.results is not None]
        if options.analyse:
            analyse(options.analyse)
            folders = [options.analyse]
        for folder in () if options.tables_only else folders:
            for path in draw(folder):
                print(f"report: drew {path}")
        renderings = _renderings(root)
        for name, rendering in renderings.items():
            if rendering.stale:
                write_atomic(root / name, rendering.text.encode())
                print(f"report: {name}: rendered {', '.join(rendering.stale)}")
        if broken := [f"{n}: {line}" for n, r in renderings.items() for line in r.broken]:
            raise ReportError("; ".join(broken))
    except BrokenPipeError:  # the other end of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit writes again
    except (ReportError, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
