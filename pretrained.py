"""Getting a pretrained base: where it is, whether it fits, whether it is whole and causal."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as library_logging

import sources
from common import UserError

RANK = 16  # of LoRA
LARGE = 2_000_000_000  # parameters a CPU is refused above
GIB = 2**30
NO_CODE = {"trust_remote_code": False}  # left out, the library asks whoever sits at the terminal


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' advice and bars, which drown the one line that matters."""
    level, bars = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library_logging.set_verbosity(level)
        if bars:
            library_logging.enable_progress_bar()


def read_config(source: str) -> tuple[Any, bool]:
    """The configuration of a local folder or hub id, and whether only the cache may be used."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"--backbone {source} has no config.json. Pass a whole model folder.")
        try:
            return AutoConfig.from_pretrained(path, **NO_CODE), True
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path / 'config.json'}: {first_line(error)}") from None
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        raise UserError(f"--backbone {source} is no model folder, GGUF file or hub id. Pass one.")
    with contextlib.suppress(OSError, ValueError):  # what the cache holds needs no network
        return AutoConfig.from_pretrained(source, local_files_only=True, **NO_CODE), True
    trouble = sources.hub_trouble(source)
    if not trouble:
        try:
            return AutoConfig.from_pretrained(source, **NO_CODE), False
        except ValueError as error:
            raise UserError(f'"{source}": {first_line(error)}') from None
        except OSError:
            trouble = "it is not on the hub, or it is gated (`hf auth login`)"
    raise UserError(
        f'cannot get model "{source}": it is not in this machine\'s cache and {trouble}. '
        "Pass --backbone with a local folder, a GGUF file or another hub id."
    )


def named_size(source: str) -> float:
    """Parameters that a hub id's name claims, e.g. 7e9; 0 where it claims none."""
    found = re.findall(r"(?<![\d.])(\d+(?:\.\d+)?)b\b", source.lower())
    return float(found[-1]) * 1e9 if found else 0.0


def refuse_large_on_cpu(source: str, parameters: float) -> None:
    if parameters > LARGE and not torch.cuda.is_available():
        raise UserError(
            f'"{source}" has {parameters / 1e9:.1f} billion parameters and this machine has no '
            "CUDA GPU. Pass a --backbone of at most 2 billion, or --smoke, or use a 16 GB GPU."
        )


def shape_of(config: Any, source: str) -> nn.Module:
    """The model without memory, for counting; UserError if it is not a causal LM."""
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f'"{source}" ({config.model_type}) is not a causal language model. '
            "Use e.g. Qwen2.5, Llama or GPT-2."
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def weight_bytes(shape: nn.Module, quantise: str, dtype: torch.dtype) -> float:
    """Memory of weights, LoRA with gradient and AdamW, and the CUDA context; no activations."""
    head = shape.get_output_embeddings()
    linear = [m for m in shape.modules() if isinstance(m, nn.Linear) and m is not head]
    inside = sum(m.weight.numel() for m in linear)
    outside = sum(p.numel() for p in shape.parameters()) - inside
    lora = sum(RANK * (m.in_features + m.out_features) for m in linear)
    width = 0.53 if quantise == "nf4" else dtype.itemsize
    return width * inside + dtype.itemsize * outside + 16 * lora + 0.6 * GIB


@dataclass(frozen=True)
class Room:
    """Bytes for activations, and for weights kept dequantised."""

    activations: float
    resident: float


def share_memory(
    name: str, weights: float, rows: float, device: torch.device, vram_gib: float | None
) -> Room:
    """Share out the memory before anything is loaded; UserError if the model does not fit.

    Args:
        weights: bytes that have to be there.
        rows: bytes of the activations of one pass.
        vram_gib: cap on GPU memory.
    """
    if device.type == "cpu":
        free = float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        where, held = "this machine has", ""
    else:
        free, total = torch.cuda.mem_get_info(device)
        where, held = "GPU 0 has", f" (other processes use {(total - free) / GIB:.1f} GiB)"
        if vram_gib is not None:
            free, where, held = min(free, vram_gib * GIB), "--vram-gib leaves", ""
            torch.cuda.set_per_process_memory_fraction(min(1.0, vram_gib * GIB / total))
    least = weights + rows / 10  # recomputation keeps a tenth
    if least > free:
        raise UserError(
            f"{name} needs about {least / GIB:.1f} GiB, {where} {free / GIB:.1f} GiB free{held}. "
            "Pass a smaller --backbone or --micro-batch-tokens, or close other programs."
        )
    spare = free - weights
    resident = max(0.0, 0.9 * (spare - rows)) if device.type == "cuda" else spare / 2
    return Room(spare - resident, resident)


