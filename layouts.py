"""Where the rows of a ragged batch stand in the rectangles that attention needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from common import Batch


def _length_and_token(shapes: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Of each place in groups of (texts, length): the length, and how far into its text it is."""
    texts, lengths = np.array(shapes).T
    sizes = texts * lengths
    length = np.repeat(lengths, sizes)
    return length, (np.arange(len(length)) - np.repeat(sizes.cumsum() - sizes, sizes)) % length


@dataclass(frozen=True)
class HeadPlaces:
    """Where the vectors of single heads stand, in order (parts, groups, texts, heads, length).

    One gather takes (rows, parts * heads * d) there, padded and in that order; two, by rows and
    then by heads, take three times as long.

    Args:
        rows: (parts * places,) the vector at each place, counted over rows, parts and heads.
        back: (rows * parts * heads,) the place of each vector.
        padding: the places of a part that hold none.
        shapes: (texts * heads, length) of each group.
    """

    rows: Tensor
    back: Tensor
    padding: Tensor
    shapes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, groups: Groups, heads: int, *parts: int) -> list[HeadPlaces]:
        """Of groups on a CPU, for each number of parts."""
        length, token = _length_and_token(groups.shapes)
        head = np.arange(heads)[:, None]
        place = (np.arange(len(token)) - token) * heads + token + length * head
        by_place = np.ascontiguousarray(place.T)
        back, padding = (by_place.take(at.numpy(), 0) for at in (groups.back, groups.padding))
        shapes = tuple((texts * heads, longest) for texts, longest in groups.shapes)
        found, first = [], np.empty(place.size, np.int64)
        for count in parts:
            first[place] = groups.rows.numpy() * (count * heads) + head
            there = np.concatenate([first + part * heads for part in range(count)])
            home = np.concatenate([back + part * place.size for part in range(count)], 1)
            indices = (torch.from_numpy(index.ravel()) for index in (there, home, padding))
            found.append(cls(*indices, shapes))
        return found

    def spread(self, x: Tensor, d: int) -> Tensor:
        """(rows, parts * heads * d) -> (parts * places, d); padding holds row 0."""
        return x.view(-1, d).index_select(0, self.rows)

    def views(self, placed: Tensor) -> list[tuple[Tensor, ...]]:
        """(parts * places, d) -> of each group its parts, each (texts * heads, length, d)."""
        found, start, d = [], 0, placed.shape[1]
        places = sum(texts * length for texts, length in self.shapes)
        parts = len(placed) // places
        for texts, length in self.shapes:
            strides = places * d, length * d, d, 1
            view = placed.as_strided((parts, texts, length, d), strides, start)
            found.append(view.unbind())
            start += texts * length * d
        return found

    def gather(self, placed: Tensor, width: int) -> Tensor:
        """(parts * places, d) -> (rows, width), width = parts * heads * d."""
        return placed.index_select(0, self.back).view(-1, width)


@dataclass(frozen=True)
class Groups:
    """Where the rows of a ragged batch stand when padded for attention, in groups of like length.

    Linear layers see real rows only; attention needs a rectangle. Texts are grouped by length, so
    the rectangles hold little padding although the batch itself is random.

    Args:
        rows: (padded rows,) the ragged row at each place, group after group; padding points at
            row 0, which no real query sees.
        back: (ragged rows,) the place of each ragged row.
        padding: the places that hold no row.
        shapes: (texts, length) of each group.
        masks: per group (texts, 1, 1, length), True where a key is real; None when causal, since
            right padding is then never seen.
        placed: what `by_head` has made, by number of heads: blocks share it.
    """

    rows: Tensor
    back: Tensor
    padding: Tensor
    shapes: tuple[tuple[int, int], ...]
    masks: tuple[Tensor | None, ...]
    placed: dict[int, list[HeadPlaces]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, batch: Batch, prefix: bool, causal: bool, count: int = 3) -> Groups:
        """Group a batch whose ragged rows are its T tokens, then, with a prefix, B prefixes."""
        before = int(prefix)
        tokens, lengths = len(batch.tokens), batch.host_lengths + before
        starts = lengths.cumsum() - lengths - before * np.arange(len(lengths))
        order, size = np.argsort(lengths, kind="stable"), -(-len(lengths) // count)
        parts = [order[i : i + size] for i in range(0, len(order), size)]
        shapes = tuple((len(texts), int(lengths[texts[-1]])) for texts in parts)
        length, token = _length_and_token(shapes)
        text = np.repeat(order, length[token == 0])
        real = token < lengths[text]
        index = starts[text] + token - before
        if prefix:
            index = np.where(token == 0, tokens + text, index)
        back = np.empty(tokens + before * len(lengths), np.int64)
        back[index[real]] = np.flatnonzero(real)
        masks: list[np.ndarray | None] = [None] * len(shapes)
        if not causal:
            split = np.split(real, np.cumsum([texts * longest for texts, longest in shapes[:-1]]))
            masks = [m.reshape(n, 1, 1, -1) for m, (n, _) in zip(split, shapes, strict=True)]

        def on_device(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(batch.tokens.device)

        return cls(
            *map(on_device, (np.where(real, index, 0), back, np.flatnonzero(~real))),
            shapes,
            tuple(None if mask is None else on_device(mask) for mask in masks),
        )

    @cached_property
    def later(self) -> Tensor:
        """(L, L) for keys by queries: -inf where the key stands after the query."""
        return torch.full((self.longest, self.longest), -torch.inf).tril_(-1)

    def by_head(self, heads: int) -> list[HeadPlaces]:
        """Of queries, keys and values together, and of what attention returns; on a CPU."""
        if heads not in self.placed:
            self.placed[heads] = HeadPlaces.of(self, heads, 3, 1)
        return self.placed[heads]

    @property
    def longest(self) -> int:
        return max(length for _, length in self.shapes)

    def split(self, places: Tensor, heads: int) -> list[Tensor]:
        """(places, heads * d) as (texts, length, heads, d) views, one a group."""
        parts = places.split([texts * length for texts, length in self.shapes])
        pairs = zip(parts, self.shapes, strict=True)
        return [part.view(*shape, heads, -1) for part, shape in pairs]
