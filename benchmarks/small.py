"""What does the same small-scale training cost, published recipe beside ours?

    python benchmarks/small.py [--data ../sst2] [--texts 6400] [--rounds 5] [--threads 1 2]
        [--jobs 2]

Times one epoch over the same rows per arm, contenders in turn in one process, and takes the median
of the round-by-round ratios: with 1 thread, with every core, and with a job of 1 thread on every
core at once, as the study trains (--threads 1 --jobs 2). "Published" is written here from the
study's description: every text padded to 64 tokens, float32, torch's TransformerEncoder, logits
over all words at every padded position, an untied LM head. Peak memory is that of a fresh process
per contender. Writes benchmarks/small.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

import batches
import data
from arms import ARMS, MAIN_ARMS
from common import StudyModel
from recipe import Recipe, derive_seed, prepare_cpu, seed_everything
from results import provenance
from training import Fit
from transformer import SmallTransformer

PADDED_TO = 64
RECIPE = Recipe(8, 3e-4, 0.01, 64, 1.0, "cosine-epoch")


class PublishedModel(nn.Module):
    """The published small model, as its parameter counts tell: sinusoids, classifier width 64."""

    def __init__(self, vocabulary: int, lm: bool, engram: bool) -> None:
        super().__init__()
        width = 128
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        layer = nn.TransformerEncoderLayer(width, 4, 256, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.classifier = nn.Sequential(
            nn.Linear(width, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2)
        )
        self.lm_head = nn.Linear(width, vocabulary) if lm else None
        self.compressor = nn.Linear(width, 32) if engram else None
        self.projector = nn.Linear(32, width) if engram else None
        angles = torch.arange(PADDED_TO).unsqueeze(1) * torch.exp(
            torch.arange(0, width, 2) * (-math.log(10000.0) / width)
        )
        table = torch.stack([angles.sin(), angles.cos()], 2).flatten(1)
        self.register_buffer("positions", table)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """tokens (B, 64), mask (B, 64) True at real ones -> logits (B, 2), LM logits (B, 64, V)."""
        x = self.embedding(tokens) + self.positions
        seen = mask
        if self.projector is not None:
            zero = self.projector(x.new_zeros(len(x), 32))
            x = torch.cat([zero.unsqueeze(1), x], 1)
            seen = torch.cat([mask.new_ones(len(x), 1), mask], 1)
        hidden = self.encoder(x, src_key_padding_mask=~seen)
        if self.projector is not None:
            hidden = hidden[:, 1:]
        weights = mask.unsqueeze(2).float()
        pooled = (hidden * weights).sum(1) / weights.sum(1)
        if self.compressor is not None:
            torch.tanh(self.compressor(pooled))
        return self.classifier(pooled), None if self.lm_head is None else self.lm_head(hidden)


def published_epoch(arm: str, train: batches.Encoded, vocabulary: int, steps: int) -> Callable:
    """A function that trains the published recipe for `steps` batches."""
    torch.manual_seed(0)
    model = PublishedModel(vocabulary, arm != "classification", arm == "dual_engram").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01)
    padded = torch.zeros(len(train), PADDED_TO, dtype=torch.int64)
    for row, (start, length) in enumerate(zip(train.offsets, train.lengths, strict=False)):
        padded[row, :length] = train.tokens[start : start + length]
    lengths = torch.from_numpy(train.lengths)

    def epoch() -> None:
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(train)))
        for items in order.split(64)[:steps]:
            tokens = padded[items]
            mask = torch.arange(PADDED_TO) < lengths[items].unsqueeze(1)
            logits, lm_logits = model(tokens, mask)
            loss = F.cross_entropy(logits, train.labels[items])
            if lm_logits is not None:
                targets = tokens[:, 1:].flatten()
                flat = lm_logits[:, :-1].flatten(0, 1)
                loss = loss + 0.3 * F.cross_entropy(flat, targets, ignore_index=0)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss.item()

    return epoch


def our_epoch(arm: str, train: batches.Encoded, vocabulary: int, steps: int) -> Callable:
    """A function that trains our small study's arm for `steps` batches."""
    seed_everything(0, "initialisation")
    model = StudyModel(SmallTransformer(vocabulary, PADDED_TO), ARMS[arm], 2, 32).train()
    fit = Fit(model, RECIPE, train, train, 0)

    def epoch() -> None:
        seed = derive_seed(0, "order")
        order = batches.batch_order(train.lengths, RECIPE.batch_size, seed, 0, RECIPE.window)
        for items in order[:steps]:
            fit.step(train.batch(items))

    return epoch


