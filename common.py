"""The science the three studies share: model parts, losses and clustering metrics.

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
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor, nn
from torch.nn import functional as F

CLASSIFIER_WIDTH = 256
LM_ROW_MULTIPLE = 64
FEEDBACKS = ("next", "self", "same_class", "off", "detached", "unused")
TAPS = ("classifier", "pooled")


class UserError(ValueError):
    """A user's mistake: one line that names the value and says what to do; exit code 2."""


@dataclass(frozen=True)
class Arm:
    """One training condition; loss = cls_weight * classification + lm_weight * next token.

    `feedback` says what becomes of the engram: None, the arm has no compressor; "unused", it has
    one whose code goes nowhere; else one of FEEDBACKS, and every text carries a prefix position.

    Args:
        tap: what the compressor reads, one of TAPS. engram_dim: its width; None: the run's.
        causal: False for the published small protocol alone.
        train: False leaves the initial weights.
        shuffled_labels: training labels are permuted once, by the seed; evaluation's are true.
        shuffled_targets: in training, the target words of a batch change places: their frequencies
            stay, context says nothing about them.
        lm_stopped: the LM loss is measured, and its gradient stops at the hidden states; as the
            output matrix is tied (or frozen), none of the backbone's weights feels it.
        longer: epochs, as a multiple of the run's; the schedule is stretched over them.
    """

    name: str
    title: str
    cls_weight: float = 1.0
    lm_weight: float = 0.0
    feedback: str | None = None
    tap: str = "classifier"
    causal: bool = True
    train: bool = True
    engram_dim: int | None = None
    shuffled_labels: bool = False
    shuffled_targets: bool = False
    lm_stopped: bool = False
    longer: int = 1

    @property
    def has_prefix(self) -> bool:
        return self.feedback not in (None, "unused")


_THIRD = (0.5, 0.5, "next")
ARMS = {
    arm.name: arm
    for arm in (
        Arm("classification", "Model 1: classification"),
        Arm("dual", "Model 2: + next token", 0.5, 0.5),
        Arm("dual_engram", "Model 3: + engram", *_THIRD),
        Arm("classification_engram", "Model 1 + engram, no LM", 1.0, 0.0, "next"),
        Arm("dual_engram_self", "Model 3, own engram fed back", 0.5, 0.5, "self"),
        Arm("dual_engram_same_class", "Model 3, same-class engram", 0.5, 0.5, "same_class"),
        Arm("dual_engram_off", "Model 3, zero engram", 0.5, 0.5, "off"),
        Arm("dual_engram_detached", "Model 3, detached engram", 0.5, 0.5, "detached"),
        Arm("lm_only_engram", "LM + engram, no labels", 0.0, 1.0, "next", tap="pooled"),
        Arm(
            "dual_engram_shuffled_labels",
            "Model 3, shuffled labels",
            *_THIRD,
            shuffled_labels=True,
        ),
        Arm(
            "dual_engram_shuffled_targets",
            "Model 3, shuffled LM targets",
            *_THIRD,
            shuffled_targets=True,
        ),
        # classification at full weight: its gradients, and their clipping, are then Model 1's
        Arm("dual_stopped", "Model 2, LM gradient stopped", 1.0, 1.0, lm_stopped=True),
        Arm("classification_longer", "Model 1, twice the epochs", longer=2),
        *(
            Arm(f"dual_lm_{weight}", f"Model 2, LM weight 0.{weight}", 1 - share, share)
            for weight, share in (("25", 0.25), ("75", 0.75))
        ),
        *(
            Arm(f"dual_engram_lm_{w}", f"Model 3, LM weight 0.{w}", 1 - share, share, "next")
            for w, share in (("25", 0.25), ("75", 0.75))
        ),
        *(
            Arm(f"dual_engram_w{dim}", f"Model 3, engram of {dim}", *_THIRD, engram_dim=dim)
            for dim in (2, 8, 32, 128, 256)
        ),
        Arm("published_small", "Published protocol", 1.0, 0.3, "unused", "pooled", causal=False),
        Arm("untrained", "Untrained", 0.5, 0.5, "next", train=False),
    )
}
MAIN_ARMS = ("classification", "dual", "dual_engram")
# what --arms takes beside names; the published protocol is another backbone's
ARM_GROUPS = {
    "main": MAIN_ARMS,
    "controls": tuple(n for n in ARMS if n not in (*MAIN_ARMS, "published_small")),
    "widths": tuple(n for n, arm in ARMS.items() if arm.engram_dim),
    "weights": tuple(n for n in ARMS if "_lm_" in n),
}


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
    def longest(self) -> int:
        return int(self.lengths.max())

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
        is_source = torch.ones_like(self.tokens, dtype=torch.bool)
        is_source[self.starts + self.lengths - 1] = False
        return is_source.nonzero().squeeze(1)

    def take(self, texts: Tensor) -> Batch:
        """The batch of the given texts (int64 indices), in that order."""
        lengths = self.lengths[texts]
        shift = self.starts[texts] - (lengths.cumsum(0) - lengths)
        size = int(lengths.sum())
        rows = torch.repeat_interleave(shift, lengths, output_size=size)
        rows = rows + torch.arange(size, device=rows.device)
        return Batch(self.tokens[rows], lengths, self.labels[texts], self.items[texts])

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            *(part.to(device) for part in (self.tokens, self.lengths, self.labels, self.items))
        )


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
        tapped = intermediate if self.arm.tap == "classifier" else pooled
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


