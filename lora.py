"""A lean LoRA layer: PEFT's equation and PEFT's weights in a third of its operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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


class _LoraLinear(torch.autograd.Function):
    """y = x W' + bias + scale (mask x) A' B' with W frozen, in the dtype of x.

    On a GPU, where memory is dear, x is saved, which sibling projections share, and the mask is
    drawn again from its seed; on a CPU, where random bits are dear, mask and masked x are saved.
    W may be rebuilt from its 4-bit form each time it is used.
    """

    @staticmethod
    def forward(ctx, x, a, b, layer, seed):
        down, up = a.to(x.dtype), (b * layer.gain(seed)).to(x.dtype)
        mask = None if seed is None else keep_mask(seed, x.numel(), layer.rate, x.device).view_as(x)
        dropped = masked(x, mask)
        inner = dropped @ down.T
        out = torch.nn.functional.linear(x, layer.weight(), layer.bias).addmm_(inner, up.T)
        ctx.save_for_backward(dropped if x.is_cpu else x, inner, down, up)
        ctx.layer, ctx.seed, ctx.mask, ctx.dtype = layer, seed, mask if x.is_cpu else None, a.dtype
        return out

    @staticmethod
    def backward(ctx, d_out):
        dropped, inner, down, up = ctx.saved_tensors
        layer, mask = ctx.layer, ctx.mask
        if ctx.seed is not None and mask is None:
            mask = keep_mask(ctx.seed, dropped.numel(), layer.rate, dropped.device).view_as(dropped)
            dropped = masked(dropped, mask)
        d_x = d_a = d_b = None
        d_inner = d_out @ up
        if ctx.needs_input_grad[1]:
            d_a = (d_inner.T @ dropped).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            d_b = (d_out.T @ inner).to(ctx.dtype).mul_(layer.gain(ctx.seed))
        if ctx.needs_input_grad[0]:
            d_x = (d_out @ layer.weight()).add_(masked(d_inner @ down, mask))
        return d_x, d_a, d_b, None, None


@dataclass
class LeanLora:
    """A callable to put in the place of a PEFT LoRA layer's forward.

    Args:
        a, b: (r, in) and (out, r) LoRA weights, shared with the layer.
        weight: gives the frozen (out, in) weight in the compute dtype.
        bias: (out,) or None.
        scale: lora_alpha / r.
        rate: LoRA dropout.
        module: the layer, for its train or eval mode.
    """

    a: Tensor
    b: Tensor
    weight: Callable[[], Tensor]
    bias: Tensor | None
    scale: float
    rate: float
    module: torch.nn.Module

    def gain(self, seed: int | None) -> float:
        # dropout's 1 / (1 - rate) belongs here: in a bfloat16 mask it would be rounded
        return self.scale if seed is None else self.scale / (1 - self.rate)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out); draws one seed from the default generator when training."""
        seed = None
        if self.module.training and self.rate:
            seed = int(torch.randint(2**62, ()))  # of the CPU's generator: no wait for the GPU
        flat = x.reshape(-1, x.shape[-1])
        out = _LoraLinear.apply(flat, self.a, self.b, self, seed)
        return out.view(*x.shape[:-1], -1)
