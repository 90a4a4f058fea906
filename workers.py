"""Arms trained one after the other, or side by side in forked processes."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any

import numpy as np

from cli import StopSignals
from flags import StudyConfig
from training import Interrupted

Task = tuple[int, str]
Trained = tuple[dict[str, Any], dict[str, np.ndarray]]
_shared: dict[str, Any] = {}  # what forked workers inherit


def finished(
    train: Callable[[int, str], Trained], todo: list[Task], config: StudyConfig, stop: StopSignals
) -> Iterator[tuple[Task, Trained]]:
    """Train the (seed, arm) of `todo`, here or in --jobs processes, each as it is done.

    Raises:
        Interrupted: after a signal, once every worker has saved.
    """
    stop.after(config.stop_after)
    jobs = min(config.jobs, len(todo))
    if jobs <= 1:
        for seed, name in todo:
            yield (seed, name), train(seed, name)
        return
    _shared["train"] = train
    context = multiprocessing.get_context("fork")  # the data is inherited, not sent
    with ProcessPoolExecutor(jobs, context, initializer=_start_worker) as pool:
        running = {pool.submit(_work, *task): task for task in todo}
        interrupted, told = None, False
        while running:
            done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                task = running.pop(future)
                try:
                    result = future.result()
                except Interrupted as error:
                    interrupted = error
                else:
                    yield task, result
            if stop.due and not told:
                interrupted, told = interrupted or Interrupted(stop.due), True
                running = {f: task for f, task in running.items() if not f.cancel()}
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGTERM)
        if interrupted is not None:
            raise Interrupted(interrupted.reason)


def _start_worker() -> None:
    """The parent alone answers Ctrl-C; a worker never outlives it, and lets go of the lock."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _work(seed: int, name: str) -> Trained:
    return _shared["train"](seed, name)
