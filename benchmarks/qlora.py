"""What does the same QLoRA training cost: published recipe, Hugging Face Trainer, ours?

    python benchmarks/qlora.py --backbone ID_OR_PATH [--data ../sst2] [--arms dual] [--steps 4]
        [--passes 32 128 512 2048]

Same NF4 base, rows, losses, batches of 16 and seed for every contender, taken in turn in one
process. "published": written from the study's description: every text padded to --max-tokens,
float32 logits at every padded position, gradient checkpointing always, micro-batches of 8, of 2 in
the engram arm. "trainer": the library's Trainer with dynamic padding and length grouping. Neither
feeds an engram back: they do less than Model 3. "products": the frozen weights' matrix products
alone, forward and back, which bound what any of them can do here. --passes times our forward and
backward pass at several sizes: its fixed and its per-token part are what carries over to another
card. Each case is put into benchmarks/qlora-cpu.json or qlora-gpu.json in the place of an earlier
one of the same data set, backbone, arm and machine. benchmarks/random_backbone.py makes a 7B
backbone where none can be had: speed and memory do not depend on the weights' values.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

import backbones
import batches
import data
from arms import ARMS, MAIN_ARMS
from common import Batch, ClassificationHead, StudyModel
from files import write_json
from packing import ROW_MULTIPLE
from parts import Totals
from recipe import Recipe, derive_seed, prepare_cpu, seed_everything
from results import provenance
from training import Fit

BATCH = 16
EPOCHS = 3  # of the published studies, on so many training texts
FULL_ROWS = {"sst2": 67_349, "ag-news": 120_000}
# steps -> loss (None: nothing is learnt), seconds by its own clock
Run = Callable[[int, int], tuple[float | None, float | None]]


class PaddedModel(nn.Module):
    """Causal LM, masked mean, head: what the published recipe and the Trainer share."""

    def __init__(self, backbone: backbones.CausalBackbone, classes: int, lm: bool) -> None:
        super().__init__()
        self.lm = backbone.model
        self.with_lm = lm
        self.head = ClassificationHead(backbone.hidden_size, classes)

    def forward(self, input_ids, attention_mask, labels):
        """(B, L) tokens and mask, (B,) labels -> loss and logits, as the library's models give."""
        causal = self.lm.get_base_model()
        hidden = causal.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        mask = attention_mask.unsqueeze(2).float()
        logits, _ = self.head((hidden.float() * mask).sum(1) / mask.sum(1))
        loss = F.cross_entropy(logits, labels)
        if self.with_lm:
            words = causal.get_output_embeddings()(hidden[:, :-1]).float()
            targets = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100)
            lm = F.cross_entropy(words.flatten(0, 1), targets.flatten(), ignore_index=-100)
            loss = 0.5 * loss + 0.5 * lm
        return {"loss": loss, "logits": logits}


def rows_of(train: batches.Encoded, items: np.ndarray, length: int | None) -> dict:
    """Padded tensors of the given rows; length None: of the longest."""
    batch = train.batch(items)
    width = length or batch.longest
    tokens = torch.zeros(len(batch), width, dtype=torch.int64)
    mask = torch.arange(width) < batch.lengths.unsqueeze(1)
    tokens[mask] = batch.tokens
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": batch.labels}


def load(options: argparse.Namespace, lean: bool, recompute: str) -> backbones.Pretrained:
    pretrained = backbones.load(
        options.backbone,
        quantise=options.quantise,
        max_tokens=options.max_tokens,
        recompute=recompute,
        vram_gib=options.vram_gib,
        lean=lean,
    )
    if not lean:  # the library's own attention for padded rows
        pretrained.backbone.model.get_base_model().set_attn_implementation("sdpa")
        for layer in pretrained.backbone.recomputable:
            layer.gradient_checkpointing = recompute == "on"
    return pretrained


def our_fit(options, arm: str, train: batches.Encoded) -> Fit:
    """Our path, ready to step."""
    pretrained = load(options, True, "auto")
    seed_everything(0, "initialisation")
    model = StudyModel(pretrained.make_backbone(ARMS[arm]), ARMS[arm], options.classes, 128)
    model.to(pretrained.device).train()
    # at one rate, as the others
    recipe = Recipe(EPOCHS, 2e-4, 0.01, BATCH, 1.0, "cosine-epoch", micro_batch_tokens=1800)
    return Fit(model, recipe, train, train, 0)


def ours(options, arm, train, order) -> Run:
    """Our path."""
    fit, arm = our_fit(options, arm, train), ARMS[arm]

    def run(first: int, last: int) -> tuple[float, None]:
        fit.progress.totals = Totals()
        for step in range(first, last):
            fit.step(train.batch(order[step]))
        fit.settle()
        totals = fit.progress.totals
        lm = totals.lm / max(1, totals.targets)
        return arm.cls_weight * totals.cls / totals.texts + arm.lm_weight * lm, None

    return run


