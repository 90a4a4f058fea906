"""The 48 bad inputs: each one line on stderr, exit code 2, nothing written, nothing loaded.

Through the scripts' own command line, small and 7B. A number that is accepted rather than refused
names the test that shows it.
"""

import importlib
import time
from pathlib import Path

import pytest
import torch
import transformers
from test_backbones import tiny, write_other
from test_data import AG_RAW, GOOD, ROWS, TABLE, jsonl, parquet, write

import backbones
import cli
import experiment
import experiment_7b
import experiment_agnews_7b
import pretrained
import sources
import two_labels
from common import UserError

# number of the input in the table, what is wrong: (file, content, part of the message, flags)
FILES = {
    "3 suffix": ("x.xlsx", "a", "x.xlsx: expected .csv .tsv .jsonl .json .parquet", ""),
    "4 empty": ("x.csv", "", "x.csv is empty", ""),
    "4 mark only": ("x.csv", b"\xef\xbb\xbf\n", "x.csv is empty", ""),
    "5 header only": ("x.csv", TABLE, "has a header but no rows", ""),
    "5 no record": ("x.json", "[]", "has columns none", ""),
    "6 text column": ("x.csv", "words,y\na,1\n", 'columns words, y; need "sentence" and', ""),
    "7 label column": (
        "x.csv",
        "text,y\na,1\n",
        "Pass --text-column text --label-column NAME.",
        "",
    ),
    "7 flag": ("x.jsonl", GOOD, '"sentence" and "y"', "--label-column y"),
    "8 -1": ("x.tsv", "sentence\tlabel\na\t1\nb\t-1\n", "row 2: label -1 means unlabelled", ""),
    "9 range": ("x.csv", TABLE + "a,0\nb,2\nc,7\n", "row 2: label 2 is outside 0..1 (neg", ""),
    "9 ignored": ("x.csv", TABLE + "a,0\nb,-100\n", "row 2: label -100 is outside 0..1", ""),
    "9 count": ("x.csv", TABLE + "a,0\nb,2\nc,7\n", "2 bad rows in all", ""),
    "10 offset": ("x.csv", TABLE + "a,1\nb,2\n", "are 1..2; expected 0..1", ""),
    "11 words": ("x.csv", TABLE + "a,pos\nb,neg\n", "The column holds neg, pos. For", ""),
    "11 unlisted": ("x.csv", TABLE + "a,x\nb,y\n", "row 2: label y is", "--labels x z"),
    "11 newline": ("x.csv", TABLE + 'a,"p\nq"\nb,1\n', "row 1: label p q is not a whole", ""),
    "12 half": ("x.csv", TABLE + "a,1\nb,0.5\n", "row 2: label 0.5 is not a whole number", ""),
    "13 missing": ("x.csv", TABLE + "a,1\nb,\n", "row 2: label is missing", ""),
    "13 null": ("x.jsonl", jsonl(("a", 0), ("b", None)), "row 2: label is missing", ""),
    "13 NaN": ("x.jsonl", jsonl(("a", 0), ("b", float("nan"))), "row 2: label is missing", ""),
    "14 null": ("x.jsonl", jsonl(*ROWS, (None, 0)), "row 5: text is missing", ""),
    "15 number": ("x.jsonl", jsonl(*ROWS, (5, 0)), "row 5: text is a number (5), not text", ""),
    "15 column": ("x.csv", TABLE + "5,1\n6,0\n", "row 1: text is a number (5)", ""),
    "15 list": ("x.jsonl", jsonl((["a"], 0)), "row 1: text is a list", ""),
    "16 empty": ("x.csv", TABLE + "a,0\n ,1\n", "row 2: text is empty. Remove it or pass --dr", ""),
    "17 one class": ("x.csv", TABLE + "a,1\n" * 120, "all 120 rows have label 1; two", ""),
    "17 dropped": ("x.csv", TABLE + "a,1\n ,0\n", "all 1 rows have label 1", "--drop-empty"),
    "19 batch": ("x.jsonl", GOOD * 2, "6 training rows < batch 64. Pass --batch-size 2 ", ""),
    "19 too few": ("x.csv", TABLE + "a,1\nb,0\n", "2 rows are too few", ""),
    "21 quote": ("x.csv", TABLE + '"a,1\nb,0\n', "row 1: quote opened here never closes", ""),
    "22 columns": ("x.csv", TABLE + "a,1\na, b,1\n", "row 2: 3 columns, the header has 2", ""),
    "22 tsv": (
        "x.tsv",
        "sentence\tlabel\na\t1\n\nb\t0\n",
        "row 2: 1 columns, the header has 2",
        "",
    ),
    "22 twice": ("x.csv", "text,text,label\na,b,1\n", "names a column twice", ""),
    "23 latin-1": ("x.csv", b"caf\xe9,label\n", "not UTF-8 (byte 0xe9 at 3)", ""),
    "23 encoding": ("x.csv", TABLE, '"nope" is unknown', "--encoding nope"),
    "25 truncated": ("x.jsonl", GOOD[:60], "x.jsonl line 2: JSON ends inside a string", ""),
    "25 object": ("x.json", '{"a": 1}', "expected an object a row", ""),
    "26 truncated": ("x.parquet", parquet({"a": [1]})[:-5], "truncated or not parquet", ""),
    "26 text": ("x.parquet", "sentence,label", "truncated or not parquet (no footer)", ""),
    "30 surrogate": ("x.jsonl", jsonl(("a", 0), ("\ud800", 1)), "row 2: text holds half", ""),
    "limit": ("x.jsonl", GOOD, "--limit-train: must be a whole number >= 1", "--limit-train 0"),
    "labels": ("x.jsonl", GOOD, "--labels names a twice", "--labels a a"),
}


