"""Clusters and their scores against planted cases and brute force."""

from itertools import permutations

import numpy as np
import pytest

import clustering

RNG = np.random.default_rng(0)


def planted(n=300, classes=3, width=8, gap=8.0):
    """Points in well-separated class clusters, and their labels."""
    labels = RNG.integers(0, classes, n)
    centres = np.eye(classes, width) * gap
    return centres[labels] + RNG.normal(size=(n, width)), labels


def test_kmeans_finds_planted_clusters_and_not_random_ones():
    x, labels = planted()
    assert clustering.adjusted_rand(labels, clustering.kmeans(x, 3, n_init=5).clusters) > 0.99
    noise = RNG.normal(size=x.shape)
    assert (
        abs(clustering.adjusted_rand(labels, clustering.kmeans(noise, 3, n_init=5).clusters)) < 0.05
    )
    assert clustering.adjusted_mutual_information(labels, labels) == pytest.approx(1)
    assert abs(clustering.adjusted_mutual_information(labels, RNG.permutation(labels))) < 0.05


def test_nearest_centroid_is_kmeans_own_assignment():
    x, _ = planted()
    fit = clustering.kmeans(x, 3, n_init=2)
    assert np.array_equal(clustering.nearest_centroid(x, fit.centroids), fit.clusters)


@pytest.mark.parametrize("clusters", [2, 3, 5])
def test_cluster_accuracy_equals_brute_force_over_mappings(clusters):
    labels, found = RNG.integers(0, 3, 60), RNG.integers(0, clusters, 60)
    table = np.array(
        [[((labels == c) & (found == k)).sum() for k in range(clusters)] for c in range(3)]
    )
    square = np.pad(table, ((0, max(0, clusters - 3)), (0, max(0, 3 - clusters))))
    best = max(sum(square[c, k] for c, k in enumerate(p)) for p in permutations(range(len(square))))
    match = clustering.cluster_accuracy(labels, found)
    assert match.accuracy == pytest.approx(best / 60)
    right = sum(match.mapping.get(int(k)) == c for c, k in zip(labels, found, strict=True))
    assert right == best
    assert match.recall_per_class == pytest.approx((table.max(1) / table.sum(1)).tolist())


@pytest.mark.parametrize("centre", [False, True])
def test_cosine_gap_equals_the_full_matrix(centre):
    x, labels = planted(60)
    shifted = x - x.mean(0) if centre else x
    unit = shifted / np.linalg.norm(shifted, axis=1, keepdims=True)
    cosines, same = unit @ unit.T, labels[:, None] == labels[None]
    gap = clustering.cosine_gap(x, labels, centre)
    off = ~np.eye(60, dtype=bool)
    assert gap.within == pytest.approx(cosines[same & off].mean())
    assert gap.between == pytest.approx(cosines[~same].mean())
    noise = clustering.cosine_gap(RNG.normal(size=(400, 8)), RNG.integers(0, 2, 400), centre)
    assert abs(noise.within - noise.between) < 0.02


def test_effective_rank_of_known_spectra():
    rotation = np.linalg.qr(RNG.normal(size=(50, 50)))[0]
    flat = np.vstack([rotation[:10], -rotation[:10]])  # centred, 10 equal singular values
    assert clustering.effective_rank(flat) == pytest.approx(10)
    line = np.outer(RNG.normal(size=40), RNG.normal(size=9))
    assert clustering.effective_rank(line) == pytest.approx(1, abs=1e-6)
    values = np.linalg.svd(planted(40)[0] - 0, compute_uv=False)
    assert 1 <= clustering.effective_rank(planted(40)[0]) <= len(values)
    assert clustering.effective_rank(np.ones((5, 3))) == 0


def test_engram_metrics_excess_is_over_the_predictions():
    x, labels = planted()
    wrong = labels.copy()
    wrong[:60] = (wrong[:60] + 1) % 3
    good = clustering.engram_metrics(x, labels, wrong)
    assert good.ari > 0.99
    assert good.excess_ari == pytest.approx(good.ari - clustering.adjusted_rand(labels, wrong))
    assert good.excess_ari > 0.2
    same = clustering.engram_metrics(x, labels, labels)
    assert abs(same.excess_ari) < 0.01
    assert good.centred_cosine_within > 0.5 > good.centred_cosine_between
