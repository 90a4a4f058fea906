"""Do runs survive? Injects seeded faults into small runs, reruns each, and compares the bytes.

    python benchmarks/faults.py [--faults 200] [--seed 0]

Every trial forks a run of `experiment.py --smoke` at a small width (torch imported once), injects
one fault, reruns the same command and compares rows (without timings), features and weights with
those of a run that was left alone. A rerun that refuses with a message is told to --restart. After
out of memory the parts of a step are smaller, which is another sum: its weights are compared
to 1e-2, everything else bit for bit. Also times a checkpoint against an epoch. Writes
benchmarks/faults.json.
"""

from __future__ import annotations

import argparse
import contextlib
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
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load as load_safetensors

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
import evaluation
import experiment
import study
import training
from checkpoints import CheckpointStore
from results import provenance

FORK = multiprocessing.get_context("fork")
COMMAND = ("--smoke", "--threads", "1", "--epochs", "3", "--batch-size", "32", "--width", "16",
           "--inner", "16", "--engram-dim", "4", "--arms", "dual", "dual_engram")  # fmt: skip
PAUSE = 0.01  # seconds a step is slowed, so that signals meet every moment of a run
OUTCOMES = ("recovered", "refused", "silently_wrong", "lost_epochs")


def fork_run(folder: Path, *extra: str, before: Callable[[], None] | None = None, slow=False):
    """Start the command in a child, its output in folder's .out file; `before` runs there first."""

    def work() -> None:
        os.setsid()
        to = os.open(f"{folder}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(to, 1)
        os.dup2(to, 2)
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
            code = cli.run(experiment.main, [*COMMAND, "--out", str(folder), *extra])
        os._exit(code)

    child = FORK.Process(target=work)
    child.start()
    return child


def finish(folder: Path, *extra: str, before: Callable[[], None] | None = None) -> int:
    child = fork_run(folder, *extra, before=before)
    child.join(120)
    return child.exitcode


def said(folder: Path) -> str:
    return Path(f"{folder}.out").read_text()


def outcome_of(folder: Path) -> tuple:
    """Rows without timings, features and weights of a finished run: what must be equal."""
    rows = json.loads((folder / "results.json").read_text())["rows"]
    for seeds in rows.values():
        for row in seeds.values():
            row.pop("commit"), row.pop("memory")
            for epoch in row["epochs"]:
                del epoch["train_seconds"]
    with np.load(folder / "features.npz") as arrays:
        features = {name: arrays[name].tobytes() for name in arrays.files}
    weights = {
        path.parent.name: max(path.parent.glob("*.safetensors")).read_bytes()
        for path in folder.glob("checkpoints/*/*.safetensors")
    }
    return rows, features, weights


def epochs_done(folder: Path) -> int:
    """Finished epochs that the folder's manifests and rows know of."""
    found = Counter()
    for path in folder.glob("checkpoints/*/*.json"):
        with contextlib.suppress(ValueError, KeyError):
            name = path.parent.name
            found[name] = max(found[name], json.loads(path.read_text())["progress"]["epoch"])
    return sum(found.values())


# a fault: breaks the run in `folder`, or its files, in a way that `rng` chooses


def killed(folder: Path, rng: random.Random, number: int) -> None:
    child = fork_run(folder, slow=True)
    child.join(rng.uniform(0.05, 1.5))
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, number)
    child.join()


def stopped_half_way(folder: Path, rng: random.Random) -> None:
    """A run stopped by SIGTERM after some of its epochs: files for a fault to damage."""
    child = fork_run(folder, slow=True)
    until = time.monotonic() + rng.uniform(0.4, 1.5)
    while time.monotonic() < until or not list(folder.glob("checkpoints/*/*.json")):
        time.sleep(0.01)
        if child.exitcode is not None:
            break
    if child.exitcode is None:
        os.kill(child.pid, signal.SIGTERM)
    child.join()


def damaged(folder: Path, rng: random.Random, damage: Callable[[bytearray], bytearray]) -> None:
    stopped_half_way(folder, rng)
    kinds = ("checkpoints/*/*.safetensors", "checkpoints/*/*.state", "checkpoints/*/*.json",
             "features.npz", "results.json")  # fmt: skip
    files = sorted(path for kind in kinds for path in folder.glob(kind))
    victim = rng.choice(files)
    victim.write_bytes(damage(bytearray(victim.read_bytes())))


def truncated(folder: Path, rng: random.Random) -> None:
    damaged(folder, rng, lambda content: content[: rng.randrange(len(content))])