# script, words of the command line, part of the message
WORDS = {
    "1 missing": (experiment, "--data nope.csv", "nope.csv does not exist (looked in"),
    "10 AG News": (experiment_agnews_7b, "--data raw.csv", "are 1..4; expected 0..3"),
    "33 split": (experiment, "--data .", 'no split "train"; has none'),
    "34 lr 0": (experiment, "--smoke --lr 0", "a finite number > 0.0 and <= 1.0, got 0."),
    "34 lr nan": (experiment_7b, "--smoke --lr nan", "> 0.0 and <= 1.0, got nan."),
    "34 negative": (experiment, "--smoke --lr -0.1", "and <= 1.0, got -0.1."),
    "34 -1e-3": (experiment, "--smoke --lr -1e-3", "and <= 1.0, got -1e-3."),
    "34 lr 1e3": (experiment_agnews_7b, "--smoke --lr 1e3", "and <= 1.0, got 1e3."),
    "35 epochs": (experiment, "--smoke --epochs 1.5", "a whole number >= 1, got 1.5."),
    "35 zero": (two_labels, "--smoke --epochs 0", "a whole number >= 1, got 0."),
    "35 negative": (experiment_7b, "--smoke --epochs -1", "a whole number >= 1, got -1."),
    "36 odd batch": (experiment_7b, "--smoke --batch-size 5", "must be even, got 5."),
    "36 small": (experiment, "--smoke --batch-size 5", "must be even, got 5."),
    "37 short": (experiment, "--smoke --max-tokens 1", "--max-tokens: must be a whole number >= 2"),
    "37 long": (experiment_7b, "--smoke --max-tokens 512", "--max-tokens must be 2..511 for"),
    "38 seed": (experiment, "--smoke --seeds x", "must be a whole number >= 0, got x."),
    "38 large": (experiment_7b, f"--smoke --seeds {2**63}", "must be a whole number >= 0, got"),
    "39 arm": (experiment, "--smoke --arms 4", "takes any of main controls"),
    "40 misspelt": (experiment_7b, "--smoke --epoch 3", "Did you mean --epochs?"),
    "40 unknown": (
        experiment,
        "--smoke --frobnicate",
        "unknown argument --frobnicate. See --help.",
    ),
    "41 model id": (
        experiment_7b,
        "--data good.csv --backbone a/b",
        "it is not in this machine's cache and HF_HUB_OFFLINE is set. Pass --backbone with",
    ),
    "42 offline": (experiment, "--data no/set", 'HF_HUB_OFFLINE is set and "no/set" is not in the'),
    "42 default": (experiment_agnews_7b, "", '"fancyzhx/ag_news" is not in the cache'),
    "43 T5": (experiment_7b, "--data good.csv --backbone t5", "is not a causal language model"),
    "43 BERT": (experiment_7b, "--data good.csv --backbone bert", "(it sees later words)"),
    "44 config": (experiment_7b, "--data good.csv --backbone no-config", "has no config.json"),
    "44 cut": (experiment_7b, "--data good.csv --backbone truncated", "truncated or damaged"),
    "44 missing": (
        experiment_7b,
        "--data good.csv --backbone missing",
        "not whole: 3 missing keys",
    ),
    # which line depends on whether the package that reads such files is there
    "45 GGUF": (experiment_7b, "--data good.csv --backbone junk.gguf", "junk.gguf"),
    "46 targets": (experiment_7b, "--smoke --lora-targets nothing", "--lora-targets from"),
    "48 no GPU": (experiment_7b, "--data good.csv", "7.0 billion parameters and this machine has"),
}
ELSEWHERE = {
    2: "test_data.test_four_formats_give_equal_datasets",
    18: "test_experiment.test_an_evaluation_of_a_few_rows_runs_and_says_what_has_no_value",
    20: "test_experiment.test_an_evaluation_of_a_few_rows_runs_and_says_what_has_no_value",
    24: "test_data.test_four_formats_give_equal_datasets",
    27: "test_data.test_stray_quotes_in_a_tsv_merge_no_lines",
    28: "test_experiment.test_cut_texts_are_counted_aloud",
    29: "test_backbones.test_text_that_spells_a_special_token_stays_text_and_padding_means_nothing",
    31: "test_data.test_notes_say_what_is_odd",
    32: "test_data.test_notes_say_what_is_odd",
    47: "test_study.test_another_configuration_is_refused_and_nothing_lost",
}
BACKBONES = ("t5", "bert", "no config", "truncated", "missing")


