"""Causality by gradient; packed texts do not touch each other; dropout; parameter counts."""

import pytest
import torch
from conftest import random_batch

import transformer
from arms import ARMS, MAIN_ARMS
from common import StudyModel
from transformer import SmallTransformer, dropout_masks


def backbone(**options):
    torch.manual_seed(0)
    return SmallTransformer(50, 16, 16, 2, 24, **options).eval()


def token_gradient(model, batch, row, prefix=None):
    """|d hidden[row] / d embedded token t| for every packed token t."""
    kept = []
    hook = model.embedding.register_forward_hook(lambda m, i, o: kept.append(o) or o.retain_grad())
    hidden = model(batch, prefix)
    hook.remove()
    hidden[row].pow(2).sum().backward()
    return kept[0].grad.abs().sum(1)


@pytest.mark.parametrize("with_prefix", [False, True])
def test_position_t_never_sees_a_later_token_nor_another_text(with_prefix):
    model, batch = backbone(), random_batch([3, 6, 2])
    prefix = torch.randn(3, 16, requires_grad=True) if with_prefix else None
    row = 5  # text 1, position 2
    gradient = token_gradient(model, batch, row, prefix)
    assert (gradient[3:6] > 0).all()
    assert (gradient[6:] == 0).all()
    assert (gradient[:3] == 0).all()
    if with_prefix:
        seen = prefix.grad.abs().sum(1)
        assert seen[1] > 0
        assert seen[0] == seen[2] == 0


def test_the_published_bidirectional_backbone_does_see_later_tokens():
    gradient = token_gradient(backbone(causal=False), random_batch([3, 6, 2]), 5)
    assert (gradient[3:9] > 0).all()
    assert (gradient[:3] == 0).all()
    assert (gradient[9:] == 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_a_batch_equals_its_texts_one_by_one(causal):
    model, batch = backbone(causal=causal), random_batch([4, 1, 9, 2])
    prefix = torch.randn(4, 16)
    for given in (None, prefix):
        together = model(batch, given)
        alone = [
            model(batch.take(torch.tensor([i])), None if given is None else given[i : i + 1])
            for i in range(4)
        ]
        assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_layers_are_collected_and_the_last_one_normed_is_the_output():
    model, batch = backbone(), random_batch([4, 2])
    layers = []
    hidden = model(batch, None, layers)
    assert len(layers) == 3
    assert torch.allclose(model.norm(layers[-1]), hidden)


def test_dropout_masks_keep_the_mean_and_follow_the_seed():
    torch.manual_seed(3)
    first, second = dropout_masks([100_000, 50_001], 0.1, torch.device("cpu"))
    assert (len(first), len(second)) == (100_000, 50_001)
    assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    assert abs(float((first == 0).float().mean()) - 0.1) < 0.005
    assert abs(float(second.mean()) - 1) < 0.01
    torch.manual_seed(3)
    again = dropout_masks([100_000, 50_001], 0.1, torch.device("cpu"))
    assert torch.equal(first, again[0])


def test_dropout_acts_in_training_only():
    model, batch = backbone(), random_batch([4, 2])
    quiet = model(batch)
    assert torch.equal(quiet, model(batch))
    model.train()
    assert not torch.equal(quiet, model(batch))


def test_every_main_arm_has_about_1_3_million_parameters():
    counts = []
    for name in MAIN_ARMS:
        model = StudyModel(SmallTransformer(8000, 64), ARMS[name], 2, 32)
        counts.append(sum(p.numel() for p in model.parameters()))
    assert all(1.25e6 < count < 1.4e6 for count in counts)
    assert counts[0] == counts[1] < counts[2]


def test_initial_weights_have_gpt2s_scale():
    model = SmallTransformer(8000, 64)
    for part in (model.embedding, model.position, model.blocks[0].qkv):
        assert abs(part.weight.std().item() - 0.02) < 1e-3


@pytest.mark.parametrize("with_prefix", [False, True])
def test_the_written_out_block_equals_automatic_differentiation(with_prefix):
    batch, found = random_batch([4, 1, 9, 2, 7]), []
    given = torch.randn(5, 16, generator=seeded(2)) if with_prefix else None
    upstream = torch.randn(23, 16, generator=seeded(3))
    for written_out in (True, False):
        model = backbone().train()
        for block in model.blocks:
            block.written_out = written_out
            with torch.no_grad():  # zeros and ones would hide a wrong bias or norm
                for parameter in block.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=seeded(1)))
        prefix = None if given is None else given.clone().requires_grad_()
        torch.manual_seed(7)
        hidden = model(batch, prefix)
        (hidden * upstream).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append((hidden.detach(), gradients | ({} if prefix is None else {"": prefix.grad})))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert our_gradients.keys() == their_gradients.keys()
    for name, wanted in their_gradients.items():
        assert float((our_gradients[name] - wanted).abs().max()) < 5e-5 * float(wanted.abs().max())


def test_long_texts_keep_the_kernel_that_holds_no_square_array(monkeypatch):
    monkeypatch.setattr(transformer, "LONGEST_WRITTEN_OUT", 6)
    monkeypatch.setattr(transformer._WrittenOut, "apply", lambda *inputs: pytest.fail("taken"))
    model = backbone().train()
    model(random_batch([4, 7, 2]))
    with pytest.raises(pytest.fail.Exception):
        model(random_batch([4, 6, 2]))


def seeded(number):
    return torch.Generator().manual_seed(number)
