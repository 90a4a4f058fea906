"""The loop that fills a results folder: every seed, every arm, one row each."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import cli
from arms import ARMS, Arm
from batches import Encoded
from checkpoints import CheckpointStore
from cli import FREE, StopSignals, StudyConfig
from clustering import adjusted_rand, cluster_accuracy, engram_metrics, kmeans, nearest_centroid
from common import StudyModel, UserError
from data import Dataset
from evaluation import Evaluation, evaluate_modes
from files import plain
from results import ResultsFolder, commit, provenance
from training import Fit, Recipe, derive_seed, seed_everything
from workers import Trained, finished

SCHEMA_VERSION = 1
FEATURES = ("pooled", "intermediate", "engram", "logits", "layers")
HEARTBEAT = 30.0  # seconds between lines that tell where training is
TRAIN_SAMPLE = 2048  # training texts the train-fitted k-means sees


@dataclass(frozen=True)
class Study:
    """What a script hands over: its data encoded, its backbone, its recipe.

    `make_backbone(arm)` builds a backbone from torch's seeded default generator. A pretrained one
    adds what makes its weights its own to the run's identity, and `save_model(model, folder)`.
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
    backbone_identity: Mapping[str, Any] = field(default_factory=dict)
    save_model: Callable[[StudyModel, Path], None] | None = None


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
        **{f"backbone.{k}": v for k, v in study.backbone_identity.items()},
        "data": study.dataset.name,
        "data_sha256": study.dataset.sha256,
    }


def departures(config: StudyConfig) -> list[str]:
    """The flags that are off their defaults and make it another run, for tables and figures."""
    usual = cli.defaults_of(type(config))
    return [
        f"{name.replace('_', '-')} {value}"
        for name, value in asdict(config).items()
        if name not in (*FREE, "smoke") and value != usual[name]
    ]


def identity_defaults(config: StudyConfig) -> dict[str, Any]:
    """Defaults of an identity's keys, for results older than a key."""
    recipe = {f"recipe.{f.name}": f.default for f in dataclasses.fields(Recipe)}
    return cli.defaults_of(type(config)) | recipe


def run_study(study: Study, out: Path, seeds: list[int], stop: StopSignals) -> Path:
    """Train every (seed, arm) that the folder does not hold yet, then analyse and draw.

    Seeds are the outer loop, so a part of a run is paired. No arm's numbers depend on another
    having run.

    Returns:
        The results folder.
    """
    config = study.config
    identity = identity_of(study)
    defaults = identity_defaults(config)
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
            write_header(study, folder)
        folder.results["departures"] = departures(config)
        given = {"labels": study.evaluation.labels.numpy(), "lengths": study.evaluation.lengths}
        if not given.keys() <= folder.features.keys():
            folder.features.update(given)
            folder.write_features()

        def train(seed: int, name: str) -> Trained:
            return train_one(study, folder, arm_for(config, name), seed, stop)

        for (seed, name), (row, features) in finished(train, todo, config, stop):
            folder.results["provenance"]["wall_seconds"] = before + time.monotonic() - started
            folder.add(name, seed, row, features)
            folder.log(_summary(name, seed, row))
        _analyse_and_draw(folder)
    return out


def write_header(study: Study, folder: ResultsFolder) -> None:
    """Set what results.json says of a run beside its rows; keep which commands came before."""
    earlier = folder.results.get("provenance", {})
    folder.results |= _header(study, folder)
    if earlier:
        brief = {key: earlier[key] for key in ("commit", "dirty", "argv", "started")}
        folder.results["provenance"]["earlier"] = [*earlier.get("earlier", []), brief]


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


