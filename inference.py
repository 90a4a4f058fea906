"""Statistical tests: what may be concluded from paired seeds and items.

Letters as in common.py, and S seeds, R resamples, J random compressors. A quantity is resampled by
weighting items: its counts under R weightings come from one matrix product, so the same draw
reaches every arm. Where a p-value can come from the bootstrap and from the seeds' own spread the
larger is taken, and of intervals the outer ends: a percentile bootstrap over few seeds alone
rejects too often (three seeds whose spread dominates: one interval in four misses), one over seeds
alone knows no items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from clustering import kmeans, nearest_centroid

ALPHA = 0.05
ARI_MARGIN = 0.05
ACCURACY_MARGIN = 0.005  # half an accuracy point
RANK_MARGIN = 0.05  # of the reference arm's rank: ranks have no scale of their own
FAMILY_SIZE = 6  # primary contrasts, measured or not
EXACT_LIMIT = 200_000  # combinations enumerated by the exchange test; more are drawn
CHUNK = 256  # weightings in one matrix product: 8 MB for 7,600 items


@dataclass(frozen=True)
class McNemar:
    """Discordant items of two classifiers and the exact two-sided p-value."""

    only_first: int
    only_second: int
    p: float


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """Exact McNemar test: the discordant items are fair coin flips if both err equally often.

    Args:
        first, second: (N,) bool, whether each classifier is right on the same items.
    Source: McNemar 1947, binomial form.
    """
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    return McNemar(b, c, float(stats.binomtest(b, b + c).pvalue) if b + c else 1.0)


def ari_of_tables(tables: np.ndarray) -> np.ndarray:
    """Adjusted Rand index of contingency tables (..., C, k) of counts -> (...).

    Source: Hubert & Arabie 1985.
    """
    tables = np.asarray(tables, np.float64)

    def pairs(counts):
        return (counts * (counts - 1)).sum(-1) / 2

    together = pairs(tables.reshape(*tables.shape[:-2], -1))
    rows, columns = pairs(tables.sum(-1)), pairs(tables.sum(-2))
    total = tables.sum((-2, -1))
    expected = rows * columns / (total * (total - 1) / 2)
    spread = (rows + columns) / 2 - expected
    # no spread: both partitions are trivial and equal, which scikit-learn scores 1 as well
    return np.where(spread == 0, 1.0, (together - expected) / np.where(spread == 0, 1, spread))


@dataclass(frozen=True)
class Statistic:
    """A quantity that depends on items through counts only.

    Args:
        codes: (J, N) int in 0..cells-1; J > 1 for the mean over J partitions.
        cells: number of codes.
        of_counts: (r, J, cells) counts -> (r, J).
    """

    codes: np.ndarray
    cells: int
    of_counts: Callable[[np.ndarray], np.ndarray]


def ari_statistic(labels: np.ndarray, partitions: np.ndarray) -> Statistic:
    """Mean ARI of partitions (N,) or (J, N) with labels (N,), all integers from 0."""
    partitions = np.atleast_2d(partitions)
    classes, k = int(labels.max()) + 1, int(partitions.max()) + 1

    def of_counts(counts):
        return ari_of_tables(counts.reshape(*counts.shape[:-1], classes, k))

    return Statistic(labels * k + partitions, classes * k, of_counts)


def share_statistic(correct: np.ndarray) -> Statistic:
    """Share of items (N,) bool that are right."""

    def of_counts(counts):
        return counts[..., 1] / counts.sum(-1)

    return Statistic(np.atleast_2d(correct).astype(np.int64), 2, of_counts)


def item_weights(n_items: int, resamples: int, seed: int) -> np.ndarray:
    """(R, N) uint8: how often each item occurs in each resample of N items with replacement.

    The first rows do not depend on R.
    """
    rng = np.random.default_rng([seed, n_items])
    weights = np.empty((resamples, n_items), np.uint8)
    for start in range(0, resamples, CHUNK):
        drawn = rng.integers(0, n_items, (CHUNK, n_items))[: resamples - start]
        flat = (drawn + n_items * np.arange(len(drawn))[:, None]).ravel()
        counts = np.bincount(flat, minlength=len(drawn) * n_items)
        weights[start : start + len(drawn)] = counts.reshape(len(drawn), n_items)
    return weights


def resample(statistic: Statistic, weights: np.ndarray) -> np.ndarray:
    """The statistic under each weighting (R, N) of the items, mean over its partitions -> (R,)."""
    j, n_items = statistic.codes.shape
    one_hot = np.zeros((n_items, j, statistic.cells), np.float32)
    np.put_along_axis(one_hot, statistic.codes.T[:, :, None], 1, axis=2)
    one_hot = one_hot.reshape(n_items, -1)
    out = np.empty(len(weights))
    for start in range(0, len(weights), CHUNK):
        # float32 counts are exact up to 2^24 items
        counts = (weights[start : start + CHUNK].astype(np.float32) @ one_hot).astype(np.float64)
        counts = counts.reshape(-1, j, statistic.cells)
        out[start : start + CHUNK] = statistic.of_counts(counts).mean(1)
    return out


def cosine_gap_draws(
    x: np.ndarray, labels: np.ndarray, weights: np.ndarray, centre: bool
) -> np.ndarray:
    """Within minus between mean cosine under each weighting of the items (R, N) -> (R,).

    Items are resampled, never pairs, and a pair of copies of one item is no pair: with unit rows
    u, S_c = sum w_i u_i and q_c = sum w_i^2, within = sum_c (|S_c|^2 - q_c) / sum_c (n_c^2 - q_c).
    The centre is the sample's own. nan where a resample has no such pair.
    """
    x = np.asarray(x, np.float64)
    x = x - x.mean(0) if centre else x
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    classes = int(labels.max()) + 1
    member = np.eye(classes, dtype=np.float32)[labels]
    spread = (member[:, :, None] * unit[:, None].astype(np.float32)).reshape(len(x), -1)
    norms = (unit**2).sum(1).astype(np.float32)[:, None]  # 0 for a row that equals the centre
    out = np.empty(len(weights))
    for start in range(0, len(weights), CHUNK):
        w = weights[start : start + CHUNK].astype(np.float32)
        sums = (w @ spread).reshape(len(w), classes, -1).astype(np.float64)
        n, q, own = w @ member, (w**2) @ member, (w**2) @ (member * norms)
        squares, whole = (sums**2).sum((1, 2)), (sums.sum(1) ** 2).sum(1)
        same = (n**2 - q).sum(1)
        other = n.sum(1) ** 2 - (n**2).sum(1)
        same, other = (np.where(pairs > 0, pairs, np.nan) for pairs in (same, other))
        out[start : start + CHUNK] = (squares - own.sum(1)) / same - (whole - squares) / other
    return out


def partition_stability(
    x: np.ndarray, k: int, seed: int = 0, refits: int = 20, restarts: int = 5
) -> float:
    """Mean ARI between partitions of all items by k-means refitted on resamples of the items."""
    rng = np.random.default_rng(seed)
    partitions = []
    for refit in range(refits):
        drawn = rng.integers(0, len(x), len(x))
        centroids = kmeans(x[drawn], k, refit, restarts).centroids
        partitions.append(nearest_centroid(x, centroids))
    member = np.stack([np.eye(k)[p] for p in partitions])
    scores = ari_of_tables(np.einsum("ani,bnj->abij", member, member, optimize=True))
    return float(scores[np.triu_indices(refits, 1)].mean())


def crossed(draws: np.ndarray, seed: int) -> np.ndarray:
    """Crossed bootstrap: mean over resampled seeds of the item-resampled quantity.

    Args:
        draws: (R, S), the quantity of every seed under one and the same draw of items per row; for
            a contrast the difference of the arms, so both see the same seeds and items.
    Returns:
        (R,) resampled means; one seed leaves the items' share alone.
    Source: Owen 2007 (pigeonhole bootstrap).
    """
    resamples, seeds = draws.shape
    chosen = np.random.default_rng([seed, seeds]).integers(0, seeds, (resamples, seeds))
    return np.take_along_axis(draws, chosen, 1).mean(1)


@dataclass(frozen=True)
class Interval:
    """Mean over n_seeds seeds; low and high None where nothing tells the spread."""

    mean: float | None
    low: float | None
    high: float | None
    n_seeds: int


def interval(
    values: np.ndarray, draws: np.ndarray | None = None, level: float = 1 - ALPHA
) -> Interval:
    """Mean of one value a seed (S,): percentiles of draws (R,) and Student's t, the outer ends.

    Without draws, or with a single seed, the other alone.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        return Interval(None, None, None, 0)
    mean, ends = float(values.mean()), []
    draws = np.zeros(0) if draws is None else draws[np.isfinite(draws)]
    if len(draws):
        ends += np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]).tolist()
    if len(values) > 1:
        half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values))
        ends += [mean - half, mean + half]
    return Interval(mean, min(ends, default=None), max(ends, default=None), len(values))


