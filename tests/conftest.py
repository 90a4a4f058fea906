"""Shared by all tests: no network, one thread, tiny encoded data."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# bitsandbytes has threads of its own, which wait for one another actively where a core is busy
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

import batches
import data
from arms import ARMS
from common import Batch, StudyModel
from recipe import Recipe, seed_everything
from transformer import SmallTransformer


@pytest.fixture(autouse=True)
def _alike_in_any_order():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def corpus():
    """The generated corpus, encoded: (train, evaluation, vocabulary size)."""
    dataset = data.generated_corpus()
    words = batches.WordVocabulary.build(dataset.train.texts)
    train, evaluation = (
        batches.encode(s, words.encode, 64) for s in (dataset.train, dataset.evaluation)
    )
    return train, evaluation, len(words)


@pytest.fixture
def recipe():
    return Recipe(2, 3e-3, 0.01, 32, 1.0, "cosine-epoch", window=4)


@pytest.fixture
def make_model(corpus):
    """make_model(arm or its name, seed=0, **transformer) -> a StudyModel for the corpus."""

    def make(arm, seed=0, **options):
        arm = ARMS[arm] if isinstance(arm, str) else arm
        seed_everything(seed, "initialisation")
        backbone = SmallTransformer(corpus[2], 64, 32, 4, 48, causal=arm.causal, **options)
        return StudyModel(backbone, arm, 2, 8)

    return make


def random_batch(lengths, vocabulary=50, seed=0):
    rng = np.random.default_rng(seed)
    lengths = torch.tensor(lengths)
    tokens = torch.from_numpy(rng.integers(2, vocabulary, int(lengths.sum())))
    labels = torch.from_numpy(rng.integers(0, 2, len(lengths)))
    return Batch(tokens, lengths, labels, torch.arange(len(lengths)))