def flipped(folder: Path, rng: random.Random) -> None:
    def flip(content: bytearray) -> bytearray:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return content

    damaged(folder, rng, flip)


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def foreign(folder: Path, rng: random.Random) -> None:
    """A pickle, a zip, or another arm's checkpoint where this run's was."""
    stopped_half_way(folder, rng)
    states = sorted(folder.glob("checkpoints/*/*.state"))
    victim = rng.choice(states)
    kind = rng.choice(("pickle", "zip", "arm"))
    if kind == "pickle":
        victim.write_bytes(pickle.dumps(_Touch(Path(f"{folder}.pwned"))))
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


def full_disk(folder: Path, rng: random.Random) -> None:
    limit = int(10 ** rng.uniform(3.5, 5))

    def before() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    finish(folder, before=before)


def not_finite(folder: Path, rng: random.Random) -> None:
    """The loss of one step is NaN: the run must stop before taking it."""
    number = rng.randrange(48)

    def before() -> None:
        weighted, count = training.weighted_loss, iter(range(10**6))
        training.weighted_loss = lambda *a: (
            weighted(*a) * (float("nan") if next(count) == number else 1.0)
        )

    code = finish(folder, before=before)
    assert code == 1 and "stopped:" in said(folder), said(folder)


def out_of_memory(folder: Path, rng: random.Random) -> None:
    """Some passes run out of memory, in training or evaluation; the run itself goes on."""
    failing = set(rng.sample(range(100), 3))
    places = (training, "run_part"), (training, "weighted_loss"), (evaluation, "batch_losses")
    module, name = rng.choice(places)

    def before() -> None:
        real, count = getattr(module, name), iter(range(10**6))

        def fail(*args):
            if next(count) in failing:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(*args)

        setattr(module, name, fail)

    assert finish(folder, before=before) == 0, said(folder)


FAULTS: dict[str, tuple[int, Callable[[Path, random.Random], None]]] = {
    "SIGKILL": (6, lambda folder, rng: killed(folder, rng, signal.SIGKILL)),
    "SIGTERM": (3, lambda folder, rng: killed(folder, rng, signal.SIGTERM)),
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


def trial(name: str, folder: Path, rng: random.Random, wanted: tuple) -> str:
    """Inject one fault and rerun: what became of it, a name of OUTCOMES."""
    FAULTS[name][1](folder, rng)
    done, saved = epochs_done(folder), unfinished(folder)
    code = finish(folder)
    if Path(f"{folder}.pwned").exists():
        return "silently_wrong"
    if code == 2 and ": error: " in said(folder):
        # the folder must be as it was, and --restart must be a way out of it
        lost = epochs_done(folder) < done
        again = finish(folder, "--restart")
        whole = again == 0 and outcome_of(folder) == wanted
        return "lost_epochs" if lost else "refused" if whole else "silently_wrong"
    if code != 0:
        print(said(folder), file=sys.stderr)
        return "silently_wrong"
    went_on = dict(re.findall(r"(\w+), seed 0: going on from step (\d+)", said(folder)))
    if name not in DAMAGING and any(int(went_on.get(a, -1)) < s for a, s in saved.items()):
        return "lost_epochs"
    found = outcome_of(folder)
    same = near(found, wanted) if name == "out of memory" else found == wanted
    return "recovered" if same else "silently_wrong"


def checkpoint_costs(folder: Path) -> dict[str, float]:
    """Seconds of a save, a load and a step of Model 3 at the published small size."""
    import batches
    import data
    from arms import ARMS
    from common import StudyModel
    from training import Fit, Recipe
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
    training.prepare_cpu(1)
    rng = random.Random(options.seed)
    weights = [weight for weight, _ in FAULTS.values()]
    drawn = rng.choices(list(FAULTS), weights, k=options.faults)
    counts = {name: Counter() for name in FAULTS}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "whole"
        assert finish(folder) == 0, said(folder)
        wanted = outcome_of(folder)
        for number, name in enumerate(drawn):
            folder = Path(scratch) / str(number)
            try:
                result = trial(name, folder, random.Random(f"{options.seed}/{number}"), wanted)
            except Exception as error:  # a fault that did not do what it says counts against us
                print(f"{number}: {type(error).__name__}: {error}", flush=True)
                result = "silently_wrong"
            counts[name][result] += 1
            seconds = time.monotonic() - started
            told = f"\n{said(folder)}" if result in OUTCOMES[2:] else ""
            print(
                f"{number} of {options.faults}, {seconds:.0f} s: {name}: {result}{told}", flush=True
            )
            shutil.rmtree(folder, ignore_errors=True)
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
            {"fault": name, "injected": sum(c.values()), **{o: c[o] for o in OUTCOMES}}
            for name, c in counts.items()
        ],
    }
    for row in result["rows"]:
        print(" ".join(f"{value!s:>15}" for value in row.values()))
    options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
