"""Write a backbone of a published size with random weights, for timing where none can be had.

    python benchmarks/random_backbone.py OUT --tokenizer FOLDER [--like qwen2.5-7b]

Speed and memory do not depend on the weights' values; losses and accuracies of such a backbone mean
nothing. The tokenizer is copied from FOLDER (any size of the same family), so that texts have their
real lengths.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SHARD_BYTES = 4 * 2**30
SIZES = {  # the model's own config.json
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
}


def weights(config, seed: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and bfloat16 weight of every parameter: N(0, 0.02), norms 1, biases 0."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            drawn = torch.empty(parameter.shape, dtype=torch.bfloat16)
            yield name, drawn.normal_(0, 0.02, generator=generator)
        else:
            fill = 0.0 if name.endswith("bias") else 1.0
            yield name, torch.full(parameter.shape, fill, dtype=torch.bfloat16)


def write(folder: Path, config, shard_bytes: int = SHARD_BYTES) -> int:
    """Write config and sharded weights; returns the number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    places, shard, size, total, number = {}, {}, 0, 0, 0

    def flush() -> None:
        nonlocal shard, size, number
        number += 1
        name = f"model-{number:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard, size = {}, 0

    for name, weight in weights(config):
        shard[name] = weight
        size += weight.nbytes
        total += weight.numel()
        if size >= shard_bytes:
            flush()
    if shard:
        flush()
    index = {"metadata": {"total_size": 2 * total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", required=True, help="folder or hub id")
    parser.add_argument("--like", choices=SIZES, default="qwen2.5-7b")
    options = parser.parse_args()
    size = dict(SIZES[options.like])
    config = AutoConfig.for_model(size.pop("model_type"), **size)
    AutoTokenizer.from_pretrained(options.tokenizer).save_pretrained(options.out)
    print(f"{write(options.out, config):,} random parameters -> {options.out}")


if __name__ == "__main__":
    main()
