"""Every metric finds what is planted and nothing in noise; fast forms beside naive ones."""

import numpy as np
import pytest

import measures as m

RNG = np.random.default_rng(0)


def clusters(n=240, classes=3, width=8, gap=8.0):
    labels = np.arange(n) % classes
    return np.eye(classes, width)[labels] * gap + RNG.normal(size=(n, width)), labels


def noise(n=240, width=8):
    return RNG.normal(size=(n, width))


def test_every_metric_tells_the_planted_from_the_random():
    x, labels = clusters()
    good = m.measure(x, labels, labels, labels)
    bad = m.measure(noise(), RNG.integers(0, 3, 240), labels, labels)
    for name in ("ari", "ami", "v_measure", "cluster_accuracy", "probe_accuracy", "nc4"):
        assert getattr(good, name) > 0.98, name
        assert getattr(bad, name) < 0.6, name
    for name in ("cosine_gap", "centred_cosine_gap", "class_silhouette"):
        assert getattr(good, name) > 0.4, name
        assert abs(getattr(bad, name)) < 0.1, name
    assert good.cosine_within - good.cosine_between == pytest.approx(good.cosine_gap)
    assert good.nc1 < 0.2 < 5 < bad.nc1
    for name in ("effective_rank", "stable_rank", "participation_ratio", "dims_95"):
        assert getattr(good, name) < getattr(bad, name), name


def test_sizes_of_a_known_spectrum():
    centred = RNG.normal(size=(100, 3))
    basis = np.linalg.qr(centred - centred.mean(0))[0]  # orthonormal, and centred
    flat = m.spectrum(basis)
    assert flat.effective_rank == pytest.approx(3) and flat.stable_rank == pytest.approx(3)
    assert flat.participation_ratio == pytest.approx(3) and flat.dims_95 == 3
    tall = m.spectrum(basis * np.array([10, 1, 1]))
    variances = np.array([100, 1, 1])
    assert tall.participation_ratio == pytest.approx(variances.sum() ** 2 / (variances**2).sum())
    assert tall.stable_rank == pytest.approx(1.02) and tall.dims_95 == 1
    shares = np.array([10, 1, 1]) / 12
    assert tall.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert m.spectrum(np.ones((5, 4))) == m.Spectrum(0.0, 0.0, 0.0, 0)


def test_nc1_is_the_naive_trace():
    x, labels = clusters(60, gap=2.0)
    means = np.stack([x[labels == c].mean(0) for c in range(3)])
    within = sum(np.outer(d, d) for d in x - means[labels]) / len(x)
    between = sum(np.outer(d, d) for d in means - means.mean(0)) / 3
    assert m.nc1(x, labels) == pytest.approx(np.trace(within @ np.linalg.pinv(between)) / 3)
    assert m.nc1(means[labels], labels) == pytest.approx(0, abs=1e-20)
    assert np.isnan(m.nc1(np.ones((6, 2)), np.arange(6) % 2))


def test_nc4_asks_the_classifier_not_the_labels():
    x, labels = clusters()
    assert m.nc4(x, labels, (labels + 1) % 3) == 0


def test_probe_needs_two_items_a_class_and_finds_no_label_in_noise():
    assert np.isnan(m.probe_accuracy(noise(5), np.array([0, 0, 0, 0, 1])))
    assert 0.2 < m.probe_accuracy(noise(), np.arange(240) % 3) < 0.47


def test_random_compressor_follows_torchs_law():
    tap = RNG.normal(size=(50, 16)).astype(np.float16)
    code = m.random_compressor(tap, 4, np.random.default_rng(1))
    again = np.random.default_rng(1)
    weight, bias = again.uniform(-0.25, 0.25, (4, 16)), again.uniform(-0.25, 0.25, 4)
    assert code == pytest.approx(np.tanh(tap.astype(np.float64) @ weight.T + bias), abs=1e-6)
    assert np.abs(weight).max() > 0.24  # uniform to the bound 1 / sqrt(16)


def test_principal_components_keep_distances_and_whitening_evens_them():
    x = noise(50, 6) * np.array([9, 5, 3, 1, 0, 0])
    full = m.principal_components(x, 6)
    assert full.shape == (50, 4)  # two directions have no variance
    assert np.linalg.norm(full[0] - full[1]) == pytest.approx(np.linalg.norm(x[0] - x[1]))
    white = m.principal_components(x, 3, whiten=True)
    assert np.cov(white.T, bias=True) == pytest.approx(np.eye(3), abs=1e-9)
    assert m.principal_components(np.ones((5, 4)), 3).shape == (5, 1)


def test_other_clusterings_find_the_clusters():
    from sklearn.metrics import adjusted_rand_score as ari

    x, labels = clusters()
    points = m.mixture_input(x, 4)
    assert ari(labels, m.mixture(points, 3).predict(points)) > 0.97
    assert ari(labels, m.ward(x, 3)) > 0.97
    assert ari(labels, m.spherical_kmeans(x, 3)) > 0.97
    assert abs(ari(labels, m.ward(noise(), 3))) < 0.1
    # directions matter to spherical k-means, lengths do not
    lengths = RNG.uniform(0.1, 100, (240, 1))
    assert ari(labels, m.spherical_kmeans(x * lengths, 3)) > 0.97


def test_spherical_kmeans_cannot_be_improved_by_one_more_step():
    x = noise()
    found = m.spherical_kmeans(x, 3)
    unit = m.unit_rows(x)
    centroids = m.unit_rows(np.stack([unit[found == c].sum(0) for c in range(3)]))
    assert ((unit @ centroids.T).argmax(1) == found).all()


@pytest.mark.parametrize("classes", [2, 4])
def test_best_cluster_count_finds_the_planted_number(classes):
    found = m.best_cluster_count(clusters(classes=classes)[0], restarts=3, dims=4, most=6)
    assert (found.best_silhouette, found.best_bic) == (classes, classes)
    assert list(found.bic) == [2, 3, 4, 5, 6]


def test_noise_asks_for_no_clusters():
    found = m.best_cluster_count(noise(), restarts=3, dims=4, most=6)
    assert max(found.silhouette.values()) < 0.2


def test_first_direction_correlation_finds_a_planted_quantity_only():
    rng = np.random.default_rng(0)
    length = rng.integers(1, 60, 400)
    x = rng.normal(size=(400, 6))
    assert m.first_direction_correlation(x, length) < 0.15
    x[:, 2] += length
    assert m.first_direction_correlation(x, length) > 0.95
    assert np.isnan(m.first_direction_correlation(x, np.ones(400)))
