"""How an arm is trained, the seeds it draws from, and the machine it runs on."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass

import torch

from common import UserError


@dataclass(frozen=True)
class Recipe:
    """How an arm is trained.

    `schedule` "cosine-epoch" sets the rate once an epoch, lr (1 + cos(pi e / epochs)) / 2
    (published small recipe); "cosine" every step after a linear warm-up (published 7B recipe).
    `window` is how many batches are sorted by length together; 0 keeps the random order. Sorting
    lets the giver of an engram tell the receiver's length, and the engram then learns length.
    """

    epochs: int
    lr: float
    weight_decay: float
    batch_size: int
    clip: float
    schedule: str
    warmup: float = 0.0
    window: int = 0
    eval_tokens: int = 8000
    lm_chunk: int = 512
    lm_dtype: str = "bfloat16"
    micro_batch_tokens: int = 0  # of one pass; 0: the whole step's

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The rate of optimizer step `step` (from 0): a pure function, so no scheduler is saved."""
        if self.schedule == "cosine-epoch":
            return self.lr * 0.5 * (1 + math.cos(math.pi * (step // steps_per_epoch) / self.epochs))
        total = steps_per_epoch * self.epochs
        warm = math.ceil(self.warmup * total)
        if step < warm:
            return self.lr * step / max(1, warm)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def derive_seed(seed: int, purpose: str) -> int:
    """A 63-bit seed for each purpose ("initialisation", "dropout", ...) of a run's seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "big") >> 1


def prepare_cpu(threads: int | None, jobs: int = 1, deterministic: bool = False) -> None:
    """Set the threads (None: the cores this process may use, shared by jobs); flush denormals.

    AdamW's first moment of a rare word's embedding decays into denormals and stays there: at this
    size the optimizer step then takes ten times as long.

    Args:
        deterministic: only kernels that give the same bits every time, on a GPU too; to be asked
            for before CUDA starts.
    """
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // jobs))
    torch.set_flush_denormal(True)


def require_texts(texts: int, batch_size: int) -> None:
    """Refuse fewer training texts than a batch."""
    if texts < batch_size:
        raise UserError(
            f"{texts} training rows < batch {batch_size}. "
            f"Pass --batch-size {max(2, texts // 4 * 2)} or more data."
        )


def seed_everything(seed: int, purpose: str) -> None:
    """Seed torch's generators (all devices); nothing else here draws from a global generator."""
    torch.manual_seed(derive_seed(seed, purpose))