def pass_times(options, arm: str, train: batches.Encoded) -> dict:
    """Milliseconds of one forward and backward pass by its real tokens, and the line through them.

    The line weighs every size alike (least squares on relative errors).
    """
    fit = our_fit(options, arm, train)
    fit.recipe = dataclasses.replace(fit.recipe, micro_batch_tokens=0)
    total, points = np.cumsum(train.lengths), []
    for wanted in options.passes:
        texts = int(np.searchsorted(total, wanted, side="right"))
        batch = train.batch(np.arange(max(2, texts - texts % 2)))
        seconds = []
        for number in range(1 + options.rounds):
            _synchronise(fit.device)
            started = time.perf_counter()
            fit.optimizer.zero_grad(set_to_none=True)
            fit.gradients(batch)
            _synchronise(fit.device)
            if number:  # the first meets the kernels' shapes
                seconds.append(time.perf_counter() - started)
        points.append({"tokens": len(batch.tokens), "ms": 1000 * statistics.median(seconds)})
    tokens, ms = (np.array([point[key] for point in points]) for key in ("tokens", "ms"))
    line = np.polyfit(tokens, ms, 1, w=1 / ms) if len(points) > 2 else (None, None)
    found = {"points": points, "ms_per_token": line[0], "fixed_ms": line[1]}
    print(arm, "passes", json.dumps(found), flush=True)
    return found


def _free() -> None:
    """Give back what the last contender held: modules and their hooks are cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def published(options, arm, train, order) -> Run:
    """Padded to --max-tokens, recomputed, micro-batches of 8 (2 in the engram arm)."""
    pretrained = load(options, False, "on")
    seed_everything(0, "initialisation")
    pretrained.backbone.reset()
    lm = ARMS[arm].lm_weight > 0
    model = PaddedModel(pretrained.backbone, options.classes, lm).to(pretrained.device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.01)
    micro = 2 if ARMS[arm].has_prefix else 8

    def run(first: int, last: int) -> tuple[float, None]:
        losses = []
        for step in range(first, last):
            optimizer.zero_grad()
            for part in np.split(order[step], range(micro, len(order[step]), micro)):
                inputs = rows_of(train, part, options.max_tokens)
                inputs = {k: v.to(pretrained.device) for k, v in inputs.items()}
                loss = model(**inputs)["loss"] * len(part) / len(order[step])
                loss.backward()
                losses.append(loss.item())
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        return sum(losses) / max(1, last - first), None

    return run


class _Rows(torch.utils.data.Dataset):
    def __init__(self, train: batches.Encoded, items: np.ndarray) -> None:
        self.train, self.items = train, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        batch = self.train.batch(self.items[[index]])
        return {"input_ids": batch.tokens.tolist(), "labels": int(batch.labels)}


def trainer(options, arm, train, order) -> Run:
    """The library's Trainer: dynamic padding, length grouping."""
    pretrained = load(options, False, "off")
    seed_everything(0, "initialisation")
    pretrained.backbone.reset()
    lm = ARMS[arm].lm_weight > 0
    model = PaddedModel(pretrained.backbone, options.classes, lm)

    def collate(rows: list[dict]) -> dict:
        width = max(len(row["input_ids"]) for row in rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            tokens[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            mask[i, : len(row["input_ids"])] = 1
        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}

    def run(first: int, last: int) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                folder,
                per_device_train_batch_size=BATCH,
                num_train_epochs=1,
                learning_rate=2e-4,
                lr_scheduler_type="constant",
                weight_decay=0.01,
                train_sampling_strategy="group_by_length",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=pretrained.device.type == "cpu",
                bf16=False,
            )
            dataset = _Rows(train, np.concatenate(order[first:last]))
            worker = transformers.Trainer(model, arguments, collate, dataset)
            done = worker.train()
            # its own clock: setting a Trainer up is not training
            return float(done.training_loss), float(done.metrics["train_runtime"])

    return run


