"""A results folder through crashes: what a rerun of the same command gives is what was promised."""

import dataclasses
import errno
import fcntl
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoints
import cli
import data
import experiment
import experiment_7b
import experiment_agnews_7b
import flags
import study
import training
import two_labels
from benchmarks.trials import outcome_of
from checkpoints import CheckpointStore
from common import UserError
from files import write_atomic
from recipe import Recipe
from results import ResultsFolder
from training import Fit

FORK = multiprocessing.get_context("fork")
COMMAND = ("--smoke", "--threads", "1", "--epochs", "3", "--batch-size", "16", "--width", "16",
           "--inner", "16", "--engram-dim", "4")  # fmt: skip


def run_in_child(folder, *extra, ready=None, slow=0.0, before=lambda: None):
    """Fork a process that runs experiment.py's main as the command line does."""

    def target():
        os.setsid()
        before()
        study._analyse_and_draw = lambda folder: None
        if slow:
            step = Fit.step

            def slowed(self, batch):
                step(self, batch)
                if ready is not None:
                    ready.set()
                time.sleep(slow)

            Fit.step = slowed
        os._exit(cli.run(experiment.main, [*COMMAND, "--out", str(folder), *extra]))

    child = FORK.Process(target=target)
    child.start()
    return child


def finish(folder, *extra):
    child = run_in_child(folder, *extra)
    child.join(60)
    return child.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert finish(folder) == 0
    return outcome_of(folder)


def test_sigkill_at_random_moments_then_rerun_gives_identical_bytes(whole, tmp_path):
    moments = random.Random(0)
    for _ in range(6):
        child = run_in_child(tmp_path, slow=0.01)
        child.join(moments.uniform(0.1, 1.0))
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
    assert finish(tmp_path) == 0
    assert outcome_of(tmp_path) == whole


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_a_rerun_goes_on(whole, tmp_path, capfd, number, code):
    ready = FORK.Event()
    child = run_in_child(tmp_path, ready=ready, slow=0.02)
    assert ready.wait(20)
    os.kill(child.pid, number)
    child.join(20)
    assert child.exitcode == code
    assert "saved at step" in capfd.readouterr().err
    assert list(tmp_path.glob("checkpoints/*/*.json"))
    assert finish(tmp_path) == 0
    assert outcome_of(tmp_path) == whole


def test_jobs_side_by_side_give_the_same_bytes(whole, tmp_path):
    assert finish(tmp_path, "--jobs", "3") == 0
    assert outcome_of(tmp_path) == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_jobs_survive_signals(whole, tmp_path, number):
    child = run_in_child(tmp_path, "--jobs", "2", slow=0.01)
    until = time.monotonic() + 20
    while not list(tmp_path.glob("checkpoints/*/*.json")) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(child.pid, number)
    child.join(20)
    assert child.exitcode == {15: 143, 2: 130, 9: -9}[number]
    time.sleep(0.2)  # the kernel ends the workers of a killed parent
    assert finish(tmp_path, "--jobs", "2") == 0
    assert outcome_of(tmp_path) == whole


def test_jobs_survive_a_signal_to_each_of_their_processes(whole, tmp_path, capfd):
    """A scheduler's; the parent then tells its workers once more, within their step."""
    ready = FORK.Event()
    child = run_in_child(tmp_path, "--jobs", "2", ready=ready, slow=0.5)
    assert ready.wait(20)
    os.killpg(child.pid, signal.SIGTERM)
    child.join(20)
    assert child.exitcode == 143
    assert capfd.readouterr().out.count("seed 0: saved at step ") == 2
    assert finish(tmp_path, "--jobs", "2") == 0
    assert outcome_of(tmp_path) == whole


@pytest.mark.parametrize("how", ["killed", "not finite"])
def test_one_of_several_jobs_that_fails_stops_them_all(whole, tmp_path, capfd, how):
    def before():
        weighted, calls = training.weighted_loss, itertools.count()

        def failing(arm, losses):
            if arm.name == "dual" and next(calls) == 20:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                return weighted(arm, losses) * float("nan")
            return weighted(arm, losses)

        training.weighted_loss = failing

    child = run_in_child(tmp_path, "--jobs", "2", slow=0.01, before=before)
    child.join(30)
    assert child.exitcode == 1
    said = capfd.readouterr()
    (line,) = [line for line in said.err.splitlines() if "stopped: " in line]
    assert {"killed": "Pass a smaller --jobs", "not finite": "dual, seed 0, step 20"}[how] in line
    assert "Traceback" not in said.err
    assert "classification, seed 0: saved at step" in said.out  # and dual_engram never began
    assert {path.name for path in tmp_path.glob("checkpoints/*")} == {"classification-0", "dual-0"}
    assert finish(tmp_path, "--jobs", "2") == 0
    assert outcome_of(tmp_path) == whole


