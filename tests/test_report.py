"""report.py on a made-up results folder: figures, tables, and what --check must notice."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import arm_figures
import benchmark_tables
import clustering
import figures
import report
import schema
import tables
import values

ITEMS, CLASSES, WIDTH = 60, 2, 8
EPOCHS = 3
README = """# Study, in words

Example: `<!-- v:NAME -->` and `0.999` are code, [0.998](https://a.b/1.5) is a link,
0.50.2 a version.

<!-- table:small-accuracy -->
<!-- end -->

<!-- table:7b-accuracy -->
<!-- end -->

```
<!-- table:nothing -->
0.997
```
"""
FINDINGS = """# 1.2 Findings

<!-- table:small-engram -->
<!-- end -->
<!-- table:small-arms -->
<!-- end -->
<!-- table:small-modes -->
<!-- end -->
<!-- table:small-parameters -->
<!-- end -->
<!-- table:small-provenance -->
<!-- end -->
<!-- table:benchmark-small -->
<!-- end -->

The ARI is <!-- v:small.dual_engram.ari -->?<!-- /v -->; published
<!-- v:small.published.dual_engram.ari --><!-- /v -->,
A1 <!-- v:small.analysis.controls.A1/random/dual_engram/engram.ari --><!-- /v -->.
"""


def _run(rng, labels, arm: str, seed: int, features: dict) -> dict:
    """One (arm, seed): features with the class in their first direction, and their true scores."""
    has_engram = arm in ("dual_engram", "published_small", "untrained")
    strength = {"untrained": 0.0, "published_small": 1.0}.get(arm, 2.0)
    base = rng.normal(size=(len(labels), WIDTH))
    base[:, 0] += strength * (2 * labels - 1)
    logits = np.stack([-base[:, 0], base[:, 0]], 1).astype(np.float32)
    features[f"{arm}/{seed}/pooled"] = base.astype(np.float16)
    features[f"{arm}/{seed}/intermediate"] = np.maximum(base, 0).astype(np.float16)
    features[f"{arm}/{seed}/logits"] = logits
    engram, predictions = None, logits.argmax(1)
    if has_engram:
        code = np.tanh(base[:, :4]).astype(np.float16)
        features[f"{arm}/{seed}/engram"] = code
        scores = clustering.engram_metrics(code, labels, predictions)
        fitted = {"ari": scores.ari, "cluster_accuracy": scores.cluster_accuracy}
        engram = {**vars(scores), "train_fitted": fitted}
        engram["mapping"] = {str(k): v for k, v in scores.mapping.items()}
    lm = None if arm == "classification" else 4.0
    final = {"accuracy": float((predictions == labels).mean()), "cls_loss": 0.5, "lm_loss": lm}
    modes = ("zero", "own", "shuffled", "mean", "no_prefix") if arm == "dual_engram" else ()
    epochs = [
        {
            "epoch": epoch + 1,
            "train_accuracy": 0.6 + 0.1 * epoch,
            "train_cls_loss": 0.6 - 0.1 * epoch,
            "train_lm_loss": lm,
            "eval_accuracy": 0.6 + 0.05 * epoch + rng.uniform(0, 0.03),
            "eval_cls_loss": 0.6 - 0.05 * epoch + rng.uniform(0, 0.03),
            "eval_lm_loss": lm and lm - 0.3 * epoch + rng.uniform(0, 0.1),
            "train_seconds": 1.5,
            "train_tokens": 1000,
        }
        for epoch in range(0 if arm == "untrained" else EPOCHS)
    ]
    return {
        "parameters_trainable": 1_300_000,
        "parameters_total": 1_300_000,
        "epochs": epochs,
        "final": {
            **final,
            "predictions_ari": clustering.adjusted_rand(labels, predictions),
            "modes": dict.fromkeys(modes, final),
        },
        "engram": engram,
    }


def write_study(folder: Path, seeds: int = 3, items: int = ITEMS, **dataset) -> dict:
    """A results folder of five arms as the experiments write it, figures not yet drawn."""
    rng, features = np.random.default_rng(0), {}
    labels = np.arange(items) % CLASSES
    rows = {
        arm: {str(seed): _run(rng, labels, arm, seed, features) for seed in range(seeds)}
        for arm in ("classification", "dual", "dual_engram", "published_small", "untrained")
    }
    controls = [
        {"control": c, "name": n, "arm": arm, "representation": r, "ari": ari}
        for arm in ("classification", "dual", "dual_engram")
        for c, n, r, ari in (
            ("A0", "prediction ARI", "", {"mean": 0.45, "low": 0.4, "high": 0.5, "n_seeds": 3}),
            ("A1", "random", "engram", {"mean": 0.4, "low": 0.3, "high": 0.5, "n_seeds": 3}),
            ("A4", "layer", "pooled", {"mean": 0.2, "low": None, "high": None, "n_seeds": 1}),
        )
    ]
    results = {
        "schema_version": 1,
        "experiment": "experiment.py",
        "backbone": "from scratch, 2 layers, d 128",
        "dataset": {
            **{"name": "SST-2", "slug": "sst2", "source": "made up", "eval_split": "validation"},
            **{"sha256": "0" * 64, "own": True, "train_rows": 500, "eval_rows": items},
            **{"classes": ["negative", "positive"], "notes": []},
            **dataset,
        },
        "config": {"lr": 3e-4},
        "fingerprint": "abc",
        "provenance": {
            **{"commit": "f" * 40, "dirty": False, "argv": ["experiment.py", "--seeds", "0"]},
            **{"versions": {"python": "3.11.9", "torch": "2.13.0"}, "hardware": {"cpu": "x"}},
            **{"started": "2025-01-01T00:00:00", "wall_seconds": 4000.0},
        },
        "rows": rows,
        "analysis": {"controls": controls, "contrasts": {}, "claims": []},
    }
    folder.mkdir(parents=True)
    np.savez(folder / "features.npz", labels=labels, **features)
    (folder / "results.json").write_text(json.dumps(results, allow_nan=False))
    published = {
        "source": "made up",
        "protocol": {"epochs": EPOCHS},
        "arms": {
            "classification": {"parameters": 1297346, "val_accuracy": [0.61, 0.6811, 0.6701]},
            "dual_engram": {"val_accuracy": [0.6, 0.66, 0.67], "ari": 0.2356},
        },
    }
    (folder / "published.json").write_text(json.dumps(published))
    return results


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A rendered checkout; tests copy it."""
    root = tmp_path_factory.mktemp("checkout")
    write_study(root / "results")
    (root / "README.md").write_text(README)
    (root / "FINDINGS.md").write_text(FINDINGS)
    assert report.main([], root) == 0
    return root


@pytest.fixture
def checkout(pristine, tmp_path):
    for path in pristine.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(pristine)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def edit_results(root: Path, change) -> None:
    path = root / "results" / "results.json"
    results = json.loads(path.read_text())
    change(results)
    path.write_text(json.dumps(results))


def test_everything_is_rendered_and_checks(checkout):
    results = checkout / "results"
    assert {path.name for path in results.glob("*.png")} == {
        *("learning_curves.png", "engram_clusters.png", "spectrum.png", "controls.png"),
        "arms.png",
    }
    readme, findings = ((checkout / name).read_text() for name in report.DOCUMENTS)
    assert "| Model 1: classification | 0.6811 | 0.6701 | 0." in readme
    assert "| 0.2356 |" in findings and "; published\n<!-- v:small.published" in findings
    assert "(3 seeds)" in findings and "1 h 7 min" in findings and "1,300,000" in findings
    assert "0.400 [0.300, 0.500] (3 seeds)" in findings  # control A1, in a sentence
    assert "Published protocol" in readme and "Untrained" not in readme
    assert "Untrained" in findings  # the table of all arms
    assert readme.count("This project's run: not measured") == 1  # 7b
    assert "| Published protocol | 0.2356 |" in findings  # beside the published Model 3's figure
    assert "<!-- table:nothing -->\n0.997" in readme  # an example in code stays one
    assert "Not measured.\n<!-- end -->" in findings  # no benchmark yet
    assert report.check(checkout) == []
    assert not list(checkout.rglob("*.tmp"))


def test_a_second_render_changes_nothing(checkout):
    before = {path: path.read_bytes() for path in checkout.rglob("*.*") if path.is_file()}
    assert report.main([], checkout) == 0
    assert before == {path: path.read_bytes() for path in checkout.rglob("*.*") if path.is_file()}


def _break_nan(root):
    edit(root / "results" / "results.json", '"cls_loss": 0.5', '"cls_loss": NaN')


def _break_fraction(root):
    edit_results(root, lambda r: r["rows"]["dual"]["0"]["final"].update(accuracy=1.2))


def _break_key(root):
    edit_results(root, lambda r: r["dataset"].pop("sha256"))


def _break_figure_source(root):
    edit_results(root, lambda r: r["rows"]["dual"]["0"]["epochs"][0].update(eval_accuracy=0.5))


def _break_prose(root):
    edit(root / "FINDINGS.md", "The ARI is", "It gains 4.78 points. The ARI is")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda r: edit(r / "README.md", "| 0.6811 |", "| 0.6911 |"), "small-accuracy is stale"),
        (lambda r: edit(r / "FINDINGS.md", "ari -->0.2356", "ari -->0.2357"), "ari is stale"),
        (lambda r: (r / "results" / "spectrum.png").unlink(), "spectrum.png is missing"),
        (_break_figure_source, "learning_curves.png was drawn from other results"),
        (_break_prose, "FINDINGS.md:"),
        (_break_nan, "holds NaN"),
        (_break_fraction, "rows.dual.0.final.accuracy is '1.2', expected a fraction"),
        (_break_key, "dataset.sha256 is missing"),
        (lambda r: edit(r / "README.md", "table:7b-", "table:8b-"), "no table '8b-accuracy'"),
        (lambda r: edit(r / "FINDINGS.md", "engram.ari", "engram.arj"), "no value"),
        (lambda r: edit(r / "README.md", "<!-- end -->", ""), "no partner"),
        (lambda r: (r / "results" / "features.npz").write_bytes(b"PK\x03\x04"), "is damaged"),
    ],
)
def test_check_notices(checkout, capsys, damage, told):
    damage(checkout)
    assert report.main(["--check"], checkout) == 1
    assert told in capsys.readouterr().out


