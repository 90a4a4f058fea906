"""Metrics against brute force, with a planted positive and a random negative; losses."""

from itertools import permutations

import numpy as np
import pytest
import torch
from conftest import random_batch
from torch.nn import functional as F

import common
from common import ARMS, Arm, Batch

RNG = np.random.default_rng(0)


def planted(n=300, classes=3, width=8, gap=8.0):
    """Points in well-separated class clusters, and their labels."""
    labels = RNG.integers(0, classes, n)
    centres = np.eye(classes, width) * gap
    return centres[labels] + RNG.normal(size=(n, width)), labels


def test_batch_take_equals_slicing_each_text():
    batch = random_batch([3, 1, 5, 2])
    texts = batch.tokens.split(batch.lengths.tolist())
    order = torch.tensor([2, 0, 3])
    taken = batch.take(order)
    assert torch.equal(taken.tokens, torch.cat([texts[i] for i in order]))
    assert taken.items.tolist() == order.tolist()
    assert taken.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1]


def test_lm_rows_predict_the_next_token_of_the_same_text_only():
    batch = random_batch([3, 1, 2])
    pairs = [(int(r), int(r) + 1) for r in batch.lm_rows]
    assert pairs == [(0, 1), (1, 2), (4, 5)]


def test_mean_pool_is_each_texts_own_mean():
    batch = random_batch([3, 1, 4])
    hidden = torch.randn(8, 5)
    wanted = torch.stack([part.mean(0) for part in hidden.split([3, 1, 4])])
    assert torch.allclose(common.mean_pool(hidden, batch), wanted, atol=1e-6)
    assert common.mean_pool(hidden.bfloat16(), batch).dtype == torch.float32


@pytest.mark.parametrize("chunk", [7, 512])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_lm_loss_equals_torch_in_value_and_gradient(chunk, dtype, tolerance):
    torch.manual_seed(0)
    batch = random_batch([9, 1, 30, 12], vocabulary=70)
    hidden = torch.randn(52, 16, requires_grad=True)
    matrix = (torch.randn(70, 16) * 0.3).requires_grad_()
    rows = torch.tensor([i for i in range(52) if i not in (8, 9, 39, 51)])
    wanted = F.cross_entropy(hidden[rows] @ matrix.T, batch.tokens[rows + 1], reduction="sum")
    wanted_grads = torch.autograd.grad(wanted, [hidden, matrix])
    loss = common.lm_loss(hidden, batch, matrix, chunk, dtype)
    grads = torch.autograd.grad(loss.total * 3, [hidden, matrix])
    assert loss.count == 48
    assert abs(loss.total / wanted - 1) < tolerance
    for got, want in zip(grads, wanted_grads, strict=True):
        assert (got / 3 - want).norm() / want.norm() < tolerance


def test_lm_loss_of_one_token_texts_is_zero_with_zero_gradient():
    batch = random_batch([1, 1])
    hidden = torch.randn(2, 4, requires_grad=True)
    matrix = torch.randn(50, 4, requires_grad=True)
    loss = common.lm_loss(hidden, batch, matrix)
    assert loss.count == 0
    grads = torch.autograd.grad(loss.total, [hidden, matrix])
    assert loss.total.item() == 0
    assert all(float(g.abs().sum()) == 0 for g in grads)


def test_lm_loss_leaves_a_frozen_matrix_alone():
    batch = random_batch([4, 3])
    hidden, matrix = torch.randn(7, 4, requires_grad=True), torch.randn(50, 4)
    common.lm_loss(hidden, batch, matrix).total.backward()
    assert hidden.grad.abs().sum() > 0
    assert matrix.grad is None


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_next_feedback_pairs_the_halves(count):
    first, second, source = common.feedback_partners("next", torch.zeros(count, dtype=torch.long))
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(count))
    assert len(first) - len(second) in (0, 1)
    assert source.tolist() == list(range(len(second)))


def test_same_class_feedback_gives_a_partner_of_the_same_label_or_none():
    labels = torch.tensor([0, 0, 1, 0, 1, 1, 2, 0])
    first, second, source = common.feedback_partners("same_class", labels)
    for text, giver in zip(second, source, strict=True):
        if labels[text] in labels[first]:
            assert labels[first[giver]] == labels[text]
        else:
            assert giver == -1
    assert int((source == -1).sum()) == 1


