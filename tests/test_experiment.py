"""experiment.py as a user runs it: the smoke run, and bad input through the real command line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cli
import experiment

SCRIPT = Path(experiment.__file__)
GOOD = "sentence,label\n" + "".join(
    f"a {w} film number {i},{i % 2}\n" for i in range(40) for w in ["good"]
)


def test_smoke_run_end_to_end(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--out", str(out)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    assert list(results["rows"]) == ["classification", "dual", "dual_engram"]
    row = results["rows"]["dual_engram"]["0"]
    assert len(row["epochs"]) == 8
    assert set(row["final"]["modes"]) == {"zero", "own", "shuffled", "mean", "no_prefix"}
    assert results["rows"]["classification"]["0"]["engram"] is None
    assert results["dataset"]["own"] is False
    for name in ("learning_curves", "engram_clusters", "spectrum", "controls"):
        assert (out / f"{name}.png").stat().st_size > 10_000
    assert results["analysis"]["controls"]
    assert "smoke" in results["dataset"]["name"]


def refused(capsys, folder, *words):
    """Run main in this process; the one line it printed, after the script's name."""
    code = cli.run(experiment.main, [*words, "--out", str(folder)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1
    assert not (folder / "results.json").exists()
    return lines[0].split(": error: ")[1]


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, [], "does not exist"),
        ("", [], "is empty"),
        ("sentence,label\n", [], "no rows"),
        ("text,y\ngood,1\nbad,0\n", [], "label"),
        (GOOD, ["--text-column", "body"], "body"),
        (GOOD.replace(",1\n", ",0\n"), [], "two classes"),
        (GOOD.replace("number 3,1", "number 3,-1"), [], "-1"),
        (GOOD.replace("number 3,1", "number 3,7"), [], "7"),
        (GOOD.replace("number 3,1", "number 3,0.5"), [], "0.5"),
        (GOOD.replace("a good film number 3,1", " ,1"), [], "--drop-empty"),
        (GOOD, ["--batch-size", "64"], "36 training rows < batch 64"),
    ],
)
def test_bad_data_is_one_line_before_anything_is_trained(tmp_path, capsys, content, flags, message):
    path = tmp_path / "mine.csv"
    if content is not None:
        path.write_text(content)
    assert message in refused(capsys, tmp_path / "out", "--data", str(path), *flags)


def test_an_unwritable_results_folder_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert "--out" in refused(capsys, tmp_path / "file" / "results", "--smoke")


def test_heads_must_divide_the_width(tmp_path, capsys):
    assert "--heads 3" in refused(capsys, tmp_path, "--smoke", "--heads", "3")


def test_own_texts_train_and_land_in_a_folder_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("study._analyse_and_draw", lambda folder: None)
    rows = [
        (f"{'lovely' if i % 2 else 'awful'} thing {i}", "pos" if i % 2 else "neg")
        for i in range(80)
    ]
    path = tmp_path / "Shop Reviews.tsv"
    path.write_text("review\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in rows))
    words = ["--data", str(path), "--labels", "neg", "pos", "--epochs", "2", "--batch-size", "8",
             "--width", "16", "--arms", "dual_engram", "--threads", "1"]  # fmt: skip
    assert cli.run(experiment.main, words) == 0, capsys.readouterr().err
    (made,) = (tmp_path / "results").glob("*/results.json")
    results = json.loads(made.read_text())
    assert made.parent.name == results["dataset"]["slug"] != "sst2"
    assert results["dataset"]["classes"] == ["neg", "pos"]
    assert results["rows"]["dual_engram"]["0"]["parameters_trainable"] > 0


@pytest.mark.parametrize("rows", [(0, 0, 1), (0, 1)])
def test_an_evaluation_of_a_few_rows_runs_and_says_what_has_no_value(tmp_path, capsys, rows):
    """A class with one row has no pair of items; two rows are as many as there are clusters."""
    for name, labels in (("train", [0, 1] * 40), ("validation", rows)):
        lines = [f"{name} {'good' if c else 'bad'} number {i},{c}" for i, c in enumerate(labels)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    words = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--threads", "1"]
    words += ["--epochs", "1", "--seeds", "0", "--width", "16", "--inner", "16"]
    words += ["--batch-size", "16", "--arms", "dual_engram"]
    assert cli.run(experiment.main, words) == 0
    said = capsys.readouterr()
    assert "few rows of a class" in said.out + said.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    engram = results["rows"]["dual_engram"]["0"]["engram"]
    assert (engram["cosine_within"] is None) == (len(rows) == 2)
    assert (tmp_path / "out" / "engram_clusters.png").exists()


def test_cut_texts_are_counted_aloud(tmp_path, monkeypatch, capsys):
    rows = "".join(f"{'word ' * (100_000 if i < 7 else 3)}{i},{i % 2}\n" for i in range(90))
    (tmp_path / "x.csv").write_text("text,label\n" + rows)
    words = ["--data", str(tmp_path / "x.csv"), "--out", str(tmp_path / "out"), "--threads", "1"]
    words += ["--width", "16", "--inner", "16", "--max-tokens", "8", "--stop-after", "0.001s"]
    assert cli.run(experiment.main, words) == 0
    said = capsys.readouterr().out
    counts = [int(n) for n in re.findall(r"^(\d+) of \d+ \S+ texts cut at 8 tokens$", said, re.M)]
    assert sum(counts) == 7