def refused(capsys, folder: Path, script, words: list[str]) -> str:
    """The one line of a refused command; nothing was written, within 10 s."""
    before, started = sorted(folder.rglob("*")), time.monotonic()
    code = cli.run(script.main, [*words, "--threads", "1", "--out", str(folder / "out" / "deep")])
    assert time.monotonic() - started < 10
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and ": error: " in line
    assert sorted(folder.rglob("*")) == before
    return line


@pytest.mark.parametrize("script", [experiment, experiment_7b])
@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_one_line_that_names_it(case, script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "run_study", None)
    monkeypatch.setattr(backbones, "load", None)
    name, content, expected, flags = FILES[case]
    if script is experiment_7b:
        expected = expected.replace("batch 64", "batch 16")
    words = ["--data", write(tmp_path, name, content), *flags.split()]
    assert expected in refused(capsys, tmp_path, script, words)


@pytest.mark.parametrize("case", ["8 -1", "13 missing", "16 empty", "21 quote", "26 text"])
def test_a_bad_file_of_the_two_label_script_is_one_line(case, tmp_path, capsys):
    name, content, expected, _ = FILES[case]
    words = ["--sst2", write(tmp_path, name, content)]
    assert expected in refused(capsys, tmp_path, two_labels, words)


@pytest.fixture(scope="module")
def unusable(tmp_path_factory):
    """A folder of backbones that cannot be used, and of texts that can."""
    folder = tmp_path_factory.mktemp("unusable")
    for kind in BACKBONES:
        write_other(folder / kind.replace(" ", "-"), kind)
    rows = "".join(f"text number {i},{i % 2}\n" for i in range(80))
    write(folder, "good.csv", "text,label\n" + rows)
    write(folder, "raw.csv", AG_RAW)
    write(folder, "junk.gguf", b"GGUF and then nothing")
    return folder


