"""Do engrams cluster by class when a small model is trained from scratch?

    python experiment.py [--data ../sst2] [--seeds 0 1 2] [--smoke]

Trains Model 1 (classification), Model 2 (+ next token) and Model 3 (+ engram) on SST-2 with a
2-layer causal transformer of 1.3M parameters, evaluates and clusters the engrams, and writes
results.json, features.npz and figures to results/. Without SST-2 it trains on real sentences of a
packaged corpus and writes to results/rotten-tomatoes/. The README states the measured time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import batches
import cli
import data
import flags
from arms import Arm
from recipe import prepare_cpu
from study import Study, run_study
from transformer import SmallTransformer

SPEC = data.SST2
RESULTS = Path(__file__).parent / "results"
SEEDS = [0, 1, 2, 3, 4]
SEEDS_ELSEWHERE = [0]


@dataclass(frozen=True)
class Config(flags.StudyConfig):
    """The published small recipe; the shared flags and their defaults are in flags.StudyConfig."""

    vocabulary: int = flags.option(8000, "words, from the training texts only", low=3)
    width: int = flags.option(128, "hidden width", low=4)
    heads: int = flags.option(4, "attention heads", low=1)
    inner: int = flags.option(256, "feed-forward width", low=1)
    layers: int = flags.option(2, "transformer layers", low=1)
    dropout: float = flags.option(0.1, "dropout of the transformer", low=0.0, high=0.9)
    embedding_std: float = flags.option(0.02, "of the initial token embedding", above=0.0)
    window: int = flags.option(
        0, "batches whose texts are sorted by length together (0: random batches)", low=0
    )


def load_dataset(config: Config) -> data.Dataset:
    """SST-2, the user's own texts, or the embedded corpus."""
    if config.smoke:
        return data.generated_corpus()
    return data.load(
        SPEC,
        config.data,
        text_column=config.text_column,
        label_column=config.label_column,
        labels=config.labels,
        label_offset=config.label_offset,
        encoding=config.encoding,
        drop_empty=config.drop_empty,
        limit_train=config.limit_train,
        limit_eval=config.limit_eval,
    )


def results_folder(config: Config, dataset: data.Dataset) -> Path:
    """--out, or results/, or its subfolder named after another data set."""
    if config.out is not None:
        return Path(config.out)
    return RESULTS if dataset.name == SPEC.name else RESULTS / dataset.slug


def backbone_maker(config: Config, vocabulary: int) -> Callable[[Arm], SmallTransformer]:
    """A function that builds an arm's transformer from torch's seeded generator."""

    def make(arm: Arm) -> SmallTransformer:
        return SmallTransformer(
            vocabulary=vocabulary,
            max_tokens=config.max_tokens,
            width=config.width,
            heads=config.heads,
            inner=config.inner,
            layers=config.layers,
            dropout=config.dropout,
            causal=arm.causal,
            embedding_std=config.embedding_std,
        )

    return make


def check_width(config: Config) -> None:
    """Refuse a width that the heads do not divide."""
    if config.width % config.heads:
        raise cli.UserError(
            f"--width {config.width} is not a multiple of --heads {config.heads}. Change one."
        )


def backbone_name(config: Config) -> str:
    """What results, tables and figures call it."""
    return f"transformer from scratch, {config.layers} layers, d {config.width}"


def main(argv: Sequence[str], stop: cli.StopSignals) -> None:
    config = flags.parse(Config, argv, __doc__)
    cli.require_writable(Path(config.out or RESULTS))
    # a run of seconds gains nothing from threads, and loses much to them on a busy machine
    prepare_cpu(config.threads or (1 if config.smoke else None), config.jobs, config.deterministic)
    check_width(config)
    dataset = load_dataset(config)
    folder = results_folder(config, dataset)
    vocabulary = batches.WordVocabulary.build(dataset.train.texts, config.vocabulary)

    study = Study(
        script=Path(__file__).name,
        backbone=backbone_name(config),
        config=config,
        recipe=flags.recipe_of(
            config, len(dataset.train.texts), schedule="cosine-epoch", window=config.window
        ),
        dataset=dataset,
        train=batches.encode(dataset.train, vocabulary.encode, config.max_tokens),
        evaluation=batches.encode(dataset.evaluation, vocabulary.encode, config.max_tokens),
        make_backbone=backbone_maker(config, len(vocabulary)),
        device=torch.device("cpu"),
    )
    own = dataset.name == SPEC.name
    seeds = config.seeds or (SEEDS if own else SEEDS_ELSEWHERE)
    run_study(study, folder, seeds, stop)


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
