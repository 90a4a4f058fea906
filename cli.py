"""The command line: a typed Config becomes flags, and a user's mistake becomes one line."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import os
import re
import signal
import sys
import tempfile
import time
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from arms import ARM_GROUPS, ARMS, FEEDBACKS, MAIN_ARMS, TAPS
from common import UserError
from files import NoRoomError
from memory import ADVICE, OutOfMemory, is_out_of_memory
from training import Interrupted, NonFiniteError, Recipe


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
    lr: float = option(3e-4, "peak learning rate", above=0.0)
    lr_grid: list[float] = option(
        [1e-4, 3e-4, 1e-3, 3e-3],
        "rates of which a tuned arm takes the best on a dev split of the training texts",
        above=0.0,
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
        None, "CPU threads (default: all cores); part of a run's identity", low=1
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


def recipe_of(config: StudyConfig, **extra: Any) -> Recipe:
    """The training recipe a Config describes; extra: what its script fixes."""
    pairing = [n for n in config.arms if ARMS[n].has_prefix and ARMS[n].feedback != "off"]
    if config.batch_size % 2 and pairing:
        raise UserError(
            f"{ARMS[pairing[0]].title} pairs texts; --batch-size must be even, "
            f"got {config.batch_size}."
        )
    names = ("epochs", "lr", "weight_decay", "batch_size", "clip")
    return Recipe(**{name: getattr(config, name) for name in names}, **extra)


def require_writable(folder: Path) -> None:
    """Refuse a results folder that cannot be written to, before anything is loaded or made."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}). Pass a writable --out."
        ) from None


class StopSignals:
    """What asks a run to stop: SIGINT, SIGTERM (a second one exits at once), or a time limit.

    `check` raises at the next safe place.
    """

    CODES: typing.ClassVar = {signal.SIGINT: 130, signal.SIGTERM: 143}

    def __init__(self) -> None:
        self.received: int | None = None
        self.started, self.limit = time.monotonic(), math.inf
        self.limit_text = ""

    def after(self, limit: str | None) -> None:
        """Stop once a time ("5h", "90m", "30s") has gone by since the start; None: never."""
        if limit is not None:
            self.limit = float(limit[:-1]) * {"h": 3600, "m": 60, "s": 1}[limit[-1]]
            self.limit_text = f"--stop-after {limit}"

    @property
    def due(self) -> str | None:
        """What asked to stop."""
        if self.received is not None:
            return signal.Signals(self.received).name
        return self.limit_text if time.monotonic() - self.started > self.limit else None

    def __enter__(self) -> StopSignals:
        self.before = {number: signal.signal(number, self._handle) for number in self.CODES}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.received is not None:
            os._exit(self.CODES[number])
        self.received = number

    def check(self) -> None:
        """Raise Interrupted once a signal has come or the time is up."""
        if due := self.due:
            raise Interrupted(due)


class _Unbroken:
    """A text stream that stops writing, and never raises, once nobody reads it any more."""

    def __init__(self, stream: typing.TextIO | None) -> None:
        self.stream, self.broken = stream, stream is None

    def write(self, text: str) -> int:
        if not self.broken:
            try:
                self.stream.write(text)
            except (OSError, ValueError):  # ValueError: closed on our side
                self._give_up()
        return len(text)

    def flush(self) -> None:
        if not self.broken:
            try:
                self.stream.flush()
            except (OSError, ValueError):
                self._give_up()

    def _give_up(self) -> None:
        """Send what is still buffered nowhere, so that the exit's own flush succeeds."""
        self.broken = True
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def _unbroken_streams() -> typing.Iterator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Unbroken(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def run(main: Callable[[Sequence[str], StopSignals], None], argv: Sequence[str]) -> int:
    """Call a script's main and turn its errors into an exit code and one line on stderr.

    Returns:
        0, also when --stop-after ended it; 2 for a user's mistake; 1 for a loss that is not finite,
        a full disk or memory that ran out; 130 or 143 after a signal.
    """
    name = Path(sys.argv[0]).name
    with _unbroken_streams(), StopSignals() as stop:
        try:
            main(argv, stop)
            return 0
        except UserError as error:
            if "--debug" in argv:
                raise
            print(f"{name}: error: {error}", file=sys.stderr)
            return 2
        except (NonFiniteError, NoRoomError) as error:
            print(f"{name}: stopped: {error}", file=sys.stderr)
            return 1
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) and not isinstance(error, OutOfMemory):
                raise
            if "--debug" in argv:
                raise
            said = str(error)
            if not isinstance(error, OutOfMemory):
                said = f"{(said or type(error).__name__).splitlines()[0]} {ADVICE}"
            print(f"{name}: stopped: out of memory: {said}", file=sys.stderr)
            return 1
        except Interrupted as error:
            where = f"saved at step {error.saved}" if error.saved is not None else "nothing lost"
            state = "" if stop.received is not None else "incomplete: "
            print(
                f"{name}: {error.reason}: {state}{where}; run the same command to continue",
                file=sys.stderr,
            )
            return StopSignals.CODES.get(stop.received, 0)
