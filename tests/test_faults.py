"""Faults of the machine: a full disk, memory that runs out, nobody reading, a time limit."""

import dataclasses
import errno
import gc
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

import backbones
import checkpoints
import cli
import evaluation
import experiment
import experiment_7b
import experiment_agnews_7b
import files
import flags
import memory
import pretrained
import reporter
import study
import training
import two_labels
from arms import ARMS
from benchmarks import faults as campaign
from benchmarks import trials
from checkpoints import CheckpointStore
from common import StudyModel, UserError
from files import NoRoomError
from recipe import seed_everything
from training import Fit, Interrupted

SCRIPTS = (experiment, experiment_7b, experiment_agnews_7b, two_labels)
FORK = multiprocessing.get_context("fork")
COMMAND = ["--smoke", "--threads", "1", "--epochs", "2", "--batch-size", "32", "--width", "16",
           "--inner", "16", "--engram-dim", "4", "--arms", "dual_engram"]  # fmt: skip


def in_child(work):
    """Fork a process that exits with what work() returns."""
    child = FORK.Process(target=lambda: os._exit(work()))
    child.start()
    child.join(60)
    return child.exitcode


def command(folder, *extra):
    study._analyse_and_draw = lambda folder: None
    return cli.run(experiment.main, [*COMMAND, "--out", str(folder), *extra])


def weights_in(folder):
    newest = max(folder.glob("checkpoints/*/*.safetensors"))
    return newest.name, newest.read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert in_child(lambda: command(folder)) == 0
    return weights_in(folder)


@pytest.fixture(scope="module", autouse=True)
def _few_objects_to_collect():
    """Each time memory runs out the collector runs, over all that was ever imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# faults at a random moment of the QLoRA path; the campaign of benchmarks/faults.py has hundreds

# test_moments.py has these at chosen moments, and test_study.py cuts every file at 50 places
EXACT = ("SIGKILL", "SIGTERM", "NaN loss", "out of memory", "truncated file")


@pytest.fixture(scope="module")
def qlora(tmp_path_factory):
    """The QLoRA path of the campaign, and what it gives when left alone."""
    folder = tmp_path_factory.mktemp("qlora")
    kind = trials.kinds(folder)["QLoRA"]
    run = trials.Trial(kind, folder / "whole")
    assert run.finish() == 0, run.said
    return kind, trials.outcome_of(run.folder)


@pytest.mark.parametrize("fault", [f for f in campaign.FAULTS if f not in EXACT])
def test_a_fault_on_the_qlora_path_is_recovered_or_refused(qlora, tmp_path, fault):
    kind, whole = qlora
    run = trials.Trial(kind, tmp_path / "run")
    outcome = campaign.outcome_after(fault, run, random.Random(fault), whole)
    assert outcome in ("recovered", "refused"), run.said
    assert whole[3]  # adapters were compared


# a full disk


def save(store, step, size=50):
    weights = {"w": torch.full((size,), float(step))}
    store.save(step, weights, {"rng": torch.arange(3)}, {"epoch": step})
    return store.newest


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk(number of writes): those that follow meet a full disk."""

    def fill(writes):
        left = [writes]
        real = tempfile.mkstemp

        def mkstemp(*, prefix, suffix, dir):
            handle, name = real(prefix=prefix, suffix=suffix, dir=dir)
            left[0] -= 1
            if left[0] >= -1:
                Path(name).unlink()
                Path(name).symlink_to("/dev/full")
            return handle, name

        monkeypatch.setattr(files.tempfile, "mkstemp", mkstemp)

    return fill


def test_a_full_disk_keeps_the_last_checkpoint_and_tries_again(tmp_path, capsys, full_disk):
    store = CheckpointStore(tmp_path, {})
    assert save(store, 1) == 1
    full_disk(0)
    assert save(store, 2) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said and "bytes needed" in said and " free" in said
    assert "the checkpoint of step 1 is kept" in said
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".state", ".json"}
    assert len(list(tmp_path.iterdir())) == 3  # nothing half written stays
    assert save(store, 3) == 3
    assert store.load()[2] == {"epoch": 3}


def test_three_failures_stop_and_name_the_last_good_step(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, {})
    save(store, 7)

    def full(self, content):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert [save(store, 8), save(store, 9)] == [7, 7]
    with pytest.raises(NoRoomError, match=r"3 tries, the checkpoint of step 7 is kept"):
        save(store, 10)
    assert store.load()[2] == {"epoch": 7}


