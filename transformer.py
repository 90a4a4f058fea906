"""The small study's backbone: a causal transformer trained from scratch."""

from __future__ import annotations

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

    def forward(self, x: Tensor, mask: Tensor | None, drops: tuple | None) -> Tensor:
        """x (B, L, H); mask (B, 1, 1, L) True where a key may be seen, None: causal."""
        batch, length, width = x.shape

        def drop(y: Tensor, site: int) -> Tensor:
            return y if drops is None else y * drops[site].view_as(y)

        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, width per head)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + drop(self.out(seen.transpose(1, 2).reshape(batch, length, width)), 0)
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

        Batches come sorted by length, so the texts are padded to the longest inside.

        Args:
            batch: B texts, T tokens.
            prefix: (B, H) state that stands before token 0 of each text.
            layers: receives (T, H) after the embedding and after each block.
        Returns:
            (T, H) after the final norm, prefix rows left out.
        """
        before = 0 if prefix is None else 1
        width = batch.longest + before
        where = batch.segments * width + batch.positions + before
        x = batch.tokens.new_zeros(len(batch) * width).index_copy(0, where, batch.tokens)
        x = self.embedding(x.view(len(batch), width))
        if prefix is not None:
            x = torch.cat([prefix.unsqueeze(1), x[:, 1:]], 1)
        x = x + self.position.weight[1 - before : 1 - before + width]
        drops: tuple[Tensor, ...] = ()
        if self.training and self.dropout:
            cells = len(batch) * width
            residual, inner = cells * self.hidden_size, cells * self.inner
            sizes = [residual] + [residual, inner, residual] * len(self.blocks)
            drops = dropout_masks(sizes, self.dropout, x.device)
            x = x * drops[0].view_as(x)
        mask = None
        if not self.causal:
            last = batch.lengths + before
            mask = torch.arange(width, device=x.device) < last.view(-1, 1, 1, 1)
        if layers is not None:
            layers.append(x.flatten(0, 1)[where])
        for index, block in enumerate(self.blocks):
            x = block(x, mask, drops[1 + 3 * index : 4 + 3 * index] or None)
            if layers is not None:
                layers.append(x.flatten(0, 1)[where])
        return self.norm(x.flatten(0, 1)[where])
