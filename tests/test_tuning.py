"""The dev split knows nothing of training; each tuned arm gets the rate that is best on it."""

import json

import numpy as np
import pytest

import cli
import experiment
import study
import tuning
from results import ResultsFolder
from training import Interrupted


def test_no_dev_text_is_known_from_training():
    """Phrases of made-up sentences, as SST-2's: nested, overlapping and repeated."""
    rng = np.random.default_rng(0)
    sentences = [[f"w{w}" for w in rng.integers(0, 400, 20)] for _ in range(150)]
    texts = []
    for words in sentences:
        for _ in range(12):
            start, length = rng.integers(0, 18), rng.integers(1, 20)
            texts.append(" ".join(words[start : start + length]))
    dev = tuning.held_out(texts, seed=3)
    assert 0.03 * len(texts) < dev.sum() <= 0.1 * len(texts)
    assert np.array_equal(dev, tuning.held_out(texts, seed=3))
    assert not np.array_equal(dev, tuning.held_out(texts, seed=4))
    known = [f" {text} " for text, out in zip(texts, dev, strict=True) if not out]
    for text in np.array(texts)[dev]:
        words = text.split()
        runs = [words] if len(words) < tuning.RUN else list(tuning._runs(words, tuning.RUN))
        for run in runs:
            assert not any(f" {' '.join(run)} " in other for other in known), text


def test_the_best_mean_is_taken_and_of_equals_the_smaller_rate():
    trials = {"0.01": {"0": 0.9, "1": 0.5}, "0.001": {"0": 0.7, "1": 0.7}, "0.1": {"0": 0.6}}
    assert tuning.choose(trials) == 0.001
    rows = tuning.summary({"dual_tuned": {"dev_rows": 9, "trials": trials, "chosen": 0.001}})
    assert [(row["rate"], row["chosen"]) for row in rows] == [
        (0.001, "yes"),
        (0.01, "no"),
        (0.1, "no"),
    ]
    assert rows[1]["dev_accuracy"]["mean"] == pytest.approx(0.7)


WORDS = (
    "--smoke --arms dual_tuned --seeds 0 1 --epochs 1 --lr-grid 1e-5 3e-3 --threads 1 "
    "--width 16 --inner 16 --out"
)


def test_a_stopped_choice_goes_on_and_the_chosen_rate_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "draw_figures", lambda folder: None)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli.run(experiment.main, [*WORDS.split(), str(whole)]) == 0
    log, said = ResultsFolder.log, []

    def stop_once(folder, line, show=True):
        said.append(line)
        log(folder, line, show)
        if "dev accuracy" in line and sum("dev accuracy" in x for x in said) == 1:
            raise Interrupted("SIGTERM")

    monkeypatch.setattr(ResultsFolder, "log", stop_once)
    cli.run(experiment.main, [*WORDS.split(), str(cut)])
    assert not json.loads((cut / "results.json").read_text())["rows"]
    assert cli.run(experiment.main, [*WORDS.split(), str(cut)]) == 0
    assert sum("dev accuracy" in line for line in said) == 2  # the first was not tried again
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (whole, cut))
    assert one["tuning"] == other["tuning"]
    found = one["tuning"]["dual_tuned"]
    assert found["chosen"] == tuning.choose(found["trials"])
    assert found["trials"].keys() == {"1e-05", "0.003"}
    for seed in "01":
        row = one["rows"]["dual_tuned"][seed]
        assert row["learning_rate"] == found["chosen"]
        assert row["final"] == other["rows"]["dual_tuned"][seed]["final"]
    assert {row["arm"] for row in one["analysis"]["tuning"]} == {"dual_tuned"}


def test_a_longer_grid_goes_on_and_a_row_at_another_rate_is_trained_again(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(study, "_analyse_and_draw", lambda folder: None)
    words = ["--smoke", "--arms", "dual_tuned", "--seeds", "0", "--epochs", "6", "--threads", "1"]
    words += ["--width", "16", "--inner", "16", "--out", str(tmp_path), "--lr-grid"]

    def run(*rates):
        assert cli.run(experiment.main, [*words, *rates]) == 0
        found = json.loads((tmp_path / "results.json").read_text())
        assert (
            found["rows"]["dual_tuned"]["0"]["learning_rate"]
            == found["tuning"]["dual_tuned"]["chosen"]
        )
        return found["tuning"]["dual_tuned"], capsys.readouterr().out

    short, said = run("1e-5", "1e-4")
    assert "the edge of --lr-grid" in said
    longer, said = run("1e-5", "1e-4", "1e-2")
    assert longer["trials"].items() > short["trials"].items()
    assert said.count("dev accuracy") == 1
    assert longer["chosen"] == 0.01 and f"was trained at {short['chosen']:g}, dropped" in said
    assert run("1e-5")[0] == longer  # what is known counts, asked for or not


def test_texts_that_give_no_dev_split_are_refused(tmp_path, capsys):
    same = "one two three four five six"
    lines = [f"{same} {i},{i % 2}" for i in range(60)]
    (tmp_path / "own.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    words = ["--data", str(tmp_path / "own.csv"), "--arms", "tuned", "--batch-size", "8"]
    words += ["--out", str(tmp_path / "out"), "--threads", "1", "--width", "16", "--seeds", "0"]
    assert cli.run(experiment.main, words) == 2
    assert "dev split" in capsys.readouterr().err