@dataclass(frozen=True)
class KMeansFit:
    """clusters (N,) int, centroids (k, E)."""

    clusters: np.ndarray
    centroids: np.ndarray


def kmeans(x: np.ndarray, k: int, seed: int = 0, n_init: int = 50) -> KMeansFit:
    """k-means of the rows of x (N, E), best of n_init restarts. Source: published, n_init ours."""
    fit = KMeans(k, n_init=n_init, random_state=seed).fit(np.asarray(x, dtype=np.float64))
    return KMeansFit(fit.labels_, fit.cluster_centers_)


def nearest_centroid(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(N,) index of the centroid (k, E) nearest to each row of x (N, E)."""
    x, centroids = np.asarray(x, np.float64), np.asarray(centroids, np.float64)
    return ((centroids**2).sum(1) - 2 * x @ centroids.T).argmin(1)


def adjusted_rand(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Adjusted Rand index: 1 for equal partitions, 0 expected by chance (Hubert & Arabie 1985)."""
    return float(adjusted_rand_score(labels, clusters))


def adjusted_mutual_information(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Mutual information over its chance value, 1 for equal partitions (Vinh et al. 2010)."""
    return float(adjusted_mutual_info_score(labels, clusters))


@dataclass(frozen=True)
class ClusterMatch:
    """accuracy under the best one-to-one mapping {cluster: class}; recall_per_class (C,)."""

    accuracy: float
    mapping: dict[int, int]
    recall_per_class: list[float]


def cluster_accuracy(labels: np.ndarray, clusters: np.ndarray) -> ClusterMatch:
    """Share of items whose cluster maps to their class, mapping chosen to maximise it.

    Works for any number of clusters; those left over by the one-to-one mapping count as wrong.
    `recall_per_class` is the share of each class that lies in its most common cluster (what the
    study calls purity).

    Args:
        labels: (N,) int classes.
        clusters: (N,) int clusters.
    Source: Hungarian method on the contingency matrix (Kuhn 1955).
    """
    table = contingency_matrix(labels, clusters)
    classes, found = np.unique(labels), np.unique(clusters)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return ClusterMatch(
        accuracy=float(table[rows, columns].sum() / len(labels)),
        mapping={int(found[c]): int(classes[r]) for r, c in zip(rows, columns, strict=True)},
        recall_per_class=(table.max(1) / table.sum(1)).tolist(),
    )


@dataclass(frozen=True)
class CosineGap:
    """Mean cosine of distinct pairs of one class and of pairs of two classes."""

    within: float
    between: float


def cosine_gap(x: np.ndarray, labels: np.ndarray, centre: bool = False) -> CosineGap:
    """Mean cosine similarity within and between classes, in O(N E).

    With u the unit rows, S_c their class sums and S their sum:
    within = sum_c (|S_c|^2 - n_c) / sum_c n_c (n_c - 1),
    between = (|S|^2 - sum_c |S_c|^2) / (N^2 - sum_c n_c^2).

    Args:
        x: (N, E); centre: subtract the mean row first (raw cosines carry the tanh bias).
        labels: (N,) int.
    Returns:
        The two means, nan where there is no such pair.
    """
    x = np.asarray(x, dtype=np.float64)
    if centre:
        x = x - x.mean(0)
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), x.shape[1]))
    np.add.at(sums, codes, unit)
    squares = (sums**2).sum()
    same, other = (counts * (counts - 1)).sum(), len(x) ** 2 - (counts**2).sum()
    whole = (sums.sum(0) ** 2).sum()
    return CosineGap(
        within=float((squares - (unit**2).sum()) / same) if same else float("nan"),
        between=float((whole - squares) / other) if other else float("nan"),
    )


def effective_rank(x: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values of the centred matrix x (N, E).

    Between 1 and min(N, E), and capped by N: compare only at equal N.
    Source: Roy & Vetterli 2007.
    """
    x = np.asarray(x, dtype=np.float64)
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


@dataclass(frozen=True)
class EngramMetrics:
    """The engram's scores against the classes; excess_ari is ari - ari of the predictions."""

    ari: float
    ami: float
    cluster_accuracy: float
    excess_ari: float
    cosine_within: float
    cosine_between: float
    centred_cosine_within: float
    centred_cosine_between: float
    mapping: dict[int, int]
    recall_per_class: list[float]


def engram_metrics(
    engram: np.ndarray, labels: np.ndarray, predictions: np.ndarray, seed: int = 0
) -> EngramMetrics:
    """Cluster engrams (N, E) by k-means with k = C and score the clusters against labels (N,).

    Excess ARI = ARI(clusters, labels) - ARI(predictions, labels): what the clusters hold beyond
    the classifier's own predictions (N,).
    """
    clusters = kmeans(engram, len(np.unique(labels)), seed).clusters
    ari = adjusted_rand(labels, clusters)
    match = cluster_accuracy(labels, clusters)
    raw, centred = cosine_gap(engram, labels), cosine_gap(engram, labels, centre=True)
    return EngramMetrics(
        ari=ari,
        ami=adjusted_mutual_information(labels, clusters),
        cluster_accuracy=match.accuracy,
        excess_ari=ari - adjusted_rand(labels, predictions),
        cosine_within=raw.within,
        cosine_between=raw.between,
        centred_cosine_within=centred.within,
        centred_cosine_between=centred.between,
        mapping=match.mapping,
        recall_per_class=match.recall_per_class,
    )