def test_prose_may_hold_rendered_decimals_only(checkout):
    shown = values.values(report.read_studies(checkout))["small.dual.accuracy"].split()[0]
    with (checkout / "FINDINGS.md").open("a") as file:
        file.write(f"\nModel 2 reaches {shown}, on Qwen2.5-7B, 95 % of the time, not 0.1234.\n")
    (problem,) = report.check(checkout)
    assert "0.1234" in problem and "FINDINGS.md:" in problem


def test_an_unknown_table_is_an_error_and_the_rest_is_rendered(checkout, capsys):
    edit(checkout / "README.md", "table:7b-accuracy", "table:typo")
    edit(checkout / "README.md", "| 0.6811 |", "| 0.6911 |")
    assert report.main(["--tables-only"], checkout) == 2
    assert "no table 'typo'" in capsys.readouterr().err
    assert "| 0.6811 |" in (checkout / "README.md").read_text()


def test_a_checkout_without_results_checks(tmp_path):
    (tmp_path / "README.md").write_text("<!-- table:agnews-accuracy -->\n<!-- end -->\n")
    assert "stale" in report.check(tmp_path)[0]
    assert report.main([], tmp_path) == 0
    assert report.check(tmp_path) == []


def test_a_study_not_run_shows_what_was_published(checkout):
    (checkout / "results" / "results.json").unlink()
    studies = report.read_studies(checkout)
    text = tables.table("small-accuracy", studies, values.values(studies))
    assert text.splitlines()[2:] == [
        "| arm | published, best epoch | published, last epoch | ours |",
        "| --- | --- | --- | --- |",
        "| Model 1: classification | 0.6811 | 0.6701 | not measured |",
        "| Model 3: + engram | 0.67 | 0.67 | not measured |",
    ]


