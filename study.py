"""A results folder and the loop that fills it: every seed, every arm, one row each."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

import cli
from batches import Encoded
from checkpoints import CheckpointStore, differences
from cli import FREE, StopSignals, StudyConfig
from common import (
    ARMS,
    Arm,
    StudyModel,
    UserError,
    adjusted_rand,
    cluster_accuracy,
    engram_metrics,
    kmeans,
    nearest_centroid,
)
from data import Dataset
from files import write_atomic, write_json
from training import (
    Evaluation,
    Fit,
    Recipe,
    derive_seed,
    evaluate,
    evaluate_modes,
    seed_everything,
)

SCHEMA_VERSION = 1
FEATURES = ("pooled", "intermediate", "engram", "logits", "layers")
TRAIN_SAMPLE = 2048  # training texts the train-fitted k-means sees
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Study:
    """What a script hands over: its data encoded, its backbone, its recipe.

    `make_backbone(arm)` builds a backbone from torch's seeded default generator.
    """

    script: str
    backbone: str
    config: StudyConfig
    recipe: Recipe
    dataset: Dataset
    train: Encoded
    evaluation: Encoded
    make_backbone: Callable[[Arm], torch.nn.Module]
    device: torch.device


class ResultsFolder:
    """results.json, features.npz, log.txt and checkpoints/ of one run; one process at a time.

    Args:
        folder: made if missing.
        identity: JSON of everything that makes it this run; another one in the folder is refused.
        defaults: of identity's keys, for results older than a key.
        restart: discard what the folder holds.
    Raises:
        UserError: not writable, in use, or holding another run.
    """

    def __init__(self, folder: Path, identity: dict, defaults: dict, restart: bool) -> None:
        self.folder, self.identity, self.defaults = folder, identity, defaults
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(folder / ".lock")
            self.lock.acquire(timeout=0)
        except Timeout:
            holder = (
                (folder / ".lock.json").read_text() if (folder / ".lock.json").exists() else "?"
            )
            raise UserError(
                f"{folder} is in use by {holder.strip()}. Wait for it, or use another --out."
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot write to {folder} ({error.strerror}). Pass a writable --out."
            ) from None
        try:
            started = datetime.now(UTC).isoformat(timespec="seconds")
            holder = f"process {os.getpid()} on {platform.node()} since {started}"
            write_atomic(folder / ".lock.json", holder.encode())
            self.results = self._read(restart)
            self.features = self._read_features()
            self.log_file = (folder / "log.txt").open("a", buffering=1)
        except OSError as error:
            self.lock.release()
            raise UserError(
                f"cannot write to {folder} ({error.strerror}). Pass a writable --out."
            ) from None
        except BaseException:
            self.lock.release()
            raise

    def __enter__(self) -> ResultsFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.log_file.close()
        self.lock.release()

    @property
    def path(self) -> Path:
        return self.folder / "results.json"

    @property
    def fingerprint(self) -> str:
        """sha256 of the identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def _read(self, restart: bool) -> dict[str, Any]:
        for stray in self.folder.glob(".*.tmp"):
            stray.unlink(missing_ok=True)
        if restart:
            print(f"--restart: discarding the run in {self.folder}", file=sys.stderr)
            for path in (self.path, self.folder / "features.npz"):
                path.unlink(missing_ok=True)
            for path in sorted((self.folder / "checkpoints").glob("*/*")):
                path.unlink()
        if not self.path.exists():
            return {"rows": {}}
        try:
            results = json.loads(self.path.read_text())
            held = results["identity"]
            results["rows"], results["provenance"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path} is not a whole results file ({error}). Put a good copy back, or pass "
                "--restart to discard it."
            ) from None
        changed = differences(held, self.identity, self.defaults)
        if changed:
            raise UserError(
                f"{self.folder} holds another run ({'; '.join(changed)}). "
                "Use another --out, or pass --restart to discard it."
            )
        return results

    def _read_features(self) -> dict[str, np.ndarray]:
        path = self.folder / "features.npz"
        if not path.exists():
            # rows without features cannot be analysed: train them again (from their checkpoints)
            self.results["rows"] = {}
            return {}
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (BadZipFile, ValueError, EOFError, KeyError) as error:
            raise UserError(
                f"{path} is damaged ({error}). Put a good copy back, or delete it: its arms are "
                "then read again from their checkpoints."
            ) from None

    def has(self, arm: str, seed: int) -> bool:
        return (
            str(seed) in self.results["rows"].get(arm, {})
            and f"{arm}/{seed}/pooled" in self.features
        )

    def add(self, arm: str, seed: int, row: dict, features: Mapping[str, np.ndarray]) -> None:
        """Write one finished row; features first, so a row in results.json means both are there."""
        self.features.update({f"{arm}/{seed}/{name}": value for name, value in features.items()})
        self.write_features()
        self.results["rows"].setdefault(arm, {})[str(seed)] = row
        self.write()

    def write(self) -> None:
        write_json(self.path, self.results)

    def write_features(self) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **dict(sorted(self.features.items())))
        write_atomic(self.folder / "features.npz", buffer.getvalue())

    def log(self, line: str) -> None:
        """Print a line and keep it in log.txt."""
        self.log_file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {line}\n")
        tqdm.write(line)


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def provenance(device: torch.device) -> dict[str, Any]:
    """Where numbers come from: commit, dirty code, argv, versions, hardware, start."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    changed = _git("status", "--porcelain", "--", "*.py", "requirements.txt")
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    hardware = {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "argv": sys.argv,
        "versions": versions,
        "hardware": hardware,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_seconds": 0.0,
    }


def arm_for(config: StudyConfig, name: str) -> Arm:
    """The named arm with the command line's --feedback, --tap and --lm-weight applied."""
    arm = ARMS[name]
    if arm.feedback is not None:
        arm = dataclasses.replace(
            arm, feedback=config.feedback or arm.feedback, tap=config.tap or arm.tap
        )
    if config.lm_weight is not None and arm.cls_weight and arm.lm_weight:
        weights = {"lm_weight": config.lm_weight, "cls_weight": 1 - config.lm_weight}
        arm = dataclasses.replace(arm, **weights)
    return arm


