"""The gradient audit: planted directions, sums that must agree, and a run that it leaves alone."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from test_training import run, weights, without_seconds

import audits
import gradients
from gradients import Audit, class_directions, exchanged, loss_gradients, share
from rules import REFUTED, SUPPORTED
from schema import evidence_beside
from training import Fit


def test_shares_of_planted_gradients():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    features = rng.normal(size=(600, 40))
    features[np.arange(600), labels] += 8  # the classes differ in the first three dimensions
    basis = class_directions(features, labels)
    assert basis.shape == (40, 2)
    assert np.allclose(basis.T @ basis, np.eye(2))
    inside = np.zeros((5, 40))
    inside[:, 0], inside[:, 1] = 1, -1  # sums to 0, as differences of means do
    assert share(inside, basis) == pytest.approx(1, abs=0.02)
    outside = np.zeros((5, 40))
    outside[:, 7] = 1
    assert share(outside, basis) == pytest.approx(0, abs=0.02)
    anywhere = [share(rng.normal(size=(5, 40)), basis) for _ in range(200)]
    assert np.mean(anywhere) == pytest.approx(2 / 40, abs=0.01)
    assert share(np.zeros((5, 40)), basis) is None


def test_exchanging_errors_keeps_what_the_features_owe_and_takes_what_the_pairing_does():
    """Errors that follow the class beside errors that know none, on features with a wide class."""
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 2
    features = rng.normal(size=(64, 40))
    features[:, 0] += 2 * (2.0 * labels - 1)
    basis = class_directions(features, labels)
    blind = rng.normal(size=(64, 5))
    knowing = blind + 3 * (2.0 * labels - 1)[:, None]
    for errors, wanted in ((blind, (-0.1, 0.1)), (knowing, (0.5, 1.0))):
        apart = [share(exchanged(errors, features, rng), basis) for _ in range(200)]
        gain = share(errors.T @ features, basis) - np.mean(apart)
        assert wanted[0] < gain < wanted[1]
    half = np.where(labels[:, None], blind, 0)  # texts whose code nobody receives
    assert np.allclose(exchanged(half, np.ones((64, 1)), rng)[:, 0], half.sum(0))


@pytest.mark.parametrize("arm", ["dual_engram", "dual_engram_self", "lm_only_engram", "dual"])
@pytest.mark.parametrize("limit", [0, 60])
def test_the_parts_of_a_gradient_are_the_whole(make_model, recipe, corpus, arm, limit):
    """Both losses' gradients add up to the step's; parts of a step to the undivided one."""
    recipe = dataclasses.replace(recipe, clip=1e9, micro_batch_tokens=limit, lm_dtype="float32")
    fit = Fit(make_model(arm, dropout=0.0), recipe, corpus[0], corpus[1], 0)
    fit.model.eval()  # no dropout, so that the parts of a step draw nothing
    batch = fit.train_data.batch(np.arange(32))
    losses = [x for x in gradients.LOSSES if getattr(fit.model.arm, f"{x}_weight")]
    found = [loss_gradients(fit, batch, loss) for loss in losses]
    fit.gradients(batch)
    for part in found:
        if part.errors is not None:  # the sum over texts that `exchanged` takes apart
            wanted = part.sites["compressor"]
            assert torch.allclose(part.errors.T @ part.read, wanted, atol=1e-5 * wanted.abs().max())
    found = [part.sites for part in found]
    flat = [p.grad.flatten() for p in fit.model.backbone.parameters()]
    whole = {"backbone": torch.cat(flat)}
    if fit.model.compressor is not None:
        whole["compressor"] = fit.model.compressor.linear.weight.grad
    assert found[0].keys() - {"tap"} == whole.keys()
    for site, wanted in whole.items():
        total = sum(part[site] for part in found)
        assert wanted.abs().max() > 0
        assert torch.allclose(total, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


def test_an_audited_run_is_an_unaudited_one_and_goes_on(make_model, recipe, corpus):
    train, evaluation, _ = corpus
    plain = run(Fit(make_model("dual_engram"), recipe, train, evaluation, 0))
    audited = Fit(make_model("dual_engram"), recipe, train, evaluation, 0)
    audited.audit = Audit(4)
    states = []
    run(audited, save=lambda fit: states.append(copy.deepcopy(fit.state())))
    for name, weight in weights(plain).items():
        assert torch.equal(weight, weights(audited)[name])
    assert without_seconds(plain.progress.epochs) == without_seconds(audited.progress.epochs)
    records = audited.progress.audits
    assert [r["step"] for r in records] == [0, 4, 8, 12]
    resumed = Fit(make_model("dual_engram", seed=1), recipe, train, evaluation, 0)
    resumed.audit = Audit(4)
    resumed.restore(*states[0])  # after the first of two epochs
    assert run(resumed).progress.audits == records
    record = json.loads(json.dumps(records[-1], allow_nan=False))
    assert set(record["norm"]) == {"backbone", "tap", "compressor"}
    assert all(-1 <= cosine <= 1 for cosine in record["cosine"].values())
    assert record["share"]["uniform"] == 1 / 256
    for what in audits.DIRECTIONS:
        assert all(0 <= record["share"][what][loss] <= 1 for loss in ("cls", "lm", "both"))


def record(classes, exchanged):
    of = {"classes": classes, "exchanged": exchanged, "spread": 0.1, "mean": 0.1}
    shares = {what: dict.fromkeys(("cls", "lm", "both"), value) for what, value in of.items()}
    norm = {site: {"cls": 2.0, "lm": 1.0} for site in ("backbone", "tap", "compressor")}
    cosine = dict.fromkeys(norm, None)
    return {"step": 0, "norm": norm, "cosine": cosine, "share": {**shares, "uniform": 0.01}}


@pytest.mark.parametrize(("classes", "wanted"), [(0.6, SUPPORTED), (0.2, REFUTED)])
def test_the_verdict_follows_the_share_and_its_data_set(tmp_path, classes, wanted):
    from test_claims import verdict  # the rule through the table of verdicts

    rows = {
        "dual_engram": {
            str(s): {"audits": [record(classes + s / 100, 0.2), record(classes, 0.2)]}
            for s in range(3)
        }
    }
    found = audits.summary(rows)
    assert [row["site"] for row in found] == ["backbone", "tap", "compressor"]
    assert found[0]["norm_cls"]["mean"] == 2.0 and found[0]["cosine"] is None
    measured = audits.evidence(found, {"slug": "sst2", "train_rows": 20_000})
    assert measured["gradient_mechanism"]["where"] == "20,000 training texts"
    assert measured["gradient_mechanism"]["mean"] == pytest.approx(classes - 0.2 + 0.005)
    assert verdict("gradient_mechanism", measured=measured) == wanted
    cases = (("sst2", "small", True), ("ag-news", "small", False), ("sst2", "7B", False))
    for slug, backbone, kept in cases:
        folder = tmp_path / f"{slug}-{backbone}"
        (folder / "audit").mkdir(parents=True)
        own = {"dataset": {"slug": slug}, "backbone": backbone}
        (folder / "results.json").write_text(json.dumps(own))
        beside = {"dataset": {"slug": "sst2"}, "backbone": "small"}
        beside["analysis"] = {"evidence": measured}
        (folder / "audit" / "results.json").write_text(json.dumps(beside))
        assert ("gradient_mechanism" in evidence_beside(folder)) == kept
        fewer = {"gradient_mechanism": measured["gradient_mechanism"] | {"n_seeds": 1}}
        (folder / "later").mkdir()
        small = json.dumps(beside | {"analysis": {"evidence": fewer}})
        (folder / "later" / "results.json").write_text(small)
        if kept:  # of two the one with more seeds, whatever their names
            assert evidence_beside(folder)["gradient_mechanism"]["n_seeds"] == 3
        (folder / "subset").mkdir()  # a neighbour in the same study's folder
        (folder / "subset" / "results.json").write_text(json.dumps(own))
        assert ("gradient_mechanism" in evidence_beside(folder / "subset")) == kept