def test_another_backbone_gets_its_own_table_without_published_columns(checkout):
    folder = checkout / "results_7b" / "SmolLM2-135M"
    write_study(folder, seeds=1, own=False, name="Rotten Tomatoes")
    write_study(folder / "subset-20", seeds=2)
    studies = report.read_studies(checkout)
    assert studies["7b/SmolLM2-135M/subset-20"].path == folder / "subset-20"
    shown = values.values(studies)
    text = tables.table("7b/SmolLM2-135M-accuracy", studies, shown)
    assert "published" not in text.splitlines()[2]
    assert "Rotten Tomatoes (not the data set of this script's study): 60 validation items" in text
    assert "(n = 1)" in text
    absent = tables.table("7b/absent-accuracy", studies, shown)
    assert absent == "This project's run: not measured.\n"


def test_published_figures_of_another_backbone_are_not_comparable(checkout):
    study = report.read_study(checkout / "results")
    assert values.is_comparable(study.results, study.published)
    other = {**study.published, "protocol": {"backbone": "Qwen/Qwen2.5-7B"}}
    assert not values.is_comparable(study.results, other)


def test_benchmark_table(checkout):
    row = {**dict.fromkeys(benchmark_tables.SMALL_COSTS, 6.99), "threads": 2}
    benchmark = {"machine": "2 cores", "date": "2025-01-01", "rounds": 5}
    (checkout / "benchmarks").mkdir()
    path = checkout / benchmark_tables.BENCHMARKS["benchmark-small"].file
    path.write_text(json.dumps({**benchmark, "rows": [{"arm": "dual", **row}]}))
    assert report.main(["--tables-only"], checkout) == 0
    line = "| Model 2: + next token | 1 | 2 | 6.99 | 6.99 | 6.99 | 6.99 | 6.99 | 7 | 7 |"
    assert line in (checkout / "FINDINGS.md").read_text()
    path.write_text(json.dumps({**benchmark, "rows": [{"arm": "dual", **row, "ratio": "12"}]}))
    assert "rows[0].ratio" in report.check(checkout)[0]