@torch.no_grad()
def _products(fit: Fit, batch: Batch) -> None:
    """Every frozen weight met once forward and once back, by the rows that our step gives it."""
    backbone, device = fit.model.backbone, fit.device
    rows = -(-len(batch.tokens) // ROW_MULTIPLE) * ROW_MULTIPLE
    head = backbone.unembedding
    for layer in backbone.decoder.layers:
        for group in layer.groups:
            width = group.adapters[0][1].shape[1]
            x = torch.ones(rows, width, dtype=head.dtype, device=device)
            group.frozen.backward(group.frozen.forward(x))
    if fit.model.arm.lm_weight:
        x = torch.ones(len(batch.lm_rows), head.shape[1], dtype=head.dtype, device=device)
        (x @ head.T) @ head


def products(options, arm, train, order) -> Run:
    """No contender: the products with frozen weights alone, below which a step cannot go."""
    fit = our_fit(options, arm, train)
    if fit.model.backbone.decoder is None:
        raise SystemExit("products: a Llama or Qwen2 only; name the other --contenders")

    def run(first: int, last: int) -> tuple[None, None]:
        for step in range(first, last):
            _products(fit, train.batch(order[step]))
        return None, None

    return run


CONTENDERS = {"published": published, "trainer": trainer, "ours": ours, "products": products}


def measure(options, name: str, train: batches.Encoded, order: list) -> dict:
    """Every contender's figures for one arm.

    In turn round by round on a CPU, whose speed drifts; one after the other on a GPU, where the
    peak is to be one contender's own.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = {c: {"seconds": [], "tokens": [], "loss": []} for c in options.contenders}

    def begin(contender: str) -> Run:
        run = CONTENDERS[contender](options, name, train, order)
        run(0, options.warm_up)
        return run

    def one_round(contender: str, run: Run, number: int) -> None:
        first = options.warm_up + number * options.steps
        last, found = first + options.steps, figures[contender]
        _synchronise(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        loss, own = run(first, last)
        _synchronise(device)
        spent = time.perf_counter() - started
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
            found["peak_mib"] = max(peak, found.get("peak_mib", 0))
        found["seconds"].append(spent if own is None else own)
        found["tokens"].append(sum(int(train.lengths[order[i]].sum()) for i in range(first, last)))
        found["loss"].append(loss)

    together = options.contenders if device.type == "cpu" else []
    alone = [] if together else options.contenders
    for group in (*([contender] for contender in alone), together):
        runs = {contender: begin(contender) for contender in group}
        for number in range(options.rounds):
            for contender, run in runs.items():
                one_round(contender, run, number)
        del runs
        _free()
    rows = {}
    for contender, found in figures.items():
        seconds = statistics.median(found["seconds"])
        pairs = zip(found["tokens"], found["seconds"], strict=True)
        rows[contender] = {
            "tokens_per_s": statistics.median(t / s for t, s in pairs),
            "examples_per_s": BATCH * options.steps / seconds,
            "ms_per_step": 1000 * seconds / options.steps,
            "peak_mib": found.get("peak_mib"),
            "last_loss": found["loss"][-1],
        }
        if "ours" in figures:
            pairs = zip(found["seconds"], figures["ours"]["seconds"], strict=True)
            ratios = [a / b for a, b in pairs]
            rows[contender]["ours_times_faster"] = statistics.median(ratios)
            rows[contender]["ours_times_faster_range"] = [min(ratios), max(ratios)]
        print(name, contender, json.dumps(rows[contender]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--data", help="as for experiment_7b.py")
    parser.add_argument("--agnews", action="store_true", help="AG News instead of SST-2")
    parser.add_argument("--arms", nargs="+", choices=MAIN_ARMS, default=["dual"])
    parser.add_argument("--quantise", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the clock")
    parser.add_argument("--steps", type=int, default=4, help="measured steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--passes", type=int, nargs="+", default=[], help="real tokens of single passes to time"
    )
    parser.add_argument("--max-tokens", type=int, help="default: 128, AG News 256")
    parser.add_argument("--vram-gib", type=float)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.max_tokens = options.max_tokens or (256 if options.agnews else 128)
    prepare_cpu(options.threads)
    total = options.warm_up + options.steps * options.rounds
    spec = data.AG_NEWS if options.agnews else data.SST2
    texts = max(total * BATCH, *options.passes, 0)
    dataset = data.load(spec, options.data, limit_train=texts)
    options.classes = len(dataset.class_names)
    where = load(options, True, "off")
    train = batches.encode(dataset.train, where.tokenize, options.max_tokens)
    name, device = where.name, where.device
    del where
    _free()
    order = batches.batch_order(train.lengths, BATCH, derive_seed(0, "order"), 0, 0)
    if len(order) < total:
        raise SystemExit(f"{total} steps need {total * BATCH} rows; there are {len(train)}")
    facts = provenance(device)
    kind = "gpu" if device.type == "cuda" else "cpu"
    out = options.out or Path(__file__).with_name(f"qlora-{kind}.json")
    for arm in options.arms:
        case = {
            "dataset": dataset.name,
            "backbone": name,
            "arm": arm,
            "machine": f"{facts['hardware']['processor']}, {options.threads} threads",
            "date": datetime.now(UTC).date().isoformat(),
            "commit": facts["commit"],
            "versions": facts["versions"],
            "max_tokens": options.max_tokens,
            "steps": options.steps,
            "rounds": options.rounds,
            "full_steps": EPOCHS * -(-FULL_ROWS[spec.slug] // BATCH),
            "rows": measure(options, arm, train, order),
        }
        if options.passes:
            case["passes"] = pass_times(options, arm, train)
        cases = json.loads(out.read_text())["cases"] if out.exists() else []
        same = ("dataset", "backbone", "arm", "machine")
        cases = [old for old in cases if any(old[key] != case[key] for key in same)]
        write_json(out, {"cases": [*cases, case]})


if __name__ == "__main__":
    main()
