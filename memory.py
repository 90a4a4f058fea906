"""Out of memory: how it is told, and what is given back before a step is tried again."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

# CUDA's allocator, CUDA itself (no class of its own), and the CPU's
TELLS = ("out of memory", "can't allocate memory")
ADVICE = (
    "Close other programs that use this memory, or pass a smaller --max-tokens; "
    "the last checkpoint is kept."
)


class OutOfMemory(RuntimeError):
    """Not even the smallest part of a step fits into memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, whichever library raised it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(t in str(error).lower() for t in TELLS)


def release() -> None:
    """Give back what a failed step still holds; to be called outside of its `except`."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def generator_state(device: torch.device) -> list[Tensor]:
    """What `restore_generator` needs to draw the same dropout again."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def restore_generator(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
