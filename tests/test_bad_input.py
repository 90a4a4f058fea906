"""The 48 bad inputs: each one line on stderr, exit code 2, nothing written, nothing loaded.

Through the scripts' own command line. A number that is accepted rather than refused, or whose
refusal needs a model or a network to set up, names the test that shows it.
"""

import importlib
from pathlib import Path

import pytest
from test_data import GOOD, ROWS, TABLE, jsonl, parquet, write

import cli
import experiment
import experiment_7b

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


# the small script, then the 7B one: words of the command line, part of the message
WORDS = {
    "1 missing": (experiment, "--data nope.csv", "nope.csv does not exist (looked in"),
    "33 split": (experiment, "--data .", 'no split "train"; has none'),
    "34 lr 0": (
        experiment,
        "--smoke --lr 0",
        "--lr: must be a finite number > 0.0 and <= 1.0, got 0.",
    ),
    "34 lr nan": (experiment_7b, "--smoke --lr nan", "> 0.0 and <= 1.0, got nan."),
    "35 epochs": (experiment, "--smoke --epochs 1.5", "a whole number >= 1, got 1.5."),
    "35 negative": (experiment_7b, "--smoke --epochs -1", "a whole number >= 1, got -1."),
    "36 odd batch": (experiment_7b, "--smoke --batch-size 5", "must be even, got 5."),
    "37 short": (experiment, "--smoke --max-tokens 1", "--max-tokens: must be a whole number >= 2"),
    "38 seed": (experiment, "--smoke --seeds x", "must be a whole number >= 0, got x."),
    "38 large": (experiment_7b, f"--smoke --seeds {2**63}", "must be a whole number >= 0, got"),
    "39 arm": (experiment, "--smoke --arms 4", "takes any of main controls"),
    "40 misspelt": (experiment_7b, "--smoke --epoch 3", "Did you mean --epochs?"),
    "40 unknown": (
        experiment,
        "--smoke --frobnicate",
        "unknown argument --frobnicate. See --help.",
    ),
    "41 model id": (experiment_7b, "--data good.csv --backbone a/b", "HF_HUB_OFFLINE is set"),
    "42 offline": (experiment, "--data no/set", "--data"),
    # read it, or one line that says how: the package that reads such files is not required
    "45 GGUF": (experiment_7b, "--data good.csv --backbone junk.gguf", "junk.gguf"),
    "46 targets": (experiment_7b, "--smoke --lora-targets nothing", "--lora-targets from"),
}
ELSEWHERE = {
    2: "test_data.test_four_formats_give_equal_datasets",
    18: "test_experiment.test_an_evaluation_of_a_few_rows_runs_and_says_what_has_no_value",
    20: "test_experiment.test_an_evaluation_of_a_few_rows_runs_and_says_what_has_no_value",
    24: "test_data.test_odd_but_good_input_is_kept",
    27: "test_data.test_stray_quotes_in_a_tsv_merge_no_lines",
    28: "test_data.test_notes_say_what_is_odd",
    29: "test_backbones.test_text_that_spells_a_special_token_stays_text_and_padding_means_nothing",
    31: "test_data.test_notes_say_what_is_odd",
    32: "test_data.test_notes_say_what_is_odd",
    43: "test_backbones.test_what_cannot_be_used_is_refused_in_one_line",
    44: "test_backbones.test_what_cannot_be_used_is_refused_in_one_line",
    47: "test_study.test_another_configuration_is_refused_and_nothing_lost",
    48: "test_backbones.test_limits_are_known_before_loading",
}


def refused(capsys, folder: Path, script, words: list[str]) -> str:
    """The one line of a refused command; nothing was written."""
    before = sorted(folder.rglob("*"))
    code = cli.run(script.main, [*words, "--threads", "1", "--out", str(folder / "out" / "deep")])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2, lines
    assert len([line for line in lines if ": error: " in line]) == 1, lines
    assert not any("Traceback" in line for line in lines)
    assert sorted(folder.rglob("*")) == before
    return lines[-1]


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_one_line_that_names_it(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "run_study", None)
    name, content, expected, flags = FILES[case]
    words = ["--data", write(tmp_path, name, content), *flags.split()]
    assert expected in refused(capsys, tmp_path, experiment, words)


@pytest.mark.parametrize("case", WORDS)
def test_bad_words_are_one_line_that_names_them(case, tmp_path, capsys, monkeypatch):
    script, words, expected = WORDS[case]
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"text number {i},{i % 2}\n" for i in range(80))
    if "good.csv" in words:
        write(tmp_path, "good.csv", "text,label\n" + rows)
        write(tmp_path, "junk.gguf", b"GGUF and then nothing")
    assert expected in refused(capsys, tmp_path, script, words.split())


def test_all_48_are_here():
    shown = {int(case.split()[0]) for case in (*FILES, *WORDS) if case[0].isdigit()}
    assert shown | ELSEWHERE.keys() == set(range(1, 49))
    for where in ELSEWHERE.values():
        module, name = where.split(".")
        assert callable(getattr(importlib.import_module(module), name)), where