def identity_of(study: Study) -> dict[str, Any]:
    """What must be equal for a folder's rows to be of one run: config, recipe, data, backbone."""
    config = {k: v for k, v in asdict(study.config).items() if k not in FREE}
    return {
        **config,
        **{f"recipe.{k}": v for k, v in asdict(study.recipe).items()},
        "backbone": study.backbone,
        "data": study.dataset.name,
        "data_sha256": study.dataset.sha256,
    }


def run_study(study: Study, out: Path, seeds: list[int], stop: StopSignals) -> Path:
    """Train every (seed, arm) that the folder does not hold yet, then analyse and draw.

    Seeds are the outer loop, so a part of a run is paired. No arm's numbers depend on another
    having run.

    Returns:
        The results folder.
    """
    config = study.config
    identity = identity_of(study)
    defaults = cli.defaults_of(type(config)) | {
        f"recipe.{f.name}": f.default for f in dataclasses.fields(Recipe)
    }
    restart = config.restart or not config.resume
    with ResultsFolder(out, identity, defaults, restart) as folder:
        for note in study.dataset.notes:
            folder.log(note)
        started = time.monotonic()
        before = folder.results.get("provenance", {}).get("wall_seconds", 0.0)
        todo = [(s, a) for s in seeds for a in config.arms if not folder.has(a, s)]
        kept = len(seeds) * len(config.arms) - len(todo)
        if kept:
            folder.log(
                f"{kept} of {kept + len(todo)} (arm, seed) are in {folder.path} already; kept"
            )
        if todo or "provenance" not in folder.results:
            folder.results |= _header(study, folder)
        folder.features["labels"] = study.evaluation.labels.numpy()
        folder.features["lengths"] = study.evaluation.lengths
        for seed, name in todo:
            row, features = _train_one(study, folder, arm_for(config, name), seed, stop)
            folder.results["provenance"]["wall_seconds"] = before + time.monotonic() - started
            folder.add(name, seed, row, features)
            folder.log(_summary(name, seed, row))
        _analyse_and_draw(folder)
    return out


