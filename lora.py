"""Linear layers with LoRA, forward and backward written out: PEFT's equation, PEFT's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


def keep_mask(seed: int, size: int, rate: float, device: torch.device) -> Tensor:
    """(size,) int16: all bits set where dropout keeps, none where it drops.

    A pure function of its arguments. Sixteen random bits an element, compared in whole-number
    arithmetic: many times cheaper on a CPU than `F.dropout`; the rate is met to within 2^-17.
    """
    count = -(-size // 4)
    if device.type == "cpu":  # NumPy's SFC64 is twice as fast as torch's Mersenne twister
        drawn = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, count, np.uint64)
        words = torch.from_numpy(drawn.view(np.int64))
    else:
        generator = torch.Generator(device).manual_seed(seed)
        words = torch.empty(count, dtype=torch.int64, device=device)
        words.random_(-(2**63), None, generator=generator)
    lanes = words.view(torch.int16)[:size]
    first_kept = round(rate * 2**16) - 2**15
    return torch.ge(lanes, first_kept, out=torch.empty_like(lanes)).neg_()


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with the dropped elements at 0; not scaled."""
    if mask is None:
        return x
    if x.dtype.itemsize == 2:
        return (x.view(torch.int16) & mask).view(x.dtype)
    return x * (mask != 0)


def new_seed() -> int:
    """Of dropout, from the CPU's default generator: no wait for the GPU."""
    return int(torch.randint(2**62, ()))


def _weight_of(base: nn.Linear) -> Callable[[], Tensor]:
    """A function that gives a layer's weight in the compute type."""
    if getattr(base.weight, "quant_state", None) is None:
        return lambda: base.weight
    import bitsandbytes

    return lambda: bitsandbytes.functional.dequantize_4bit(
        base.weight.data, base.weight.quant_state
    )


