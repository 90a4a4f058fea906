"""Arms trained one after the other, or side by side in forked processes."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from cli import StopSignals
from flags import StudyConfig
from memory import OutOfMemory
from training import Interrupted

Task = tuple[int, str]
Trained = tuple[dict[str, Any], dict[str, np.ndarray]]


def finished(
    train: Callable[[int, str], Trained], todo: list[Task], config: StudyConfig, stop: StopSignals
) -> Iterator[tuple[Task, Trained]]:
    """Train the (seed, arm) of `todo`, here or in --jobs processes, each as it is done.

    What stops one arm stops them all, once every process has saved.

    Raises:
        Interrupted: after a signal.
        OutOfMemory: a process was killed.
    """
    stop.after(config.stop_after)
    if min(config.jobs, len(todo)) <= 1:
        for seed, name in todo:
            yield (seed, name), train(seed, name)
        return
    context = multiprocessing.get_context("fork")  # the data is inherited, not sent
    waiting, running = list(todo), {}
    failure, told = None, False
    try:
        while waiting or running:
            while waiting and len(running) < config.jobs:
                task = waiting.pop(0)
                result, theirs = context.Pipe(duplex=False)
                child = context.Process(target=_work, args=(train, task, theirs, stop))
                child.start()
                theirs.close()  # the end of a dead child is then the end of the pipe
                running[result] = task, child
            for result in wait(running, timeout=0.2):
                task, outcome = running[result][0], _received(result)
                running.pop(result)[1].join()
                if not isinstance(outcome, BaseException):
                    yield task, outcome
                elif failure is None or isinstance(failure, Interrupted):
                    failure = outcome
            if (failure or stop.due) and not told:
                waiting, told = [], True
                for _, child in running.values():
                    child.terminate()
    finally:
        for result, (_, child) in running.items():
            child.terminate()
            result.close()
    if failure and not isinstance(failure, Interrupted):
        raise failure
    stop.check()
    if failure:
        raise failure


def _received(result: Connection) -> Trained | BaseException:
    try:
        return result.recv()
    except (EOFError, OSError):
        return OutOfMemory(
            "the process of an arm was killed, most likely for its memory. Pass a smaller --jobs; "
            "run the same command to continue."
        )


def _work(
    train: Callable[[int, str], Trained], task: Task, result: Connection, stop: StopSignals
) -> None:
    """The parent alone answers Ctrl-C and second signals; a worker never outlives it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop.note)
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    try:
        outcome = train(*task)
    except Exception as error:
        error.add_note(traceback.format_exc())  # it does not cross the pipe by itself
        outcome = error
    with contextlib.suppress(OSError):  # the parent gave up
        result.send(outcome)
