"""Given two independent labels, which one does the engram follow, and what happens to the other?

    python two_labels.py [--sst2 ../sst2] [--agnews ../ag_news] [--seeds 0 1 2] [--smoke]

Each text is one SST-2 sentence and one AG News text: sentiment and topic, in 2 x 4 equal cells.
Trains the small transformer on sentiment, on topic, each with and without the next-token loss, on
the next token alone, and not at all; clusters each run's engram, classifier layer and pooled state
with k = 2 and k = 4 and scores them against both labels, with a linear probe of both, beside random
compressors. Writes results.json (with evidence for the claims), features.npz and figures to
results/two-labels/. The folder's provenance states the measured time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import arms
import batches
import cli
import data
import experiment
import flags
import pairs
from recipe import prepare_cpu
from results import ResultsFolder
from runs import arm_for, train_one
from study import (
    Study,
    departures,
    draw_figures,
    identity_defaults,
    identity_of,
    notes_on,
    write_header,
)
from workers import Trained, finished

RESULTS = experiment.RESULTS / "two-labels"
SMOKE = experiment.RESULTS / "smoke" / "two-labels"
SEEDS = [0, 1, 2]
ARMS = ["classification_engram", "dual_engram", "lm_only_engram", "untrained"]
FOREIGN = ("data", "text_column", "label_column", "labels", "label_offset")


@dataclass(frozen=True)
class Config(experiment.Config):
    """The small recipe; each text's two parts have half of --max-tokens words each."""

    sst2: str | None = flags.option(None, "SST-2: hub id, file or folder (default: the hub's)")
    agnews: str | None = flags.option(None, "AG News: hub id, file or folder (default: the hub's)")
    arms: list[str] = flags.option(
        ARMS, "conditions to train, on each label where they learn one", choices=tuple(arms.ARMS)
    )


def load_pairs(config: Config) -> pairs.Pairs:
    """The two-label data set of both sources; --limit-* count its texts, not the sources'."""
    if config.smoke:
        sources = [pairs.generated(task) for task in pairs.TASKS]
    else:
        given = {"encoding": config.encoding, "drop_empty": config.drop_empty}
        sources = [
            data.load(data.SST2, config.sst2, **given),
            data.load(data.AG_NEWS, config.agnews, **given),
        ]
    half = config.max_tokens // 2
    return pairs.build(*sources, half, config.limit_train, config.limit_eval)


def conditions_of(config: Config) -> dict[str, tuple[str, str]]:
    """(arm, task) by condition, TASK-ARM; an arm that learns no label runs once, as "neither"."""
    out = {}
    for name in config.arms:
        arm = arms.ARMS[name]
        if arm.has_prefix or arm.feedback == "unused":
            learns = arm.cls_weight > 0 and arm.train
            for task in pairs.TASKS if learns else ("neither",):
                out[f"{task}-{name}"] = name, task
            continue
        raise cli.UserError(f"--arms {name} has no engram to score. Leave it out.")
    return out


def check(config: Config) -> None:
    """Refuse flags that mean nothing here."""
    usual = flags.defaults_of(Config)
    for name in FOREIGN:
        if getattr(config, name) != usual[name]:
            flag = f"--{name.replace('_', '-')}"
            raise cli.UserError(f"{flag} is for one data set; here give --sst2 and --agnews.")
    experiment.check_width(config)


def studies_of(config: Config, joint: pairs.Pairs) -> dict[str, Study]:
    """One study a task, alike but for the labels; "neither" scores itself against the first."""
    texts = joint.tasks[pairs.TASKS[0]].train.texts
    vocabulary = batches.WordVocabulary.build(texts, config.vocabulary)
    studies = {
        task: Study(
            script=Path(__file__).name,
            backbone=experiment.backbone_name(config),
            config=config,
            recipe=flags.recipe_of(
                config, len(texts), schedule="cosine-epoch", window=config.window
            ),
            dataset=dataset,
            train=batches.encode(dataset.train, vocabulary.encode, config.max_tokens),
            evaluation=batches.encode(dataset.evaluation, vocabulary.encode, config.max_tokens),
            make_backbone=experiment.backbone_maker(config, len(vocabulary)),
            device=torch.device("cpu"),
        )
        for task, dataset in joint.tasks.items()
    }
    return studies | {"neither": studies[pairs.TASKS[0]]}


def analyse(folder: ResultsFolder, smoke: bool) -> None:
    """Score every run against both labels and draw."""
    import rivals

    started = time.monotonic()
    settings = rivals.SMOKE if smoke else rivals.Settings()
    analysis = rivals.score(folder.features, settings=settings)
    folder.results["analysis"] = {"controls": [], "contrasts": [], "claims": [], **analysis}
    folder.write()
    folder.log(f"analysis: {time.monotonic() - started:.1f} s")
    draw_figures(folder)


def main(argv: Sequence[str], stop: cli.StopSignals) -> None:
    config = flags.parse(Config, argv, __doc__)
    out = Path(config.out or (SMOKE if config.smoke else RESULTS))
    cli.require_writable(out)
    # a run of seconds gains nothing from threads, and loses much to them on a busy machine
    prepare_cpu(config.threads or (1 if config.smoke else None), config.jobs, config.deterministic)
    check(config)
    conditions = conditions_of(config)
    joint = load_pairs(config)
    studies = studies_of(config, joint)
    first = studies[pairs.TASKS[0]]
    identity = identity_of(first) | {"data_sha256": joint.sha256}
    restart = config.restart or not config.resume
    seeds = config.seeds or SEEDS

    with ResultsFolder(out, identity, identity_defaults(config), restart) as folder:
        for note in notes_on(first):
            folder.log(note)
        started = time.monotonic()
        before = folder.results.get("provenance", {}).get("wall_seconds", 0.0)
        todo = [(s, c) for s in seeds for c in conditions if not folder.has(c, s)]
        if todo or "provenance" not in folder.results:
            write_header(first, folder)
            classes = {task: list(d.class_names) for task, d in joint.tasks.items()}
            folder.results["dataset"] |= {"tasks": classes, "sha256": joint.sha256}
        folder.results["departures"] = departures(config)
        for task, dataset in joint.tasks.items():
            folder.features[task] = dataset.evaluation.labels

        def train(seed: int, condition: str) -> Trained:
            name, task = conditions[condition]
            arm = replace(arm_for(config, name), name=condition)
            return train_one(studies[task], folder, arm, seed, stop)

        for (seed, condition), (row, features) in finished(train, todo, config, stop):
            folder.results["provenance"]["wall_seconds"] = before + time.monotonic() - started
            folder.add(condition, seed, row, features)
            folder.log(f"{condition}, seed {seed}: accuracy {row['final']['accuracy']:.4f}")
        stop.check()
        analyse(folder, config.smoke)


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
