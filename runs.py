"""One arm of one seed: trained or gone on with, evaluated, and its row and features made."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import tuning
from arms import ARMS, MAIN_ARMS, Arm
from checkpoints import CheckpointStore
from cli import StopSignals
from clustering import adjusted_rand, cluster_accuracy, engram_metrics, kmeans, nearest_centroid
from common import StudyModel, UserError
from evaluation import Evaluation, evaluate_modes
from files import plain
from flags import StudyConfig
from gradients import Audit
from recipe import derive_seed, seed_everything
from reporter import Reporter
from results import ResultsFolder, commit
from scores import MODES
from training import Fit, Interrupted
from workers import Trained, finished

if TYPE_CHECKING:
    from study import Study

FEATURES = ("pooled", "intermediate", "engram", "logits")
# control A4's arms; not the two-label test's, whose conditions have names of their own. Of a deep
# backbone the states of every layer outweigh all other features
LAYERED = (*MAIN_ARMS, "untrained")
TRAIN_SAMPLE = 2048  # training texts the train-fitted k-means sees


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


def train_one(
    study: Study, folder: ResultsFolder, arm: Arm, seed: int, stop: StopSignals
) -> Trained:
    """Train (or go on with) one arm of one seed; its row of results.json and its features."""
    place = f"{arm.name}-{seed}"
    if arm.tuned:
        rate = folder.results["tuning"][arm.name]["chosen"]
        study = _at_rate(study, rate)
        place += f"-at-{rate:g}"  # not what was begun at a rate that is no longer the best
    with _fitted(study, folder, arm, seed, stop, place) as (fit, initial):
        model = fit.model
        if study.save_model is not None:
            study.save_model(model, folder.folder / "adapters" / f"{arm.name}-{seed}")
        names = (*FEATURES, "layers") if arm.name in LAYERED else FEATURES
        zero = fit.evaluate(study.evaluation, collect=names, check_stop=stop.check)
        features = _rounded(zero.features) | initial | _compressor_arrays(model, "")
        row = _row(study, model, fit, zero, features, seed, stop)
    return row, features


def _at_rate(study: Study, rate: float) -> Study:
    return dataclasses.replace(study, recipe=dataclasses.replace(study.recipe, lr=rate))


@contextlib.contextmanager
def _fitted(
    study: Study, folder: ResultsFolder, arm: Arm, seed: int, stop: StopSignals, place: str
) -> Iterator[tuple[Fit, dict[str, np.ndarray]]]:
    """Train (or go on with) an arm; its checkpoints, in `place`, go once the caller is done."""
    seed_everything(seed, "initialisation")
    classes = len(study.dataset.class_names)
    model = StudyModel(study.make_backbone(arm), arm, classes, study.config.engram_dim)
    model.to(study.device)
    initial = _compressor_arrays(model, "0")
    fit = Fit(model, study.recipe, study.train, study.evaluation, seed)
    fit.audit = Audit(study.config.audit) if study.config.audit else None
    environment = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": study.device.type,
    }
    store = CheckpointStore(
        folder.folder / "checkpoints" / place,
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
    try:
        with Reporter(folder, fit, plain=study.config.jobs > 1) as reporter:
            fit.run(lambda f: store.save(f.step_number, *f.state()), reporter, stop.check)
        yield fit, initial
    except Interrupted as stopped:
        stopped.saved = store.newest
        if stopped.saved is not None:
            folder.log(f"{arm.name}, seed {seed}: saved at step {stopped.saved}")
        raise
    store.finished()


def _trials(config: StudyConfig) -> dict[str, tuple[str, float]]:
    return {
        tuning.trial_name(name, rate): (name, rate)
        for name in config.arms
        if ARMS[name].tuned
        for rate in config.lr_grid
    }


def untried(config: StudyConfig, folder: ResultsFolder) -> list[tuple[int, str]]:
    """The (seed, trial) of every tuned arm and rate that the folder does not know yet."""
    known = folder.results.get("tuning", {})

    def tried(name: str, rate: float) -> dict[str, float]:
        return known.get(name, {}).get("trials", {}).get(f"{rate:g}", {})

    return [
        (seed, trial)
        for seed in range(config.tune_seeds)
        for trial, (name, rate) in _trials(config).items()
        if str(seed) not in tried(name, rate)
    ]


def tune(study: Study, folder: ResultsFolder, stop: StopSignals) -> None:
    """Try what is untried, and write down every tuned arm's best rate.

    Rates tried earlier count too, so a longer --lr-grid goes on where a shorter one ended; rows
    trained at a rate that is no longer the best are dropped, aloud.
    """
    config = study.config
    names = [name for name in config.arms if ARMS[name].tuned]
    if not names:
        return
    known = folder.results.setdefault("tuning", {})
    if todo := untried(config, folder):
        _try(study, folder, todo, stop)
    for name in names:
        found = known[name]
        rates = [float(rate) for rate in found["trials"]]
        chosen = found["chosen"] = tuning.choose(found["trials"])
        edge = chosen in (min(rates), max(rates))
        at = "; the edge of --lr-grid: a rate beyond it may be better" if edge else ""
        folder.log(f"{name}: rate {chosen:g} is the best on {found['dev_rows']:,} dev texts{at}")
        for seed, row in list(folder.results["rows"].get(name, {}).items()):
            if row["learning_rate"] != chosen:
                folder.log(f"{name}, seed {seed}: was trained at {row['learning_rate']:g}, dropped")
                folder.drop(name, seed)
    folder.write()


def _try(study: Study, folder: ResultsFolder, todo: list, stop: StopSignals) -> None:
    """Train trials on all but the dev split of the training texts, and keep their accuracy on it.

    Raises:
        UserError: the texts give no dev split with every class.
    """
    config, trials, known = study.config, _trials(study.config), folder.results["tuning"]
    texts, classes = study.dataset.train.texts, len(study.dataset.class_names)
    out = tuning.held_out(texts, derive_seed(0, "dev split"))
    rows, dev = np.flatnonzero(~out), np.flatnonzero(out)
    if len(np.unique(study.dataset.train.labels[dev])) < classes:
        raise UserError(
            f"{trials[todo[0][1]][0]} chooses its rate on a dev split, and {len(texts)} training "
            "texts give none with every class. Leave this arm out, or give more texts."
        )
    part = dataclasses.replace(
        study, train=study.train.select(rows), evaluation=study.train.select(dev)
    )

    def train(seed: int, trial: str) -> Trained:
        name, rate = trials[trial]
        arm = dataclasses.replace(arm_for(config, name), name=trial)
        with _fitted(_at_rate(part, rate), folder, arm, seed, stop, f"{trial}-{seed}") as (fit, _):
            return {"accuracy": fit.progress.epochs[-1]["eval_accuracy"]}, {}

    for (seed, trial), (row, _) in finished(train, todo, config, stop):
        name, rate = trials[trial]
        found = known.setdefault(name, {"dev_rows": len(dev), "trials": {}})
        found["trials"].setdefault(f"{rate:g}", {})[str(seed)] = row["accuracy"]
        folder.write()
        folder.log(f"{trial}, seed {seed}: dev accuracy {row['accuracy']:.4f}")


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
    stop: StopSignals,
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
    if model.arm.tuned:
        row["learning_rate"] = fit.recipe.lr
    if fit.progress.audits:
        row["audits"] = fit.progress.audits
    if model.arm.has_prefix:
        score = partial(fit.evaluate, study.evaluation, check_stop=stop.check)
        row["final"]["modes"], predicted = evaluate_modes(score, zero, seed)
        features |= {f"{MODES}{mode}": classes for mode, classes in predicted.items()}
    if model.compressor is not None:
        order = np.random.default_rng(derive_seed(0, "train sample")).permutation(len(study.train))
        sample = study.train.select(np.sort(order[:TRAIN_SAMPLE]))
        seen = fit.evaluate(sample, collect=("engram",), check_stop=stop.check)
        train = seen.features["engram"]
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
