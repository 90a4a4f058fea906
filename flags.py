"""The flags that the scripts share: a typed Config becomes flags, and argv a checked Config."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from arms import ARM_GROUPS, ARMS, FEEDBACKS, MAIN_ARMS, TAPS
from common import UserError
from recipe import Recipe, require_texts

HIGH_RATE = 0.1  # above it a slip of the finger is likelier than a choice


def option(default: Any, text: str, **extra: Any) -> Any:
    """A Config field: its default, its help (with the unit) and optionally choices or limits."""
    metadata = {"help": text, **extra}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class StudyConfig:
    """The flags all three scripts share; a script's Config overrides defaults and adds its own."""

    data: str | None = option(
        None,
        "hub id, csv/tsv/jsonl/parquet file, or folder with train.* "
        "and validation.* or test.* (default: the script's own data set)",
    )
    text_column: str | None = option(None, "column of the texts (default: the usual names)")
    label_column: str | None = option(None, "column of the labels (default: the usual names)")
    labels: list[str] | None = option(None, "class names in order, for labels that are words")
    label_offset: int = option(0, "the smallest label, if labels are numbers not from 0")
    encoding: str = option("utf-8", "of the data files")
    drop_empty: bool = option(False, "drop rows without text, counted, instead of refusing them")
    limit_train: int | None = option(
        None, "train on the first N rows of a stratified shuffle", low=1
    )
    limit_eval: int | None = option(None, "evaluate on the first N rows of one", low=2)
    arms: list[str] = option(
        list(MAIN_ARMS),
        f"conditions to train, groups ({', '.join(ARM_GROUPS)}) or names ({', '.join(ARMS)})",
        choices=(*ARM_GROUPS, *ARMS),
        groups=ARM_GROUPS,
        metavar="ARM",
    )
    seeds: list[int] | None = option(None, "training seeds", low=0)
    epochs: int = option(8, "passes over the training texts", low=1)
    batch_size: int = option(64, "texts per optimizer step", low=1)
    lr: float = option(3e-4, "peak learning rate", above=0.0, high=1.0)
    lr_grid: list[float] = option(
        [1e-4, 3e-4, 1e-3, 3e-3],
        "rates of which a tuned arm takes the best on a dev split of the training texts",
        above=0.0,
        high=1.0,
    )
    tune_seeds: int = option(1, "seeds that try each of them", low=1)
    weight_decay: float = option(0.01, "AdamW weight decay", low=0.0)
    clip: float = option(1.0, "largest gradient norm", above=0.0)
    feedback: str | None = option(
        None, "what Model 3 feeds back (default: each arm's own rule)", choices=FEEDBACKS
    )
    tap: str | None = option(
        None, "what the compressor reads (default: each arm's own)", choices=TAPS
    )
    engram_dim: int = option(32, "width of the engram", low=1)
    lm_weight: float | None = option(
        None,
        "weight of the LM loss in arms with both losses; the classification loss gets the rest",
        low=0.0,
        high=1.0,
    )
    max_tokens: int = option(64, "longest text in tokens; longer ones are cut and counted", low=2)
    audit: int = option(
        0, "steps before which each arm's gradients are measured (control B14; 0: none)", low=0
    )
    jobs: int = option(1, "arms trained side by side, each in a process of its own", low=1)
    threads: int | None = option(
        None, "CPU threads (default: all cores); bits are the same for the same number only", low=1
    )
    out: str | None = option(
        None,
        "results folder (default: the script's, or its subfolder named "
        "after another data set or backbone)",
    )
    stop_after: str | None = option(
        None, "save and stop, to go on later, after a time such as 5h, 90m or 30s", time=True
    )
    deterministic: bool = option(
        False, "only GPU kernels that give the same bits every time (slower)"
    )
    resume: bool = option(True, "go on with what the folder holds")
    restart: bool = option(False, "discard the run the folder holds and start over")
    smoke: bool = option(False, "whole path on a generated corpus: CPU, no network, seconds")
    debug: bool = option(False, "show the traceback of an error")


