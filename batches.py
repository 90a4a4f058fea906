"""Texts as token ids, and which of them make a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from common import Batch, UserError
from data import Split


class WordVocabulary:
    """Lower-cased white-space words; `words[i]` is the word of id i, ids 0 and 1 are special."""

    PAD, UNK = 0, 1

    def __init__(self, words: Sequence[str]):
        self.words = ("<pad>", "<unk>", *words)
        self._ids = {word: i for i, word in enumerate(words, 2)}

    @classmethod
    def build(cls, texts: Iterable[str], size: int = 8000) -> WordVocabulary:
        """The size - 2 most frequent words of the training texts; ties go by word order."""
        counts = Counter(chain.from_iterable(text.lower().split() for text in texts))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ranked[: size - 2])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Word ids of each text, UNK for a word outside the vocabulary."""
        find = self._ids.get
        return [[find(word, self.UNK) for word in text.lower().split()] for text in texts]


@dataclass(frozen=True)
class Encoded:
    """A split as token ids: text i is `tokens[offsets[i] : offsets[i + 1]]`.

    Args:
        tokens: (sum of lengths,) int64.
        offsets: (N + 1,) int64, numpy.
        labels: (N,) int64.
        truncated: texts that were cut.
    """

    tokens: Tensor
    offsets: np.ndarray
    labels: Tensor
    truncated: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64, tokens of each text."""
        return np.diff(self.offsets)

    def batch(self, items: np.ndarray) -> Batch:
        """The packed batch of the given row numbers, in that order."""
        items = np.asarray(items, dtype=np.int64)
        lengths = self.offsets[items + 1] - self.offsets[items]
        shift = self.offsets[items] - (np.cumsum(lengths) - lengths)
        rows = torch.from_numpy(np.repeat(shift, lengths) + np.arange(lengths.sum()))
        index = torch.from_numpy(items)
        return Batch(self.tokens[rows], torch.from_numpy(lengths), self.labels[index], index)

    def select(self, items: np.ndarray) -> Encoded:
        """The given rows as a split of their own."""
        part = self.batch(items)
        offsets = np.concatenate([[0], np.cumsum(part.lengths.numpy())])
        return Encoded(part.tokens, offsets, part.labels, 0)


def encode(
    split: Split, tokenize: Callable[[Sequence[str]], list[list[int]]], max_tokens: int
) -> Encoded:
    """Tokenize a split and cut each text at max_tokens, counting the cuts."""
    ids = tokenize(list(split.texts))
    full = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    if (full == 0).any():
        row = int(np.argmin(full))
        raise UserError(
            f"{split.name} row {row + 1}: text {split.texts[row][:40]!r} gives no tokens. "
            f"Remove it. {(full == 0).sum()} such rows."
        )
    offsets = np.concatenate([[0], np.cumsum(np.minimum(full, max_tokens))])
    flat = chain.from_iterable(text[:max_tokens] for text in ids)
    tokens = np.fromiter(flat, dtype=np.int64, count=int(offsets[-1]))
    labels = torch.from_numpy(split.labels.copy())
    return Encoded(torch.from_numpy(tokens), offsets, labels, int((full > max_tokens).sum()))


def batch_order(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, window: int = 50
) -> list[np.ndarray]:
    """Row numbers of each training batch of an epoch, every row once.

    A pure function of its arguments, so a resumed run sees the same batches. Rows are shuffled,
    sorted by length within windows, cut, and shuffled again within each batch, because feedback
    pairs the first half of a batch with the second. The one short batch is a random sample.

    Args:
        lengths: (N,) tokens of each text.
        window: batches sorted together; 0 or 1 for plain random batches.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    if window <= 1:
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    whole = len(order) - len(order) % batch_size
    batches = [order[whole:]] if whole < len(order) else []
    for start in range(0, whole, window * batch_size):
        rows = order[start : min(start + window * batch_size, whole)]
        rows = rows[np.argsort(lengths[rows], kind="stable")].reshape(-1, batch_size)
        batches.extend(rng.permuted(rows, axis=1))
    return [batches[i] for i in rng.permutation(len(batches))]


def eval_order(lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Row numbers of evaluation batches, longest texts first, at most tokens_per_batch each."""
    order = np.argsort(-lengths, kind="stable")
    batches, start, total = [], 0, 0
    for i, row in enumerate(order):
        if total + lengths[row] > tokens_per_batch and i > start:
            batches.append(order[start:i])
            start, total = i, 0
        total += lengths[row]
    return [*batches, order[start:]]