CONTENDERS = {"published": published_epoch, "ours": our_epoch}


def _peak(name: str, arm: str, train: batches.Encoded, vocabulary: int, queue) -> None:
    CONTENDERS[name](arm, train, vocabulary, 30)()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would start at the parent's size
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        queue.put(int(line.split()[1]) / 1024)
    else:
        queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peak_mb(name: str, arm: str, train: batches.Encoded, vocabulary: int) -> float:
    """Largest resident size (MiB) of a fresh process that loads the same and trains 30 steps."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(name, arm, train, vocabulary, queue))
    process.start()
    peak = queue.get()
    process.join()
    return peak


def rounds_of(
    arm: str, train: batches.Encoded, vocabulary: int, threads: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of an epoch of each contender, round by round, in turn."""
    prepare_cpu(threads)
    steps = -(-len(train) // RECIPE.batch_size)
    epochs = {name: make(arm, train, vocabulary, steps) for name, make in CONTENDERS.items()}
    for make in CONTENDERS.values():
        make(arm, train, vocabulary, 20)()  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, epoch in epochs.items():
            started = time.perf_counter()
            epoch()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def timed(
    arm: str, train: batches.Encoded, vocabulary: int, threads: int, jobs: int, rounds: int
) -> dict[str, float]:
    """Median seconds of an epoch of each contender, their ratio and its range, and peak memory."""
    given = arm, train, vocabulary, threads, rounds
    if jobs == 1:
        found = [rounds_of(*given)]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            tasks = [pool.submit(rounds_of, *given) for _ in range(jobs)]
            found = [task.result() for task in tasks]
    seconds = {name: [s for job in found for s in job[name]] for name in CONTENDERS}
    ratios = [a / b for a, b in zip(seconds["published"], seconds["ours"], strict=True)]
    return {
        **{f"{name}_seconds": statistics.median(s) for name, s in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        **{f"{name}_peak_mb": peak_mb(name, arm, train, vocabulary) for name in CONTENDERS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="as for experiment.py")
    parser.add_argument("--texts", type=int, default=6400, help="rows of an epoch")
    parser.add_argument("--rounds", type=int, default=5)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores}))
    parser.add_argument("--jobs", type=int, default=cores, help="processes at once, 1 thread each")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    dataset = data.load(data.SST2, options.data)
    words = batches.WordVocabulary.build(dataset.train.texts)
    whole = batches.encode(dataset.train, words.encode, PADDED_TO)
    train = whole.select(np.random.default_rng(0).permutation(len(whole))[: options.texts])
    rows = []
    setups = [(threads, 1) for threads in options.threads]
    setups += [(1, options.jobs)] if options.jobs > 1 else []
    for arm, (threads, jobs) in itertools.product(MAIN_ARMS, setups):
        figures = timed(arm, train, len(words), threads, jobs, options.rounds)
        rows.append({"arm": arm, "threads": threads, "jobs": jobs, **figures})
        print(json.dumps(rows[-1]), flush=True)
    facts = provenance(torch.device("cpu"))
    hardware = facts["hardware"]
    result = {
        "machine": f"{hardware['processor']}, {hardware['cores']} cores",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": facts["commit"],
        "versions": facts["versions"],
        "dataset": dataset.name,
        "texts": len(train),
        "texts_full_epoch": len(whole),
        "rounds": options.rounds,
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