def with_more_arms(results):
    """The made-up results with stand-ins for a control and for widths."""
    rows, controls = results["rows"], results["analysis"]["controls"]
    for arm in ("dual_engram_same_class", "dual_engram_w2", "dual_engram_w256"):
        rows[arm] = rows["dual_engram"]
        controls += [r | {"arm": arm} for r in controls if r["arm"] == "dual_engram"]
    score = {"mean": 0.3, "low": 0.2, "high": 0.4, "n_seeds": 3}
    trained = {"control": "A4", "name": "trained", "representation": "engram", "ari": score}
    controls += [trained | {"arm": arm} for arm in rows if arm.startswith("dual_engram")]
    results["config"]["engram_dim"] = 32
    return results


@pytest.mark.parametrize("arms", [("dual",), ("classification", "dual"), ("dual", "dual_engram")])
def test_legends_fit_and_name_what_is_drawn(tmp_path, arms):
    results = with_more_arms(write_study(tmp_path / "results"))
    rows = {name: results["rows"][name] for name in arms}
    kept = [r for r in results["analysis"]["controls"] if r["arm"] in arms]
    kept = [r for r in kept if r["control"] != "A1" or "dual_engram" in arms]
    few = {**results, "rows": rows, "analysis": {"controls": kept}}
    for draw in (figures.controls, arm_figures.arms):
        figure = draw(few)
        figure.savefig(io.BytesIO())  # lays it out
        (legend,) = figure.legends
        extent = legend.get_window_extent()
        assert extent.x0 >= 0 and extent.x1 <= figure.bbox.x1
        said = " ".join(text.get_text() for text in legend.get_texts())
        for text in ("engram", "random compressors"):
            assert (text in said) == ("dual_engram" in arms)


def test_an_accuracy_interval_cut_at_the_axis_ends_in_an_arrow(tmp_path):
    results = write_study(tmp_path / "results")
    for runs in results["rows"].values():
        for run, accuracy in zip(runs.values(), (0.8, 0.801, 0.802), strict=True):
            run["final"]["accuracy"] = accuracy

    def arrows():
        axes = arm_figures.arms(results).axes[0]
        ends = dict(zip(("<", ">"), axes.get_xlim(), strict=True))
        shown = [line for line in axes.lines if line.get_marker() in ends]
        assert all(line.get_xdata()[0] == ends[line.get_marker()] for line in shown)
        return {(line.get_marker(), line.get_ydata()[0]) for line in shown}

    assert arrows() == set()
    results["rows"]["dual"]["0"]["final"]["accuracy"] = 0.1
    row = values.in_order(results["rows"]).index("dual")
    assert arrows() == {("<", row), (">", row)}


