"""Metrics of one representation, and what stands beside it: random compressors, PCA, clusterings.

Letters as in common.py, and J random compressors.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass

import numpy as np
from sklearn.cluster import AgglomerativeClustering
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import RidgeClassifierCV
from sklearn.metrics import silhouette_score, v_measure_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import StratifiedKFold, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from clustering import (
    adjusted_mutual_information,
    adjusted_rand,
    cluster_accuracy,
    cosine_gap,
    kmeans,
    nearest_centroid,
)

PROBE_ALPHAS = (1.0, 100.0, 10_000.0)
PROBE_FOLDS = 5


@dataclass(frozen=True)
class Spectrum:
    """Sizes of the centred matrix: all between 1 and min(N, width), all capped by N."""

    effective_rank: float
    stable_rank: float
    participation_ratio: float
    dims_95: int


def spectrum(x: np.ndarray) -> Spectrum:
    """Effective rank, stable rank, participation ratio and dimensions that hold 95 % of variance.

    With singular values s of the centred matrix (N, width) and variances l = s^2: effective rank
    exp(H(s / sum s)) (Roy & Vetterli 2007); stable rank sum l / max l; participation ratio
    (sum l)^2 / sum l^2. A constant matrix has 0 of each. Compare only at equal N.
    """
    x = np.asarray(x, np.float64)
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    variances = values**2
    total = variances.sum()
    if total == 0:
        return Spectrum(0.0, 0.0, 0.0, 0)
    shares = values[values > 0] / values.sum()
    return Spectrum(
        effective_rank=float(np.exp(-(shares * np.log(shares)).sum())),
        stable_rank=float(total / variances[0]),
        participation_ratio=float(total**2 / (variances**2).sum()),
        dims_95=int(np.searchsorted(variances.cumsum(), 0.95 * total) + 1),
    )


def class_means(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(C, width) mean of each class; labels (N,) are 0..C-1, each present."""
    member = np.eye(int(labels.max()) + 1)[labels]
    return (member.T @ x) / member.sum(0)[:, None]


def nc1(x: np.ndarray, labels: np.ndarray) -> float:
    """Within-class variability tr(S_W S_B^+) / C; 0 when every class is a point.

    S_W is the mean squared deviation from the class mean, S_B that of the class means from their
    own mean. S_B has rank C - 1, so S_W is needed along its few eigenvectors only.

    Returns:
        nan where the class means coincide.
    Source: Papyan, Han & Donoho 2020.
    """
    x = np.asarray(x, np.float64)
    means = class_means(x, labels)
    _, sizes, directions = np.linalg.svd(means - means.mean(0), full_matrices=False)
    kept = sizes > sizes.max() * 1e-9
    if not kept.any():
        return float("nan")
    within = ((x - means[labels]) @ directions[kept].T) ** 2
    # S_B = (centred means)^T (centred means) / C, and the C of the quotient cancels its C
    return float((within.mean(0) / sizes[kept] ** 2).sum())


