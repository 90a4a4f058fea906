"""A kill, a signal or a fault at a chosen moment: a rerun gives the bytes of a run left alone.

On the small path, the QLoRA path and the two-label script alike; every run is a forked process.
"""

import itertools
import json
import os
import signal
from dataclasses import replace

import pytest
import torch

import evaluation
import results
import training
import two_labels
from benchmarks import trials

TWO = ("--smoke", "--epochs", "2", "--batch-size", "32", "--seeds", "0", "--threads", "1",
       "--width", "16", "--inner", "16", "--engram-dim", "4", "--arms", "dual_engram")  # fmt: skip
EPOCHS = 2
# evaluations of the first arm: of its epochs, its features, its engram modes, its training texts
FIRST = {"small": 3, "QLoRA": 3, "two labels": 8}


def small_batches():
    """Several batches an evaluation, so that one can be left between two of them."""
    order = evaluation.eval_order
    evaluation.eval_order = lambda lengths, tokens: order(lengths, 150)
    two_labels.analyse = lambda folder, smoke: None


class Run(trials.Trial):
    """A trial whose evaluations have several batches."""

    def start(self, *extra, before=lambda: None, slow=False):
        return super().start(*extra, before=lambda: (small_batches(), before()), slow=slow)

    def finish(self, *extra, before=lambda: None):
        return super().finish(*extra, before=before)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    made = trials.kinds(tmp_path_factory.mktemp("kinds"))
    command = made["small"].command
    shorter = tuple(str(EPOCHS) if word == "3" else word for word in command)
    made["small"] = replace(made["small"], command=shorter)
    return made | {"two labels": trials.Kind(two_labels.main, TWO, 0)}


@pytest.fixture(scope="module", params=FIRST)
def path(request, kinds, tmp_path_factory):
    """(its name, its kind of run, what it gives when left alone)."""
    run = Run(kinds[request.param], tmp_path_factory.mktemp("whole") / "run")
    assert run.finish() == 0, run.said
    return request.param, run.kind, trials.outcome_of(run.folder)


def in_evaluation(number, act):
    """Let `act` happen in the first batch of the given evaluation, and tell of every later one."""

    def before():
        evaluate, losses = training.evaluate, evaluation.batch_losses
        calls, begun = itertools.count(1), []

        def counted(*args, **options):
            begun.append(next(calls))
            return evaluate(*args, **options)

        def acting(*args):
            if begun[-1] >= number:
                print("scored a batch")
                act()
            return losses(*args)

        training.evaluate, evaluation.batch_losses = counted, acting

    return before


def test_a_signal_stops_training_and_every_kind_of_evaluation(path, tmp_path):
    name, kind, whole = path
    run = Run(kind, tmp_path / "run")
    assert run.finish("--stop-after", "0.001s") == 0
    assert ": incomplete: saved at step 0; run the same command to continue" in run.said
    steps = 256 // 32
    moments = (  # evaluation since the rerun began, and the step that must have been saved
        (FIRST[name] + 1, steps),  # of the second arm's first epoch
        (EPOCHS + 1, EPOCHS * steps),  # its features
        (3, EPOCHS * steps),  # its engram modes
        (6, EPOCHS * steps),  # its training texts
    )
    codes = itertools.cycle([(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    for (moment, step), (number, code) in zip(moments, codes, strict=False):
        act = in_evaluation(moment, lambda number=number: signal.raise_signal(number))
        assert run.finish(before=act) == code, run.said
        assert f"saved at step {step}; run the same command to continue" in run.said
        assert run.said.count("scored a batch") == 1
    assert run.finish() == 0, run.said
    assert trials.outcome_of(run.folder) == whole


def killed_at_fsync(number):
    """SIGKILL at a write: odd ones are before their file's rename, even ones after it."""

    def before():
        fsync, calls = os.fsync, itertools.count(1)

        def dying(file):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(file)

        os.fsync = dying

    return before


def test_sigkill_before_and_after_any_rename(path, tmp_path):
    _, kind, whole = path
    run = Run(kind, tmp_path / "run")
    strays = 0
    for number in (7, 8, 9, 10):
        assert run.finish(before=killed_at_fsync(number)) == -signal.SIGKILL, run.said
        strays += len(list(run.folder.rglob(".*.tmp")))
    assert strays == 2
    assert run.finish() == 0, run.said
    assert trials.outcome_of(run.folder) == whole
    assert not list(run.folder.rglob(".*.tmp"))


def test_an_arm_that_is_done_is_not_trained_again(path, tmp_path):
    _, kind, whole = path
    run = Run(kind, tmp_path / "run")

    def before():
        add = results.ResultsFolder.add

        def dying(*args):
            add(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        results.ResultsFolder.add = dying

    assert run.finish(before=before) == -signal.SIGKILL
    (first,) = json.loads((run.folder / "results.json").read_text())["rows"]
    assert f"{first}, seed 0: epoch {EPOCHS} of {EPOCHS}" in run.said
    assert run.finish() == 0
    assert f"{first}, seed 0: " not in run.said
    assert trials.outcome_of(run.folder) == whole


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_the_run_before_it_is_taken(path, tmp_path, where):
    name, kind, whole = path
    if name == "two labels":
        pytest.skip("its steps are those of the small path")
    run, number = Run(kind, tmp_path / "run"), 11

    def before():
        weighted, calls = training.weighted_loss, itertools.count()

        def broken(*args):
            loss = weighted(*args)
            if next(calls) != number:
                return loss
            # the second is 0, and its gradient is not finite
            return loss * float("nan") if where == "loss" else loss + (loss - loss.detach()).sqrt()

        training.weighted_loss = broken

    assert run.finish(before=before) == 1
    (said,) = [line for line in run.said.splitlines() if "stopped:" in line]
    for part in ("dual, seed 0, step 11: loss", "(classification ", "targets), gradient norm",
                 "rate ", "bfloat16, training rows ["):  # fmt: skip
        assert part in said
    assert ("loss nan" in said) == (where == "loss")
    manifests = sorted(run.folder.glob("checkpoints/dual-0/*.json"))
    assert [path.stem for path in manifests] == ["00000008"]
    for path in run.folder.rglob("[!.]*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)
    assert run.finish() == 0
    assert trials.outcome_of(run.folder) == whole


def test_memory_that_runs_out_is_survived_and_recorded(path, tmp_path):
    name, kind, whole = path
    if name == "two labels":
        pytest.skip("its steps are those of the small path")
    run = Run(kind, tmp_path / "run")

    def before():
        parts, calls = training.run_part, itertools.count()

        def failing(*args):
            if next(calls) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return parts(*args)

        training.run_part = failing

    assert run.finish(before=before) == 0, run.said
    (lowered,) = json.loads((run.folder / "results.json").read_text())["rows"]["dual"]["0"][
        "memory"
    ]
    assert (lowered["step"], lowered["limit"]) == (3, "micro_batch_tokens")
    said = f"dual, seed 0: out of memory at step 3; micro_batch_tokens is {lowered['tokens']} from"
    assert said in (run.folder / "log.txt").read_text()
    assert trials.near(trials.outcome_of(run.folder), whole)


def test_a_run_whose_output_nobody_reads_goes_on(path, tmp_path):
    _, kind, whole = path
    run = Run(kind, tmp_path / "run")

    def before():
        reader, writer = os.pipe()
        os.close(reader)
        for stream in (1, 2):
            os.dup2(writer, stream)

    assert run.finish(before=before) == 0
    assert not run.said
    assert "epoch 2 of 2" in (run.folder / "log.txt").read_text()
    assert trials.outcome_of(run.folder) == whole
