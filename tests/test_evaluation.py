"""Scores and features of a split, whatever its batches; the modes of the engram."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

import evaluation


def test_evaluation_does_not_depend_on_its_batches_and_keeps_order(corpus, make_model, recipe):
    model = make_model("dual_engram")
    split = corpus[1]
    large = evaluation.evaluate(model, split, recipe, collect=("pooled", "engram", "layers"))
    small = evaluation.evaluate(
        model, split, dataclasses.replace(recipe, eval_tokens=30), collect=("pooled", "engram")
    )
    assert large.cls_loss == pytest.approx(small.cls_loss, abs=1e-5)
    assert large.lm_loss == pytest.approx(small.lm_loss, abs=1e-5)
    assert np.allclose(large.features["pooled"], small.features["pooled"], atol=1e-5)
    model.eval()
    one = split.batch(np.array([17]))
    alone = model(one, model.zero_engram(one)).engram.detach().numpy()
    assert np.allclose(large.features["engram"][17], alone[0], atol=1e-5)
    assert large.features["layers"].shape == (len(split), 3, 32)


def test_evaluation_modes_differ_where_the_engram_matters(corpus, make_model, recipe):
    model = make_model("dual_engram")
    with torch.no_grad():
        model.projector.linear.weight.mul_(20)
    zero = evaluation.evaluate(model, corpus[1], recipe, collect=("engram", "logits"))
    score = partial(evaluation.evaluate, model, corpus[1], recipe)
    modes, predicted = evaluation.evaluate_modes(score, zero, 0)
    assert tuple(modes) == evaluation.EVAL_MODES
    assert modes["zero"] == zero.scores()
    assert len({m["cls_loss"] for m in modes.values()}) == 5
    labels = corpus[1].labels.numpy()
    for mode, scores in modes.items():
        assert scores["accuracy"] == (predicted[mode] == labels).mean()