def nc4(x: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of items whose nearest class mean is the class that the classifier predicts."""
    x = np.asarray(x, np.float64)
    return float((nearest_centroid(x, class_means(x, labels)) == predictions).mean())


def probe_accuracy(x: np.ndarray, labels: np.ndarray, seed: int = 0) -> float:
    """Stratified cross-validated accuracy of a ridge classifier on standardised columns.

    The penalty is chosen among PROBE_ALPHAS inside each training part.

    Returns:
        nan where a class has fewer than two items.
    """
    folds = min(PROBE_FOLDS, int(np.bincount(labels).min()))
    if folds < 2:
        return float("nan")
    model, splits = _probe(folds, seed)
    return float(cross_val_score(model, np.asarray(x, np.float64), labels, cv=splits).mean())


def probe_predictions(x: np.ndarray, labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """(N,) the probe's prediction of each item by the folds that do not hold it.

    Args:
        labels: (N,) int, each class at least twice.
    """
    model, splits = _probe(min(PROBE_FOLDS, int(np.bincount(labels).min())), seed)
    return cross_val_predict(model, np.asarray(x, np.float64), labels, cv=splits)


def _probe(folds: int, seed: int):
    model = make_pipeline(StandardScaler(), RidgeClassifierCV(PROBE_ALPHAS))
    return model, StratifiedKFold(folds, shuffle=True, random_state=seed)


@dataclass(frozen=True)
class Metrics:
    """Scores of one representation; those of clusters are k-means with k = C."""

    ari: float
    ami: float
    v_measure: float
    cluster_accuracy: float
    cosine_within: float
    cosine_between: float
    cosine_gap: float
    centred_cosine_gap: float
    class_silhouette: float
    nc1: float
    nc4: float
    effective_rank: float
    stable_rank: float
    participation_ratio: float
    dims_95: int
    probe_accuracy: float


def sample_rows(n_items: int, size: int, seed: int = 0) -> np.ndarray:
    """Row numbers of a fixed random sample, in order; every row if there are no more than size."""
    return np.sort(np.random.default_rng([seed, n_items]).permutation(n_items)[:size])


def measure(
    x: np.ndarray,
    clusters: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    silhouette_items: int = 1000,
    probe_items: int = 2000,
    rank_items: int = 872,
) -> Metrics:
    """Every metric of a representation.

    Args:
        x: (N, width); clusters, labels, predictions: (N,) int, labels 0..C-1.
        silhouette_items, probe_items, rank_items: the metric is taken on a fixed random sample of
            at most so many items; ranks must be at equal N to be compared. No probe_items, no
            probe: it is the slow one.
    """
    x = np.asarray(x, np.float64)
    raw, centred = cosine_gap(x, labels), cosine_gap(x, labels, centre=True)
    shown, probed, ranked = (
        sample_rows(len(x), size) for size in (silhouette_items, probe_items, rank_items)
    )
    varied = 1 < len(np.unique(labels[shown])) < len(shown)
    return Metrics(
        ari=adjusted_rand(labels, clusters),
        ami=adjusted_mutual_information(labels, clusters),
        v_measure=float(v_measure_score(labels, clusters)),
        cluster_accuracy=cluster_accuracy(labels, clusters).accuracy,
        cosine_within=raw.within,
        cosine_between=raw.between,
        cosine_gap=raw.within - raw.between,
        centred_cosine_gap=centred.within - centred.between,
        class_silhouette=float(silhouette_score(x[shown], labels[shown]))
        if varied
        else float("nan"),
        nc1=nc1(x, labels),
        nc4=nc4(x, labels, predictions),
        probe_accuracy=probe_accuracy(x[probed], labels[probed]) if probe_items else float("nan"),
        **asdict(spectrum(x[ranked])),
    )


def random_compressor(tap: np.ndarray, width: int, rng: np.random.Generator) -> np.ndarray:
    """tanh(W z + b) of a compressor that was never trained, (N, in) -> (N, width) float32.

    W and b are uniform on +-1 / sqrt(in), the default initialisation of torch.nn.Linear.
    """
    bound = 1 / np.sqrt(tap.shape[1])
    weight = rng.uniform(-bound, bound, (width, tap.shape[1])).astype(np.float32)
    bias = rng.uniform(-bound, bound, width).astype(np.float32)
    return np.tanh(tap.astype(np.float32) @ weight.T + bias)


def principal_components(x: np.ndarray, width: int, whiten: bool = False) -> np.ndarray:
    """Scores on the first `width` principal components, (N, in) -> (N, <= width).

    Whitened scores have variance 1; directions without variance are left out.
    """
    x = np.asarray(x, np.float64)
    left, values, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    kept = min(width, max(1, int((values > 1e-6 * values[0]).sum())))
    return left[:, :kept] * (np.sqrt(len(x)) if whiten else values[:kept])


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Rows of x divided by their length; a zero row stays zero."""
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def spherical_kmeans(x: np.ndarray, k: int, seed: int = 0, restarts: int = 10) -> np.ndarray:
    """Clusters (N,) that maximise the cosine to the cluster's direction.

    Starts at k-means on the unit rows and goes on with centroids of length 1 until nothing moves.
    Source: Dhillon & Modha 2001.
    """
    unit = unit_rows(x)
    clusters = kmeans(unit, k, seed, restarts).clusters
    for _ in range(100):
        centroids = unit_rows(np.eye(k)[clusters].T @ unit)
        moved = (unit @ centroids.T).argmax(1)
        if (moved == clusters).all():
            break
        clusters = moved
    return clusters


def mixture(points: np.ndarray, k: int, seed: int = 0) -> GaussianMixture:
    """A full-covariance Gaussian mixture fitted to what `mixture_input` returns."""
    model = GaussianMixture(k, reg_covar=1e-3, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(points)


def mixture_input(x: np.ndarray, dims: int = 10) -> np.ndarray:
    """The first principal components, on a common scale: a full covariance of all does not fit."""
    scores = principal_components(x, dims)
    return scores / max(np.sqrt(scores.var(0).mean()), 1e-12)


@dataclass(frozen=True)
class ClusterCounts:
    """Silhouette of k-means and BIC of a mixture by k, and the k at which each is best."""

    silhouette: dict[int, float]
    bic: dict[int, float]
    best_silhouette: int
    best_bic: int


def best_cluster_count(
    x: np.ndarray,
    seed: int = 0,
    restarts: int = 5,
    dims: int = 10,
    silhouette_items: int = 1000,
    most: int = 10,
) -> ClusterCounts:
    """How many clusters the points themselves ask for, k from 2 to `most`.

    Args:
        x: (N, width), N > most.
        restarts: of k-means at each k; dims: principal components the mixture sees.
    """
    x = np.asarray(x, np.float64)
    shown = sample_rows(len(x), silhouette_items)
    points = mixture_input(x, dims)
    silhouettes, bics = {}, {}
    for k in range(2, most + 1):
        clusters = kmeans(x, k, seed, restarts).clusters[shown]
        found = len(np.unique(clusters))
        silhouettes[k] = (
            float(silhouette_score(x[shown], clusters)) if 1 < found < len(shown) else -1.0
        )
        bics[k] = float(mixture(points, k, seed).bic(points))
    return ClusterCounts(
        silhouettes, bics, max(silhouettes, key=silhouettes.get), min(bics, key=bics.get)
    )


def ward(x: np.ndarray, k: int) -> np.ndarray:
    """Clusters (N,) of Ward's agglomeration; memory grows with N^2."""
    return AgglomerativeClustering(k).fit(np.asarray(x, np.float64)).labels_


def first_direction_correlation(x: np.ndarray, other: np.ndarray) -> float:
    """|Pearson correlation| of the rows' first principal score with another quantity.

    What the widest direction of a representation is about, where it is not the classes: k-means
    with few clusters cuts along it.

    Args:
        x: (N, d) representation; other: (N,) numbers, such as the texts' lengths.
    Returns:
        In 0..1; nan where either is constant.
    """
    scores = principal_components(x, 1)[:, 0]
    other = np.asarray(other, np.float64)
    if scores.std() == 0 or other.std() == 0:
        return float("nan")
    return float(abs(np.corrcoef(scores, other)[0, 1]))
