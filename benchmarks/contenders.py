"""What benchmarks/qlora.py times: ways to train the same model, and a bound on all of them."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import backbones
import batches
from arms import ARMS
from common import Batch, ClassificationHead, StudyModel
from packing import whole_rows
from parts import Totals
from recipe import Recipe, seed_everything
from training import Fit

BATCH = 16
EPOCHS = 3  # of the published studies
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
    rows = whole_rows(len(batch.tokens))
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
    """No recipe but a bound: the products with frozen weights alone, of layers written out."""
    fit = our_fit(options, arm, train)

    def run(first: int, last: int) -> tuple[None, None]:
        for step in range(first, last):
            _products(fit, train.batch(order[step]))
        return None, None

    return run


CONTENDERS = {"published": published, "trainer": trainer, "ours": ours, "products": products}