def from_gguf(path: Path) -> Path:
    """A folder with the dequantised weights of a GGUF file, made once and kept in a cache.

    GGUF and NF4 in one step is refused by the library.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    folder = root / "dual-objective-engrams" / f"{path.stem}-{digest}"
    if (folder / "config.json").exists():
        return folder
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where, **NO_CODE)
        extra = {}
        if hasattr(transformers, "GgufConfig"):  # older versions always dequantise
            extra = {"quantization_config": transformers.GgufConfig(dequantize=True)}
        loaded = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.bfloat16, **extra, **NO_CODE
        )
    except ImportError:
        raise UserError(f"reading {path.name} needs the package gguf: pip install gguf") from None
    except Exception as error:  # a damaged file fails anywhere in the reader: struct, index, memory
        raise UserError(f"{path}: not a readable GGUF model ({first_line(error)}).") from None
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # saving refuses a model marked as quantised
    with torch.device("meta"):
        plain = type(loaded)(config).to(torch.bfloat16)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        made = Path(unfinished) / "model"
        tokenizer.save_pretrained(made)
        plain.save_pretrained(made)
        made.rename(folder)
    return folder


def choose_dtype(wanted: str, device: torch.device, notes: list[str]) -> torch.dtype:
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    notes.append("this GPU has no bfloat16: computed in float32, several times slower")
    return torch.float32


def load_weights(
    source: str, cached: bool, dtype: torch.dtype, quantise: str, device: torch.device
):
    """The causal LM, whole, frozen and in evaluation mode."""
    extra: dict[str, Any] = dict(NO_CODE)
    if quantise == "nf4":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            raise UserError(
                "--quantise nf4 needs the package bitsandbytes: pip install bitsandbytes, "
                "or pass --quantise none."
            ) from None
        extra["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,  # its default is float32
        )
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            device_map={"": device},
            local_files_only=cached,
            output_loading_info=True,
            attn_implementation="eager",
            **extra,
        )
    except SafetensorError as error:
        raise UserError(
            f'the weights of "{source}" are truncated or damaged ({first_line(error)}). '
            "Download them again."
        ) from None
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, UnpicklingError) as error:
        raise UserError(f'cannot load "{source}" ({first_line(error)}).') from None
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if wrong := info.get(kind):
            first = sorted(map(str, wrong))[0]
            raise UserError(
                f'the weights of "{source}" are not whole: {len(wrong)} {kind.replace("_", " ")}, '
                f"first {first}. Download the model again."
            )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weights at the first evaluation, for another kernel
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False).eval()


@torch.no_grad()
def probe(model: nn.Module, source: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (2, 9) and the model's own logits, one text at a time; refuses a look ahead."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2, 9), generator=torch.Generator().manual_seed(0)).to(device)
    ids[1, :4] = ids[0, :4]
    ids[1, 4:] = (ids[0, 4:] + vocabulary // 2) % vocabulary
    first, second = (model(input_ids=i[None], use_cache=False).logits[0].float() for i in ids)
    if not torch.allclose(first[:4], second[:4], rtol=1e-3, atol=1e-3 * float(first.std())):
        raise UserError(
            f'"{source}" is not a causal language model (it sees later words). '
            "Use e.g. Qwen2.5, Llama or GPT-2."
        )
    return ids, torch.stack([first, second])


def revision(folder: Path | None, config: Any) -> str:
    """The hub's commit, or sha256 of the headers, sizes and first megabyte of local weights."""
    if folder is None:
        return getattr(config, "_commit_hash", None) or "unknown"
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(2**20))
    return digest.hexdigest()[:16]


def tiny_model(folder: Path, texts: Sequence[str], kind: str = "qwen2", **sizes: int) -> None:
    """Write a tiny random causal LM and a byte-pair tokenizer of `texts`, for --smoke and tests.

    Args:
        kind: a model type of the library: "qwen2", "llama", ...
        sizes: of the configuration, in place of 2 layers of width 32.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=[end])
    tokenizer.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end
    )
    small = {
        "vocab_size": len(fast),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    config = AutoConfig.for_model(kind, **(small | sizes))
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        fast.save_pretrained(folder)
