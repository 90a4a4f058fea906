"""Scoring a model on a split, without gradients, in batches that fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from batches import Encoded, eval_order
from common import StudyModel, mean_pool
from memory import ADVICE, OutOfMemory, is_out_of_memory, release
from parts import Losses, Totals, batch_losses

if TYPE_CHECKING:
    from recipe import Recipe

EVAL_MODES = ("zero", "own", "shuffled", "mean", "no_prefix")


@dataclass(frozen=True)
class Evaluation:
    """accuracy in 0..1, cls_loss in nats per text, lm_loss in nats per target token or None.

    `eval_tokens` is the bound on a batch that held: the recipe's, or less where memory ran out.
    """

    accuracy: float
    cls_loss: float
    lm_loss: float | None
    eval_tokens: int
    features: dict[str, np.ndarray] | None = None

    def scores(self) -> dict[str, float | None]:
        return {"accuracy": self.accuracy, "cls_loss": self.cls_loss, "lm_loss": self.lm_loss}


@torch.no_grad()
def evaluate(
    model: StudyModel,
    data: Encoded,
    recipe: Recipe,
    engrams: Tensor | None = None,
    prefix: bool = True,
    collect: tuple[str, ...] = (),
    check_stop: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score a split without gradients, in the backbone's own type, by length-sorted batches.

    Args:
        model: any arm's model.
        data: the split, N texts.
        recipe: eval_tokens bounds a batch.
        engrams: (N, E) prefixes, one per text; None: the zero engram (headline, as published).
        prefix: False leaves the prefix position out (an arm with a prefix only).
        collect: names among pooled, intermediate, engram, logits, layers to return as features, in
            the split's order.
        check_stop: called between batches; may raise Interrupted.
    Returns:
        Evaluation; features[name] is (N, ...) float32, layers (N, layers + 1, H).
    """
    model.eval()
    totals, parts, order = Totals(), {name: [] for name in collect}, []
    device = next(model.parameters()).device
    engrams = None if engrams is None else engrams.to(device)

    def score(items: np.ndarray) -> tuple[Losses, int, dict[str, np.ndarray]]:
        batch = data.batch(items).to(device)
        own = model.zero_engram(batch) if engrams is None else engrams[batch.items]
        layers: list[Tensor] | None = [] if "layers" in collect else None
        out = model(batch, own if prefix else None, layers)
        dtype = model.backbone.unembedding.dtype
        losses = batch_losses(model, [(batch, out)], recipe, dtype)
        found = {name: getattr(out, name, None) for name in collect}
        if layers is not None:
            found["layers"] = torch.stack([mean_pool(layer, batch) for layer in layers], 1)
        arrays = {k: v.float().cpu().numpy() for k, v in found.items() if v is not None}
        return losses, len(batch.tokens), arrays

    limit = recipe.eval_tokens
    waiting = list(eval_order(data.lengths, limit))
    while waiting:
        check_stop()
        items, scored = waiting[0], None
        try:
            scored = score(items)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if scored is None:
            if len(items) == 1:
                raise OutOfMemory(f"evaluating a text of {data.lengths[items[0]]} tokens: {ADVICE}")
            release()
            limit = max(1, int(data.lengths[items].sum()) // 2)
            left = np.concatenate(waiting)
            waiting = [left[part] for part in eval_order(data.lengths[left], limit)]
            continue
        losses, tokens, arrays = scored
        totals.add(losses, tokens)
        order.append(waiting.pop(0))
        for name, array in arrays.items():
            parts[name].append(array)
    back = np.argsort(np.concatenate(order))
    features = {name: np.concatenate(rows)[back] for name, rows in parts.items() if rows}
    return Evaluation(
        accuracy=totals.correct / totals.texts,
        cls_loss=totals.cls / totals.texts,
        lm_loss=totals.lm / totals.targets if totals.targets else None,
        eval_tokens=limit,
        features=features or None,
    )


def evaluate_modes(
    score: Callable[..., Evaluation], zero: Evaluation, seed: int
) -> tuple[dict[str, dict[str, float | None]], dict[str, np.ndarray]]:
    """Score an arm with a prefix under every engram of EVAL_MODES (control A9).

    Args:
        score: `evaluate` of the arm and the split, which takes `engrams` or `prefix`.
        zero: the evaluation under the zero engram, with its engrams and logits collected.
        seed: of the permutation of the shuffled mode.
    Returns:
        Scores by mode, and the (N,) int16 classes that were predicted, by mode.
    """
    own = torch.from_numpy(zero.features["engram"])
    shuffled = own[torch.from_numpy(np.random.default_rng(seed).permutation(len(own)))]
    mean = own.mean(0, keepdim=True).expand_as(own)
    given = {"own": own, "shuffled": shuffled, "mean": mean}
    found = {"zero": zero}
    found |= {n: score(engrams=engrams, collect=("logits",)) for n, engrams in given.items()}
    found["no_prefix"] = score(prefix=False, collect=("logits",))
    predicted = {n: e.features["logits"].argmax(1).astype(np.int16) for n, e in found.items()}
    return {n: e.scores() for n, e in found.items()}, predicted
