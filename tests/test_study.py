"""A results folder through crashes: what a rerun of the same command gives is what was promised."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

import checkpoints
import cli
import experiment
import study
from benchmarks.trials import outcome_of
from checkpoints import CheckpointStore
from common import UserError
from files import write_atomic
from training import Fit

FORK = multiprocessing.get_context("fork")
COMMAND = ("--smoke", "--threads", "1", "--epochs", "3", "--batch-size", "16", "--width", "16",
           "--inner", "16", "--engram-dim", "4")  # fmt: skip


def run_in_child(folder, *extra, ready=None, slow=0.0):
    """Fork a process that runs experiment.py's main as the command line does."""

    def target():
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


@pytest.mark.parametrize("seed", [0, 1])
def test_sigkill_at_random_moments_then_rerun_gives_identical_bytes(whole, tmp_path, seed):
    moments = random.Random(seed)
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
    child = run_in_child(tmp_path, "--jobs", "2", slow=0.02)
    until = time.monotonic() + 20
    while not list(tmp_path.glob("checkpoints/*/*.json")) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(child.pid, number)
    child.join(20)
    assert child.exitcode == {15: 143, 2: 130, 9: -9}[number]
    time.sleep(0.2)  # the kernel ends the workers of a killed parent
    assert finish(tmp_path, "--jobs", "2") == 0
    assert outcome_of(tmp_path) == whole


def test_finished_arms_are_kept_and_new_ones_added(whole, tmp_path):
    assert finish(tmp_path, "--arms", "dual_engram") == 0
    made = json.loads((tmp_path / "results.json").read_text())["rows"]["dual_engram"]["0"]
    assert finish(tmp_path) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows["dual_engram"]["0"] == made  # timings too: it was not trained again
    assert outcome_of(tmp_path)[0] == whole[0]  # nor does an arm depend on what ran before it


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
    assert f"in use by process {child.pid}" in capfd.readouterr().err
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert finish(tmp_path) == 0  # the kernel frees a dead process's lock


def test_a_figure_that_cannot_be_drawn_loses_nothing(tmp_path, monkeypatch, capfd):
    import figures  # noqa: F401
    import report

    def broken(folder):
        raise RuntimeError("no font")

    monkeypatch.setattr(report, "draw", broken)
    command = [*COMMAND, "--out", str(tmp_path), "--arms", "classification"]
    assert cli.run(experiment.main, command) == 0
    assert "figures not drawn (RuntimeError: no font)" in capfd.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["rows"]["classification"]


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


def test_damage_falls_back_aloud_and_never_starts_over(tmp_path, capsys):
    rng = random.Random(0)
    for _ in range(40):
        for path in tmp_path.glob("*"):
            path.unlink()
        save(store(tmp_path), 1)
        save(store(tmp_path), 2)
        victim = tmp_path / rng.choice(["00000002.safetensors", "00000002.state", "00000002.json"])
        content = bytearray(victim.read_bytes())
        if rng.random() < 0.5:
            content = content[: rng.randrange(len(content))]
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        victim.write_bytes(content)
        try:
            weights, _, progress = store(tmp_path).load()
        except UserError:
            continue  # a flipped bit in the identity: refused with a message
        assert (weights["w"] == progress["epoch"]).all()
        if progress["epoch"] == 1:
            assert "is damaged" in capsys.readouterr().err
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"")
    for path in tmp_path.glob("*.json"):
        path.write_text("{}")
    with pytest.raises(UserError, match="--restart"):
        store(tmp_path).load()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    save(store(tmp_path), 1)
    with pytest.raises(UserError, match=r"lr 0\.1 -> 0\.2"):
        store(tmp_path, {"lr": 0.2}).load()


def test_a_pickle_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "pwned").touch, ())

    save(store(tmp_path), 1)
    torch.save({"rng": Evil()}, tmp_path / "00000001.state")
    manifest = json.loads((tmp_path / "00000001.json").read_text())
    manifest["sha256"]["00000001.state"] = checkpoints._sha256(tmp_path / "00000001.state")
    (tmp_path / "00000001.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError):
        store(tmp_path).load()
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("point", ["opened", "half", "before rename"])
def test_a_crash_inside_a_write_leaves_the_old_file(tmp_path, monkeypatch, point):
    path = tmp_path / "results.json"
    write_atomic(path, b"old")

    def crash(*_):
        raise KeyboardInterrupt

    def content(temporary):
        if point != "opened":
            temporary.write_bytes(b"ne" if point == "half" else b"new")
        if point != "before rename":
            crash()

    if point == "before rename":
        monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, content)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
