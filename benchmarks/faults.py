"""Do runs survive? Injects seeded faults into small runs, reruns each, and compares the bytes.

    python benchmarks/faults.py [--faults 200] [--seed 0]

Every trial forks a small run of one of two paths, in turn: `experiment.py` at a small width, and
`experiment_7b.py` (NF4, LoRA) on a tiny backbone of random weights; torch is imported once. It
injects one fault, reruns the same command and compares rows (without timings), features, weights
and adapters with those of a run that was left alone. A rerun that refuses with a message is told
to --restart. After out of memory the parts of a step are smaller, which is another sum: its weights
are compared to 1e-2, everything else bit for bit. Also times a checkpoint against an epoch. Writes
benchmarks/faults.json. About 12 minutes of one core.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load as load_safetensors

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
import data
import evaluation
import experiment
import experiment_7b
import pretrained
import study
import training
from checkpoints import CheckpointStore
from recipe import prepare_cpu
from results import provenance

FORK = multiprocessing.get_context("fork")
SHARED = ("--threads", "1", "--batch-size", "32", "--engram-dim", "4", "--seeds", "0",
          "--arms", "dual", "dual_engram")  # fmt: skip
PAUSE = 0.01  # seconds a step is slowed, so that signals meet every moment of a run
OUTCOMES = ("recovered", "refused", "silently_wrong", "lost_epochs")


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


# a fault: breaks the run, or its files, in a way that `rng` chooses


def killed(run: Trial, rng: random.Random, number: int) -> None:
    child = run.start(slow=True)
    child.join(rng.uniform(0.05, 1.5))
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, number)
    child.join()


def stopped_half_way(run: Trial, rng: random.Random) -> None:
    """A run stopped by SIGTERM after some of its epochs: files for a fault to damage."""
    child = run.start(slow=True)
    until = time.monotonic() + rng.uniform(0.4, 1.5)
    while time.monotonic() < until or not list(run.folder.glob("checkpoints/*/*.json")):
        time.sleep(0.01)
        if child.exitcode is not None:
            break
    if child.exitcode is None:
        os.kill(child.pid, signal.SIGTERM)
    child.join()


def damaged(run: Trial, rng: random.Random, damage: Callable[[bytearray], bytearray]) -> None:
    stopped_half_way(run, rng)
    patterns = ("checkpoints/*/*.safetensors", "checkpoints/*/*.state", "checkpoints/*/*.json",
                "features.npz", "results.json")  # fmt: skip
    files = sorted(path for pattern in patterns for path in run.folder.glob(pattern))
    victim = rng.choice(files)
    victim.write_bytes(damage(bytearray(victim.read_bytes())))


def truncated(run: Trial, rng: random.Random) -> None:
    damaged(run, rng, lambda content: content[: rng.randrange(len(content))])


def flipped(run: Trial, rng: random.Random) -> None:
    def flip(content: bytearray) -> bytearray:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return content

    damaged(run, rng, flip)


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def foreign(run: Trial, rng: random.Random) -> None:
    """A pickle, a zip, or another arm's checkpoint where this run's was."""
    stopped_half_way(run, rng)
    states = sorted(run.folder.glob("checkpoints/*/*.state"))
    victim = rng.choice(states)
    kind = rng.choice(("pickle", "zip", "arm"))
    if kind == "pickle":
        victim.write_bytes(pickle.dumps(_Touch(Path(f"{run.folder}.pwned"))))
    elif kind == "zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("photo.jpg", rng.randbytes(2000))
        victim.write_bytes(buffer.getvalue())
    else:
        manifest = victim.with_suffix(".json")
        content = json.loads(manifest.read_text())
        content["identity"]["arm"]["name"] = "classification"
        manifest.write_text(json.dumps(content))


def full_disk(run: Trial, rng: random.Random) -> None:
    limit = int(10 ** rng.uniform(3.5, 5))

    def before() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    run.finish(before=before)


def not_finite(run: Trial, rng: random.Random) -> None:
    """The loss of one step is NaN: the run must stop before taking it."""
    number = rng.randrange(run.kind.steps)

    def before() -> None:
        weighted, count = training.weighted_loss, iter(range(10**6))
        training.weighted_loss = lambda *a: (
            weighted(*a) * (float("nan") if next(count) == number else 1.0)
        )

    code = run.finish(before=before)
    assert code == 1 and "stopped:" in run.said, run.said


def out_of_memory(run: Trial, rng: random.Random) -> None:
    """Some passes run out of memory, in training or evaluation; the run itself goes on."""
    failing = set(rng.sample(range(2 * run.kind.steps), 3))
    places = (training, "run_part"), (training, "weighted_loss"), (evaluation, "batch_losses")
    module, name = rng.choice(places)

    def before() -> None:
        real, count = getattr(module, name), iter(range(10**6))

        def fail(*args):
            if next(count) in failing:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(*args)

        setattr(module, name, fail)

    assert run.finish(before=before) == 0, run.said


FAULTS: dict[str, tuple[int, Callable[[Trial, random.Random], None]]] = {
    "SIGKILL": (6, lambda run, rng: killed(run, rng, signal.SIGKILL)),
    "SIGTERM": (3, lambda run, rng: killed(run, rng, signal.SIGTERM)),
    "truncated file": (3, truncated),
    "flipped bit": (3, flipped),
    "foreign file": (2, foreign),
    "full disk": (1, full_disk),
    "NaN loss": (1, not_finite),
    "out of memory": (1, out_of_memory),
}


DAMAGING = ("truncated file", "flipped bit", "foreign file")  # these may cost the newest step


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


def outcome_after(name: str, run: Trial, rng: random.Random, wanted: tuple) -> str:
    """Inject one fault and rerun: what became of it, a name of OUTCOMES."""
    FAULTS[name][1](run, rng)
    folder = run.folder
    done, saved = epochs_done(folder), unfinished(folder)
    code = run.finish()
    if Path(f"{folder}.pwned").exists():
        return "silently_wrong"
    if code == 2 and ": error: " in run.said:
        # the folder must be as it was, and --restart must be a way out of it
        lost = epochs_done(folder) < done
        again = run.finish("--restart")
        whole = again == 0 and same(outcome_of(folder), wanted)
        return "lost_epochs" if lost else "refused" if whole else "silently_wrong"
    if code != 0:
        print(run.said, file=sys.stderr)
        return "silently_wrong"
    went_on = dict(re.findall(r"(\w+), seed 0: going on from step (\d+)", run.said))
    if name not in DAMAGING and any(int(went_on.get(a, -1)) < s for a, s in saved.items()):
        return "lost_epochs"
    found = outcome_of(folder)
    compare = {"out of memory": near, **dict.fromkeys((*DAMAGING, "full disk"), same)}
    equal = compare.get(name, tuple.__eq__)(found, wanted)
    return "recovered" if equal else "silently_wrong"


def checkpoint_costs(folder: Path) -> dict[str, float]:
    """Seconds of a save, a load and a step of Model 3 at the published small size."""
    import batches
    from arms import ARMS
    from common import StudyModel
    from recipe import Recipe
    from training import Fit
    from transformer import SmallTransformer

    generated = data.generated_corpus()
    words = batches.WordVocabulary.build(generated.train.texts)
    train = batches.encode(generated.train, words.encode, 64)
    model = StudyModel(SmallTransformer(8000, 64), ARMS["dual_engram"], 2, 32).train()
    fit = Fit(model, Recipe(8, 3e-4, 0.01, 64, 1.0, "cosine-epoch"), train, train, 0)
    fit.step(train.batch(np.arange(64)))
    store, steps, saves, loads = CheckpointStore(folder, {}), [], [], []
    for step in range(5):
        started = time.perf_counter()
        fit.step(train.batch(np.arange(64)))
        steps.append(time.perf_counter() - started)
        started = time.perf_counter()
        store.save(step, *fit.state())
        saves.append(time.perf_counter() - started)
        started = time.perf_counter()
        fit.restore(*store.load())
        loads.append(time.perf_counter() - started)
    bytes_taken = sum(path.stat().st_size for path in folder.glob("00000004.*"))
    return {
        "save_seconds": float(np.median(saves)),
        "load_seconds": float(np.median(loads)),
        "step_seconds": float(np.median(steps)),
        "bytes": bytes_taken,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    prepare_cpu(1)
    rng = random.Random(options.seed)
    weights = [weight for weight, _ in FAULTS.values()]
    drawn = rng.choices(list(FAULTS), weights, k=options.faults)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        paths = kinds(Path(scratch))
        counts = {(path, name): Counter() for path in paths for name in FAULTS}
        wanted = {}
        for path, kind in paths.items():
            run = Trial(kind, Path(scratch) / path)
            assert run.finish() == 0, run.said
            wanted[path] = outcome_of(run.folder)
        for number, name in enumerate(drawn):
            path = list(paths)[number % len(paths)]
            run = Trial(paths[path], Path(scratch) / str(number))
            try:
                chance = random.Random(f"{options.seed}/{number}")
                result = outcome_after(name, run, chance, wanted[path])
            except Exception as error:  # a fault that did not do what it says counts against us
                print(f"{number}: {type(error).__name__}: {error}", flush=True)
                result = "silently_wrong"
            counts[path, name][result] += 1
            seconds = time.monotonic() - started
            told = f"\n{run.said}" if result in OUTCOMES[2:] else ""
            print(
                f"{number} of {options.faults}, {seconds:.0f} s: {path}, {name}: {result}{told}",
                flush=True,
            )
            shutil.rmtree(run.folder, ignore_errors=True)
        costs = checkpoint_costs(Path(scratch) / "costs")
    facts = provenance(torch.device("cpu"))
    result = {
        "machine": facts["hardware"]["processor"],
        "date": datetime.now(UTC).date().isoformat(),
        "commit": facts["commit"],
        "dirty": facts["dirty"],
        "versions": facts["versions"],
        "seed": options.seed,
        "seconds": time.monotonic() - started,
        "checkpoint": costs,
        "rows": [
            {"path": path, "fault": name, "injected": sum(c.values())}
            | {outcome: c[outcome] for outcome in OUTCOMES}
            for (path, name), c in counts.items()
        ],
    }
    for row in result["rows"]:
        print(" ".join(f"{value!s:>15}" for value in row.values()))
    options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