@pytest.mark.parametrize("case", WORDS)
def test_bad_words_are_one_line_that_names_them(case, tmp_path, capsys, monkeypatch, unusable):
    script, words, expected = WORDS[case]
    monkeypatch.chdir(tmp_path if case == "33 split" else unusable)
    monkeypatch.setattr(script, "run_study" if script is not two_labels else "finished", None)
    assert expected in refused(capsys, tmp_path, script, words.split())


def test_a_rate_that_is_high_is_a_warning(tmp_path, capsys):
    words = ["--smoke", "--threads", "1", "--stop-after", "0.001s", "--out", str(tmp_path)]
    assert cli.run(experiment.main, [*words, "--lr", "0.2"]) == 0
    assert "warning: --lr 0.2 is high for AdamW" in capsys.readouterr().err


@pytest.mark.parametrize("trouble", ["", "the hub did not answer within 5 s"])
def test_a_model_that_the_hub_does_not_give_is_one_line(trouble, monkeypatch):
    """41, 42 on a machine that is not offline."""

    def no_such_model(source, local_files_only=False, **_):
        raise OSError(f"{source} is not a local folder\nand is not a valid model identifier")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", no_such_model)
    monkeypatch.setattr(sources, "hub_trouble", lambda hub_id: trouble)
    with pytest.raises(UserError) as error:
        backbones.load("nobody/model")
    said = str(error.value)
    assert (trouble or "it is not on the hub, or it is gated (`hf auth login`)") in said
    assert said.endswith("Pass --backbone with a local folder, a GGUF file or another hub id.")


def test_a_gguf_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    """45 with the package that reads such files, and without it."""
    path = Path(write(tmp_path, "x.gguf", b"GGUF"))
    for error, said in (
        (ImportError("gguf"), "pip install gguf"),
        (IndexError("1"), "readable GGUF"),
    ):

        def fail(error=error, **_):
            raise error

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
        with pytest.raises(UserError, match=said):
            pretrained.from_gguf(path)


@pytest.mark.parametrize("gpu", [False, True])
def test_too_little_memory_is_known_before_anything_is_loaded(
    gpu, tmp_path, capsys, monkeypatch, unusable
):
    """48: a model whose weights do not fit, on a CPU by the command line, on a GPU by its parts."""
    monkeypatch.setattr(backbones, "load_weights", None)
    if not gpu:
        monkeypatch.setattr(pretrained.os, "sysconf", lambda name: 2**13)
        words = ["--data", str(unusable / "good.csv"), "--backbone", tiny(tmp_path / "m")]
        said = refused(capsys, tmp_path, experiment_7b, words)
        assert "m needs about 0.6 GiB, this machine has 0.1 GiB free. Pass a smaller --b" in said
        return
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5.1 * 2**30, 16 * 2**30))
    said = r"7B needs about 9\.\d GiB, GPU 0 has 5\.1 GiB free \(other processes use 10\.9 GiB\)\. "
    with pytest.raises(UserError, match=said):
        pretrained.share_memory("7B", 8.5 * 2**30, 2**33, torch.device("cuda"), None)


def test_all_48_are_here():
    shown = {int(case.split()[0]) for case in (*FILES, *WORDS) if case[0].isdigit()}
    assert shown | ELSEWHERE.keys() == set(range(1, 49))
    for where in ELSEWHERE.values():
        module, name = where.split(".")
        assert callable(getattr(importlib.import_module(module), name)), where