def test_main_arms_weigh_their_losses_as_published():
    weights = {a: (ARMS[a].cls_weight, ARMS[a].lm_weight) for a in common.MAIN_ARMS}
    assert weights == {"classification": (1, 0), "dual": (0.5, 0.5), "dual_engram": (0.5, 0.5)}


def test_kmeans_finds_planted_clusters_and_not_random_ones():
    x, labels = planted()
    assert common.adjusted_rand(labels, common.kmeans(x, 3, n_init=5).clusters) > 0.99
    noise = RNG.normal(size=x.shape)
    assert abs(common.adjusted_rand(labels, common.kmeans(noise, 3, n_init=5).clusters)) < 0.05
    assert common.adjusted_mutual_information(labels, labels) == pytest.approx(1)
    assert abs(common.adjusted_mutual_information(labels, RNG.permutation(labels))) < 0.05


def test_nearest_centroid_is_kmeans_own_assignment():
    x, _ = planted()
    fit = common.kmeans(x, 3, n_init=2)
    assert np.array_equal(common.nearest_centroid(x, fit.centroids), fit.clusters)


@pytest.mark.parametrize("clusters", [2, 3, 5])
def test_cluster_accuracy_equals_brute_force_over_mappings(clusters):
    labels, found = RNG.integers(0, 3, 60), RNG.integers(0, clusters, 60)
    table = np.array(
        [[((labels == c) & (found == k)).sum() for k in range(clusters)] for c in range(3)]
    )
    square = np.pad(table, ((0, max(0, clusters - 3)), (0, max(0, 3 - clusters))))
    best = max(sum(square[c, k] for c, k in enumerate(p)) for p in permutations(range(len(square))))
    match = common.cluster_accuracy(labels, found)
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
    gap = common.cosine_gap(x, labels, centre)
    off = ~np.eye(60, dtype=bool)
    assert gap.within == pytest.approx(cosines[same & off].mean())
    assert gap.between == pytest.approx(cosines[~same].mean())
    noise = common.cosine_gap(RNG.normal(size=(400, 8)), RNG.integers(0, 2, 400), centre)
    assert abs(noise.within - noise.between) < 0.02


def test_effective_rank_of_known_spectra():
    rotation = np.linalg.qr(RNG.normal(size=(50, 50)))[0]
    flat = np.vstack([rotation[:10], -rotation[:10]])  # centred, 10 equal singular values
    assert common.effective_rank(flat) == pytest.approx(10)
    line = np.outer(RNG.normal(size=40), RNG.normal(size=9))
    assert common.effective_rank(line) == pytest.approx(1, abs=1e-6)
    values = np.linalg.svd(planted(40)[0] - 0, compute_uv=False)
    assert 1 <= common.effective_rank(planted(40)[0]) <= len(values)
    assert common.effective_rank(np.ones((5, 3))) == 0


def test_engram_metrics_excess_is_over_the_predictions():
    x, labels = planted()
    wrong = labels.copy()
    wrong[:60] = (wrong[:60] + 1) % 3
    good = common.engram_metrics(x, labels, wrong)
    assert good.ari > 0.99
    assert good.excess_ari == pytest.approx(good.ari - common.adjusted_rand(labels, wrong))
    assert good.excess_ari > 0.2
    same = common.engram_metrics(x, labels, labels)
    assert abs(same.excess_ari) < 0.01
    assert good.centred_cosine_within > 0.5 > good.centred_cosine_between


def test_parts_an_arm_has_follow_from_its_data(make_model):
    assert make_model("classification").compressor is None
    published = make_model("published_small")
    assert published.compressor is not None and published.projector is None
    pooled = make_model(Arm("x", "x", feedback="next", tap="pooled"))
    assert pooled.compressor.linear.in_features == pooled.backbone.hidden_size


def test_arms_of_a_seed_share_the_initial_values_they_share(make_model):
    one, three = (make_model(a).state_dict() for a in ("classification", "dual_engram"))
    assert all(torch.equal(value, three[name]) for name, value in one.items())
    other = make_model("classification", seed=1).state_dict()
    assert not torch.equal(other["head.inner.weight"], one["head.inner.weight"])


def test_batch_requires_nothing_but_its_parts():
    batch = Batch(torch.arange(3), torch.tensor([2, 1]), torch.zeros(2).long(), torch.arange(2))
    assert (len(batch), batch.longest, batch.segments.tolist()) == (2, 2, [0, 0, 1])