class Frozen:
    """Weights of sibling linear layers that never change: x -> x W' + b, and g -> g W.

    In bfloat16 on a CPU both forms are packed once for its matrix kernels, which would otherwise
    pack them again for every product; `weights` that are kept dense are joined; others are rebuilt
    from 4 bits whenever they are used.

    Args:
        weights: each gives a (out, in) matrix in the compute type.
        biases: (out,) or None, one per weight.
        keep: whether there is room to hold them.
    """

    def __init__(
        self, weights: Sequence[Callable[[], Tensor]], biases: Sequence[Tensor | None], keep: bool
    ) -> None:
        self.weights, self.bias, self.packed = list(weights), None, None
        if any(bias is not None for bias in biases):
            pairs = zip(weights, biases, strict=True)
            self.bias = torch.cat([w().new_zeros(len(w())) if b is None else b for w, b in pairs])
        if not keep:
            return
        whole = torch.cat([weight() for weight in weights]) if len(weights) > 1 else weights[0]()
        if whole.is_cpu and whole.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
            pack = torch.ops.mkldnn._reorder_linear_weight
            self.packed = pack(whole), pack(whole.t().contiguous())
        else:
            self.weights = [lambda: whole]

    def _product(self, x: Tensor, back: bool) -> Tensor:
        bias = None if back or self.bias is None else self.bias.to(x.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed[back], bias, "none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, sum of outs)."""
        if self.packed:
            return self._product(x, False)
        outs = [x @ weight().T for weight in self.weights]
        out = torch.cat(outs, 1) if len(outs) > 1 else outs[0]
        return out if self.bias is None else out.add_(self.bias.to(x.dtype))

    def backward(self, grad: Tensor) -> Tensor:
        """(N, sum of outs) -> (N, in)."""
        if self.packed:
            return self._product(grad.contiguous(), True)
        total, start = None, 0
        for weight in self.weights:
            matrix = weight()
            part = grad[:, start : start + len(matrix)]
            start += len(matrix)
            total = part @ matrix if total is None else total.addmm_(part, matrix)
        return total


@dataclass
class Siblings:
    """Projections of one input: frozen weights and the LoRA pairs of those that have one.

    Args:
        frozen: all of them, in order. outs: (out,) sizes in that order.
        adapters: (index, A (r, in), B (out, r)) of each adapted one.
        gain: lora_alpha / r. rate: LoRA dropout, a mask of its own for each.
    """

    frozen: Frozen
    outs: list[int]
    adapters: list[tuple[int, Tensor, Tensor]]
    gain: float
    rate: float

    def parameters(self) -> list[Tensor]:
        """A, B, A, B, .. of the adapted projections."""
        return [p for _, *pair in self.adapters for p in pair]

    def masks(self, x: Tensor, seed: int | None) -> list[Tensor | None]:
        """A dropout mask (N, in) for each adapter, from one draw; None without a seed."""
        count = len(self.adapters)
        if seed is None:
            return [None] * count
        drawn = keep_mask(seed, count * x.numel(), self.rate, x.device)
        return [mask.view_as(x) for mask in drawn.split(x.numel())]

    def forward(self, x: Tensor, masks: Sequence[Tensor | None]) -> tuple[Tensor, tuple]:
        """(N, in) -> (N, sum of outs), and what `backward` needs; masks: (N, in), one an adapter.

        out = x W' + b + sum_i gain (mask_i x) A_i' B_i' at the columns of projection i.
        """
        out = self.frozen.forward(x)
        if not self.adapters:
            return out, ()
        # dropout's 1 / (1 - rate) belongs here: in a bfloat16 mask it would be rounded
        gain = self.gain if masks[0] is None else self.gain / (1 - self.rate)
        downs = [a.detach().to(x.dtype) for _, a, _ in self.adapters]
        pairs = zip(masks, downs, strict=True)
        inner = torch.cat([masked(x, mask) @ down.T for mask, down in pairs], 1)
        up = x.new_zeros(sum(self.outs), inner.shape[1])
        for rows, columns, (_, _, b) in zip(*self._blocks(), self.adapters, strict=True):
            torch.mul(b.detach(), gain, out=up[rows, columns])
        out.addmm_(inner, up.T)
        return out, (x, downs, inner, up, gain)

    def backward(
        self, grad: Tensor, saved: tuple, masks: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients of the input (N, in) and of A, B, A, B, .. in float32."""
        d_x, found = self.frozen.backward(grad), []
        if not self.adapters:
            return d_x, found
        x, downs, inner, up, gain = saved
        d_inner = grad @ up
        d_up = grad.T @ inner
        for i, (rows, columns) in enumerate(zip(*self._blocks(), strict=True)):
            part = d_inner[:, columns]
            d_down = part.T @ masked(x, masks[i])
            found += [d_down.float(), d_up[rows, columns].float().mul_(gain)]
            d_x += masked(part @ downs[i], masks[i])
        return d_x, found

    def _blocks(self) -> tuple[list[slice], list[slice]]:
        starts = [sum(self.outs[:i]) for i in range(len(self.outs))]
        rows, columns, at = [], [], 0
        for index, a, _ in self.adapters:
            rows.append(slice(starts[index], starts[index] + self.outs[index]))
            columns.append(slice(at, at + len(a)))
            at += len(a)
        return rows, columns


class Residents:
    """Makes the Frozen of sibling linear layers, kept dequantised while `room` bytes last."""

    def __init__(self, room: float) -> None:
        self.room = room

    def __call__(self, bases: Sequence[nn.Linear]) -> Frozen:
        weight = bases[0].weight
        quantised = getattr(weight, "quant_state", None) is not None
        copies = 2 if weight.is_cpu else 1  # packed for forward and for backward
        needed = 2 * copies * sum(base.in_features * base.out_features for base in bases)
        keep = needed <= self.room
        if keep:
            self.room -= needed
        weights = [_weight_of(base) for base in bases]
        # weights that are there anyway cost no room, unless joining or packing copies them
        return Frozen(weights, [base.bias for base in bases], keep and (quantised or weight.is_cpu))


def siblings_of(modules: Sequence[nn.Module], residents: Residents) -> Siblings:
    """Of linear layers that read the same input, with PEFT's LoRA around some or none."""
    adapted = [(i, m) for i, m in enumerate(modules) if hasattr(m, "lora_A")]
    first = adapted[0][1] if adapted else None
    return Siblings(
        frozen=residents([m.get_base_layer() if hasattr(m, "lora_A") else m for m in modules]),
        outs=[m.out_features for m in modules],
        adapters=[(i, m.lora_A["default"].weight, m.lora_B["default"].weight) for i, m in adapted],
        gain=first.scaling["default"] if first else 1.0,
        rate=getattr(first.lora_dropout["default"], "p", 0.0) if first else 0.0,
    )


class _LoraLinear(torch.autograd.Function):
    """`Siblings` as a node of the graph, which recomputation may drop and run again."""

    @staticmethod
    def forward(ctx, x, siblings, seed, *parameters):
        mask = siblings.masks(x, seed)
        out, saved = siblings.forward(x, mask)
        rows, downs, inner, up, ctx.gain = saved
        ctx.save_for_backward(rows, inner, up, *downs)
        # random bits are dear on a CPU, memory on a GPU: there they are drawn again
        ctx.siblings, ctx.seed, ctx.masks = siblings, seed, mask if x.is_cpu else None
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, inner, up, *downs = ctx.saved_tensors
        masks = ctx.masks or ctx.siblings.masks(x, ctx.seed)
        saved = x, downs, inner, up, ctx.gain
        d_x, found = ctx.siblings.backward(grad.contiguous(), saved, masks)
        return d_x, None, None, *found


@dataclass
class LeanLora:
    """A callable to put in the place of a PEFT LoRA layer's forward.

    Args:
        siblings: the layer's own projection. module: the layer, for its train or eval mode.
    """

    siblings: Siblings
    module: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out); draws one seed from the default generator when training."""
        seed = new_seed() if self.module.training and self.siblings.rate else None
        flat = x.reshape(-1, x.shape[-1])
        out = _LoraLinear.apply(flat, self.siblings, seed, *self.siblings.parameters())
        return out.view(*x.shape[:-1], -1)