def _tails(values: np.ndarray, draws: np.ndarray | None, bound: float) -> tuple[float, float]:
    """p-values of 'the mean is not above bound' and 'not below bound': the larger of two tests."""
    above, below = [], []
    if draws is not None:
        count = len(draws) + 1  # +1: the sample itself is one of the possible draws
        above.append((1 + (draws <= bound).sum()) / count)
        below.append((1 + (draws >= bound).sum()) / count)
    if len(values) > 1:
        error, distance = stats.sem(values), values.mean() - bound
        t = distance / error if error > 0 else np.sign(distance) * np.inf if distance else 0.0
        above.append(stats.t.sf(t, len(values) - 1))
        below.append(stats.t.cdf(t, len(values) - 1))
    return (float(max(above)), float(max(below))) if above else (1.0, 1.0)


def difference_p(values: np.ndarray, draws: np.ndarray | None) -> float | None:
    """Two-sided p-value of a mean difference of 0.

    The larger of the crossed bootstrap's (items and seeds, +1 corrected) and, with two seeds or
    more, Student's t over the seeds' differences.

    Args:
        values: (S,) a difference per seed; draws: (R,) of `crossed`, or None (seeds alone).
    Returns:
        None where neither can be computed.
    """
    if draws is None and len(values) < 2:
        return None
    return min(1.0, 2 * min(_tails(np.asarray(values, np.float64), draws, 0.0)))


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests: p is that of 'the difference reaches the margin'; 90 % interval."""

    margin: float
    p: float
    low: float | None
    high: float | None
    equivalent: bool


def equivalence(
    values: np.ndarray, draws: np.ndarray | None, margin: float, alpha: float = ALPHA
) -> Equivalence | None:
    """TOST: whether a mean difference lies inside -margin..margin; arguments as `difference_p`.

    Source: Schuirmann 1987; its 1 - 2 alpha interval is returned with it.
    """
    values = np.asarray(values, np.float64)
    if draws is None and len(values) < 2:
        return None
    p = max(_tails(values, draws, -margin)[0], _tails(values, draws, margin)[1])
    inner = interval(values, draws, 1 - 2 * alpha)
    return Equivalence(float(margin), p, inner.low, inner.high, bool(p < alpha))


def exchange_p(trained: np.ndarray, band: np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of 'the trained compressor is one more draw of the random law'.

    Within each seed the trained value and its J draws are exchangeable under the null, so the mean
    over seeds of one value picked in each is its null distribution: exact up to EXACT_LIMIT
    combinations, else drawn. One seed cannot go below 2 / (J + 1).

    Args:
        trained: (S,); band: (S, J), the same metric of random compressors on the same features.
    """
    pooled = np.column_stack([trained, band])
    seeds, choices = pooled.shape
    if choices**seeds <= EXACT_LIMIT:
        null = np.zeros(1)
        for values in pooled:
            null = (null[:, None] + values).ravel()
        extra = 0
    else:
        picked = np.random.default_rng(seed).integers(0, choices, (EXACT_LIMIT // 2, seeds))
        null = pooled[np.arange(seeds), picked].sum(1)
        extra = 1
    observed, tolerance = np.sum(trained), 1e-9
    tails = [(null >= observed - tolerance).sum(), (null <= observed + tolerance).sum()]
    return float(min(1.0, 2 * (min(tails) + extra) / (len(null) + extra)))


def holm(p: Sequence[float | None], size: int = FAMILY_SIZE) -> list[float | None]:
    """Holm's adjusted p-values in a family of fixed size; None (not measured) stays None.

    A contrast that was not measured counts as one that would have failed: leaving it out does not
    make the others easier.
    """
    order = sorted((i for i, x in enumerate(p) if x is not None), key=lambda i: p[i])
    adjusted, worst = list(p), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (size - rank) * p[i]))
        adjusted[i] = worst
    return adjusted


def benjamini_hochberg(p: Sequence[float | None]) -> list[float | None]:
    """Benjamini and Hochberg's adjusted p-values; None stays None and is not counted."""
    known = [i for i, x in enumerate(p) if x is not None]
    adjusted = list(p)
    if known:
        for i, x in zip(known, stats.false_discovery_control([p[i] for i in known]), strict=True):
            adjusted[i] = float(x)
    return adjusted


def adjust(contrasts: Sequence[Mapping]) -> list[dict]:
    """Contrast rows with p_adjusted: Holm within `primary`, Benjamini-Hochberg in the rest."""
    out = [dict(row) for row in contrasts]
    for family, method in (("primary", holm), ("exploratory", benjamini_hochberg)):
        members = [row for row in out if row["family"] == family]
        for row, p in zip(members, method([row["p"] for row in members]), strict=True):
            row["p_adjusted"] = p
    return out
