"""The parts of a model that the studies share, and their losses.

Dimension letters, used in every module: B batch (texts), T tokens of a packed batch, L tokens of
the longest text, H hidden width of the backbone, D classifier width (256), E engram width,
C classes, V vocabulary, N evaluated examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arms import Arm

CLASSIFIER_WIDTH = 256
LM_ROW_MULTIPLE = 64


class UserError(ValueError):
    """A user's mistake: one line that names the value and says what to do; exit code 2."""


@dataclass(frozen=True)
class Batch:
    """Texts packed without padding: text i is `tokens[starts[i] : starts[i] + lengths[i]]`.

    Args:
        tokens: (T,) int64 token ids, text after text.
        lengths: (B,) int64, each at least 1.
        labels: (B,) int64 in 0..C-1.
        items: (B,) int64 row numbers in the split, for messages and for putting results in order.
    """

    tokens: Tensor
    lengths: Tensor
    labels: Tensor
    items: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def host_lengths(self) -> np.ndarray:
        """`lengths` on the CPU, where layouts are made: no wait for a GPU."""
        return self.lengths.cpu().numpy()

    @property
    def longest(self) -> int:
        return int(self.host_lengths.max())

    @cached_property
    def starts(self) -> Tensor:
        """(B,) index of each text's first token."""
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def segments(self) -> Tensor:
        """(T,) the text each token belongs to."""
        return torch.repeat_interleave(self.lengths, output_size=len(self.tokens))

    @cached_property
    def positions(self) -> Tensor:
        """(T,) position of each token in its text, from 0."""
        return (
            torch.arange(len(self.tokens), device=self.tokens.device) - self.starts[self.segments]
        )

    @cached_property
    def lm_rows(self) -> Tensor:
        """Rows that predict a next token: all but each text's last; token 0 is never a target."""
        is_source = np.ones(len(self.tokens), bool)
        is_source[self.host_lengths.cumsum() - 1] = False
        return torch.from_numpy(np.flatnonzero(is_source)).to(self.tokens.device)

    def take(self, texts: Tensor) -> Batch:
        """The batch of the given texts (int64 indices), in that order."""
        lengths = self.lengths[texts]
        shift = self.starts[texts] - (lengths.cumsum(0) - lengths)
        size = int(lengths.sum())
        rows = torch.repeat_interleave(shift, lengths, output_size=size)
        rows = rows + torch.arange(size, device=rows.device)
        return Batch(self.tokens[rows], lengths, self.labels[texts], self.items[texts])

    def to(self, device: torch.device | str) -> Batch:
        parts = self.tokens, self.lengths, self.labels, self.items
        moved = Batch(*(part.to(device) for part in parts))
        moved.__dict__["host_lengths"] = self.host_lengths
        return moved


def mean_pool(hidden: Tensor, batch: Batch) -> Tensor:
    """Mean of each text's hidden states over its real tokens, in float32.

    The prefix is not among the rows of `hidden`, so it is never pooled.

    Args:
        hidden: (T, H), any float dtype.
        batch: the packed texts.
    Returns:
        (B, H) float32.
    Source: published recipe (masked mean), written for packed rows.
    """
    sums = hidden.new_zeros(len(batch), hidden.shape[1], dtype=torch.float32)
    sums = sums.index_add(0, batch.segments, hidden.float())
    return sums / batch.lengths.unsqueeze(1)


