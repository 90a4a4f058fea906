"""Decoder layers of the Llama family with LoRA, forward and backward written out.

A layer is one node of the graph: sibling projections share one product with the frozen weights,
masks of a whole layer come from one draw, and rows are padded once, for attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora import Residents, Siblings, keep_mask, new_seed, siblings_of
from packing import Layout, spread

FAMILY = ("llama", "qwen2")  # model types whose layers compute exactly what is written here


@dataclass(frozen=True)
class Norm:
    """y = w x / sqrt(mean(x^2) + eps), computed in float32; w is frozen."""

    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, H) -> (N, H) and the (N, 1) scale."""
        wide = x.float()
        scale = wide.square().mean(1, keepdim=True).add_(self.eps).rsqrt_()
        return (wide * scale).to(x.dtype).mul_(self.weight), scale

    def backward(self, grad: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        """dx = s (g w - n mean(g w n)) with n = s x."""
        inward, normed = (grad * self.weight).float(), x.float().mul_(scale)
        share = (inward * normed).mean(1, keepdim=True)
        return inward.addcmul_(normed, share, value=-1).mul_(scale).to(x.dtype)


@dataclass(frozen=True)
class Turn:
    """Rotary angles of the padded rows: (P, 1, d / 2) cosines and sines, in float32 on a CPU."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor, back: bool = False) -> Tensor:
        """(P, heads, d) turned by its rows' angles, or by their negatives."""
        first, second = x.chunk(2, -1)
        out = torch.empty_like(x)
        sign = -1 if back else 1
        torch.addcmul(first * self.cos, second, self.sin, value=-sign, out=out.chunk(2, -1)[0])
        torch.addcmul(second * self.cos, first, self.sin, value=sign, out=out.chunk(2, -1)[1])
        return out


class _Attention:
    """Causal attention of padded groups of rows: softmax(scale q k' + mask) v, keys shared.

    Forward is the device's kernel. Backward on a CPU is written out in float32, because its kernel
    takes several times as long for short texts; with P from the kernel's log-sum-exp,
    dv = P' do, dS = P (do v' - rowsum(do o)), dq = scale dS k, dk = scale dS' q, where the queries
    that share a key head are rows of one matrix.
    """

    def __init__(self, heads: int, key_heads: int, scale: float) -> None:
        self.heads, self.key_heads, self.scale = heads, key_heads, scale

    def forward(self, rows: Tensor, layout: Layout) -> tuple[Tensor, Any]:
        """(P, heads + 2 key heads, d) -> (P, heads, d)."""
        outs, saved = [], []
        for block in self._blocks(rows, layout):
            inputs = [x.contiguous() for x in block.split(self._sizes, 1)]
            if rows.is_cpu:
                share = self.heads // self.key_heads
                q, *wide = (x if x is inputs[0] else x.repeat_interleave(share, 1) for x in inputs)
                kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
                out, total = kernel(q, *wide, 0.0, True, scale=self.scale)
                saved.append((inputs, out, total))
            else:
                with torch.enable_grad():
                    inputs = [x.detach().requires_grad_() for x in inputs]
                    out = F.scaled_dot_product_attention(
                        *inputs, is_causal=True, scale=self.scale, enable_gqa=True
                    )
                saved.append((inputs, out, None))
            outs.append(out.detach().transpose(1, 2).flatten(0, 1))
        return torch.cat(outs), saved

    def backward(self, grad: Tensor, layout: Layout, saved: Any) -> Tensor:
        """(P, heads, d) -> (P, heads + 2 key heads, d)."""
        found = []
        for d_out, (inputs, out, total) in zip(self._blocks(grad, layout), saved, strict=True):
            if total is None:
                grads = torch.autograd.grad(out, inputs, d_out)
            else:
                grads = self._written_out(d_out.contiguous(), *inputs, out, total)
            found.append(torch.cat(grads, 1).transpose(1, 2).flatten(0, 1))
        return torch.cat(found)

    def _written_out(self, d_out, q, k, v, out, total) -> list[Tensor]:
        texts, _, length, d = q.shape
        # (texts * key heads, queries, d): the queries of all heads that share a key head
        d_out, q, out = (x.reshape(texts * self.key_heads, -1, d) for x in (d_out, q, out))
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        total = total.reshape(len(q), -1, 1)
        chances = torch.bmm(q, k.mT).mul_(self.scale).sub_(total).exp_()
        chances = chances.unflatten(1, (-1, length)).tril_().flatten(1, 2)
        d_score = torch.bmm(d_out, v.mT).sub_((d_out * out).sum(2, keepdim=True)).mul_(chances)
        d_score.mul_(self.scale)
        d_v = torch.bmm(chances.mT, d_out)
        grads = torch.bmm(d_score, k), torch.bmm(d_score.mT, q), d_v
        return [x.view(texts, -1, length, d) for x in grads]

    @property
    def _sizes(self) -> list[int]:
        return [self.heads, self.key_heads, self.key_heads]

    @staticmethod
    def _blocks(rows: Tensor, layout: Layout) -> list[Tensor]:
        """(texts, heads, length, d) of each group."""
        blocks = layout.groups.split(rows.flatten(1), rows.shape[1])
        return [block.transpose(1, 2) for block in blocks]


@dataclass
class Layer:
    """x += o(attention(qkv(norm1 x))); x += down(silu(gate) up), gate and up of norm2 x.

    Args:
        norm1, norm2: before attention and before the feed-forward part.
        qkv, o, gate_up, down: the projections.
        attention: its kernel, heads and scale.
        module: for its train or eval mode.
    """

    norm1: Norm
    qkv: Siblings
    o: Siblings
    norm2: Norm
    gate_up: Siblings
    down: Siblings
    attention: _Attention
    module: nn.Module

    @property
    def groups(self) -> tuple[Siblings, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def parameters(self) -> list[Tensor]:
        """A, B, A, B, .. in the order of `groups`."""
        return [p for group in self.groups for p in group.parameters()]

    def masks(self, rows: int, like: Tensor, seed: int | None) -> list[list[Tensor | None]]:
        """Dropout masks of every adapter, group by group, from one draw."""
        widths = [[a.shape[1] for _, a, _ in group.adapters] for group in self.groups]
        if seed is None:
            return [[None] * len(group) for group in widths]
        sizes = [rows * width for group in widths for width in group]
        drawn = iter(keep_mask(seed, sum(sizes), self.qkv.rate, like.device).split(sizes))
        return [[next(drawn).view(rows, width) for width in group] for group in widths]

    def forward(
        self, x: Tensor, layout: Layout, turn: Turn, seed: int | None
    ) -> tuple[Tensor, tuple]:
        """(N, H) -> (N, H), and what `backward` needs."""
        masks = self.masks(len(x), x, seed)
        normed, scale1 = self.norm1.forward(x)
        qkv, saved_qkv = self.qkv.forward(normed, masks[0])
        places = layout.forward_rows
        wide = torch.float32 if x.is_cpu else x.dtype
        # the CPU's bfloat16 kernel takes 100 times as long backwards on short texts
        rows = qkv.index_select(0, places).to(wide).unflatten(1, (-1, turn.cos.shape[-1] * 2))
        turned = self.attention.heads + self.attention.key_heads
        rows[:, :turned] = turn(rows[:, :turned])
        seen, saved_seen = self.attention.forward(rows, layout)
        seen = seen.flatten(1).to(x.dtype).index_select(0, layout.forward_places)
        mixed, saved_o = self.o.forward(seen, masks[1])
        middle = mixed.add_(x)
        normed, scale2 = self.norm2.forward(middle)
        both, saved_both = self.gate_up.forward(normed, masks[2])
        gate, up = both.chunk(2, 1)
        active = F.silu(gate)
        out, saved_down = self.down.forward(active * up, masks[3])
        # random bits are dear on a CPU, memory on a GPU: there they are drawn again
        kept = masks if x.is_cpu else None
        saved = (x, scale1, saved_qkv, saved_seen, saved_o, middle, scale2, saved_both)
        return out.add_(middle), (*saved, both, active, saved_down, kept)

    def backward(
        self, grad: Tensor, layout: Layout, turn: Turn, seed: int | None, saved: tuple
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients of the input and of `parameters()`."""
        x, scale1, saved_qkv, saved_seen, saved_o, middle, scale2, saved_both = saved[:8]
        both, active, saved_down, masks = saved[8:]
        masks = masks or self.masks(len(x), x, seed)
        d_hidden, found_down = self.down.backward(grad, saved_down, masks[3])
        gate, up = both.chunk(2, 1)
        d_both = torch.empty_like(both)
        d_gate, d_up = d_both.chunk(2, 1)
        torch.mul(d_hidden, active, out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(d_hidden.mul_(up), gate))
        d_normed, found_both = self.gate_up.backward(d_both, saved_both, masks[2])
        d_middle = self.norm2.backward(d_normed, middle, scale2).add_(grad)
        d_seen, found_o = self.o.backward(d_middle, saved_o, masks[1])
        wide = torch.float32 if x.is_cpu else x.dtype
        d_rows = self.attention.backward(
            spread(d_seen, layout.to_places).to(wide).unflatten(1, (self.attention.heads, -1)),
            layout,
            saved_seen,
        )
        turned = self.attention.heads + self.attention.key_heads
        d_rows[:, :turned] = turn(d_rows[:, :turned], back=True)
        d_qkv = spread(d_rows.flatten(1).to(x.dtype), layout.from_places)
        d_normed, found_qkv = self.qkv.backward(d_qkv, saved_qkv, masks[0])
        d_x = self.norm1.backward(d_normed, x, scale1).add_(d_middle)
        return d_x, [*found_qkv, *found_o, *found_both, *found_down]


class _Run(torch.autograd.Function):
    """One layer as one node; `recompute` keeps its input only and runs it again backwards."""

    @staticmethod
    def forward(ctx, x, layer, layout, turn, seed, recompute, *parameters):
        out, saved = layer.forward(x, layout, turn, seed)
        ctx.of = layer, layout, turn, seed
        # not save_for_backward: none of it is an output, and most of it are no tensors
        ctx.saved = (x, None) if recompute else (x, saved)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        layer, layout, turn, seed = ctx.of
        (x, saved), ctx.saved = ctx.saved, None
        if saved is None:
            _, saved = layer.forward(x, layout, turn, seed)
        d_x, found = layer.backward(grad.contiguous(), layout, turn, seed, saved)
        return d_x, None, None, None, None, None, *found


class Decoder:
    """The layers of a causal LM of the family, in place of the library's own loop.

    Args:
        base: the library's model without its head, LoRA layers in place.
        residents: makes the frozen products of sibling linear layers.
    """

    def __init__(self, base: nn.Module, residents: Residents) -> None:
        self.base = base
        self.layers = [_layer(module, residents) for module in base.layers]

    @staticmethod
    def fits(base: nn.Module) -> bool:
        """Whether the layers compute what is written here, without windows or dropout."""
        config = base.config
        return (
            config.model_type in FAMILY
            and config.hidden_act == "silu"
            and not getattr(config, "use_sliding_window", False)
            and not getattr(config, "attention_dropout", 0.0)
        )

    def __call__(
        self,
        x: Tensor,
        positions: Tensor,
        layout: Layout,
        recompute: bool,
        picked: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """(N, H) embeddings -> (N, H) after the final norm, and the states that `picked` numbers.

        Args:
            positions: (N,) of each row in its text.
            picked: 0 for the embedding, i for the state after layer i, the last for the output.
        """
        cos, sin = self.base.rotary_emb(x.float(), position_ids=positions.unsqueeze(0))
        half = cos.shape[-1] // 2
        places = layout.forward_rows
        wide = torch.float32 if x.is_cpu else x.dtype
        turn = Turn(*(t[0, places, None, :half].to(wide) for t in (cos, sin)))
        states = [x]
        for layer in self.layers:
            seed = None
            if layer.module.training and layer.qkv.rate and layer.parameters():
                seed = new_seed()
            x = _Run.apply(x, layer, layout, turn, seed, recompute, *layer.parameters())
            if picked:
                states.append(x)
        out = self.base.norm(x)
        if picked:
            states[-1] = out
        return out, [states[i] for i in picked]


def _layer(module: nn.Module, residents: Residents) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    heads = attention.q_proj.out_features // attention.head_dim
    key_heads = attention.k_proj.out_features // attention.head_dim
    return Layer(
        norm1=_norm(module.input_layernorm),
        qkv=siblings_of([attention.q_proj, attention.k_proj, attention.v_proj], residents),
        o=siblings_of([attention.o_proj], residents),
        norm2=_norm(module.post_attention_layernorm),
        gate_up=siblings_of([mlp.gate_proj, mlp.up_proj], residents),
        down=siblings_of([mlp.down_proj], residents),
        attention=_Attention(heads, key_heads, attention.scaling),
        module=module,
    )


def _norm(module: nn.Module) -> Norm:
    return Norm(module.weight, module.variance_epsilon)
