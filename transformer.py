"""The small study's backbone: a causal transformer trained from scratch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import Batch
from layouts import Groups

LONGEST_WRITTEN_OUT = 128  # tokens: attention written out keeps (L, L) arrays, the kernel does not


def dropout_masks(sizes: list[int], rate: float, device: torch.device) -> tuple[Tensor, ...]:
    """Scaled keep-masks (0 or 1 / (1 - rate)), flat, one per size, from the default generator.

    All masks of a forward pass come from one draw of 16 random bits an element, about 4 times
    cheaper on a CPU than as many calls of `F.dropout`; the rate is met to within 2^-17.
    """
    total = sum(sizes)
    words = torch.empty(-(-total // 4), dtype=torch.int64, device=device)
    lanes = words.random_(-(2**63), None).view(torch.int16)[:total]
    masks = torch.empty(total, device=device)
    # compared straight into float32: a conversion from bool takes longer than the comparison
    torch.ge(lanes, round(rate * 2**16) - 2**15, out=masks)
    return masks.mul_(1 / (1 - rate)).split(sizes)


class _WrittenOut(torch.autograd.Function):
    """A causal `Block` in training on a CPU, forward and backward in one node of the graph.

    The same equations on the same numbers, without the graph's nodes, copies and zero-filled
    gradients between them; attention as batched products, since the kernel for long texts takes
    twice as long on short ones. Together 5 to 10 % of a step. Parameters in the block's order.
    """

    @staticmethod
    def forward(ctx, x, groups, drops, heads, *parameters):
        w1, b1, w_qkv, b_qkv, w_out, b_out, w2, b2, w_up, b_up, w_down, b_down = parameters
        width, d = x.shape[1], x.shape[1] // heads
        inputs, outputs = groups.by_head(heads)
        normed1, *moments1 = torch.native_layer_norm(x, [width], w1, b1, 1e-5)
        placed = inputs.spread(torch.addmm(b_qkv, normed1, w_qkv.t()), d)
        found, attended = torch.empty(len(outputs.rows), d), []
        for (q, k, v), (out,) in zip(inputs.views(placed), outputs.views(found), strict=True):
            # keys by queries: softmax over the first of two short dimensions is vectorised
            later = groups.later[: k.shape[1], : k.shape[1]]
            chances = torch.softmax(torch.baddbmm(later, k, q.mT, alpha=d**-0.5), 1)
            torch.bmm(chances.mT, v, out=out)
            attended.append((q, k, v, chances))
        seen = outputs.gather(found, width)
        middle = torch.addmm(b_out, seen, w_out.t()).mul_(drops[0].view_as(x)).add_(x)
        normed2, *moments2 = torch.native_layer_norm(middle, [width], w2, b2, 1e-5)
        up = torch.addmm(b_up, normed2, w_up.t())
        active = F.gelu(up).mul_(drops[1].view_as(up))
        out = torch.addmm(b_down, active, w_down.t()).mul_(drops[2].view_as(x)).add_(middle)
        ctx.of = inputs, outputs, drops, d
        ctx.found = x, normed1, moments1, attended, seen, middle, normed2, moments2, up, active
        ctx.save_for_backward(*parameters)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        inputs, outputs, drops, d = ctx.of
        x, normed1, moments1, attended, seen, middle, normed2, moments2, up, active = ctx.found
        ctx.found = None
        w1, b1, w_qkv, _, w_out, _, w2, b2, w_up, _, w_down, _ = ctx.saved_tensors
        width, every = x.shape[1], [True] * 3
        d_down = grad * drops[2].view_as(x)
        d_active = (d_down @ w_down).mul_(drops[1].view_as(up))
        d_up = torch.ops.aten.gelu_backward(d_active, up)
        d_middle, d_w2, d_b2 = torch.ops.aten.native_layer_norm_backward(
            d_up @ w_up, middle, [width], *moments2, w2, b2, every
        )
        d_middle.add_(grad)
        d_out = d_middle * drops[0].view_as(x)
        d_found = outputs.spread(d_out @ w_out, d).index_fill_(0, outputs.padding, 0)
        d_placed = torch.empty(len(inputs.rows), d)
        for (d_q, d_k, d_v), (d_one,), (q, k, v, chances) in zip(
            inputs.views(d_placed), outputs.views(d_found), attended, strict=True
        ):
            d_chances = torch.bmm(v, d_one.mT)
            d_scores = torch._softmax_backward_data(d_chances, chances, 1, q.dtype).mul_(d**-0.5)
            torch.bmm(d_scores.mT, k, out=d_q)
            torch.bmm(d_scores, q, out=d_k)
            torch.bmm(chances, d_one, out=d_v)
        d_qkv = inputs.gather(d_placed, 3 * width)
        d_x, d_w1, d_b1 = torch.ops.aten.native_layer_norm_backward(
            d_qkv @ w_qkv, x, [width], *moments1, w1, b1, every
        )
        d_x.add_(d_middle)
        return (
            *(d_x, None, None, None, d_w1, d_b1),
            *(d_qkv.t() @ normed1, d_qkv.sum(0), d_out.t() @ seen, d_out.sum(0), d_w2, d_b2),
            *(d_up.t() @ normed2, d_up.sum(0), d_down.t() @ active, d_down.sum(0)),
        )


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
        self.written_out = True

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
        short = groups.masks[0] is None and groups.longest <= LONGEST_WRITTEN_OUT
        if self.written_out and x.is_cpu and x.requires_grad and drops and short:
            layers = self.norm1, self.qkv, self.out, self.norm2, self.up, self.down
            parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
            return _WrittenOut.apply(x, groups, drops, self.heads, *parameters)
        return self.plain(x, groups, drops)

    def plain(self, x: Tensor, groups: Groups, drops: tuple | None) -> Tensor:
        """The same by automatic differentiation: what `_WrittenOut` is tested against."""

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
        return self.norm(x if prefix is None else x[:tokens])
