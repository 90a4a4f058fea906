"""The step, the feedback rules, the schedule, and a fit that goes on bit for bit."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import random_batch
from torch.nn import functional as F

import parts
import training
from arms import ARMS
from common import UserError
from recipe import Recipe, derive_seed
from training import Fit, Interrupted, NonFiniteError, Progress


def never():
    return None


def run(fit, **hooks):
    calls = {"save": lambda f: None, "report": lambda f, e: None, "check_stop": never} | hooks
    fit.run(**calls)
    return fit


def weights(fit):
    return {name: p.detach().clone() for name, p in fit.parameters.items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def without_seconds(epochs):
    return [{k: v for k, v in e.items() if k != "train_seconds"} for e in epochs]


def test_loss_is_the_weighted_sum_of_plain_means(make_model, recipe):
    model = make_model("dual").eval()
    batch = random_batch([5, 1, 7], vocabulary=20)
    losses = training.batch_losses(model, parts.forward_passes(model, batch), recipe, torch.float32)
    logits, targets, texts = [], [], []
    for i in range(3):
        alone = batch.take(torch.tensor([i]))
        out = model(alone, None)
        logits.append(out.hidden[:-1] @ model.backbone.unembedding.T)
        targets.append(alone.tokens[1:])
        texts.append(out.logits)
    wanted = 0.5 * F.cross_entropy(torch.cat(texts), batch.labels)
    wanted += 0.5 * F.cross_entropy(torch.cat(logits), torch.cat(targets))
    assert torch.allclose(training.weighted_loss(model.arm, losses), wanted, atol=1e-5)
    assert (losses.texts, losses.targets) == (3, 10)


def test_a_batch_without_targets_has_a_finite_loss(make_model, recipe):
    model, batch = make_model("dual").eval(), random_batch([1, 1], vocabulary=20)
    losses = training.batch_losses(model, parts.forward_passes(model, batch), recipe, torch.float32)
    assert losses.targets == 0
    assert math.isfinite(training.weighted_loss(model.arm, losses).item())


@pytest.mark.parametrize("feedback", ["next", "same_class", "detached"])
def test_second_half_runs_with_the_first_halfs_engrams(make_model, feedback):
    arm = dataclasses.replace(ARMS["dual_engram"], feedback=feedback)
    model, batch = make_model(arm).eval(), random_batch([4, 3, 6, 2, 5], vocabulary=20)
    batch = dataclasses.replace(batch, labels=torch.tensor([0, 1, 0, 1, 0]))
    (first, first_out), (second, second_out) = parts.forward_passes(model, batch)
    assert first.items.tolist() + second.items.tolist() == [0, 1, 2, 3, 4]
    givers = {"same_class": [1, 0]}.get(feedback, [0, 1])
    wanted = model(second, first_out.engram[givers])
    assert torch.equal(second_out.hidden, wanted.hidden)
    second_out.logits.sum().backward()
    received = model.compressor.linear.weight.grad
    assert (received is None) == (feedback == "detached")


def test_self_and_off_feedback(make_model):
    batch = random_batch([4, 3], vocabulary=20)
    own = make_model(ARMS["dual_engram_self"]).eval()
    (_, zero), (_, again) = parts.forward_passes(own, batch)
    assert torch.equal(again.hidden, own(batch, zero.engram).hidden)
    off = make_model(ARMS["dual_engram_off"]).eval()
    ((_, only),) = parts.forward_passes(off, batch)
    assert torch.equal(only.hidden, off(batch, torch.zeros(2, 8)).hidden)


def test_the_prefix_changes_the_text_and_unused_compressors_get_no_gradient(make_model, recipe):
    model, batch = make_model("dual_engram").eval(), random_batch([4, 3], vocabulary=20)
    one = model(batch, torch.ones(2, 8)).hidden
    assert not torch.allclose(one, model(batch, torch.zeros(2, 8)).hidden)
    published = make_model("published_small")
    passes = parts.forward_passes(published, batch)
    training.weighted_loss(
        published.arm, training.batch_losses(published, passes, recipe, torch.float32)
    ).backward()
    assert published.compressor.linear.weight.grad is None


def test_schedules():
    per_epoch = Recipe(8, 1.0, 0, 4, 1, "cosine-epoch")
    assert [per_epoch.learning_rate(s, 10) for s in (0, 9)] == [1.0, 1.0]
    assert per_epoch.learning_rate(40, 10) == pytest.approx(0.5)
    warm = Recipe(2, 1.0, 0, 4, 1, "cosine", warmup=0.1)
    rates = [warm.learning_rate(s, 50) for s in range(100)]
    assert rates[0] == 0 and rates[5] == pytest.approx(0.5) and rates[10] == 1
    assert rates == sorted(rates[:11]) + sorted(rates[11:], reverse=True)
    assert rates[-1] < 0.001


def test_all_arms_of_a_seed_see_equal_batches(corpus, make_model, recipe):
    seen = {}
    for name in ("classification", "dual", "dual_engram"):
        fit = Fit(make_model(name), recipe, *corpus[:2], seed=3)
        seen[name] = []
        step = fit.step
        fit.step = lambda batch, to=seen[name], step=step: (to.append(batch.items), step(batch))
        run(fit)
    first, *others = seen.values()
    assert len(first) == 16
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert sorted(torch.cat(first[:8]).tolist()) == list(range(256))
    assert torch.cat(first[:8]).tolist() != torch.cat(first[8:]).tolist()


def test_training_learns_the_generated_corpus(corpus, make_model, recipe):
    fit = run(
        Fit(make_model("classification"), dataclasses.replace(recipe, epochs=4), *corpus[:2], 0)
    )
    assert fit.progress.epochs[-1]["eval_accuracy"] > 0.8
    assert len(fit.progress.epochs) == 4


@pytest.mark.parametrize("name", ["dual_engram", "classification"])
def test_a_stopped_fit_goes_on_bit_for_bit(corpus, make_model, recipe, name):
    whole = run(Fit(make_model(name), recipe, *corpus[:2], 0))
    for stop_at in (1, 7, 8, 11):
        calls = iter(range(1000))

        def check(limit=stop_at, calls=calls):
            if next(calls) == limit:
                raise Interrupted("test")

        saved = []
        part = Fit(make_model(name), recipe, *corpus[:2], 0)
        with pytest.raises(Interrupted):
            run(part, save=lambda f, to=saved: to.append(f.state()), check_stop=check)
        kept, rest, progress = saved[-1]
        torch.manual_seed(12345)  # whatever happened since
        again = Fit(make_model(name, seed=9), recipe, *corpus[:2], 0)
        again.restore({k: v.clone() for k, v in kept.items()}, rest, progress)
        run(again)
        assert same(weights(whole), weights(again))
        assert without_seconds(whole.progress.epochs) == without_seconds(again.progress.epochs)


def test_other_weights_are_refused(corpus, make_model, recipe):
    state = Fit(make_model("dual_engram"), recipe, *corpus[:2], 0).state()
    with pytest.raises(ValueError, match="do not fit"):
        Fit(make_model("dual"), recipe, *corpus[:2], 0).restore(*state)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_is_not_taken(corpus, make_model, recipe, monkeypatch, where):
    fit = Fit(make_model("dual"), recipe, *corpus[:2], 0)
    before = weights(fit)
    if where == "loss":
        monkeypatch.setattr(training, "weighted_loss", lambda m, x: x.cls / 0.0)
    else:
        fit.model.head.outer.weight.register_hook(lambda g: g * float("nan"))
    with pytest.raises(NonFiniteError, match=r"dual, seed 0, step 0.*training rows \["):
        fit.step(fit.train_data.batch(np.arange(32)))
    assert same(before, weights(fit))


def test_an_evaluation_that_is_not_finite_stops_and_is_never_written(corpus, make_model, recipe):
    fit, saved = Fit(make_model("dual"), recipe, *corpus[:2], 0), []
    with torch.no_grad():
        fit.model.head.outer.bias[0] = float("inf")
    message = (
        r"dual, seed 0, evaluation at step 0: classification loss (nan|inf), next-token loss \d"
    )
    with pytest.raises(NonFiniteError, match=message):
        fit.evaluate(corpus[1])
    fit.step = lambda batch: None
    fit.progress.totals.texts = 1
    with pytest.raises(NonFiniteError):
        run(fit, save=lambda f: saved.append(f.state()))
    assert not saved and not fit.progress.epochs


def test_fewer_rows_than_a_batch_is_a_users_mistake(corpus, make_model, recipe):
    few = corpus[0].select(np.arange(5))
    with pytest.raises(UserError, match="5 training rows < batch 32"):
        Fit(make_model("dual"), recipe, few, corpus[1], 0)


def test_progress_survives_json():
    progress = Progress(epoch=1, batch=3, epochs=[{"epoch": 1}])
    progress.totals.cls = 0.1
    assert Progress.from_json(progress.to_json()) == progress


def test_seeds_differ_by_purpose_and_do_not_overflow():
    seeds = {derive_seed(s, p) for s in range(50) for p in ("order", "dropout")}
    assert len(seeds) == 100
    assert all(0 <= s < 2**63 for s in seeds)


def test_with_its_lm_gradient_stopped_model_2_is_model_1(make_model, corpus, recipe):
    train, evaluation, _ = corpus
    one, two = (
        run(Fit(make_model(arm), recipe, train, evaluation, 0))
        for arm in ("classification", "dual_stopped")
    )
    assert same(weights(one), weights(two))
    assert two.progress.epochs[-1]["eval_lm_loss"] > 0  # measured nevertheless


def test_shuffled_labels_are_the_seeds_and_evaluation_keeps_its_own(make_model, corpus, recipe):
    train, evaluation, _ = corpus
    first, again, other = (
        Fit(make_model("dual_engram_shuffled_labels"), recipe, train, evaluation, seed)
        for seed in (0, 0, 1)
    )
    shuffled = first.train_data.labels
    assert torch.equal(shuffled.sort().values, train.labels.sort().values)
    assert 0.3 < float((shuffled == train.labels).float().mean()) < 0.7
    assert torch.equal(shuffled, again.train_data.labels)
    assert not torch.equal(shuffled, other.train_data.labels)
    assert first.eval_data is evaluation


def test_shuffled_targets_keep_their_words_in_training_only(make_model, recipe):
    model = make_model("dual_engram_shuffled_targets")
    batch = random_batch([9, 7, 8, 6], vocabulary=20)
    plain = make_model("dual_engram").eval()
    wanted = training.batch_losses(plain, parts.forward_passes(plain, batch), recipe, torch.float32)
    model.eval()
    passes = parts.forward_passes(model, batch)
    found = training.batch_losses(model, passes, recipe, torch.float32)
    assert torch.equal(found.lm, wanted.lm)
    model.train()
    shuffled = training.batch_losses(model, passes, recipe, torch.float32)
    assert not torch.equal(shuffled.lm, wanted.lm)
    assert shuffled.targets == wanted.targets


def test_twice_the_epochs_stretch_the_schedule(make_model, corpus, recipe):
    train, evaluation, _ = corpus
    fit = Fit(make_model("classification_longer"), recipe, train, evaluation, 0)
    usual = Fit(make_model("classification"), recipe, train, evaluation, 0)
    assert fit.total_steps == 2 * usual.total_steps
    last = fit.recipe.learning_rate(fit.total_steps - 1, fit.steps_per_epoch)
    assert last < usual.recipe.learning_rate(usual.total_steps - 1, usual.steps_per_epoch)


def test_an_arms_own_engram_width_wins(make_model):
    assert make_model("dual_engram_w2").compressor.linear.weight.shape[0] == 2
    assert make_model("dual_engram").compressor.linear.weight.shape[0] == 8
