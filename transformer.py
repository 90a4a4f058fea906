"""The small study's backbone: a causal transformer trained from scratch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import Batch


def dropout_masks(sizes: list[int], rate: float, device: torch.device) -> tuple[Tensor, ...]:
    """Scaled keep-masks (0 or 1 / (1 - rate)), flat, one per size, from the default generator.

    All masks of a forward pass come from one draw of 16 random bits an element, about 4 times
    cheaper on a CPU than as many calls of `F.dropout`; the rate is met to within 2^-17.
    """
    total = sum(sizes)
    words = torch.empty(-(-total // 4), dtype=torch.int64, device=device)
    lanes = words.random_(-(2**63), None).view(torch.int16)[:total]
    keep = lanes >= round(rate * 2**16) - 2**15
    return keep.to(torch.float32).mul_(1 / (1 - rate)).split(sizes)


@dataclass(frozen=True)
class Groups:
    """Where the rows of a ragged batch stand when padded for attention, in groups of like length.

    Linear layers see real rows only; attention needs a rectangle. Texts are grouped by length, so
    the rectangles hold little padding although the batch itself is random.

    Args:
        rows: (padded rows,) the ragged row at each place, group after group; padding points at
            row 0, which no real query sees.
        back: (ragged rows,) the place of each ragged row.
        shapes: (texts, length) of each group.
        masks: per group (texts, 1, 1, length), True where a key is real; None when causal, since
            right padding is then never seen.
    """

    rows: Tensor
    back: Tensor
    shapes: tuple[tuple[int, int], ...]
    masks: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, batch: Batch, prefix: bool, causal: bool, count: int = 3) -> Groups:
        """Group a batch whose ragged rows are its T tokens, then, with a prefix, B prefixes."""
        before = int(prefix)
        tokens, device = len(batch.tokens), batch.tokens.device
        lengths = batch.lengths + before
        rows, shapes, masks, places = [], [], [], 0
        back = batch.tokens.new_empty(tokens + before * len(batch))
        for texts in lengths.argsort(stable=True).chunk(count):
            size, length = len(texts), int(lengths[texts[-1]])
            column = torch.arange(length, device=device)
            real = column < lengths[texts].unsqueeze(1)
            index = batch.starts[texts].unsqueeze(1) + column - before
            if prefix:
                index[:, 0] = tokens + texts
            index = index.masked_fill(~real, 0)
            back[index[real]] = places + real.flatten().nonzero().squeeze(1)
            rows.append(index.flatten())
            shapes.append((size, length))
            masks.append(None if causal else real[:, None, None])
            places += size * length
        return cls(torch.cat(rows), back, tuple(shapes), tuple(masks))


class Block(nn.Module):
    """Pre-norm layer: x += drop(attention(norm(x))); x += drop(W2 drop(GELU(W1 norm(x))))."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def attention(self, x: Tensor, groups: Groups) -> Tensor:
        """(rows, H) -> (rows, H), each text attending to itself only."""
        width = x.shape[1]
        padded = self.qkv(x).index_select(0, groups.rows)
        # split, not slices: the gradient of a slice is a zero-filled whole
        parts = padded.split([texts * length for texts, length in groups.shapes])
        seen = []
        for part, (texts, length), mask in zip(parts, groups.shapes, groups.masks, strict=True):
            q, k, v = part.view(texts, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            seen.append(out.transpose(1, 2).reshape(texts * length, width))
        return self.out(torch.cat(seen).index_select(0, groups.back))

    def forward(self, x: Tensor, groups: Groups, drops: tuple | None) -> Tensor:
        """(rows, H) -> (rows, H)."""

        def drop(y: Tensor, site: int) -> Tensor:
            return y if drops is None else y * drops[site].view_as(y)

        x = x + drop(self.attention(self.norm1(x), groups), 0)
        return x + drop(self.down(drop(F.gelu(self.up(self.norm2(x))), 1)), 2)


class SmallTransformer(nn.Module):
    """Token + position embedding, pre-norm blocks, final norm; LM head tied to the embedding.

    Position 0 belongs to the prefix in every arm, so a text's tokens stand at the same positions
    with and without one.

    Args:
        vocabulary: V, words including padding and unknown.
        max_tokens: longest text.
        causal: position t never sees t + 1. False only for the published protocol, whose LM target
            leaked.
        embedding_std: of the initial token embedding; 1 is torch's default, for comparison.
    """

    def __init__(
        self,
        vocabulary: int,
        max_tokens: int,
        width: int = 128,
        heads: int = 4,
        inner: int = 256,
        layers: int = 2,
        dropout: float = 0.1,
        causal: bool = True,
        embedding_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.hidden_size = width
        self.causal = causal
        self.dropout = dropout
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(max_tokens + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(layers))
        self.inner = inner
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                # 0.02 for positions too: unit-variance positions drown tied 0.02 tokens
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.embedding.weight.mul_(embedding_std / 0.02)

    @property
    def unembedding(self) -> Tensor:
        """(V, H) output matrix of the next-token head."""
        return self.embedding.weight

    def forward(
        self, batch: Batch, prefix: Tensor | None = None, layers: list[Tensor] | None = None
    ) -> Tensor:
        """Hidden states of a packed batch.

        Args:
            batch: B texts, T tokens.
            prefix: (B, H) state that stands before token 0 of each text.
            layers: receives (T, H) after the embedding and after each block.
        Returns:
            (T, H) after the final norm, prefix rows left out.
        """
        tokens = len(batch.tokens)
        x = self.embedding(batch.tokens) + self.position(batch.positions + 1)
        if prefix is not None:
            x = torch.cat([x, prefix + self.position.weight[0]])
        drops: tuple[Tensor, ...] = ()
        if self.training and self.dropout:
            residual, inner = len(x) * self.hidden_size, len(x) * self.inner
            sizes = [residual] + [residual, inner, residual] * len(self.blocks)
            drops = dropout_masks(sizes, self.dropout, x.device)
            x = x * drops[0].view_as(x)
        groups = Groups.of(batch, prefix is not None, self.causal)
        if layers is not None:
            layers.append(x[:tokens])
        for index, block in enumerate(self.blocks):
            x = block(x, groups, drops[1 + 3 * index : 4 + 3 * index] or None)
            if layers is not None:
                layers.append(x[:tokens])
        return self.norm(x[:tokens])
