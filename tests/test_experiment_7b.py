"""The two 7B scripts as a user runs them, on a tiny random backbone."""

import difflib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cli
import experiment_7b
import experiment_agnews_7b

SCRIPTS = [experiment_7b, experiment_agnews_7b]


@pytest.mark.parametrize(("script", "quantise"), zip(SCRIPTS, ("nf4", "none"), strict=True))
def test_smoke_run_end_to_end(tmp_path, script, quantise):
    out = tmp_path / "out"
    words = ["--smoke", "--epochs", "1", "--quantise", quantise, "--out", str(out)]
    done = subprocess.run(
        [sys.executable, script.__file__, *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    assert list(results["rows"]) == ["classification", "dual", "dual_engram"]
    label = {"nf4": "NF4", "none": "bfloat16"}[quantise]
    assert results["backbone"] == f"tiny-random-qwen2, {label}"
    assert results["identity"]["backbone.quantise"] == quantise
    assert results["recipe"]["eval_tokens"] == 2000
    row = results["rows"]["dual_engram"]["0"]
    assert set(row["final"]["modes"]) == {"zero", "own", "shuffled", "mean", "no_prefix"}
    assert row["parameters_total"] > 2 * row["parameters_trainable"] / 3
    saved = out / "adapters" / "dual_engram-0"
    assert {p.name for p in saved.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "heads.safetensors", "study.json",
    }  # fmt: skip
    assert (out / "engram_clusters.png").stat().st_size > 10_000


def test_without_bitsandbytes_nf4_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert cli.run(experiment_7b.main, ["--smoke", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "pip install bitsandbytes, or pass --quantise none" in said[0]
    assert not (tmp_path / "out").exists()


def test_the_scripts_differ_only_in_config_data_and_names():
    texts = [Path(script.__file__).read_text().splitlines() for script in SCRIPTS]
    body = [text[text.index("from __future__ import annotations") :] for text in texts]
    changed = [
        line[1:].strip()
        for line in difflib.unified_diff(*body, n=0, lineterm="")
        if line[0] in "+-" and not line.startswith(("+++", "---"))
    ]
    allowed = ("SPEC =", "RESULTS =", '"""The published', '128, "longest', '256, "longest')
    assert changed
    assert all(line.startswith(allowed) for line in changed), changed
    assert all(120 <= len(text) <= 220 for text in texts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--smoke", "--batch-size", "5"], "must be even, got 5"),
        (["--smoke", "--quantise", "int3"], "takes any of nf4 none"),
        (["--smoke", "--max-tokens", "1"], ">= 2"),
        (["--smoke", "--lora-targets", "nothing"], "--lora-targets from"),
        (["--smoke", "--arms", "published_small"], "not causal"),
        (["--data", "DATA"], "no CUDA GPU"),
        (["--data", "DATA", "--backbone", "a/b"], "HF_HUB_OFFLINE is set"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, words, message):
    data = tmp_path / "mine.csv"
    data.write_text("text,label\n" + "".join(f"text number {i},{i % 2}\n" for i in range(80)))
    words = [str(data) if word == "DATA" else word for word in words]
    code = cli.run(experiment_7b.main, [*words, "--threads", "1", "--out", str(tmp_path / "out")])
    lines = [x for x in capsys.readouterr().err.strip().splitlines() if "error:" in x]
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out" / "results.json").exists()
