"""Tests against known answers; counts beside explicit resamples; error rates on planted nulls."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import adjusted_rand_score

import inference as inf

RNG = np.random.default_rng(0)


def test_mcnemar_is_the_textbook_case():
    # Agresti, Categorical Data Analysis: 86 and 150 discordant approvals
    first = np.array([True] * 794 + [True] * 150 + [False] * 86 + [False] * 570)
    second = np.array([True] * 794 + [False] * 150 + [True] * 86 + [False] * 570)
    found = inf.mcnemar(first, second)
    assert (found.only_first, found.only_second) == (150, 86)
    assert found.p == pytest.approx(2 * stats.binom.cdf(86, 236, 0.5))
    assert found.p == pytest.approx(3.716e-05, rel=1e-3)
    assert inf.mcnemar(first, first).p == 1.0
    # +3 of 872 items: never significant, whatever the discordance
    assert inf.mcnemar(np.arange(872) < 3, np.zeros(872, bool)).p == 0.25


def test_ari_of_tables_is_scikit_learns():
    for classes, k in ((2, 2), (4, 4), (3, 7)):
        labels, clusters = RNG.integers(0, classes, 200), RNG.integers(0, k, 200)
        clusters = np.where(RNG.random(200) < 0.5, labels, clusters)
        table = np.zeros((classes, k))
        np.add.at(table, (labels, clusters), 1)
        wanted = adjusted_rand_score(labels, clusters)
        assert inf.ari_of_tables(table) == pytest.approx(wanted, abs=1e-12)
    assert inf.ari_of_tables(np.array([[[5.0, 0], [0, 0]], [[5, 0], [0, 5]]])).tolist() == [1, 1]


def test_resampling_by_counts_equals_scoring_the_resampled_items():
    labels = RNG.integers(0, 3, 150)
    partitions = np.stack([np.where(RNG.random(150) < 0.7, labels, 0) for _ in range(4)])
    weights = inf.item_weights(150, 20, seed=3)
    assert (weights.sum(1) == 150).all() and weights.std() > 0.9
    assert (inf.item_weights(150, 900, 3)[:20] == weights).all()  # a prefix of a longer draw
    assert not (inf.item_weights(150, 20, 4) == weights).all()
    found = inf.resample(inf.ari_statistic(labels, partitions), weights)
    shares = inf.resample(inf.share_statistic(partitions[0] == labels), weights)
    for row, ari, share in zip(weights, found, shares, strict=True):
        items = np.repeat(np.arange(150), row)
        wanted = [adjusted_rand_score(labels[items], p[items]) for p in partitions]
        assert ari == pytest.approx(np.mean(wanted), abs=1e-9)
        assert share == pytest.approx((partitions[0] == labels)[items].mean(), abs=1e-9)


@pytest.mark.parametrize("centre", [False, True])
def test_cosine_gap_draws_are_pairs_of_distinct_items(centre):
    x, labels = RNG.normal(size=(40, 6)) + 0.5, RNG.integers(0, 3, 40)
    weights = inf.item_weights(40, 5, 0)
    moved = x - x.mean(0) if centre else x
    unit = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    for row, gap in zip(weights, inf.cosine_gap_draws(x, labels, weights, centre), strict=True):
        pair = np.outer(row, row).astype(float) * (1 - np.eye(40))
        same = labels[:, None] == labels
        cosines = unit @ unit.T
        wanted = np.average(cosines, weights=pair * same) - np.average(
            cosines, weights=pair * ~same
        )
        assert gap == pytest.approx(wanted, abs=1e-5)


def test_stability_is_high_for_clusters_and_low_for_noise():
    labels = np.arange(200) % 3
    clusters = np.eye(3, 5)[labels] * 6 + RNG.normal(size=(200, 5))
    assert inf.partition_stability(clusters, 3, refits=8) > 0.97
    assert inf.partition_stability(RNG.normal(size=(200, 5)), 3, refits=8) < 0.7


def test_crossed_bootstrap_has_the_spread_of_seeds_and_of_items():
    draws = RNG.normal(size=(20_000, 1)) * 2 + np.zeros((1, 4))  # items' noise, common to all seeds
    assert inf.crossed(draws, 0).std() == pytest.approx(2, rel=0.03)
    seeds = np.array([[0.0, 1.0, 2.0, 3.0]]) + np.zeros((20_000, 1))
    assert inf.crossed(seeds, 0).std() == pytest.approx(np.std([0, 1, 2, 3]) / 2, rel=0.03)
    assert (inf.crossed(draws[:, :1], 0) == draws[:, 0]).all()  # one seed: items alone


def test_interval_is_students_without_draws():
    values = [0.1, 0.3, 0.2, 0.4]
    found = inf.interval(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (found.low, found.high, found.n_seeds) == (pytest.approx(low), pytest.approx(high), 4)
    assert inf.interval([0.5]) == inf.Interval(0.5, None, None, 1)
    assert inf.interval([]).mean is None
    assert inf.interval([0.5], np.arange(101) / 100).low == pytest.approx(0.025)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_of_few_seeds_cover(seeds):
    """Seeds whose spread dominates: percentiles alone would miss in up to one of four draws."""
    rng, misses, alone, times = np.random.default_rng(seeds), 0, 0, 600
    for draw in range(times):
        values = rng.normal(size=seeds)
        draws = inf.crossed(values + 0.1 * rng.normal(size=(400, 1)), draw)
        found = inf.interval(values, draws)
        misses += not found.low <= 0 <= found.high
        low, high = np.quantile(draws, [0.025, 0.975])
        assert found.low <= low + 1e-9 and found.high >= high - 1e-9
        alone += not low <= 0 <= high
    assert misses / times < 0.07 < alone / times


def test_difference_p_is_the_larger_of_both_tests():
    values = np.array([0.02, 0.05, 0.03])
    assert inf.difference_p(values, None) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    sure = np.full(999, 0.03)
    assert inf.difference_p(values, sure) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert inf.difference_p(values[:1], sure) == pytest.approx(2 / 1000)  # +1: never zero
    assert inf.difference_p(values[:1], np.linspace(-1, 1, 999)) == 1.0
    assert inf.difference_p(values[:1], None) is None
    assert inf.difference_p(np.zeros(3), np.zeros(99)) == 1.0


def test_tost_is_the_hand_computed_case():
    # mean 0.01, standard error 0.01, 4 df: t = (0.01 + 0.05) / 0.01 = 6 and (0.01 - 0.05) / 0.01
    values = 0.01 + 0.01 * np.sqrt(5) * np.array([-2, -1, 0, 1, 2]) / np.sqrt(2.5)
    found = inf.equivalence(values, None, 0.05)
    assert found.p == pytest.approx(stats.t.cdf(-4, 4)) and found.equivalent
    assert found.p == pytest.approx(0.00806, abs=1e-5)
    half = 2.1318 * 0.01  # 95th percentile of t with 4 df
    assert (found.low, found.high) == (
        pytest.approx(0.01 - half, abs=1e-5),
        pytest.approx(0.01 + half, abs=1e-5),
    )
    assert not inf.equivalence(values, None, 0.02).equivalent
    draws = np.concatenate([np.zeros(96), np.full(3, 0.06)])
    assert inf.equivalence(values[:1], draws, 0.05).p == pytest.approx(4 / 100)
    assert inf.equivalence(values[:1], None, 0.05) is None


def test_exchange_test_enumerates_or_draws():
    band = np.arange(1.0, 51.0)[None]
    assert inf.exchange_p(np.array([51.0]), band) == pytest.approx(2 / 51)  # one seed's floor
    assert inf.exchange_p(np.array([25.5]), band) == 1.0
    two = np.vstack([band, band])
    assert inf.exchange_p(np.array([51.0, 51.0]), two) == pytest.approx(2 / 51**2)
    four = np.vstack([two, two])
    assert inf.exchange_p(np.full(4, 51.0), four) < 1e-4
    assert inf.exchange_p(np.full(4, 0.0), four) < 1e-4  # below the band counts as well
    # pooling tells what no single seed can: always at the 90th percentile
    assert inf.exchange_p(np.full(4, 45.5), four) < 0.05 < inf.exchange_p(np.array([45.5]), band)


def test_exchange_test_holds_its_level():
    draws = np.random.default_rng(5).normal(size=(400, 3, 21))
    rejected = np.mean([inf.exchange_p(x[:, 0], x[:, 1:]) < 0.05 for x in draws])
    assert 0.02 < rejected < 0.085  # 0.05 within four standard errors


def test_difference_p_holds_its_level_with_few_seeds():
    rng, rejected = np.random.default_rng(6), 0
    weights = inf.item_weights(80, 300, 0).astype(float)
    for _ in range(300):
        seeds = rng.normal(scale=0.2, size=(3, 1))
        values = seeds + rng.normal(size=80) * 0.3 + rng.normal(size=(3, 80))
        draws = inf.crossed(weights @ values.T / 80, 0)
        rejected += inf.difference_p(values.mean(1), draws) < 0.05
    assert rejected / 300 < 0.08


def test_holm_and_benjamini_hochberg_are_the_known_vectors():
    p = [0.01, 0.04, 0.03, 0.005]
    assert inf.holm(p, 4) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert inf.benjamini_hochberg(p) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    # what was not measured keeps its place in the family
    assert inf.holm([0.01, None, None, 0.02, None, None]) == [
        pytest.approx(0.06),
        None,
        None,
        pytest.approx(0.1),
        None,
        None,
    ]
    assert inf.benjamini_hochberg([None, 0.02]) == [None, 0.02]
    assert inf.benjamini_hochberg([]) == []


def test_adjust_keeps_the_families_apart():
    rows = [{"family": "primary", "p": 0.01}] + [{"family": "exploratory", "p": 0.01}] * 2
    assert [row["p_adjusted"] for row in inf.adjust(rows)] == pytest.approx([0.06, 0.01, 0.01])