class ClassificationHead(nn.Module):
    """logits = W2 dropout(z) + b2 with the intermediate z = GELU(W1 x + b1).

    Source: published recipe, H - 256 - C.
    """

    def __init__(self, hidden: int, classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden, CLASSIFIER_WIDTH)
        self.outer = nn.Linear(CLASSIFIER_WIDTH, classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H) float32 -> logits (B, C) and intermediate z (B, D), before dropout."""
        intermediate = F.gelu(self.inner(pooled))
        return self.outer(self.dropout(intermediate)), intermediate


class EngramCompressor(nn.Module):
    """e = tanh(W z + b), z the classifier's intermediate (D) or the pooled state (H).

    Source: published recipe (AG News: the intermediate; SST-2: the pooled state).
    """

    def __init__(self, width: int, engram: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, engram)

    def forward(self, tapped: Tensor) -> Tensor:
        """(B, width) float32 -> engram (B, E) in (-1, 1)."""
        return torch.tanh(self.linear(tapped))


class EngramProjector(nn.Module):
    """prefix = W e + b: one prefix position in the backbone's hidden width.

    A zero engram gives the bias b, so a text without a giver still has a prefix.
    Source: published recipe.
    """

    def __init__(self, engram: int, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(engram, hidden)

    def forward(self, engram: Tensor) -> Tensor:
        """(B, E) float32 -> (B, H)."""
        return self.linear(engram)


@dataclass(frozen=True)
class Outputs:
    """hidden (T, H), pooled (B, H), intermediate (B, D), logits (B, C), engram (B, E) or None."""

    hidden: Tensor
    pooled: Tensor
    intermediate: Tensor
    logits: Tensor
    engram: Tensor | None


class StudyModel(nn.Module):
    """A backbone with the parts an arm needs.

    The backbone is any module with `hidden_size`, `unembedding` (V, H) and
    `forward(batch, prefix=None, layers=None) -> (T, H)`: prefix (B, H) stands before token 0 and is
    not among the returned rows; `layers`, a list, receives the (T, H) state after each layer.
    Parts are built in a fixed order, so arms of one seed share the initial values they share.
    """

    def __init__(self, backbone: nn.Module, arm: Arm, classes: int, engram: int) -> None:
        super().__init__()
        hidden, engram = backbone.hidden_size, arm.engram_dim or engram
        self.arm = arm
        self.backbone = backbone
        self.head = ClassificationHead(hidden, classes)
        self.compressor = self.projector = None
        if arm.feedback is not None:
            width = CLASSIFIER_WIDTH if arm.tap == "classifier" else hidden
            self.compressor = EngramCompressor(width, engram)
        if arm.has_prefix:
            self.projector = EngramProjector(engram, hidden)

    def zero_engram(self, batch: Batch) -> Tensor | None:
        """(B, E) zeros for an arm with a prefix position, else None."""
        if self.projector is None:
            return None
        weight = self.projector.linear.weight
        return weight.new_zeros(len(batch), weight.shape[1])

    def forward(self, batch: Batch, engram: Tensor | None, layers: list | None = None) -> Outputs:
        """Run texts with one engram each as prefix; engram None: no prefix position at all."""
        prefix = None if engram is None else self.projector(engram)
        hidden = self.backbone(batch, prefix, layers)
        pooled = mean_pool(hidden, batch)
        logits, intermediate = self.head(pooled)
        tapped = {"intermediate": intermediate, "pooled": pooled}[self.arm.reads]
        code = None if self.compressor is None else self.compressor(tapped)
        return Outputs(hidden, pooled, intermediate, logits, code)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients computed in the forward pass, in row chunks: one (chunk, V) array in all."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, dtype, frozen):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        # whole multiples of rows: kernels compiled per shape are met again; zero rows add nothing
        spare = -len(hidden) % LM_ROW_MULTIPLE
        rows, matrix = F.pad(hidden.to(dtype), (0, 0, 0, spare)), weight.to(dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(rows) if needs_hidden else None
        d_weight = None
        buffer = rows.new_empty(min(chunk, len(rows)) if frozen is None else 0, len(matrix))
        smallest = torch.finfo(torch.float32).tiny
        for start in range(0, len(rows), chunk):
            part, wanted = rows[start : start + chunk], targets[start : start + chunk]
            row = torch.arange(len(wanted), device=hidden.device)
            # softmax computes in float32 inside and may write over its input
            if frozen is None:
                logits = torch.mm(part, matrix.T, out=buffer[: len(part)])
            else:
                logits = frozen.forward(part)
            probabilities = torch.softmax(logits, 1, out=logits)
            likelihoods = probabilities[row, wanted].float()
            total -= likelihoods.clamp_min(smallest).log().sum()
            if not (needs_hidden or needs_weight):
                continue
            d_logits = probabilities
            d_logits[row, wanted] = (likelihoods - 1).to(dtype)  # scatter_ would copy it all
            if needs_hidden:
                d_part = d_logits @ matrix if frozen is None else frozen.backward(d_logits)
                d_hidden[start : start + chunk] = d_part
            if needs_weight:
                product = (d_logits.T @ part).float()
                d_weight = product if d_weight is None else d_weight.add_(product)
        if needs_weight and d_weight is None:
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
        if needs_hidden:
            d_hidden = d_hidden[: len(hidden)]
        ctx.gradients = (d_hidden, hidden.dtype), (d_weight, weight.dtype)
        return total

    @staticmethod
    def backward(ctx, d_total):
        pairs, ctx.gradients = ctx.gradients, None  # scaled in place: one backward pass only
        scaled = [None if d is None else d.to(t).mul_(d_total.to(t)) for d, t in pairs]
        return *scaled, None, None, None, None


@dataclass(frozen=True)
class LossSum:
    """A sum of losses in nats and how many texts or target tokens it runs over."""

    total: Tensor
    count: int


def lm_loss(
    hidden: Tensor,
    batch: Batch,
    unembedding: Tensor,
    chunk: int = 512,
    dtype: torch.dtype = torch.float32,
    frozen: Any = None,
    shuffle: bool = False,
) -> LossSum:
    """Next-token cross-entropy over a packed batch, as sum and count.

    Sum and count, never a mean: micro-batches add up, and the divisor is the whole effective
    batch's. Token 0 of a text is never a target; a text of one token has none.

    Args:
        hidden: (T, H) states; row t predicts token t + 1 of the same text.
        batch: the packed texts.
        unembedding: (V, H) output matrix; frozen or trained.
        chunk: rows handled at a time; bounds memory at chunk * V floats.
        dtype: of the matrix products; the softmax is always float32.
        frozen: the same matrix as an object with products `forward` (N, H) -> (N, V) and `backward`
            in `dtype`, where it is never trained; None to use `unembedding` itself.
        shuffle: permute the targets among the rows, by torch's default generator.
    Returns:
        sum in nats (0 if there is no target) and the number of target tokens.
    """
    rows = batch.lm_rows
    targets = batch.tokens[rows + 1]
    if shuffle:
        targets = targets[torch.randperm(len(targets)).to(targets.device)]
    total = _LinearCrossEntropy.apply(hidden[rows], unembedding, targets, chunk, dtype, frozen)
    return LossSum(total, len(rows))


def classification_loss(logits: Tensor, labels: Tensor) -> LossSum:
    """Cross-entropy over texts, as sum (nats) and count; logits (B, C), labels (B,)."""
    return LossSum(F.cross_entropy(logits, labels, reduction="sum"), len(labels))


def feedback_partners(feedback: str, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which texts run first, which second, and whose engram each of the second half receives.

    Args:
        feedback: "next" or "detached" (text i of the second half receives the engram of text i of
            the first half) or "same_class" (of a first-half text with its label).
        labels: (B,) labels of the batch.
    Returns:
        first (B1,), second (B2,) text indices, B1 >= B2 >= 0, and source (B2,) positions in
        `first`; -1 where same_class finds no partner (that text runs with a zero engram).
    Source: published 7B rule.
    """
    middle = (len(labels) + 1) // 2
    first, second = torch.arange(middle), torch.arange(middle, len(labels))
    source = torch.arange(len(second))
    if feedback == "same_class":
        source = torch.full((len(second),), -1)
        for label in labels.unique():
            givers = (labels[:middle] == label).nonzero().squeeze(1)
            takers = (labels[middle:] == label).nonzero().squeeze(1)
            if len(givers):
                source[takers] = givers[torch.arange(len(takers)) % len(givers)]
    return first, second, source
