"""The loop that fills a results folder: every seed, every arm, one row each."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import flags
from arms import Arm
from batches import Encoded
from cli import StopSignals
from common import StudyModel
from data import Dataset
from flags import FREE, StudyConfig
from recipe import Recipe
from results import ResultsFolder, provenance
from runs import arm_for, train_one, tune, untried
from workers import Task, Trained, finished

SCHEMA_VERSION = 1


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
    usual = flags.defaults_of(type(config))
    return [
        f"{name.replace('_', '-')} {value}"
        for name, value in asdict(config).items()
        if name not in (*FREE, "smoke") and value != usual[name]
    ]


def identity_defaults(config: StudyConfig) -> dict[str, Any]:
    """Defaults of an identity's keys, for results older than a key."""
    recipe = {f"recipe.{f.name}": f.default for f in dataclasses.fields(Recipe)}
    return flags.defaults_of(type(config)) | recipe


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
        for note in notes_on(study):
            folder.log(note)
        started = time.monotonic()
        before = folder.results.get("provenance", {}).get("wall_seconds", 0.0)

        def missing() -> list[Task]:
            return [(s, a) for s in seeds for a in config.arms if not folder.has(a, s)]

        todo = missing()
        kept = len(seeds) * len(config.arms) - len(todo)
        if kept:
            folder.log(
                f"{kept} of {kept + len(todo)} (arm, seed) are in {folder.path} already; kept"
            )
        if todo or untried(config, folder) or "provenance" not in folder.results:
            write_header(study, folder)
        folder.results["departures"] = departures(config)
        given = {"labels": study.evaluation.labels.numpy(), "lengths": study.evaluation.lengths}
        if not given.keys() <= folder.features.keys():
            folder.features.update(given)
            folder.write_features()

        def train(seed: int, name: str) -> Trained:
            return train_one(study, folder, arm_for(config, name), seed, stop)

        tune(study, folder, stop)
        for (seed, name), (row, features) in finished(train, missing(), config, stop):
            folder.results["provenance"]["wall_seconds"] = before + time.monotonic() - started
            folder.add(name, seed, row, features)
            folder.log(_summary(name, seed, row))
        stop.check()
        _analyse_and_draw(folder)
    return out


def notes_on(study: Study) -> list[str]:
    """What a reader of the numbers must know: notes on the rows, and how many texts were cut."""
    dataset = study.dataset
    splits = (dataset.train, study.train), (dataset.evaluation, study.evaluation)
    cut = [
        f"{encoded.truncated:,} of {len(encoded):,} {split.name} texts cut at "
        f"{study.config.max_tokens} tokens"
        for split, encoded in splits
        if encoded.truncated
    ]
    return [*dataset.notes, *cut]


def write_header(study: Study, folder: ResultsFolder) -> None:
    """Set what results.json says of a run beside its rows; keep which commands came before."""
    earlier = folder.results.get("provenance", {})
    folder.results |= _header(study, folder)
    if earlier:
        brief = {k: earlier[k] for k in ("commit", "dirty", "argv", "started", "hardware")}
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
