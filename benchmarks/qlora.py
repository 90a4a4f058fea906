"""What does the same QLoRA training cost: published recipe, Hugging Face Trainer, ours?

    python benchmarks/qlora.py --backbone ID_OR_PATH [--data ../sst2] [--arms dual] [--steps 4]
        [--passes 32 128 512 2048]

Same NF4 base, rows, losses, batches of 16 and seed for every contender, taken in turn in one
process. "published": written from the study's description: every text padded to --max-tokens,
float32 logits at every padded position, gradient checkpointing always, micro-batches of 8, of 2 in
the engram arm. "trainer": the library's Trainer with dynamic padding and length grouping. Neither
feeds an engram back: they do less than Model 3. "products": the frozen weights' matrix products
alone, forward and back, which bound what any of them can do here. --passes times our forward and
backward pass at several sizes: its fixed and its per-token part are what carries over to another
card. Each case is put into benchmarks/qlora-cpu.json or qlora-gpu.json in the place of an earlier
one of the same data set, backbone, arm and machine. benchmarks/random_backbone.py makes a 7B
backbone where none can be had: speed and memory do not depend on the weights' values.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from contenders import BATCH, CONTENDERS, EPOCHS, Run, load, our_fit

import batches
import data
from arms import MAIN_ARMS
from files import write_json
from recipe import derive_seed, prepare_cpu
from results import provenance

FULL_ROWS = {"sst2": 67_349, "ag-news": 120_000}  # training texts of the published studies


def pass_times(options, arm: str, train: batches.Encoded) -> dict:
    """Milliseconds of one forward and backward pass by its real tokens, and the line through them.

    The line weighs every size alike (least squares on relative errors).
    """
    fit = our_fit(options, arm, train)
    fit.recipe = dataclasses.replace(fit.recipe, micro_batch_tokens=0)
    total, points = np.cumsum(train.lengths), []
    for wanted in options.passes:
        texts = int(np.searchsorted(total, wanted, side="right"))
        batch = train.batch(np.arange(max(2, texts - texts % 2)))
        seconds = []
        for number in range(1 + options.rounds):
            _synchronise(fit.device)
            started = time.perf_counter()
            fit.optimizer.zero_grad(set_to_none=True)
            fit.gradients(batch)
            _synchronise(fit.device)
            if number:  # the first meets the kernels' shapes
                seconds.append(time.perf_counter() - started)
        points.append({"tokens": len(batch.tokens), "ms": 1000 * statistics.median(seconds)})
    tokens, ms = (np.array([point[key] for point in points]) for key in ("tokens", "ms"))
    line = np.polyfit(tokens, ms, 1, w=1 / ms) if len(points) > 2 else (None, None)
    found = {"points": points, "ms_per_token": line[0], "fixed_ms": line[1]}
    print(arm, "passes", json.dumps(found), flush=True)
    return found


def _free() -> None:
    """Give back what the last contender held: modules and their hooks are cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(options, name: str, train: batches.Encoded, order: list) -> dict:
    """Every contender's figures for one arm.

    In turn round by round on a CPU, whose speed drifts; one after the other on a GPU, where the
    peak is to be one contender's own.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = {c: {"seconds": [], "tokens": [], "loss": []} for c in options.contenders}

    def begin(contender: str) -> Run:
        run = CONTENDERS[contender](options, name, train, order)
        run(0, options.warm_up)
        return run

    def one_round(contender: str, run: Run, number: int) -> None:
        first = options.warm_up + number * options.steps
        last, found = first + options.steps, figures[contender]
        _synchronise(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        loss, own = run(first, last)
        _synchronise(device)
        spent = time.perf_counter() - started
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
            found["peak_mib"] = max(peak, found.get("peak_mib", 0))
        found["seconds"].append(spent if own is None else own)
        found["tokens"].append(sum(int(train.lengths[order[i]].sum()) for i in range(first, last)))
        found["loss"].append(loss)

    together = options.contenders if device.type == "cpu" else []
    alone = [] if together else options.contenders
    for group in (*([contender] for contender in alone), together):
        runs = {contender: begin(contender) for contender in group}
        for number in range(options.rounds):
            for contender, run in runs.items():
                one_round(contender, run, number)
        del runs
        _free()
    rows = {}
    for contender, found in figures.items():
        seconds = statistics.median(found["seconds"])
        pairs = zip(found["tokens"], found["seconds"], strict=True)
        rows[contender] = {
            "tokens_per_s": statistics.median(t / s for t, s in pairs),
            "examples_per_s": BATCH * options.steps / seconds,
            "ms_per_step": 1000 * seconds / options.steps,
            "peak_mib": found.get("peak_mib"),
            "last_loss": found["loss"][-1],
        }
        if "ours" in figures:
            pairs = zip(found["seconds"], figures["ours"]["seconds"], strict=True)
            ratios = [a / b for a, b in pairs]
            rows[contender]["ours_times_faster"] = statistics.median(ratios)
            rows[contender]["ours_times_faster_range"] = [min(ratios), max(ratios)]
        print(name, contender, json.dumps(rows[contender]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--data", help="as for experiment_7b.py")
    parser.add_argument("--agnews", action="store_true", help="AG News instead of SST-2")
    parser.add_argument("--arms", nargs="+", choices=MAIN_ARMS, default=["dual"])
    parser.add_argument("--quantise", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the clock")
    parser.add_argument("--steps", type=int, default=4, help="measured steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--passes", type=int, nargs="+", default=[], help="real tokens of single passes to time"
    )
    parser.add_argument("--max-tokens", type=int, help="default: 128, AG News 256")
    parser.add_argument("--vram-gib", type=float)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.max_tokens = options.max_tokens or (256 if options.agnews else 128)
    prepare_cpu(options.threads)
    total = options.warm_up + options.steps * options.rounds
    spec = data.AG_NEWS if options.agnews else data.SST2
    texts = max(total * BATCH, *options.passes, 0)
    dataset = data.load(spec, options.data, limit_train=texts)
    options.classes = len(dataset.class_names)
    where = load(options, True, "off")
    train = batches.encode(dataset.train, where.tokenize, options.max_tokens)
    name, device = where.name, where.device
    if where.backbone.decoder is None and "products" in options.contenders:
        print("products: left out; its layers are not among those written out (Llama, Qwen2)")
        options.contenders.remove("products")
    del where
    _free()
    order = batches.batch_order(train.lengths, BATCH, derive_seed(0, "order"), 0, 0)
    if len(order) < total:
        raise SystemExit(f"{total} steps need {total * BATCH} rows; there are {len(train)}")
    facts = provenance(device)
    kind = "gpu" if device.type == "cuda" else "cpu"
    out = options.out or Path(__file__).with_name(f"qlora-{kind}.json")
    for arm in options.arms:
        case = {
            "dataset": dataset.name,
            "backbone": name,
            "arm": arm,
            "machine": f"{facts['hardware']['processor']}, {options.threads} threads",
            "date": datetime.now(UTC).date().isoformat(),
            "commit": facts["commit"],
            "versions": facts["versions"],
            "max_tokens": options.max_tokens,
            "steps": options.steps,
            "rounds": options.rounds,
            "full_steps": EPOCHS * -(-FULL_ROWS[spec.slug] // BATCH),
            "rows": measure(options, arm, train, order),
        }
        if options.passes:
            case["passes"] = pass_times(options, arm, train)
        cases = json.loads(out.read_text())["cases"] if out.exists() else []
        same = ("dataset", "backbone", "arm", "machine")
        alike = [all(old[key] == case[key] for key in same) for old in cases]
        place = alike.index(True) if any(alike) else len(cases)
        write_json(out, {"cases": [*cases[:place], case, *cases[place + 1 :]]})


if __name__ == "__main__":
    main()