# Changing these does not make it another run
FREE = (
    "jobs",
    "seeds",
    "arms",
    "out",
    "resume",
    "restart",
    "stop_after",
    "lr_grid",  # what was tried stays, and more can be tried
    "tune_seeds",
    "debug",
    "threads",
    "data",
    "sst2",
    "agnews",
    "text_column",
    "label_column",
    "labels",
    "label_offset",
    "encoding",
    "drop_empty",
    "backbone",  # its name and its weights' revision count, not where they lie
    "vram_gib",
    "gradient_checkpointing",
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


class _Once(argparse.Action):
    """Store a value; the same flag twice is a mistake, not a last word."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = namespace.__dict__.setdefault("_given", set())
        if self.dest in given:
            raise UserError(f"{option_string} is given twice. Give it once.")
        given.add(self.dest)
        value = self.const if self.nargs == 0 else values
        if option_string and option_string.startswith("--no-"):
            value = False
        setattr(namespace, self.dest, value)


def parse(config: type, argv: Sequence[str], description: str) -> Any:
    """Build the flags of a Config dataclass and read argv into one.

    Raises:
        UserError: an unknown flag, a flag given twice, a wrong type, or a value out of range.
    """
    parser = _Parser(
        prog=Path(sys.argv[0]).name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # argparse of Python 3.14: with 3.11's, -1e-3 is a flag, and the message not about its value
    parser._negative_number_matcher = re.compile(r"-(?:\d+|\d*\.\d+)(?:e[-+]?\d+)?$", re.IGNORECASE)
    hints = typing.get_type_hints(config)
    known = []
    defaults = defaults_of(config)
    for item in fields(config):
        default = defaults[item.name]
        many, kind = _kind(hints[item.name])
        flags = [f"--{item.name.replace('_', '-')}"]
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        text = item.metadata["help"] + ("" if default in (None, False) else f" (default: {shown})")
        extra: dict[str, Any] = {"nargs": "+"} if many else {}
        if kind is bool:
            extra = {"nargs": 0, "const": True}
            if default:
                flags.append(f"--no-{item.name.replace('_', '-')}")
        else:
            extra |= {"type": _reader(kind, item.metadata)}
            choices = item.metadata.get("choices")
            shown = f"{{{','.join(choices)}}}" if choices else kind.__name__.upper()
            extra["metavar"] = item.metadata.get("metavar", shown)
        known += flags
        parser.add_argument(
            *flags,
            dest=item.name,
            default=default,
            help=text.replace("%", "%%"),
            action=_Once,
            **extra,
        )
    values, unknown = parser.parse_known_args(list(argv))
    if unknown:
        flag = unknown[0].split("=")[0]
        near = difflib.get_close_matches(flag, known, 1)
        hint = f"Did you mean {near[0]}?" if near else "See --help."
        raise UserError(f"unknown argument {flag}. {hint}")
    vars(values).pop("_given", None)
    for item in fields(config):
        if groups := item.metadata.get("groups"):
            words = [groups.get(word, (word,)) for word in getattr(values, item.name)]
            setattr(values, item.name, [name for group in words for name in group])
    for name, value in vars(values).items():
        if isinstance(value, list) and len(set(value)) < len(value):
            raise UserError(f"--{name.replace('_', '-')} names {_first_repeat(value)} twice.")
    return config(**vars(values))


def _first_repeat(values: list) -> Any:
    return next(value for value in values if values.count(value) > 1)


def _kind(hint: Any) -> tuple[bool, type]:
    """(takes several values, type of one) of a field's annotation."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is list:
        return True, typing.get_args(hint)[0]
    return False, hint


def _reader(kind: type, limits: typing.Mapping[str, Any]) -> Callable[[str], Any]:
    """A function from the word on the command line to the checked value."""
    low, above, high = (limits.get(name) for name in ("low", "above", "high"))
    choices = limits.get("choices")
    bounds = [
        f">= {low}" if low is not None else "",
        f"> {above}" if above is not None else "",
        f"<= {high}" if high is not None else "",
    ]
    wanted = {int: "a whole number", float: "a finite number", str: "text"}[kind]
    wanted = " ".join([wanted, " and ".join(filter(None, bounds))]).strip()

    def read(word: str) -> Any:
        try:
            value = kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {word}.") from None
        if choices and value not in choices:
            raise argparse.ArgumentTypeError(f"takes any of {' '.join(choices)}, got {word}.")
        if limits.get("time") and not re.fullmatch(r"\d+(\.\d+)?[hms]", word):
            raise argparse.ArgumentTypeError(f"must be a time such as 5h, 90m or 30s, got {word}.")
        if kind is str:
            return value
        fits = math.isfinite(value) and abs(value) < 2**63
        fits = fits and (low is None or value >= low) and (above is None or value > above)
        if not fits or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {word}.")
        return value

    return read


def defaults_of(config: type) -> dict[str, Any]:
    """Every flag's default by field name."""
    return {
        item.name: item.default_factory() if item.default is MISSING else item.default
        for item in fields(config)
    }


def recipe_of(config: StudyConfig, texts: int, **extra: Any) -> Recipe:
    """The training recipe a Config describes.

    Args:
        texts: training texts there are.
        extra: what its script fixes.
    Raises:
        UserError: batches of that size cannot be made, or not be paired.
    """
    pairing = [n for n in config.arms if ARMS[n].has_prefix and ARMS[n].feedback != "off"]
    if config.batch_size % 2 and pairing:
        raise UserError(
            f"{ARMS[pairing[0]].title} pairs texts; --batch-size must be even, "
            f"got {config.batch_size}."
        )
    require_texts(texts, config.batch_size)
    if config.lr > HIGH_RATE:
        print(f"warning: --lr {config.lr:g} is high for AdamW", file=sys.stderr)
    names = ("epochs", "lr", "weight_decay", "batch_size", "clip")
    return Recipe(**{name: getattr(config, name) for name in names}, **extra)
