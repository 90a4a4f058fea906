"""Do engrams cluster by sentiment when Qwen2.5-7B is fine-tuned in 4 bits?

    python experiment_7b.py [--data ../sst2] [--backbone ID_OR_PATH] [--smoke]

Trains Model 1 (classification), Model 2 (+ next token) and Model 3 (+ engram) on SST-2 with
Qwen/Qwen2.5-7B, NF4 double-quantised, LoRA on its seven projections, evaluates and clusters the
engrams, and writes results.json, features.npz, figures and adapters/ to results_7b/. Another
backbone or data set goes to a subfolder named after it. Needs a GPU with 16 GB; the README states
the measured time. Backbones of at most 2 billion parameters also run on a CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import adapters
import backbones
import batches
import cli
import data
import flags
import pretrained
from common import StudyModel
from recipe import prepare_cpu
from study import Study, run_study

SPEC = data.SST2
RESULTS = Path(__file__).parent / "results_7b"
BACKBONE = "Qwen/Qwen2.5-7B"
SEEDS = [0]
SEEDS_ELSEWHERE = [0, 1, 2]
WARMUP = 0.05  # of all steps


@dataclass(frozen=True)
class Config(flags.StudyConfig):
    """The published SST-2 recipe; the shared ones are in flags.StudyConfig."""

    epochs: int = flags.option(3, "passes over the training texts", low=1)
    batch_size: int = flags.option(16, "texts per optimizer step", low=1)
    lr: float = flags.option(2e-4, "peak learning rate", above=0.0, high=1.0)
    lr_grid: list[float] = flags.option(
        [1e-4, 2e-4, 4e-4],
        "rates of which a tuned arm takes the best on a dev split of the training texts",
        above=0.0,
        high=1.0,
    )
    engram_dim: int = flags.option(128, "width of the engram", low=1)
    max_tokens: int = flags.option(
        128, "longest text in tokens; longer ones are cut and counted", low=2
    )
    backbone: str = flags.option(BACKBONE, "hub id, local folder or GGUF file of any causal LM")
    quantise: str = flags.option("nf4", "how the frozen weights are kept", choices=("nf4", "none"))
    dtype: str = flags.option(
        "auto",
        "compute type; auto: bfloat16, or float32 on a GPU without it",
        choices=("auto", "bfloat16", "float32"),
    )
    lora_targets: list[str] | None = flags.option(
        None, "last names of the layers that get LoRA (default: the seven projections, or found)"
    )
    micro_batch_tokens: int = flags.option(
        1800, "most tokens of one pass; a longer step is split, its loss stays the same", low=2
    )
    gradient_checkpointing: str = flags.option(
        "auto",
        "compute activations again in the backward pass; auto: where they would not fit",
        choices=("auto", "on", "off"),
    )
    vram_gib: float | None = flags.option(None, "cap on GPU memory, in GiB", above=0.0)


def load_dataset(config: Config) -> data.Dataset:
    """The script's own data set or the user's texts."""
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


def load_backbone(config: Config, dataset: data.Dataset) -> backbones.Pretrained:
    """The base that all arms share, or a tiny random one for --smoke."""
    with tempfile.TemporaryDirectory() if config.smoke else contextlib.nullcontext() as folder:
        source = config.backbone
        if config.smoke:
            source = str(Path(folder) / "tiny-random-qwen2")
            pretrained.tiny_model(Path(source), dataset.train.texts)
        return backbones.load(
            source,
            quantise=config.quantise,
            dtype=config.dtype,
            lora_targets=config.lora_targets,
            max_tokens=config.max_tokens,
            pass_tokens=config.micro_batch_tokens,
            recompute=config.gradient_checkpointing,
            vram_gib=config.vram_gib,
            jobs=config.jobs,
        )


def results_folder(config: Config, dataset: data.Dataset, slug: str) -> Path:
    """--out, or the script's folder, or its subfolder named after another backbone or data set."""
    if config.out is not None:
        return Path(config.out)
    own = config.backbone == BACKBONE and not config.smoke
    folder = RESULTS if own else RESULTS / slug
    return folder if dataset.own else folder / dataset.slug


def main(argv: Sequence[str], stop: cli.StopSignals) -> None:
    config = flags.parse(Config, argv, __doc__)
    cli.require_writable(Path(config.out or RESULTS))
    threads = config.threads or (1 if config.smoke else None)
    prepare_cpu(threads, config.jobs, config.deterministic)
    dataset = load_dataset(config)
    recipe = flags.recipe_of(
        config,
        len(dataset.train.texts),
        schedule="cosine",
        warmup=WARMUP,
        micro_batch_tokens=config.micro_batch_tokens,
    )
    base = load_backbone(config, dataset)
    dataset = dataclasses.replace(dataset, notes=(*dataset.notes, *base.notes))

    def save_model(model: StudyModel, folder: Path) -> None:
        adapters.save(base, model, folder, dataset.class_names, config.max_tokens)

    study = Study(
        script=Path(__file__).name,
        backbone=base.name,
        config=config,
        recipe=dataclasses.replace(
            recipe, lm_dtype=base.identity["dtype"], eval_tokens=base.eval_tokens
        ),
        dataset=dataset,
        train=batches.encode(dataset.train, base.tokenize, config.max_tokens),
        evaluation=batches.encode(dataset.evaluation, base.tokenize, config.max_tokens),
        make_backbone=base.make_backbone,
        device=base.device,
        backbone_identity=base.identity,
        save_model=save_model,
    )
    own = config.backbone == BACKBONE and not config.smoke
    seeds = config.seeds or (SEEDS if own or config.smoke else SEEDS_ELSEWHERE)
    run_study(study, results_folder(config, dataset, base.slug), seeds, stop)


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