def test_finished_arms_are_kept_and_new_ones_added(whole, tmp_path):
    assert finish(tmp_path, "--arms", "dual_engram") == 0
    made = json.loads((tmp_path / "results.json").read_text())["rows"]["dual_engram"]["0"]
    assert finish(tmp_path) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows["dual_engram"]["0"] == made  # timings too: it was not trained again
    assert outcome_of(tmp_path)[0] == whole[0]  # nor does an arm depend on what ran before it


def test_states_of_layers_are_kept_for_the_arms_of_their_control(tmp_path):
    assert finish(tmp_path, "--arms", "dual", "dual_stopped", "untrained") == 0
    with np.load(tmp_path / "features.npz") as features:
        assert {name.split("/")[0] for name in features.files if name.endswith("/pooled")} == {
            "dual",
            "dual_stopped",
            "untrained",
        }
        layered = {name for name in features.files if name.endswith("/layers")}
    assert layered == {"dual/0/layers", "untrained/0/layers"}


def test_another_configuration_is_refused_and_nothing_lost(tmp_path, capfd):
    assert finish(tmp_path, "--arms", "classification") == 0
    before = (tmp_path / "results.json").read_bytes()
    for flag, value, named in (
        ("--lr", "1e-4", "(lr 0.0003 -> 0.0001)"),
        ("--epochs", "4", "(epochs 3 -> 4)"),
        ("--engram-dim", "5", "(engram_dim 4 -> 5)"),
        ("--feedback", "self", "(feedback None -> self)"),
    ):
        command = dict(zip(COMMAND[1::2], COMMAND[2::2], strict=True)) | {flag: value}
        words = ["--smoke", *(word for pair in command.items() for word in pair)]
        code = cli.run(experiment.main, [*words, "--out", str(tmp_path)])
        error = capfd.readouterr().err
        assert code == 2
        assert named in error and "--restart" in error
    assert (tmp_path / "results.json").read_bytes() == before


SCRIPTS = (experiment, experiment_7b, experiment_agnews_7b, two_labels)
KEYS = [
    pytest.param(script, field.name, id=f"{script.__name__}-{field.name}")
    for script in SCRIPTS
    for field in dataclasses.fields(script.Config)
    if script is experiment or field.name not in experiment.Config.__dataclass_fields__
]


def other_value(name, value):
    """A value of a flag that is not the given one."""
    if name in ("arms", "lr_grid"):
        return value[:1]
    named = {"feedback": "self", "tap": "pooled", "quantise": "none", "dtype": "float32"}
    kinds = {bool: lambda x: not x, int: lambda x: x + 2, float: lambda x: x / 2}
    return named.get(name) or kinds.get(type(value), lambda x: 7)(value)


@pytest.mark.parametrize(("script", "name"), KEYS)
def test_a_flag_is_free_or_makes_it_another_run(tmp_path, script, name):
    def identity(config):
        names = ("epochs", "lr", "weight_decay", "batch_size", "clip")
        recipe = Recipe(**{n: getattr(config, n) for n in names}, schedule="cosine")
        if hasattr(config, "micro_batch_tokens"):
            recipe = dataclasses.replace(recipe, micro_batch_tokens=config.micro_batch_tokens)
        made = study.Study("s", "b", config, recipe, data.generated_corpus(), *[None] * 4)
        return study.identity_of(made)

    config = script.Config()
    other = dataclasses.replace(config, **{name: other_value(name, getattr(config, name))})
    defaults = study.identity_defaults(config)
    with ResultsFolder(tmp_path, identity(config), defaults, False) as folder:
        folder.results |= {"identity": identity(config), "provenance": {}}
        folder.write()
    before = (tmp_path / "results.json").read_bytes()
    if name in (*flags.FREE, "micro_batch_tokens"):
        ResultsFolder(tmp_path, identity(other), defaults, False).__exit__()
    else:
        values = f"{getattr(config, name)} -> {getattr(other, name)}"
        with pytest.raises(UserError, match=re.escape(f"({name} {values})")):
            ResultsFolder(tmp_path, identity(other), defaults, False)
    assert (tmp_path / "results.json").read_bytes() == before


