"""The command line around a script's main: a user's mistake becomes one line, a signal a stop."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import tempfile
import time
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import UserError
from files import NoRoomError
from memory import ADVICE, OutOfMemory, is_out_of_memory
from schema import ReportError
from training import Interrupted, NonFiniteError


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
        self.note(number, frame)

    def note(self, number: int, frame: object) -> None:
        """Take note of a signal, however many there are."""
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


def _show_traceback(argv: Sequence[str]) -> None:
    if "--debug" in argv:
        traceback.print_exc()


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
        except (UserError, ReportError, NonFiniteError, NoRoomError) as error:
            mistake = isinstance(error, UserError | ReportError)
            _show_traceback(argv)
            print(f"{name}: {'error' if mistake else 'stopped'}: {error}", file=sys.stderr)
            return 2 if mistake else 1
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) and not isinstance(error, OutOfMemory):
                raise
            _show_traceback(argv)
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
