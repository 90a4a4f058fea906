"""Ragged rows in linear layers, rectangles in attention: the packed pass of a pretrained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import Batch, UserError
from layouts import Groups

ROW_MULTIPLE = 16  # CPU kernels are compiled per shape: whole multiples of rows are met again
GROUPS = 3  # rectangles that attention is laid out in


def whole_rows(rows: int) -> int:
    """The multiple of ROW_MULTIPLE that rows are padded to."""
    return rows + -rows % ROW_MULTIPLE


def spread(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], zero where index is one past the end."""
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, 1)).index_select(0, index)


class _Take(torch.autograd.Function):
    """rows of x, where the gradient flows back through another index instead of by addition.

    `index` (N,) into x; `back` (rows of x,) into the result, or N where a row gets no gradient.
    """

    @staticmethod
    def forward(ctx, x, index, back):
        ctx.save_for_backward(back)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, d_out):
        (back,) = ctx.saved_tensors
        return spread(d_out, back), None, None


@dataclass(frozen=True)
class Layout:
    """How ragged rows and the padded places of attention map to each other.

    Args:
        groups: rows and places without the spare rows.
        to_places, from_places: (places,) the ragged row at each place, or `rows` where there is
            none; (rows,) the place of each ragged row, or `places` for a spare row.
    """

    groups: Groups
    forward_rows: Tensor
    forward_places: Tensor
    to_places: Tensor
    from_places: Tensor

    @classmethod
    def of(cls, batch: Batch, prefix: bool, rows: int) -> Layout:
        groups = Groups.of(batch, prefix, causal=True, count=GROUPS)
        places, used = len(groups.rows), len(groups.back)
        to_places = groups.rows.new_full((places,), rows)
        to_places[groups.back] = torch.arange(used, device=groups.back.device)
        from_places = F.pad(groups.back, (0, rows - used), value=places)
        return cls(
            groups, groups.rows, F.pad(groups.back, (0, rows - used)), to_places, from_places
        )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of ragged rows, each text to itself: transformers' attention interface.

    Linear layers see the rows of all texts end to end; only here are they laid out as rectangles,
    texts of like length together. Right padding under a causal rule is never seen, so no mask.

    Args:
        query, key, value: (1, heads, rows, d); key and value may have fewer heads.
        packed: the layout; reaches this function as a keyword of the model's forward.
    Returns:
        (1, rows, heads, d) and None for the weights.
    """
    layout, longest = packed, max(length for _, length in packed.groups.shapes)
    if softcap is not None or (sliding_window is not None and longest > sliding_window):
        raise UserError(
            "this backbone's attention has a soft cap or a window shorter than a text. Pass "
            "another --backbone, or a smaller --max-tokens."
        )
    parts = [
        _Take.apply(x[0].transpose(0, 1), layout.forward_rows, layout.from_places)
        for x in (query, key, value)
    ]
    if query.is_cpu:  # the CPU's bfloat16 kernel takes 100 times as long backwards on short texts
        parts = [x.float() for x in parts]
    seen, start = [], 0
    for texts, length in layout.groups.shapes:
        stop = start + texts * length
        q, k, v = (x[start:stop].unflatten(0, (texts, length)).transpose(1, 2) for x in parts)
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
        )
        seen.append(out.transpose(1, 2).flatten(0, 1))
        start = stop
    out = _Take.apply(torch.cat(seen).to(query.dtype), layout.forward_places, layout.to_places)
    return out.unsqueeze(0), None
