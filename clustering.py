"""Clustering of representations and its scores: arrays in, numbers out.

N examples, C classes, E width of a representation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from sklearn.metrics.cluster import contingency_matrix


@dataclass(frozen=True)
class KMeansFit:
    """clusters (N,) int, centroids (k, E)."""

    clusters: np.ndarray
    centroids: np.ndarray


def kmeans(x: np.ndarray, k: int, seed: int = 0, n_init: int = 50) -> KMeansFit:
    """k-means of the rows of x (N, E), best of n_init restarts. Source: published, n_init ours."""
    fit = KMeans(k, n_init=n_init, random_state=seed).fit(np.asarray(x, dtype=np.float64))
    return KMeansFit(fit.labels_, fit.cluster_centers_)


def nearest_centroid(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(N,) index of the centroid (k, E) nearest to each row of x (N, E)."""
    x, centroids = np.asarray(x, np.float64), np.asarray(centroids, np.float64)
    return ((centroids**2).sum(1) - 2 * x @ centroids.T).argmin(1)


def adjusted_rand(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Adjusted Rand index: 1 for equal partitions, 0 expected by chance (Hubert & Arabie 1985)."""
    return float(adjusted_rand_score(labels, clusters))


def adjusted_mutual_information(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Mutual information over its chance value, 1 for equal partitions (Vinh et al. 2010)."""
    return float(adjusted_mutual_info_score(labels, clusters))


@dataclass(frozen=True)
class ClusterMatch:
    """accuracy under the best one-to-one mapping {cluster: class}; recall_per_class (C,)."""

    accuracy: float
    mapping: dict[int, int]
    recall_per_class: list[float]


def cluster_accuracy(labels: np.ndarray, clusters: np.ndarray) -> ClusterMatch:
    """Share of items whose cluster maps to their class, mapping chosen to maximise it.

    Works for any number of clusters; those left over by the one-to-one mapping count as wrong.
    `recall_per_class` is the share of each class that lies in its most common cluster (what the
    study calls purity).

    Args:
        labels: (N,) int classes.
        clusters: (N,) int clusters.
    Source: Hungarian method on the contingency matrix (Kuhn 1955).
    """
    table = contingency_matrix(labels, clusters)
    classes, found = np.unique(labels), np.unique(clusters)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return ClusterMatch(
        accuracy=float(table[rows, columns].sum() / len(labels)),
        mapping={int(found[c]): int(classes[r]) for r, c in zip(rows, columns, strict=True)},
        recall_per_class=(table.max(1) / table.sum(1)).tolist(),
    )


@dataclass(frozen=True)
class CosineGap:
    """Mean cosine of distinct pairs of one class and of pairs of two classes."""

    within: float
    between: float


def cosine_gap(x: np.ndarray, labels: np.ndarray, centre: bool = False) -> CosineGap:
    """Mean cosine similarity within and between classes, in O(N E).

    With u the unit rows, S_c their class sums and S their sum:
    within = sum_c (|S_c|^2 - n_c) / sum_c n_c (n_c - 1),
    between = (|S|^2 - sum_c |S_c|^2) / (N^2 - sum_c n_c^2).

    Args:
        x: (N, E); centre: subtract the mean row first (raw cosines carry the tanh bias).
        labels: (N,) int.
    Returns:
        The two means, nan where there is no such pair.
    """
    x = np.asarray(x, dtype=np.float64)
    if centre:
        x = x - x.mean(0)
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), x.shape[1]))
    np.add.at(sums, codes, unit)
    squares = (sums**2).sum()
    same, other = (counts * (counts - 1)).sum(), len(x) ** 2 - (counts**2).sum()
    whole = (sums.sum(0) ** 2).sum()
    return CosineGap(
        within=float((squares - (unit**2).sum()) / same) if same else float("nan"),
        between=float((whole - squares) / other) if other else float("nan"),
    )


def effective_rank(x: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values of the centred matrix x (N, E).

    Between 1 and min(N, E), and capped by N: compare only at equal N.
    Source: Roy & Vetterli 2007.
    """
    x = np.asarray(x, dtype=np.float64)
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


@dataclass(frozen=True)
class EngramMetrics:
    """The engram's scores against the classes; excess_ari is ari - ari of the predictions."""

    ari: float
    ami: float
    cluster_accuracy: float
    excess_ari: float
    cosine_within: float
    cosine_between: float
    centred_cosine_within: float
    centred_cosine_between: float
    mapping: dict[int, int]
    recall_per_class: list[float]


def engram_metrics(
    engram: np.ndarray, labels: np.ndarray, predictions: np.ndarray, seed: int = 0
) -> EngramMetrics:
    """Cluster engrams (N, E) by k-means with k = C and score the clusters against labels (N,).

    Excess ARI = ARI(clusters, labels) - ARI(predictions, labels): what the clusters hold beyond
    the classifier's own predictions (N,).
    """
    clusters = kmeans(engram, len(np.unique(labels)), seed).clusters
    ari = adjusted_rand(labels, clusters)
    match = cluster_accuracy(labels, clusters)
    raw, centred = cosine_gap(engram, labels), cosine_gap(engram, labels, centre=True)
    return EngramMetrics(
        ari=ari,
        ami=adjusted_mutual_information(labels, clusters),
        cluster_accuracy=match.accuracy,
        excess_ari=ari - adjusted_rand(labels, predictions),
        cosine_within=raw.within,
        cosine_between=raw.between,
        centred_cosine_within=centred.within,
        centred_cosine_between=centred.between,
        mapping=match.mapping,
        recall_per_class=match.recall_per_class,
    )