def test_other_threads_do_not_go_on_with_an_arm(tmp_path, capfd):
    assert finish(tmp_path, "--stop-after", "0.001s") == 0
    threads = COMMAND.index("--threads") + 1
    command = [*COMMAND[:threads], "2", *COMMAND[threads + 1 :]]
    child = FORK.Process(
        target=lambda: os._exit(cli.run(experiment.main, [*command, "--out", str(tmp_path)]))
    )
    child.start()
    child.join(30)
    assert child.exitcode == 2
    assert "(threads 1 -> 2)" in capfd.readouterr().err


def test_a_run_older_than_a_flag_is_still_itself(tmp_path):
    assert finish(tmp_path, "--arms", "classification") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    del results["identity"]["clip"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert finish(tmp_path, "--arms", "classification") == 0
    assert finish(tmp_path, "--arms", "classification", "--clip", "2") == 2


def test_restart_says_so_and_discards(tmp_path, capfd):
    assert finish(tmp_path, "--arms", "classification") == 0
    command = ("--arms", "classification", "--seeds", "7", "--restart")
    assert finish(tmp_path, *command) == 0
    assert "discarding the run" in capfd.readouterr().err
    assert list(json.loads((tmp_path / "results.json").read_text())["rows"]["classification"]) == [
        "7"
    ]


def test_a_second_process_is_refused_at_once(tmp_path, capfd):
    ready = FORK.Event()
    child = run_in_child(tmp_path, ready=ready, slow=0.05)
    assert ready.wait(20)
    assert finish(tmp_path) == 2
    said = rf"in use by process {child.pid} on \S+ since \d{{4}}-\d\d-\d\dT[\d:+]+\. Wait for it"
    assert re.search(said, capfd.readouterr().err)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert finish(tmp_path) == 0  # the kernel frees a dead process's lock


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, capsys, number):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with ResultsFolder(tmp_path, IDENTITY, {}, False) as folder:
        folder.log("works")
    assert "has no locks: make sure that no other process uses" in capsys.readouterr().err


def test_a_file_beside_the_results_that_is_damaged_loses_no_row(tmp_path, capfd):
    (tmp_path / "published.json").write_text('{"arms": ')
    command = [*COMMAND, "--out", str(tmp_path), "--arms", "classification"]
    assert cli.run(experiment.main, command) == 2
    assert "published.json is not JSON" in capfd.readouterr().err.splitlines()[-1]
    assert json.loads((tmp_path / "results.json").read_text())["rows"]["classification"]


def test_a_figure_that_cannot_be_drawn_loses_nothing(tmp_path, monkeypatch, capfd):
    """Neither the numbers nor, written whole or not at all, the figure of before."""
    from matplotlib.figure import Figure

    command = [*COMMAND, "--out", str(tmp_path), "--arms", "classification"]
    assert cli.run(experiment.main, command) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.[ps][nv]g")}
    save, calls = Figure.savefig, itertools.count()

    def broken(self, file, **options):
        save(self, file, **options)
        if next(calls) == 1:
            raise RuntimeError("no font")

    monkeypatch.setattr(Figure, "savefig", broken)
    (tmp_path / "learning_curves.png").unlink()
    folder = SimpleNamespace(folder=tmp_path, path=tmp_path / "results.json", log=print)
    study.draw_figures(folder)
    said = capfd.readouterr().out
    assert "figures not drawn (RuntimeError: no font)" in said and "python report.py" in said
    assert json.loads(folder.path.read_text())["rows"] == rows
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.[ps][nv]g")} == before
    assert not list(tmp_path.glob(".*.tmp"))


IDENTITY = {"lr": 0.1}


def store(folder, identity=IDENTITY):
    return CheckpointStore(folder, identity)


def save(store, step):
    store.save(
        step, {"w": torch.full((50,), float(step))}, {"rng": torch.arange(3)}, {"epoch": step}
    )


def test_the_newest_checkpoint_comes_back_and_two_are_kept(tmp_path):
    for step in (1, 5, 12):
        save(store(tmp_path), step)
    weights, rest, progress = store(tmp_path).load()
    assert (weights["w"][0], progress, rest["rng"].tolist()) == (12, {"epoch": 12}, [0, 1, 2])
    assert sorted(p.name for p in tmp_path.glob("*.json")) == ["00000005.json", "00000012.json"]
    assert json.loads((tmp_path / "00000012.json").read_text())["identity"] == IDENTITY
    assert CheckpointStore(tmp_path / "none", {}).load() is None