def test_a_file_size_limit_stops_the_run_and_a_rerun_goes_on(tmp_path, whole, capfd):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        return command(tmp_path)

    assert in_child(limited) == 1
    said = capfd.readouterr().err.strip().splitlines()
    assert "stopped: cannot write" in said[-1] and "File too large" in said[-1]
    assert "Traceback" not in "".join(said)
    assert not list(tmp_path.rglob("*.tmp"))
    assert in_child(lambda: command(tmp_path)) == 0
    assert weights_in(tmp_path) == whole


def test_results_that_do_not_fit_leave_the_old_ones(tmp_path, full_disk):
    path = tmp_path / "results.json"
    files.write_json(path, {"old": 1})
    full_disk(0)
    with pytest.raises(NoRoomError, match=r"results.json .No space.*1\d bytes needed"):
        files.write_json(path, {"old": 22})
    assert json.loads(path.read_text()) == {"old": 1}


def test_a_full_disk_is_one_line(capsys):
    assert cli.run(raising(pickle.loads(pickle.dumps(NoRoomError("cannot write x")))), []) == 1
    assert capsys.readouterr().err.endswith(": stopped: cannot write x\n")


def test_a_disk_that_is_full_at_the_start_is_one_line(tmp_path, full_disk, capfd):
    full_disk(0)
    assert in_child(lambda: command(tmp_path)) == 1
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "stopped: cannot write" in line and "No space left on device" in line


def raising(error):
    def main(argv, stop):
        raise error

    return main


def test_a_disk_without_room_for_two_checkpoints_is_refused_at_the_start(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path / "not" / "yet", {})
    monkeypatch.setattr(checkpoints, "free_bytes", lambda folder: 1999)
    with pytest.raises(UserError, match=r"need 2,000 bytes.*has 1,999 free"):
        store.require_room(1000)
    monkeypatch.setattr(checkpoints, "free_bytes", lambda folder: 2000)
    store.require_room(1000)


def test_a_checkpoint_takes_what_is_asked_for(corpus, make_model, recipe):
    fit = Fit(make_model("dual_engram"), recipe, *corpus[:2], 0)
    fit.step(fit.train_data.batch(np.arange(32)))
    weights, rest, _ = fit.state()
    buffer = io.BytesIO()
    torch.save(rest, buffer)
    size = len(save_safetensors(weights)) + len(buffer.getvalue())
    assert size < 2 * fit.checkpoint_bytes
    assert size == pytest.approx(fit.checkpoint_bytes, rel=0.5)


# memory that runs out


ERRORS = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory")]


def fail_on(monkeypatch, owner, name, calls, error=ERRORS[0]):
    """Let the given calls (from 0) of a function raise, after it has run."""
    real, count = getattr(owner, name), iter(range(10**6))

    def failing(*args, **options):
        result = real(*args, **options)
        if next(count) in calls:
            raise error
        return result

    monkeypatch.setattr(owner, name, failing)


def trained(corpus, make_model, recipe, name, dropout):
    """An epoch in which AdamW does not turn the rounding of a near-zero gradient into a step."""
    recipe = dataclasses.replace(recipe, epochs=1, lm_dtype="float32")
    fit = Fit(make_model(name, dropout=dropout), recipe, *corpus[:2], 0)
    fit.optimizer.param_groups[0]["eps"] = 1e-3
    for module in fit.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout  # the head's
    rows = []
    step = fit.step
    fit.step = lambda batch: (rows.append(batch.items.tolist()), step(batch))
    fit.run(lambda f: f.step_number, lambda f, e: None, lambda: None)
    return fit, rows


