"""Small runs that faults are injected into, and what must be equal between two of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load as load_safetensors

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
import data
import experiment
import experiment_7b
import pretrained
import study
import training

FORK = multiprocessing.get_context("fork")
SHARED = ("--threads", "1", "--batch-size", "32", "--engram-dim", "4", "--seeds", "0",
          "--arms", "dual", "dual_engram")  # fmt: skip
PAUSE = 0.01  # seconds a step is slowed, so that signals meet every moment of a run


@dataclass(frozen=True)
class Kind:
    """A path to break: a script's main, its command, and how many steps its arms take together."""

    main: Callable
    command: tuple[str, ...]
    steps: int


def kinds(scratch: Path) -> dict[str, Kind]:
    """Both paths on one generated corpus; the QLoRA path's tiny backbone is made in `scratch`."""
    corpus = data.generated_corpus()
    texts, backbone = scratch / "texts", scratch / "tiny-random-qwen2"
    texts.mkdir()
    for split in (corpus.train, corpus.evaluation):
        rows = [f"{text},{label}" for text, label in zip(split.texts, split.labels, strict=True)]
        (texts / f"{split.name}.csv").write_text("\n".join(["sentence,label", *rows]) + "\n")
    pretrained.tiny_model(backbone, corpus.train.texts)
    with pretrained.quiet():
        import peft.tuners.lora  # noqa: F401  here once, or every forked child imports it
    shared = (*SHARED, "--data", str(texts))
    small = (*shared, "--epochs", "3", "--width", "16", "--inner", "16")
    qlora = (*shared, "--epochs", "2", "--backbone", str(backbone))
    return {
        "small": Kind(experiment.main, small, 2 * 3 * 8),
        "QLoRA": Kind(experiment_7b.main, qlora, 2 * 2 * 8),
    }


@dataclass(frozen=True)
class Trial:
    """A kind of run in a folder; what it says goes to the folder's .out file."""

    kind: Kind
    folder: Path

    def start(self, *extra: str, before: Callable[[], None] | None = None, slow=False):
        """Start the command in a child; `before` runs there first."""

        def work() -> None:
            os.setsid()
            to = os.open(f"{self.folder}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(to, 1)
            os.dup2(to, 2)
            # whatever this process's own streams were
            sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, closefd=False) for n in (1, 2))
            study._analyse_and_draw = lambda folder: None
            if slow:
                step = training.Fit.step

                def slowed(self, batch):
                    step(self, batch)
                    time.sleep(PAUSE)

                training.Fit.step = slowed
            if before is not None:
                before()
            code = 70
            with contextlib.suppress(BaseException):
                words = [*self.kind.command, "--out", str(self.folder), *extra]
                code = cli.run(self.kind.main, words)
            os._exit(code)

        child = FORK.Process(target=work)
        child.start()
        return child

    def finish(self, *extra: str, before: Callable[[], None] | None = None) -> int:
        child = self.start(*extra, before=before)
        child.join(120)
        return child.exitcode

    @property
    def said(self) -> str:
        return Path(f"{self.folder}.out").read_text()


def outcome_of(folder: Path) -> tuple:
    """Rows without timings, features, weights, adapters of a finished run: what must be equal.

    The weights are those of checkpoints that are whole by their manifest's sha256. A finished arm's
    is read no more: what harms it there is told when somebody reads it, and changes no result.
    """
    rows = json.loads((folder / "results.json").read_text())["rows"]
    for seeds in rows.values():
        for row in seeds.values():
            row.pop("commit"), row.pop("memory")
            for epoch in row["epochs"]:
                del epoch["train_seconds"]
    with np.load(folder / "features.npz") as arrays:
        features = {name: arrays[name].tobytes() for name in arrays.files}
    weights = {
        str(path.relative_to(folder).with_suffix("")): path.read_bytes()
        for path in folder.glob("checkpoints/*/*.safetensors")
        if is_whole(path)
    }
    adapters = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.glob("adapters/*/*.safetensors")
    }
    return rows, features, weights, adapters


def is_whole(weights: Path) -> bool:
    """Whether a checkpoint's weights are those that its manifest names."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        files = json.loads(weights.with_suffix(".json").read_text())["sha256"]
        return files[weights.name] == hashlib.sha256(weights.read_bytes()).hexdigest()
    return False


def same(found: tuple, wanted: tuple) -> bool:
    """Equal rows, features and adapters; a last checkpoint may be missing, never another's."""
    known = all(found[2].get(name, content) == content for name, content in wanted[2].items())
    return known and all(found[i] == wanted[i] for i in (0, 1, 3))


def epochs_done(folder: Path) -> int:
    """Finished epochs that the folder's manifests and rows know of."""
    found = Counter()
    for path in folder.glob("checkpoints/*/*.json"):
        with contextlib.suppress(ValueError, KeyError):
            name = path.parent.name
            found[name] = max(found[name], json.loads(path.read_text())["progress"]["epoch"])
    return sum(found.values())


def unfinished(folder: Path) -> dict[str, int]:
    """The newest saved step of every arm that has no row yet."""
    with contextlib.suppress(OSError, ValueError):
        rows = json.loads((folder / "results.json").read_text())["rows"]
        return {a: s for a, s in _saved_steps(folder).items() if a not in rows}
    return _saved_steps(folder)


def _saved_steps(folder: Path) -> dict[str, int]:
    steps = {}
    for path in sorted(folder.glob("checkpoints/*/*.json")):
        steps[path.parent.name.removesuffix("-0")] = int(path.stem)
    return steps


def near(one: tuple, two: tuple) -> bool:
    """Equal names, epochs and order of data; weights within 1e-2."""
    pairs = [(load_safetensors(one[2][k]), load_safetensors(two[2][k])) for k in two[2]]
    return one[2].keys() == two[2].keys() and all(
        np.isfinite(a[n]).all() and np.abs(a[n] - b[n]).max() < 1e-2 for a, b in pairs for n in b
    )