def train_one(
    study: Study, folder: ResultsFolder, arm: Arm, seed: int, stop: StopSignals
) -> Trained:
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
    store.require_room(fit.checkpoint_bytes * min(study.config.jobs, len(study.config.arms)))
    saved = store.load()
    if saved is None:
        count = sum(p.numel() for p in fit.parameters.values())
        name = f"{arm.name}, seed {seed}"
        folder.log(f"{name}: {count:,} trained parameters, {fit.total_steps} steps")
    else:
        try:
            fit.restore(*saved)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(
                f"{store.folder} holds a checkpoint that does not fit ({error}). "
                "Use another --out, or pass --restart to discard it."
            ) from None
        folder.log(
            f"{arm.name}, seed {seed}: going on from step {fit.step_number} of {fit.total_steps}"
        )
    with _Reporter(folder, fit, plain=study.config.jobs > 1) as reporter:
        fit.run(lambda f: store.save(f.step_number, *f.state()), reporter, stop.check)
    if study.save_model is not None:
        study.save_model(model, folder.folder / "adapters" / f"{arm.name}-{seed}")
    zero = fit.evaluate(study.evaluation, collect=FEATURES, check_stop=stop.check)
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
        "commit": commit(),
        "parameters_trainable": sum(p.numel() for p in fit.parameters.values()),
        # a byte of 4-bit weights holds two parameters and counts as one
        "parameters_total": sum(p.numel() for p in model.parameters())
        + getattr(model.backbone, "parameters_packed_away", 0),
        "epochs": fit.progress.epochs,
        "memory": fit.progress.memory,  # limits lowered because memory ran out
        "final": zero.scores()
        | {"predictions_ari": adjusted_rand(labels, predictions), "modes": {}},
        "engram": None,
    }
    if model.arm.has_prefix:
        row["final"]["modes"] = evaluate_modes(model, study.evaluation, fit.recipe, zero, seed)
    if model.compressor is not None:
        order = np.random.default_rng(derive_seed(0, "train sample")).permutation(len(study.train))
        sample = study.train.select(np.sort(order[:TRAIN_SAMPLE]))
        train = fit.evaluate(sample, collect=("engram",)).features["engram"]
        classes = len(study.dataset.class_names)
        features["train_centroids"] = kmeans(train, classes, seed).centroids.astype(np.float32)
        assigned = nearest_centroid(features["engram"], features["train_centroids"])
        scores = engram_metrics(features["engram"], labels, predictions, seed)
        # null where it has no value: a class without a pair of items has no cosine
        row["engram"] = plain(asdict(scores)) | {
            "train_fitted": {
                "ari": adjusted_rand(labels, assigned),
                "cluster_accuracy": cluster_accuracy(labels, assigned).accuracy,
            }
        }
    return row


class _Reporter:
    """A line every half minute in log.txt, and on screen where no progress bar is."""

    def __init__(self, folder: ResultsFolder, fit: Fit, plain: bool) -> None:
        self.folder, self.said = folder, time.monotonic()
        self.name = f"{fit.model.arm.name}, seed {fit.seed}"
        self.first, self.started = fit.step_number, time.monotonic()
        self.lowered = len(fit.progress.memory)
        self.bar = tqdm(
            total=fit.total_steps,
            initial=fit.step_number,
            desc=self.name,
            disable=plain or None,  # None: off unless stderr is a terminal
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
            for lowered in fit.progress.memory[self.lowered :]:
                self.folder.log(
                    f"{self.name}: out of memory at step {lowered['step']}; "
                    f"{lowered['limit']} is {lowered['tokens']} from here on"
                )
            self.lowered = len(fit.progress.memory)
            if now - self.said > HEARTBEAT:
                self.said = now
                done = fit.step_number - self.first
                left = (fit.total_steps - fit.step_number) * (now - self.started) / done
                loss = fit.progress.totals.cls / max(1, fit.progress.totals.texts)
                self.folder.log(
                    f"{self.name}: step {fit.step_number} of {fit.total_steps}, "
                    f"classification loss {loss:.4f}, rate "
                    f"{fit.optimizer.param_groups[0]['lr']:.3g}, "
                    f"about {left / 60:.1f} min left in this arm",
                    show=self.bar.disable,
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
    """The numbers are safe by now."""
    import analysis
    from schema import evidence_beside, read_study

    started = time.monotonic()
    published = read_study(folder.folder).published
    folder.results["analysis"] = analysis.analyse(
        folder.features,
        folder.results | {"evidence": evidence_beside(folder.folder)},
        published=published,
    )
    folder.write()
    folder.log(f"analysis: {time.monotonic() - started:.1f} s")
    draw_figures(folder)


def draw_figures(folder: ResultsFolder) -> None:
    """Draw a folder's figures; one that cannot be drawn is a warning, not a loss."""
    import report

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
