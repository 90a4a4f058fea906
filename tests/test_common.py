"""Metrics against brute force, with a planted positive and a random negative; losses."""

import pytest
import torch
from conftest import random_batch
from torch.nn import functional as F

import common
from arms import ARMS, MAIN_ARMS, Arm
from common import Batch


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
    weights = {a: (ARMS[a].cls_weight, ARMS[a].lm_weight) for a in MAIN_ARMS}
    assert weights == {"classification": (1, 0), "dual": (0.5, 0.5), "dual_engram": (0.5, 0.5)}


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