def _header(study: Study, folder: ResultsFolder) -> dict[str, Any]:
    dataset = study.dataset
    return {
        "schema_version": SCHEMA_VERSION,
        "experiment": study.script,
        "backbone": study.backbone,
        "dataset": {
            "name": dataset.name,
            "slug": dataset.slug,
            "source": dataset.source,
            "own": dataset.own,
            "train_rows": len(dataset.train.texts),
            "eval_rows": len(dataset.evaluation.texts),
            "eval_split": dataset.evaluation.name,
            "classes": list(dataset.class_names),
            "sha256": dataset.sha256,
            "notes": list(dataset.notes),
            "texts_cut": {"train": study.train.truncated, "eval": study.evaluation.truncated},
        },
        "config": asdict(study.config),
        "recipe": asdict(study.recipe),
        "identity": folder.identity,
        "fingerprint": folder.fingerprint,
        "provenance": provenance(study.device),
        "rows": folder.results["rows"],
        "analysis": folder.results.get("analysis", {"controls": [], "contrasts": [], "claims": []}),
    }


def _train_one(
    study: Study, folder: ResultsFolder, arm: Arm, seed: int, stop: StopSignals
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Train (or go on with) one arm of one seed; its row of results.json and its features."""
    seed_everything(seed, "initialisation")
    classes = len(study.dataset.class_names)
    model = StudyModel(study.make_backbone(arm), arm, classes, study.config.engram_dim)
    model.to(study.device)
    initial = _compressor_arrays(model, "0")
    fit = Fit(model, study.recipe, study.train, study.evaluation, seed)
    environment = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": study.device.type,
    }
    store = CheckpointStore(
        folder.folder / "checkpoints" / f"{arm.name}-{seed}",
        folder.identity | environment | {"arm": asdict(arm), "seed": seed},
        folder.defaults,
    )
    saved = store.load()
    if saved is None:
        count = sum(p.numel() for p in fit.parameters.values())
        name = f"{arm.name}, seed {seed}"
        folder.log(f"{name}: {count:,} trained parameters, {fit.total_steps} steps")
    else:
        fit.restore(*saved)
        folder.log(
            f"{arm.name}, seed {seed}: going on from step {fit.step_number} of {fit.total_steps}"
        )
    with _Reporter(folder, fit) as reporter:
        fit.run(lambda f: store.save(f.step_number, *f.state()), reporter, stop.check)
    zero = evaluate(model, study.evaluation, study.recipe, collect=FEATURES, check_stop=stop.check)
    features = _rounded(zero.features) | initial | _compressor_arrays(model, "")
    row = _row(study, model, fit, zero, features, seed)
    store.finished()
    return row, features


def _rounded(features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As stored: float16, but logits float32, so that every argmax is exact."""
    return {k: v if k == "logits" else v.astype(np.float16) for k, v in features.items()}


def _compressor_arrays(model: StudyModel, suffix: str) -> dict[str, np.ndarray]:
    if model.compressor is None:
        return {}
    linear = model.compressor.linear
    arrays = {"W": linear.weight, "b": linear.bias}
    return {k + suffix: v.detach().float().cpu().numpy().copy() for k, v in arrays.items()}


def _row(
    study: Study,
    model: StudyModel,
    fit: Fit,
    zero: Evaluation,
    features: dict[str, np.ndarray],
    seed: int,
) -> dict[str, Any]:
    """Score what is stored, so that the stored features give every number again."""
    labels = study.evaluation.labels.numpy()
    predictions = features["logits"].argmax(1)
    row = {
        "parameters_trainable": sum(p.numel() for p in fit.parameters.values()),
        "parameters_total": sum(p.numel() for p in model.parameters()),
        "epochs": fit.progress.epochs,
        "final": zero.scores()
        | {"predictions_ari": adjusted_rand(labels, predictions), "modes": {}},
        "engram": None,
    }
    if model.arm.has_prefix:
        row["final"]["modes"] = evaluate_modes(model, study.evaluation, study.recipe, zero, seed)
    if model.compressor is not None:
        order = np.random.default_rng(derive_seed(0, "train sample")).permutation(len(study.train))
        sample = study.train.select(np.sort(order[:TRAIN_SAMPLE]))
        train = evaluate(model, sample, study.recipe, collect=("engram",)).features["engram"]
        classes = len(study.dataset.class_names)
        features["train_centroids"] = kmeans(train, classes, seed).centroids.astype(np.float32)
        assigned = nearest_centroid(features["engram"], features["train_centroids"])
        row["engram"] = asdict(engram_metrics(features["engram"], labels, predictions, seed)) | {
            "train_fitted": {
                "ari": adjusted_rand(labels, assigned),
                "cluster_accuracy": cluster_accuracy(labels, assigned).accuracy,
            }
        }
    return row


class _Reporter:
    """A progress bar with ETA on a terminal; on anything else a plain line every half minute."""

    def __init__(self, folder: ResultsFolder, fit: Fit) -> None:
        self.folder, self.said = folder, time.monotonic()
        self.name = f"{fit.model.arm.name}, seed {fit.seed}"
        self.first, self.started = fit.step_number, time.monotonic()
        self.bar = tqdm(
            total=fit.total_steps,
            initial=fit.step_number,
            desc=self.name,
            disable=None,  # off unless stderr is a terminal
            unit="step",
            dynamic_ncols=True,
        )

    def __enter__(self) -> _Reporter:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def __call__(self, fit: Fit, event: str) -> None:
        if event == "step":
            self.bar.update()
            now = time.monotonic()
            if self.bar.disable and now - self.said > 30:
                self.said = now
                done = fit.step_number - self.first
                left = (fit.total_steps - fit.step_number) * (now - self.started) / done
                loss = fit.progress.totals.cls / max(1, fit.progress.totals.texts)
                self.folder.log(
                    f"{self.name}: step {fit.step_number} of {fit.total_steps}, "
                    f"classification loss {loss:.4f}, about {left / 60:.1f} min left in this arm"
                )
            return
        last = fit.progress.epochs[-1]
        lm = "" if last["eval_lm_loss"] is None else f", LM loss {last['eval_lm_loss']:.3f}"
        self.folder.log(
            f"{self.name}: epoch {last['epoch']} of {fit.epochs}, "
            f"train {last['train_accuracy']:.4f}, "
            f"eval {last['eval_accuracy']:.4f}{lm}, {last['train_seconds']:.1f} s"
        )


def _summary(arm: str, seed: int, row: dict[str, Any]) -> str:
    text = f"{arm}, seed {seed}: accuracy {row['final']['accuracy']:.4f}"
    if row["engram"]:
        text += f", engram ARI {row['engram']['ari']:.3f}"
        text += f" (predictions {row['final']['predictions_ari']:.3f})"
    return text


def _analyse_and_draw(folder: ResultsFolder) -> None:
    """The numbers are safe by now: a figure that cannot be drawn is a warning, not a loss."""
    import analysis

    import report

    started = time.monotonic()
    folder.results["analysis"] = analysis.analyse(folder.features, folder.results)
    folder.write()
    folder.log(f"analysis: {time.monotonic() - started:.1f} s")
    started = time.monotonic()
    try:
        drawn = report.draw(folder.folder)
    except Exception as error:  # any plotting failure: fonts, a single class, too few points
        folder.log(
            f"warning: figures not drawn ({type(error).__name__}: {error}); "
            f"the numbers are in {folder.path}; draw with python report.py {folder.folder}"
        )
        return
    folder.log(
        f"figures: {', '.join(path.name for path in drawn)} ({time.monotonic() - started:.1f} s)"
    )