def test_more_arms_get_their_figures_in_both_formats(checkout):
    path = checkout / "results" / "results.json"
    results = with_more_arms(json.loads(path.read_text()))
    path.write_text(json.dumps(results))
    named = {2: "dual_engram_w2", 32: "dual_engram", 256: "dual_engram_w256"}
    assert arm_figures.widths_of(results) == named
    assert figures.shown_arms(set(named.values()) - {"dual_engram"}) == [named[2], named[256]]
    assert figures.shown_arms({"dual_engram_w128", "dual_engram_w8"})[0] == "dual_engram_w8"
    problems = "\n".join(report.check(checkout))
    for name in ("width.png", "width.svg"):
        assert f"{name} is missing" in problems
    assert "arms.png was drawn from other results" in problems
    drawn = {p.name: p.read_bytes() for p in report.draw(checkout / "results")}
    assert {"arms.svg", "width.svg", "learning_curves.svg"} <= drawn.keys()
    again = {p.name: p.read_bytes() for p in report.draw(checkout / "results")}
    assert drawn == again
    assert "arms.png" not in figures.expected({**results, "rows": {"dual": {}}}, {})


def test_qlora_benchmark_names_data_set_arm_and_contender():
    row = {"tokens_per_s": 1234.56, "ms_per_step": 99.6, "last_loss": 2.0, "peak_mib": None}
    case = {"dataset": "SST-2", "arm": "dual", "max_tokens": 128, "steps": 4, "rounds": 3}
    case |= {"backbone": "tiny", "machine": "2 cores", "date": "2025-01-01"}
    points = [{"tokens": 64, "ms": 20.0}, {"tokens": 128, "ms": 30.0}]
    case |= {"passes": {"points": points, "fixed_ms": 10.0, "ms_per_token": 0.156}}
    case |= {"full_steps": 36_000, "rows": {"ours": row, "published": row | {"tokens_per_s": 10}}}
    found = {"cases": [case]}
    every = dict.fromkeys(benchmark_tables.BENCHMARKS) | {"benchmark-qlora-cpu": found}
    assert not list(benchmark_tables.benchmark_mismatches(every))
    known = benchmark_tables.benchmark_values(every)
    assert known["benchmark-qlora-cpu.sst2.tiny.2cores.dual.ours.tokens_per_s"] == "1,234.6"
    text = benchmark_tables.benchmark_table("benchmark-qlora-cpu", every, known)
    line = "| SST-2 | 128 tokens | Model 2: + next token | ours | 1,234.6 | 100 | 2.000 | 1.0 |"
    assert line in text
    assert "peak" not in text and "machine" not in text
    every["benchmark-passes-cpu"] = found
    known = benchmark_tables.benchmark_values(every)
    text = benchmark_tables.benchmark_table("benchmark-passes-cpu", every, known)
    assert "| SST-2 | Model 2: + next token | 128 | 30 | 10 | 0.16 |" in text
    del case["passes"]
    text = benchmark_tables.benchmark_table("benchmark-passes-cpu", every, known)
    assert text == "Not measured.\n"
    found["cases"].append(case | {"machine": "another"})
    known = benchmark_tables.benchmark_values(every)
    text = benchmark_tables.benchmark_table("benchmark-qlora-cpu", every, known)
    assert "| SST-2 | another | 128 tokens |" in text and "| SST-2 | 2 cores | 128" in text
    with pytest.raises(schema.ReportError, match="no benchmark"):
        benchmark_tables.benchmark_table("benchmark-nothing", every, known)


def test_list_elements_are_named_by_what_tells_them_apart():
    rows = [{"id": "P1", "p": 0.25}, {"id": "P2", "p": 0.00001}]
    assert dict(values.flat(rows, "x")) == {
        **{"x.P1.id": "P1", "x.P1.p": "0.250", "x.P2.id": "P2", "x.P2.p": "1.0e-05"}
    }
    rows = [{"arm": "dual", "k": 2}, {"arm": "dual", "k": 3}]
    assert {"x.0.k", "x.1.k"} < set(dict(values.flat(rows, "x")))
    assert dict(values.flat([0.5, 1.5], "x")) == {"x.0": "0.500", "x.1": "1.500"}


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [values.interval(list(rng.normal(size=5))) for _ in range(2000)]
    assert 0.93 < np.mean([i.low < 0 < i.high for i in found]) < 0.97
    assert str(values.interval([0.5])) == "0.500 (n = 1)"


def test_effective_rank_of_the_spectrum_is_the_metric():
    x = np.random.default_rng(0).normal(size=(40, 12))
    shares, rank = figures._variances(x)
    assert rank == pytest.approx(clustering.effective_rank(x))
    assert shares.sum() == pytest.approx(1)
    assert figures._variances(np.ones((5, 3)))[1] == 0 == clustering.effective_rank(np.ones((5, 3)))


