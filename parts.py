"""The parts of one optimizer step: which texts run together, and the losses they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arms import Arm
from common import Batch, Outputs, StudyModel, classification_loss, feedback_partners, lm_loss

if TYPE_CHECKING:
    from recipe import Recipe


@dataclass(frozen=True)
class Losses:
    """Sums over a batch: classification (nats), texts, next token (nats), targets, correct."""

    cls: Tensor
    texts: int
    lm: Tensor
    targets: int
    correct: Tensor

    def __add__(self, other: Losses) -> Losses:
        return Losses(
            *(x + y for x, y in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    def detach(self) -> Losses:
        return Losses(self.cls.detach(), self.texts, self.lm.detach(), self.targets, self.correct)


@dataclass
class Totals:
    """What an epoch has seen so far; saved with a checkpoint."""

    cls: float = 0.0
    lm: float = 0.0
    correct: int = 0
    texts: int = 0
    targets: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, losses: Losses, tokens: int) -> None:
        self.cls += float(losses.cls.detach())
        self.lm += float(losses.lm.detach())
        self.correct += int(losses.correct)
        self.texts += losses.texts
        self.targets += losses.targets
        self.tokens += tokens


@dataclass(frozen=True)
class Part:
    """Texts run together: `first` with a zero engram, then `second` with engrams of `first`.

    Args:
        first, second: batches; second is None where no text waits for another's engram.
        source: (B2,) int64, the text of `first` whose engram each of `second` receives; -1: zero.
    """

    first: Batch
    second: Batch | None = None
    source: Tensor | None = None

    def to(self, device: torch.device) -> Part:
        return Part(*(None if x is None else x.to(device) for x in vars(self).values()))


def parts_of(arm: Arm, batch: Batch, limit: int = 0) -> list[Part]:
    """Plan an optimizer step: one part, or as few as hold at most `limit` tokens each.

    Cut between texts, and between pairs where one text receives another's engram: the parts give
    the numbers of the whole (dropout's draws apart). A pair longer than `limit` is a part.

    Args:
        limit: tokens of a part; 0 for no limit.
    """
    first = torch.arange(len(batch))
    second = source = torch.arange(0)
    if arm.has_prefix and arm.feedback not in ("off", "self"):
        first, second, source = feedback_partners(arm.feedback, batch.labels)
    if not limit or len(batch.tokens) <= limit:
        if not len(second):
            return [Part(batch if len(first) == len(batch) else batch.take(first))]
        return [Part(batch.take(first), batch.take(second), source)]
    # a receiver goes where its giver goes; one without a giver, where its place in line is
    home = torch.where(source >= 0, source, torch.arange(len(second)))
    cost = batch.lengths[first].index_add(0, home, batch.lengths[second])
    filled, numbers = 0, [0]
    for tokens in cost.tolist():
        full = filled and filled + tokens > limit
        filled = tokens + (0 if full else filled)
        numbers.append(numbers[-1] + bool(full))
    of = torch.tensor(numbers[1:])
    parts = []
    for number in range(numbers[-1] + 1):
        givers, takers = of == number, of[home] == number
        place = givers.cumsum(0) - 1  # of a giver among its part's
        moved = torch.where(source[takers] >= 0, place[home[takers]], -1)
        receivers = batch.take(second[takers]) if takers.any() else None
        parts.append(Part(batch.take(first[givers]), receivers, moved))
    return parts


def run_part(model: StudyModel, part: Part) -> list[tuple[Batch, Outputs]]:
    """The passes of a part, as the arm's feedback rule says.

    "next", "detached", "same_class": the first texts with a zero engram, the second with the
    first's engrams. "self": every text twice, with a zero engram and then with its own. "off": zero
    engrams. Without a prefix position: once.
    """
    first = model(part.first, model.zero_engram(part.first))
    passes = [(part.first, first)]
    if model.arm.has_prefix and model.arm.feedback == "self":
        passes.append((part.first, model(part.first, first.engram)))
    elif part.second is not None:
        engrams = first.engram.detach() if model.arm.feedback == "detached" else first.engram
        engrams = engrams[part.source.clamp_min(0)] * (part.source >= 0).unsqueeze(1)
        passes.append((part.second, model(part.second, engrams)))
    return passes


def forward_passes(model: StudyModel, batch: Batch) -> list[tuple[Batch, Outputs]]:
    """Run a whole batch as one part; one entry per pass."""
    (part,) = parts_of(model.arm, batch)
    return run_part(model, part)


def batch_losses(
    model: StudyModel, passes: list[tuple[Batch, Outputs]], recipe: Recipe, dtype: torch.dtype
) -> Losses:
    """Sum the losses of the passes of one batch; the LM loss only if the arm trains it."""
    cls = [classification_loss(out.logits, batch.labels) for batch, out in passes]
    device = cls[0].total.device
    lm = []
    if model.arm.lm_weight:
        matrix, arm = model.backbone.unembedding, model.arm
        frozen = getattr(model.backbone, "frozen_head", None)
        shuffle = arm.shuffled_targets and model.training
        for given, out in passes:
            hidden, words = out.hidden, matrix
            if arm.lm_stopped:
                hidden, words = hidden.detach(), words.detach()
            lm.append(lm_loss(hidden, given, words, recipe.lm_chunk, dtype, frozen, shuffle))
    correct = [(out.logits.argmax(1) == batch.labels).sum() for batch, out in passes]
    return Losses(
        cls=sum(part.total for part in cls),
        texts=sum(part.count for part in cls),
        lm=sum((part.total for part in lm), torch.zeros((), device=device)),
        targets=sum(part.count for part in lm),
        correct=sum(correct),
    )


def weighted_loss(arm: Arm, losses: Losses) -> Tensor:
    """cls_weight * mean over texts + lm_weight * mean over target tokens of the whole batch.

    A batch of one-token texts has no target: its LM term is 0, not 0 / 0.
    """
    lm = losses.lm / max(1, losses.targets)
    return arm.cls_weight * losses.cls / losses.texts + arm.lm_weight * lm