@pytest.mark.parametrize("where", ["run_part", "weighted_loss", "backward"])
@pytest.mark.parametrize("name", ["dual", "dual_engram", "dual_engram_same_class"])
def test_out_of_memory_halves_the_parts_and_keeps_the_numbers(
    corpus, make_model, recipe, monkeypatch, where, name
):
    plain, order = trained(corpus, make_model, recipe, name, 0.0)
    owner = torch.Tensor if where == "backward" else training
    fail_on(monkeypatch, owner, where, (1, 2), ERRORS[where == "backward"])
    fit, again = trained(corpus, make_model, recipe, name, 0.0)
    assert again == order
    assert [m["step"] for m in fit.progress.memory] == [1, 1]
    first, second = (m["tokens"] for m in fit.progress.memory)
    assert 0 < 2 * second <= first
    assert fit.recipe.micro_batch_tokens == second  # it stays so
    for key, value in plain.parameters.items():
        assert torch.allclose(fit.parameters[key], value, atol=1e-6), key
    assert fit.progress.epochs[0]["train_tokens"] == plain.progress.epochs[0]["train_tokens"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    pretrained.tiny_model(folder, ["a film"])
    found = backbones.load(str(folder), dtype="float32", max_tokens=64)  # nf4
    for siblings in (group for layer in found.backbone.decoder.layers for group in layer.groups):
        siblings.rate = 0.0
    return found


@pytest.mark.parametrize("where", ["run_part", "weighted_loss", "backward"])
def test_out_of_memory_on_the_qlora_path_keeps_the_numbers(
    corpus, base, recipe, monkeypatch, where
):
    def make(name, dropout):
        seed_everything(0, "initialisation")
        return StudyModel(base.make_backbone(ARMS[name]), ARMS[name], 2, 8)

    plain, order = trained(corpus, make, recipe, "dual_engram", 0.0)
    wanted = {key: value.detach().clone() for key, value in plain.parameters.items()}
    fail_on(monkeypatch, torch.Tensor if where == "backward" else training, where, (1, 2))
    fit, again = trained(corpus, make, recipe, "dual_engram", 0.0)
    assert again == order and [m["step"] for m in fit.progress.memory] == [1, 1]
    for key, value in wanted.items():
        assert torch.allclose(fit.parameters[key], value, atol=1e-5), key
    evaluated = fit.evaluate(corpus[1])
    fail_on(monkeypatch, evaluation, "batch_losses", (0,))
    assert fit.evaluate(corpus[1]).cls_loss == pytest.approx(evaluated.cls_loss, abs=1e-5)
    assert fit.recipe.eval_tokens < recipe.eval_tokens


def test_with_dropout_the_order_stays_and_a_first_try_draws_as_a_second(
    corpus, make_model, recipe, monkeypatch
):
    _, order = trained(corpus, make_model, recipe, "dual_engram", 0.2)
    fail_on(monkeypatch, training, "weighted_loss", (3,))
    fit, again = trained(corpus, make_model, recipe, "dual_engram", 0.2)
    assert again == order
    assert all(torch.isfinite(p).all() for p in fit.parameters.values())
    state = torch.get_rng_state()
    saved = memory.generator_state(fit.device)
    torch.rand(5)
    memory.restore_generator(saved, fit.device)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_lowered_limit_is_in_the_checkpoint(corpus, make_model, recipe, monkeypatch):
    fit = Fit(make_model("dual"), recipe, *corpus[:2], 0)
    fail_on(monkeypatch, training, "weighted_loss", (0,))
    fit.step(fit.train_data.batch(np.arange(32)))
    weights, rest, progress = fit.state()
    again = Fit(make_model("dual"), recipe, *corpus[:2], 0)
    again.restore(weights, rest, json.loads(json.dumps(progress)))
    assert again.recipe == fit.recipe != recipe
    assert again.progress.memory == [
        {"step": 0, "limit": "micro_batch_tokens", "tokens": fit.recipe.micro_batch_tokens}
    ]


@pytest.mark.parametrize("name", ["dual", "dual_engram"])
def test_parts_of_one_text_or_pair_that_do_not_fit_stop_with_advice(
    corpus, make_model, recipe, monkeypatch, capsys, name
):
    fit = Fit(make_model(name), recipe, *corpus[:2], 0)
    before = {key: p.detach().clone() for key, p in fit.parameters.items()}
    fail_on(monkeypatch, training, "weighted_loss", range(10**6))
    saved = []
    with pytest.raises(memory.OutOfMemory, match="--max-tokens") as error:
        fit.run(lambda f: saved.append(f.step_number), lambda f, e: None, lambda: None)
    assert saved == [0]
    assert all(torch.equal(p, before[key]) for key, p in fit.parameters.items())
    assert cli.run(raising(error.value), []) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_evaluation_goes_on_in_smaller_batches(corpus, make_model, recipe, monkeypatch):
    fit = Fit(make_model("dual_engram"), recipe, *corpus[:2], 0)
    plain = fit.evaluate(corpus[1], collect=("engram", "layers"))
    fail_on(monkeypatch, evaluation, "batch_losses", (0, 1))
    fewer = fit.evaluate(corpus[1], collect=("engram", "layers"))
    assert fewer.eval_tokens < plain.eval_tokens / 2
    assert fit.recipe.eval_tokens == fewer.eval_tokens
    assert fewer.cls_loss == pytest.approx(plain.cls_loss, abs=1e-6)
    for key, value in plain.features.items():
        assert np.allclose(fewer.features[key], value, atol=1e-5)
    fail_on(monkeypatch, evaluation, "batch_losses", range(10**6))
    with pytest.raises(memory.OutOfMemory):
        fit.evaluate(corpus[1])


def test_other_errors_are_not_taken_for_memory(corpus, make_model, recipe, monkeypatch):
    fit = Fit(make_model("dual"), recipe, *corpus[:2], 0)
    fail_on(monkeypatch, training, "weighted_loss", (0,), RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        fit.step(fit.train_data.batch(np.arange(32)))


@pytest.mark.parametrize("error", [*ERRORS, MemoryError()])
def test_memory_that_runs_out_elsewhere_is_one_line(capsys, error):
    assert cli.run(raising(error), []) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "stopped: out of memory" in line


# a time limit


def test_stop_after_saves_exits_with_zero_and_a_rerun_goes_on(tmp_path, whole, capfd):
    assert in_child(lambda: command(tmp_path, "--stop-after", "0.001s")) == 0
    said = capfd.readouterr().err
    assert "--stop-after 0.001s: incomplete: saved at step 0; run the same command" in said
    assert not (tmp_path / "results.json").exists()
    assert in_child(lambda: command(tmp_path)) == 0
    assert weights_in(tmp_path) == whole


@pytest.mark.parametrize(("text", "seconds"), [("5h", 18000), ("90m", 5400), ("1.5s", 1.5)])
def test_times(text, seconds):
    assert flags.parse(experiment.Config, ["--stop-after", text], "").stop_after == text
    stop = cli.StopSignals()
    stop.after(text)
    stop.started -= seconds - 0.5
    stop.check()
    stop.started -= 1
    with pytest.raises(Interrupted, match=f"--stop-after {text}"):
        stop.check()


@pytest.mark.parametrize("text", ["5", "h", "5d", "-1h", "1e3s"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UserError, match=r"must be a time such as 5h|expected one argument"):
        flags.parse(experiment.Config, ["--stop-after", text], "")


# nobody reads


@pytest.mark.parametrize("kind", ["broken pipe", "closed"])
def test_a_run_outlives_whoever_read_its_output(tmp_path, whole, kind):
    def unread():
        reader, writer = os.pipe()
        for number in (1, 2):
            os.dup2(writer, number)
        os.close(reader)
        sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
        if kind == "closed":
            sys.stdout = sys.stderr = None
        reporter.HEARTBEAT = 0.0
        return command(tmp_path)

    assert in_child(unread) == 0
    assert weights_in(tmp_path) == whole
    log = (tmp_path / "log.txt").read_text()
    assert log.count("classification loss") == 16
    assert "rate 0.0003, about" in log and "epoch 2 of 2" in log


# files of others


def zip_of_a_photo():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("photo.jpg", b"\xff\xd8\xff\xe0" + bytes(500))
    return buffer.getvalue()


IDENTITY = {"backbone": "small", "data": "SST-2", "arm": "dual"}
FOREIGN = {
    "other model": {"backbone": "large"},
    "other script's data": {"data": "AG News"},
    "other arm": {"arm": "dual_engram"},
    "photo": zip_of_a_photo(),
    "pickle": None,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_checkpoint_is_refused_and_never_run(tmp_path, kind):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    change = FOREIGN[kind]
    save(CheckpointStore(tmp_path, IDENTITY | (change if isinstance(change, dict) else {})), 3)
    if not isinstance(change, dict):
        content = pickle.dumps(Evil()) if change is None else change
        (tmp_path / "00000003.state").write_bytes(content)
        manifest = json.loads((tmp_path / "00000003.json").read_text())
        manifest["sha256"]["00000003.state"] = checkpoints._sha256(tmp_path / "00000003.state")
        del manifest["manifest_sha256"]  # as in manifests of before
        (tmp_path / "00000003.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"--restart"):
        CheckpointStore(tmp_path, IDENTITY).load()
    assert not (tmp_path / "pwned").exists()


def test_a_row_changed_by_a_bit_is_not_kept(tmp_path, capfd):
    assert in_child(lambda: command(tmp_path)) == 0
    path = tmp_path / "results.json"
    assert path.read_text().count('"parameters_total": ') == 1
    path.write_text(path.read_text().replace('"parameters_total": ', '"parameters_total": 1'))
    assert in_child(lambda: command(tmp_path)) == 2
    assert "rows do not match their sha256" in capfd.readouterr().err


# where a run reaches


def own_texts(folder):
    rows = [(f"a {'lovely' if i % 2 else 'dreadful'} film {i}", i % 2) for i in range(60)]
    (folder / "mine.csv").write_text("text,label\n" + "".join(f"{t},{y}\n" for t, y in rows))
    pretrained.tiny_model(folder / "base", [t for t, _ in rows])


@pytest.mark.parametrize("script", [experiment, experiment_7b])
def test_own_data_and_a_local_backbone_need_no_network_and_touch_only_out(tmp_path, capfd, script):
    """Every file opened to be written, folder made and socket connected, by an audit hook."""
    own_texts(tmp_path)
    out, cache = tmp_path / "results", str(Path(tempfile.gettempdir()) / "torchinductor")
    words = ["--data", str(tmp_path / "mine.csv"), "--epochs", "1", "--seeds", "0", "--threads",
             "1", "--arms", "classification", "--batch-size", "8", "--out", str(out)]  # fmt: skip
    if script is experiment_7b:
        words += ["--backbone", str(tmp_path / "base")]

    def work():
        bad = []

        def watch(event, args):
            if event in ("socket.connect", "socket.getaddrinfo"):
                bad.append(f"{event} {args}")
            elif event == "os.mkdir" or (
                event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            ):
                path = str(args[0])
                # the folder itself: an unnamed file tells whether --out can be made in it
                if not path.startswith((str(out), os.devnull, cache)) and path != str(tmp_path):
                    bad.append(f"{event} {path}")

        os.environ.pop("HF_HUB_OFFLINE")
        sys.dont_write_bytecode = True
        sys.addaudithook(watch)
        study._analyse_and_draw = lambda folder: None
        code = cli.run(script.main, words)
        print("\n".join(["touched:", *bad]), flush=True)
        return code or len(bad)

    code, said = in_child(work), capfd.readouterr()
    assert code == 0, said


def test_no_code_of_a_models_folder_is_ever_run_nor_asked_for(tmp_path, monkeypatch):
    folder = tmp_path / "m"
    pretrained.tiny_model(folder, ["a film"])
    code = f"open({str(tmp_path / 'pwned')!r}, 'w')\nfrom transformers import Qwen2Config as C\n"
    (folder / "own.py").write_text(code)
    path = folder / "config.json"
    foreign = {"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | foreign))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match=r"config\.json: ") as error:
        backbones.load(str(folder))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pwned").exists()


def test_pickled_weights_are_read_as_weights_only(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    folder = tmp_path / "m"
    pretrained.tiny_model(folder, ["a film"])
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load") as error:
        backbones.load(str(folder), quantise="none")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without rights")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_results_folder_without_rights_is_refused_before_anything_is_loaded(
    tmp_path, capfd, script
):
    def work():
        os.setuid(65534)
        script.load_dataset = script.load_pairs = None
        return cli.run(script.main, ["--smoke", "--out", str(tmp_path / "out")])

    assert in_child(work) == 2
    assert "(Permission denied). Pass a writable --out." in capfd.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("given", [True, False])
def test_a_results_folder_that_is_a_file_is_refused_before_anything_is_loaded(
    tmp_path, monkeypatch, capsys, script, given
):
    (tmp_path / "file").write_text("x")
    loader = "load_pairs" if script is two_labels else "load_dataset"
    monkeypatch.setattr(script, loader, None)
    monkeypatch.setattr(script, "RESULTS", tmp_path / "file" / "results")
    words = ["--out", str(tmp_path / "file")] if given else []
    assert cli.run(script.main, words) == 2
    assert "--out" in capsys.readouterr().err