def test_analyse_stores_what_the_analysis_returns(checkout, monkeypatch):
    def fake(features, results, published):
        count = float(len(features["labels"]))
        return {**results["analysis"], "contrasts": {"P1": {"p": count}}}

    monkeypatch.setitem(sys.modules, "analysis", type("analysis", (), {"analyse": fake}))
    assert report.main(["--analyse", str(checkout / "results")], checkout) == 0
    studies = report.read_studies(checkout)
    assert values.values(studies)["small.analysis.contrasts.P1.p"] == "60.000"


def test_drawing_a_folder_without_results_is_one_line(tmp_path, capsys):
    assert report.main([str(tmp_path)], tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_provenance_says_which_commands_ran_on_another_machine(checkout):
    studies = report.read_studies(checkout)
    run = studies["small"].results["provenance"]
    older = {"commit": "a" * 40, "argv": ["experiment.py"], "hardware": {"cpu": "y"}}
    run["earlier"] = [older, older | {"hardware": {"cpu": "x"}}, {**older, "hardware": {}}]
    lines = tables.table("small-provenance", studies, {}).splitlines()
    commands = [line for line in lines if "command at" in line]
    assert [line.count("on cpu: y") for line in commands] == [1, 0, 0, 0]
    assert [line.count("not written down") for line in commands] == [0, 0, 1, 0]
    assert "| hardware | cpu: x |" in lines


def test_failed_figure_leaves_the_old_one(checkout, monkeypatch):
    path = checkout / "results" / "learning_curves.png"
    before = path.read_bytes()

    def fail(*args):
        raise RuntimeError("no font")

    monkeypatch.setattr(figures, "learning_curves", fail)
    with pytest.raises(RuntimeError, match="no font"):
        report.draw(checkout / "results")
    assert path.read_bytes() == before


def test_predictions_alone_make_no_figure_of_controls(checkout):
    study = schema.read_study(checkout / "results")
    controls = study.results["analysis"]["controls"]
    assert "controls.png" in figures.expected(study.results, {})
    study.results["analysis"]["controls"] = [row for row in controls if row["control"] == "A0"]
    assert study.results["analysis"]["controls"]
    assert "controls.png" not in figures.expected(study.results, {})


def test_a_reader_that_has_seen_enough_is_no_error(checkout):
    code = "import sys; from pathlib import Path; import report; "
    code += "sys.exit(report.main(['--names'], Path(sys.argv[1])))"
    command = [sys.executable, "-c", code, checkout]
    done = subprocess.Popen(
        command, cwd=Path(report.__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    done.stdout.close()
    assert done.stderr.read() == b"" and done.wait() == 0


def test_check_needs_no_torch(checkout):
    code = (
        "import sys; from pathlib import Path; import report; "
        "print(report.check(Path(sys.argv[1])), 'torch' in sys.modules)"
    )
    command, folder = [sys.executable, "-c", code, checkout], Path(report.__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"


def test_lists_of_the_analysis_become_tables(checkout):
    results = json.loads((checkout / "results" / "results.json").read_text())
    band = {"mean": None, "low": 0.2, "high": 0.4}
    results["analysis"] = {
        "claims": [
            {
                "id": "x",
                "claim": "it clusters",
                "published": -0.016,
                "ours": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3},
                "control_band": band,
                "p_adjusted": 0.00002,
                "verdict": "not supported",
            },
            {"id": "y", "claim": "it gains", "ours": {"mean": None, "low": None, "n": 0}},
        ],
        "contrasts": [
            {"id": "P1", "name": "a - b", "estimate": 0.1, "low": 0.0, "high": 0.2, "n_seeds": 1,
             "p": 0.5, "equivalence": {"margin": 0.05, "equivalent": True}}
        ],
    }  # fmt: skip
    study = schema.Study(checkout, results, None)
    known = values.values({"small": study})
    claims, contrasts = (
        tables.table(f"small-{kind}", {"small": study}, known).splitlines()
        for kind in ("claims", "contrasts")
    )
    row = "| it clusters | -0.016 | 0.500 [0.400, 0.600] (3 seeds) | 0.200 to 0.400 | < 0.001 |"
    assert claims[4].startswith(row)
    assert claims[5].startswith("| it gains | - | - | - | - |")
    assert "| 0.100 [0.000, 0.200] (1 seed) | 0.500 | yes (±0.050) |" in contrasts[4]


def test_the_verdicts_of_every_scale_stand_side_by_side(checkout):
    results = json.loads((checkout / "results" / "results.json").read_text())
    assert set(tables.MAIN_ARMS) <= results["rows"].keys()
    row = {"id": "x", "claim": "it clusters", "verdict": "not decided"}
    row |= {"ours": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3}}
    elsewhere = {"mean": 0.1, "low": 0.0, "high": 0.2, "n": 5, "where": "20 training texts"}
    results["dataset"]["own"] = True
    results["analysis"] = {"claims": [row]}
    fewer = json.loads(json.dumps(results))
    fewer["dataset"]["train_rows"] = 20_000
    fewer["analysis"]["claims"] += [
        row | {"id": "y", "claim": "it gains", "ours": {"mean": None}},
        row | {"id": "z", "claim": "it grows", "turns_on": elsewhere},
    ]
    foreign = json.loads(json.dumps(results))
    foreign["dataset"] |= {"own": False, "name": "my texts"}
    found = {"a": results, "b": fewer, "c": foreign}
    studies = {name: schema.Study(checkout, each, None) for name, each in found.items()}
    header, _, *rows = tables.table("all-verdicts", studies, {}).splitlines()[2:]
    assert "20,000 texts" in header and "my texts" not in header
    assert rows[0].count("not decided: 0.500 [0.400, 0.600] (3 seeds)") == 2
    assert "not decided: 0.100 [0.000, 0.200] (5 seeds) on 20 training texts" in rows[2]
    assert rows[1] == "| it gains | - | not decided |"


def test_the_clusters_table_sets_each_scale_beside_its_controls(checkout):
    results = json.loads((checkout / "results" / "results.json").read_text())
    results["dataset"]["own"] = True
    ari = {"mean": 0.5, "low": 0.4, "high": 0.6, "n_seeds": 3}
    engram = {"control": "A4", "name": "trained", "arm": "dual_engram", "representation": "engram"}
    random = engram | {"control": "A1", "name": "random compressor"}
    results["analysis"] = {
        "claims": [{"id": "x"}],
        "controls": [engram | {"ari": ari}, random | {"ari": ari | {"mean": 0.7, "high": 0.8}}],
        "contrasts": [{"id": "P1", "estimate": -0.2, "low": -0.3, "high": -0.1, "n_seeds": 3}],
    }
    foreign = json.loads(json.dumps(results))
    foreign["dataset"] |= {"own": False, "name": "my texts"}
    studies = {
        name: schema.Study(checkout, each, None)
        for name, each in {"a": results, "b": foreign}.items()
    }
    _, _, header, _, row = tables.table("all-clusters", studies, {}).splitlines()
    shown = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert shown["Model 3's engram"] == "0.500 [0.400, 0.600] (3 seeds)"
    assert shown["random compressors, middle 95 %"] == "0.700 [0.400, 0.800] (3 seeds)"
    assert shown["trained - random (P1)"] == "-0.200 [-0.300, -0.100] (3 seeds)"
    assert shown["engram - predictions (E3)"] == "-"


def test_the_verdicts_table_says_how_often_they_came_out_as_planted(tmp_path):
    size = {"seeds": 5, "items": 400, "band_draws": 20, "resamples": 1000}
    run = {
        "draws": 20,
        "cpu_seconds": 120.0,
        "date": "2026-01-01",
        "settings": size,
        "verdicts": [
            {"scenario": "nothing", "claim": "any_task", "planted": "x", "draws": 20}
            | {"as_planted": 19}
        ],
        "false_positives": [
            {"scenario": "nothing", "contrast": "P1", "draws": 20, "raw": 2, "adjusted": 1}
        ],
    }
    page = tmp_path / "FINDINGS.md"
    page.write_text("<!-- table:benchmark-verdicts -->\n<!-- end -->\n")
    (tmp_path / "benchmarks").mkdir()
    assert report.main(["--tables-only"], tmp_path) == 0
    assert "Not measured." in page.read_text()
    (tmp_path / "benchmarks" / "verdicts.json").write_text(json.dumps(run))
    assert any("stale" in line for line in report.check(tmp_path))
    assert report.main(["--tables-only"], tmp_path) == 0
    text = page.read_text()
    assert "| nothing | any task | x | 19 of 20 | - |" in text
    assert "| nothing | P1 | no difference | - | 1 of 20 (unadjusted 2) |" in text
    assert report.check(tmp_path) == []
