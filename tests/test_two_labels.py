"""The two-label data set, its scores on planted features, and the script end to end."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score

import cli
import figures
import pairs
import report
import rivals
import two_labels
from data import Split
from inference import ARI_MARGIN, item_weights, resample
from rules import MIN_SEEDS, OPEN, SUPPORTED, decide_interval
from schema import evidence_beside, read_study
from scores import Run, Scores

WORDS = 6


@pytest.fixture(scope="module")
def joint():
    return pairs.build(*(pairs.generated(task) for task in pairs.TASKS), WORDS, 160)


def test_every_combination_of_labels_has_as_many_texts(joint):
    for split in ("train", "evaluation"):
        first, second = (getattr(joint.tasks[t], split) for t in pairs.TASKS)
        assert first.texts == second.texts
        cells = np.zeros((2, 4), int)
        np.add.at(cells, (first.labels, second.labels), 1)
        assert (cells == len(first.texts) // 8).all()
    assert len(first.texts) == 64 and len(joint.tasks["topic"].train.texts) == 160


def test_texts_carry_the_labels_of_their_parts(joint):
    class_words = pairs._WORDS
    for split in ("train", "evaluation"):
        for task, part in zip(pairs.TASKS, (slice(0, 5), slice(5, 10)), strict=True):
            data = getattr(joint.tasks[task], split)
            for text, label in zip(data.texts, data.labels, strict=True):
                assert text.split()[part][1] in class_words[task][label]


def test_no_source_text_is_used_twice_or_in_both_splits(joint):
    halves = [[], []]
    for split in ("train", "evaluation"):
        for text in getattr(joint.tasks["topic"], split).texts:
            words = text.split()
            halves[0].append(" ".join(words[:5]))
            halves[1].append(" ".join(words[5:]))
    for half in halves:
        assert len(set(half)) == len(half) == 160 + 64


def test_training_texts_that_are_evaluation_texts_are_left_out():
    train = Split("train", ("Good film  indeed", "good film at last", "bad"), np.array([1, 1, 0]))
    evaluation = Split("validation", ("good film indeed",), np.array([1]))
    assert pairs.unseen(train, evaluation, 9).texts == ("good film at last", "bad")
    assert pairs.unseen(train, evaluation, 2).texts == ("bad",)  # equal once they are cut


def test_neither_half_is_cut_away():
    long = Split("train", tuple(f"a{i} " * 50 for i in range(8)), np.arange(8) % 2)
    other = Split("train", tuple(f"b{i} " * 50 for i in range(8)), np.arange(8) % 4)
    first, _ = pairs.pair("train", long, other, None, WORDS)
    assert len(first.texts) == 8
    for text in first.texts:
        letters = [word[0] for word in text.split()]
        assert letters == ["a"] * WORDS + ["b"] * WORDS


def test_too_few_texts_for_the_cells_is_an_error():
    split = Split("train", ("a", "b", "c", "d"), np.arange(4) % 2)
    topics = Split("train", ("a", "b", "c", "d"), np.arange(4))
    with pytest.raises(cli.UserError, match="8 combinations"):
        pairs.pair("train", split, topics, None, WORDS)


def test_ami_of_tables_is_scikit_learns():
    rng = np.random.default_rng(0)
    for classes, k in ((2, 4), (4, 2), (3, 3)):
        labels, clusters = rng.integers(0, classes, 90), rng.integers(0, k, 90)
        clusters[:40] = labels[:40] % k
        table = np.zeros((classes, k))
        np.add.at(table, (labels, clusters), 1)
        wanted = adjusted_mutual_info_score(labels, clusters)
        assert rivals.ami_of_tables(table) == pytest.approx(wanted, abs=1e-12)
        padded = np.pad(table, ((0, 1), (0, 2)))  # a class that a resample missed
        assert rivals.ami_of_tables(padded) == pytest.approx(wanted, abs=1e-12)
    assert rivals.ami_of_tables(np.array([[5.0, 0], [0, 0]])) == 1


def planted(follows, items=96, seeds=MIN_SEEDS, keeps=None):
    """Features of engrams in which a condition's label is wide, and what it keeps is narrow."""
    rng = np.random.default_rng(0)
    labels = {"sentiment": np.arange(items) % 2, "topic": np.arange(items) // 2 % 4}
    features = dict(labels)
    for seed in range(seeds):
        for condition in ("sentiment-dual_engram", "topic-dual_engram", "neither-untrained"):
            here, tap = f"{condition}/{seed}/", rng.normal(size=(items, 16))
            weight, bias = rng.normal(size=(8, 16)) / 4, np.zeros(8)
            for task in {follows.get(condition)} - {None}:
                tap[:, :4] += 9 * np.eye(4)[labels[task]]
            for task in {(keeps or {}).get(condition)} - {None}:
                tap[:, 4:8] += 2 * np.eye(4)[labels[task]]
            arrays = {"W": weight, "b": bias, "pooled": tap[:, :5], "intermediate": tap}
            arrays["engram"] = np.tanh(tap @ weight.T + bias)
            arrays["logits"] = np.zeros((items, 2))
            features |= {here + name: x.astype(np.float32) for name, x in arrays.items()}
    return features


QUICK = rivals.Settings(restarts=3, band_draws=2, band_restarts=1, resamples=40)
TRUE = {f"{task}-dual_engram": task for task in pairs.TASKS}


def rows_of(features):
    found = rivals.score(features, settings=QUICK)
    rows = {(row["arm"], row["representation"]): row for row in found["two-labels"]}
    return rows, found["evidence"]


def test_codes_that_follow_the_trained_label_support_the_claim():
    rows, evidence = rows_of(planted(TRUE))
    for condition, task in TRUE.items():
        other = rivals._other(task)
        row = rows[condition, "intermediate"]
        assert row[f"ami_{task}"]["low"] > 0.9 and abs(row[f"ami_{other}"]["mean"]) < 0.1
        assert row["probe_other"] == row[f"probe_{other}"]
        band = rows[condition, "random compressor"]["difference"]
        assert 0 < band["low"] <= band["mean"] <= band["high"]
    floor = rows["neither-untrained", "engram"]
    assert floor["difference"] is None and abs(floor["ami_topic"]["mean"]) < 0.1
    chance = floor["probe_sentiment"]["mean"], floor["probe_topic"]["mean"]
    assert chance == pytest.approx((0.5, 0.25), abs=0.1)
    assert (
        decide_interval(evidence["most_salient"], "it", ARI_MARGIN, ARI_MARGIN).verdict == SUPPORTED
    )


def test_codes_that_follow_one_task_only_do_not_and_the_probe_sees_what_no_cluster_follows():
    one = "sentiment-dual_engram"
    rows, evidence = rows_of(planted({one: "sentiment"}, keeps={one: "topic"}))
    assert (
        decide_interval(evidence["most_salient"], "it", ARI_MARGIN, ARI_MARGIN).verdict != SUPPORTED
    )
    row = rows["sentiment-dual_engram", "intermediate"]
    assert row["ami_sentiment"]["low"] > 0.9
    assert row["ami_topic"]["mean"] < 0.2 and row["probe_other"]["low"] > 0.5


def test_the_evidence_is_the_weaker_task_and_needs_both():
    wide = {"mean": 0.4, "low": -0.2, "high": 1.0, "n_seeds": 5}
    narrow = {"mean": 0.3, "low": 0.2, "high": 0.4, "n_seeds": 3}
    rows = [
        {"arm": f"{task}-dual_engram", "representation": "engram", "difference": difference}
        for task, difference in zip(pairs.TASKS, (wide, narrow), strict=True)
    ]
    rows.append(rows[1] | {"representation": "pooled", "difference": {"mean": -0.9}})
    found = rivals.evidence(rows)["most_salient"]
    assert found.items() >= {"mean": 0.3, "low": -0.2, "high": 0.4, "n_seeds": 3}.items()
    assert decide_interval(found, "it", ARI_MARGIN, ARI_MARGIN).verdict == OPEN
    assert rivals.evidence(rows[:1]) == {}


def test_chance_is_taken_out_of_resamples_too():
    """A resample holds copies of items, which agree by themselves: its AMI would be too high."""
    labels, clusters = (np.random.default_rng(i).integers(0, 4, 300) for i in (0, 1))
    statistic = rivals.ami_statistic(labels, clusters, 4)
    scores = Scores(item_weights(300, 200, 0), 0)
    raw = resample(statistic, scores.weights)
    run = Run("neither-untrained", 0, labels, {})
    rivals._keep(scores, {}, run, "engram", {"ami_topic_4": statistic}, {})
    found = scores.draws["neither-untrained", "engram.ami_topic_4"][0]
    value = scores.seeds("neither-untrained", "engram.ami_topic_4")[0]
    assert raw.mean() > value + raw.std() / 2
    assert found.mean() == pytest.approx(value) and found.std() == pytest.approx(raw.std())


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "two-labels"
    words = ["--smoke", "--epochs", "1", "--seeds", "0", "--threads", "1", "--out", str(out)]
    command = [sys.executable, two_labels.__file__, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return out, done.stderr + done.stdout, words


def test_smoke_run_end_to_end(smoke):
    out, first, _ = smoke
    results = json.loads((out / "results.json").read_text())
    assert list(results["rows"]) == list(two_labels.conditions_of(two_labels.Config()))
    assert len(results["rows"]) == 6
    assert first.count("epoch 1 of 1") == 5  # nothing to train in the sixth
    labels = results["dataset"]["tasks"]
    assert [len(labels[task]) for task in pairs.TASKS] == [2, 4]
    assert results["analysis"]["evidence"]["most_salient"]["n_seeds"] == 1
    assert evidence_beside(out.parent) == results["analysis"]["evidence"]
    with np.load(out / "features.npz") as features:
        assert not any("layer" in name for name in features.files)
        assert features["topic-dual_engram/0/logits"].shape[1] == 4
    assert "warning: figures" not in first


def test_a_second_run_keeps_the_rows(smoke, capsys):
    before = json.loads((smoke[0] / "results.json").read_text())
    assert cli.run(two_labels.main, smoke[2]) == 0
    after = json.loads((smoke[0] / "results.json").read_text())
    assert after["rows"] == before["rows"] and after["analysis"] == before["analysis"]
    assert "epoch 1 of 1" not in capsys.readouterr().out


def test_its_figures_and_tables_are_checked(smoke, tmp_path):
    out = smoke[0]
    assert figures.expected(read_study(out).results, {}) == [
        "learning_curves.png", "two_labels.png",
    ]  # fmt: skip
    root = tmp_path / "root"
    folder = root / "results" / "two-labels"
    folder.mkdir(parents=True)
    for file in out.iterdir():
        if file.suffix in (".json", ".npz", ".png", ".svg"):
            (folder / file.name).write_bytes(file.read_bytes())
    key = "small/two-labels"
    page = "".join(f"<!-- table:{key}-{k} -->\n<!-- end -->\n" for k in ("two-labels", "kept"))
    (root / "FINDINGS.md").write_text(page)
    assert report.main(["--tables-only"], root) == 0
    text = (root / "FINDINGS.md").read_text()
    assert "| topic + LM | random compressor |" in text
    assert report.check(root) == []
    results = json.loads((folder / "results.json").read_text())
    results["analysis"]["two-labels"][0]["ami_topic"]["mean"] += 0.5
    (folder / "results.json").write_text(json.dumps(results))
    problems = "\n".join(report.check(root))
    assert "two_labels.png was drawn from other results" in problems
    assert "small/two-labels-two-labels is stale" in problems


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "x"], "--data is for one data set"),
        (["--smoke", "--arms", "dual"], "no engram to score"),
        (["--smoke", "--limit-eval", "7"], "8 combinations of labels"),
        (["--smoke", "--width", "30"], "not a multiple of --heads"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, words, message):
    out = tmp_path / "out"
    code = cli.run(two_labels.main, [*words, "--threads", "1", "--out", str(out)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and message in lines[0]
    assert not Path(out / "results.json").exists()
