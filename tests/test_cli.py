"""Flags from a Config, and every mistake in one line that names the value and the fix."""

import dataclasses
import multiprocessing
import os
import signal
import sys

import pytest

import cli
import experiment
import flags
from arms import MAIN_ARMS
from common import UserError
from training import Interrupted, NonFiniteError


def parse(*words):
    return flags.parse(experiment.Config, words, "test")


def test_defaults_are_the_published_recipe():
    config = parse()
    assert (config.epochs, config.lr, config.batch_size, config.engram_dim) == (8, 3e-4, 64, 32)
    assert config.arms == ["classification", "dual", "dual_engram"]
    assert dataclasses.asdict(config) == dataclasses.asdict(experiment.Config())
    assert flags.defaults_of(experiment.Config) == dataclasses.asdict(config)


def test_values_lists_and_switches():
    config = parse(
        "--seeds", "3", "5", "--lr", "1e-3", "--no-resume", "--drop-empty", "--limit-train=9"
    )
    assert (config.seeds, config.lr, config.limit_train) == ([3, 5], 1e-3, 9)
    assert (config.resume, config.drop_empty, config.smoke) == (False, True, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epoch", "3"], "unknown argument --epoch. Did you mean --epochs?"),
        (["--frobnicate"], "unknown argument --frobnicate. See --help."),
        (["--lr", "0"], "--lr: must be a finite number > 0.0 and <= 1.0, got 0."),
        (["--lr", "nan"], "--lr: must be a finite number > 0.0 and <= 1.0, got nan."),
        (["--lr", "inf"], "got inf."),
        (["--lr", "fast"], "--lr: must be a finite number > 0.0 and <= 1.0, got fast."),
        (["--epochs", "0"], "--epochs: must be a whole number >= 1, got 0."),
        (["--epochs", "1.5"], "got 1.5."),
        (["--epochs", "-1"], "got -1."),
        (["--seeds", "x"], "--seeds: must be a whole number >= 0, got x."),
        (["--seeds", str(2**63)], "--seeds: must be a whole number"),
        (["--seeds", "1", "1"], "--seeds names 1 twice."),
        (["--arms", "dual", "triple"], "--arms: takes any of main controls"),
        (["--arms"], "--arms: expected at least one argument"),
        (["--lr", "1e-3", "--lr", "1e-4"], "--lr is given twice. Give it once."),
        (["--smoke", "--smoke"], "--smoke is given twice"),
        (["--resume", "--no-resume"], "--no-resume is given twice"),
        (["--feedback", "prev"], "--feedback: takes any of next self same_class off"),
        (["--lm-weight", "1.5"], "must be a finite number >= 0.0 and <= 1.0, got 1.5."),
        (["--max-tokens", "1"], "--max-tokens: must be a whole number >= 2, got 1."),
        (["--data"], "--data: expected one argument"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(words, message):
    with pytest.raises(UserError) as caught:
        parse(*words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_explains_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as done:
        parse("--help")
    assert done.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(experiment.Config):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "(default: 0.0003)" in text
    assert "--no-resume" in text


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a.csv is empty."), 2, ": error: a.csv is empty.\n"),
        (NonFiniteError("loss nan"), 1, ": stopped: loss nan\n"),
    ],
)
def test_errors_become_one_line_and_an_exit_code(capsys, error, code, line):
    def main(argv, stop):
        raise error

    assert cli.run(main, []) == code
    assert capsys.readouterr().err.endswith(line)


@pytest.mark.parametrize("error", [UserError("x"), NonFiniteError("x")])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(capsys, error):
    def main(argv, stop):
        raise error

    code = cli.run(main, [])
    assert "Traceback" not in capsys.readouterr().err
    assert cli.run(main, ["--debug"]) == code
    said = capsys.readouterr().err
    assert "Traceback" in said and "in main" in said and said.endswith(": x\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_raised_at_the_next_check_only(capsys, number, code):
    def main(argv, stop):
        stop.check()
        signal.raise_signal(number)
        try:
            stop.check()
        except Interrupted as stopped:
            stopped.saved = 12
            raise

    before = signal.getsignal(number)
    assert cli.run(main, []) == code
    assert "saved at step 12; run the same command to continue" in capsys.readouterr().err
    assert signal.getsignal(number) is before


def test_a_second_signal_exits_at_once():
    def work():
        def main(argv, stop):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            os._exit(99)

        os._exit(cli.run(main, []))

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(20)
    assert child.exitcode == 143


def test_success_is_zero():
    assert cli.run(lambda argv, stop: None, sys.argv[1:]) == 0


def test_arm_groups_are_their_arms_and_an_arm_named_twice_is_refused():
    assert parse("--arms", "main", "untrained").arms == [*MAIN_ARMS, "untrained"]
    controls = parse("--arms", "controls").arms
    assert {"dual_engram_shuffled_labels", "dual_stopped", "dual_engram_w2"} <= set(controls)
    assert not {*MAIN_ARMS, "published_small"} & set(controls)
    with pytest.raises(UserError, match="--arms names dual twice"):
        parse("--arms", "main", "dual")
