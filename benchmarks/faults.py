"""Do runs survive? Injects seeded faults into small runs, reruns each, and compares the bytes.

    python benchmarks/faults.py [--faults 200] [--seed 0] [--costs]

Every trial forks a small run of one of two paths, in turn: `experiment.py` at a small width, and
`experiment_7b.py` (NF4, LoRA) on a tiny backbone of random weights; torch is imported once. It
injects one fault, reruns the same command and compares rows (without timings), features, weights
and adapters with those of a run that was left alone. A rerun that refuses with a message is told
to --restart. After out of memory the parts of a step are smaller, which is another sum: its weights
are compared to 1e-2, everything else bit for bit. Also times a checkpoint and a rerun that goes on
from it; --costs measures that alone, into the file that is there. Writes benchmarks/faults.json.
About 12 minutes of one core; --costs half a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
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

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import evaluation
import training
from benchmarks.trials import Trial, epochs_done, kinds, near, outcome_of, same, unfinished
from checkpoints import CheckpointStore
from recipe import prepare_cpu
from results import provenance

# the small study: SST-2's texts by 64, epochs, arms of all seeds
TEXTS, EPOCHS, RUNS = 67_349, 8, 3 * 5
STEPS = -(-TEXTS // 64)  # an epoch
OUTCOMES = ("recovered", "refused", "silently_wrong", "lost_epochs")


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
        del content["manifest_sha256"]  # with it this would be told as damage
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
    step, save = float(np.median(steps)), float(np.median(saves))
    resume = resume_seconds(folder)
    return {
        "save_seconds": save,
        "load_seconds": float(np.median(loads)),
        "step_seconds": step,
        "bytes": bytes_taken,
        "resume_seconds": resume,
        "saving_share": save / (STEPS * step),
        "resume_share": resume / (RUNS * EPOCHS * STEPS * step),
    }


def resume_seconds(folder: Path) -> float:
    """Of a rerun that reads as many texts as SST-2 has, loads a checkpoint and is stopped."""
    for split, rows in (("train", TEXTS), ("validation", 872)):
        made = data.generated_corpus(rows, 2).train
        lines = [f"{text}\t{label}" for text, label in zip(made.texts, made.labels, strict=True)]
        (folder / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    script = Path(__file__).parents[1] / "experiment.py"
    words = ["--data", folder, "--arms", "dual_engram", "--seeds", "0", "--threads", "1"]
    words += ["--out", folder / "out", "--stop-after", "0.001s"]
    for _ in range(2):
        started = time.perf_counter()
        command = [sys.executable, script, *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - started
    assert "going on from step 0" in done.stdout, done.stdout
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--costs", action="store_true", help="measure only what it costs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    prepare_cpu(1)
    if options.costs:
        found = json.loads(options.out.read_text())
        with tempfile.TemporaryDirectory() as scratch:
            found["checkpoint"] = checkpoint_costs(Path(scratch))
        print(found["checkpoint"])
        options.out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        return
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