def damages(files, rng, count=50):
    """(name, truncated content) and (name, content with a flipped bit), `count` of each."""
    for number in range(2 * count):
        name = rng.choice(sorted(files))
        content = bytearray(files[name])
        if number < count:
            content = content[: rng.randrange(len(content))]
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        yield name, bytes(content)


def test_damage_falls_back_aloud_and_never_starts_over(tmp_path, capsys):
    history = [{"epoch": 1, "eval_cls_loss": 0.6931471805599453, "train_tokens": 1234567}]
    for step in (1, 2):
        store(tmp_path).save(
            step,
            {"w": torch.full((50,), float(step))},
            {"rng": torch.arange(3)},
            {"epoch": step, "epochs": history * step},
        )
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    newest = {name: content for name, content in files.items() if "2." in name}
    kept = []
    for name, content in damages(newest, random.Random(0)):
        (tmp_path / name).write_bytes(content)
        weights, rest, progress = store(tmp_path).load()
        step = progress["epoch"]
        assert progress["epochs"] == history * step
        assert (weights["w"] == step).all() and rest["rng"].tolist() == [0, 1, 2]
        said = f"checkpoint {tmp_path / '00000002.json'} is damaged"
        assert (said in capsys.readouterr().err) == (step == 1)
        kept.append(step)
        (tmp_path / name).write_bytes(files[name])
    assert kept.count(1) > 95  # the others hit what means nothing
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint .* is whole .2 damaged.*--restart"):
        store(tmp_path).load()


def test_damaged_results_are_never_taken_for_rows(tmp_path, capsys):
    folder = ResultsFolder(tmp_path, IDENTITY, {}, False)
    with folder:
        folder.results |= {"identity": IDENTITY, "provenance": {}}
        folder.results["tuning"] = {"dual_tuned": {"trials": {"0.001": {"0": 0.75}}}}
        folder.add("dual", 0, {"final": {"accuracy": 0.8125}}, {"pooled": np.arange(60.0)})
    files = {name: (tmp_path / name).read_bytes() for name in ("results.json", "features.npz")}
    refused = 0
    for name, content in damages(files, random.Random(1)):
        (tmp_path / name).write_bytes(content)
        try:
            with ResultsFolder(tmp_path, IDENTITY, {}, False) as found:
                for part in ("rows", "tuning", "identity"):
                    assert found.results[part] == folder.results[part]
                assert np.array_equal(found.features["dual/0/pooled"], np.arange(60.0))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(tmp_path) in str(error)
        (tmp_path / name).write_bytes(files[name])
    assert refused > 80
    (tmp_path / "features.npz").unlink()
    with ResultsFolder(tmp_path, IDENTITY, {}, False) as found:
        assert found.results["rows"] == {}
    assert "features.npz is gone: its rows are made again" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    save(store(tmp_path), 1)
    with pytest.raises(UserError, match=r"lr 0\.1 -> 0\.2"):
        store(tmp_path, {"lr": 0.2}).load()


def test_a_pickle_is_never_run(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "pwned").touch, ())

    save(store(tmp_path), 1)
    torch.save({"rng": Evil()}, tmp_path / "00000001.state")
    manifest = json.loads((tmp_path / "00000001.json").read_text())
    manifest["sha256"]["00000001.state"] = checkpoints._sha256(tmp_path / "00000001.state")
    del manifest["manifest_sha256"]  # as in manifests of before
    (tmp_path / "00000001.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError):
        store(tmp_path).load()
    assert "Weights only load failed" in capsys.readouterr().err  # its sha256 is right
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("point", ["opened", "half", "before rename", "after rename"])
def test_a_crash_inside_a_write_leaves_one_whole_file(tmp_path, monkeypatch, point):
    path = tmp_path / "results.json"
    write_atomic(path, b"old")

    def crash(*_):
        raise KeyboardInterrupt

    def content(temporary):
        if point != "opened":
            temporary.write_bytes(b"ne" if point == "half" else b"new")
        if "rename" not in point:
            crash()

    if point == "before rename":
        monkeypatch.setattr(Path, "replace", crash)
    if point == "after rename":
        calls = itertools.count()
        monkeypatch.setattr(os, "fsync", lambda file: next(calls) and crash())  # of the folder
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, content)
    assert path.read_bytes() == (b"new" if point == "after rename" else b"old")
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
