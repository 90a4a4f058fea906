"""Pretrained causal language models in 4 bits with LoRA, behind the small study's interface."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as library_logging

import sources
from common import Arm, Batch, UserError
from lora import LeanLora
from packing import ROW_MULTIPLE, Layout, packed_attention

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA, DROPOUT = 16, 32, 0.05
LARGE = 2_000_000_000  # parameters a CPU is refused above
GIB = 2**30
DEPTHS = 3  # states handed out as `layers`
ATTENTION = "packed_causal"
AttentionInterface.register(ATTENTION, packed_attention)


def activation_bytes(config: Any) -> int:
    """Memory of one row kept for the backward pass: 8 states, 4 feed-forward widths a layer."""
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return config.num_hidden_layers * (8 * config.hidden_size + 4 * inner) * 2


class CausalBackbone(nn.Module):
    """A pretrained causal LM whose LoRA weights alone are trained.

    Without a prefix a text's tokens stand at positions 0, 1, ..; with one the prefix has position
    0 and they follow. Rotary positions are relative, so the tokens see each other alike in both.

    Args:
        model: PEFT model around a causal LM.
        recompute: "auto", "on" or "off": whether layers keep their activations for the backward
            pass or compute them again; "auto" decides by the rows of the pass and `memory`.
        memory: bytes for activations.
    """

    def __init__(
        self, model: PeftModel, recompute: str = "off", memory: float = float("inf")
    ) -> None:
        super().__init__()
        self.model, self.recompute, self.memory = model, recompute, memory
        causal = model.get_base_model()
        config = causal.config.get_text_config()
        self.hidden_size = config.hidden_size
        self.layer_count = config.num_hidden_layers
        self.row_bytes = activation_bytes(config)
        causal.set_attn_implementation(ATTENTION)
        self.recomputable = [m for m in causal.modules() if isinstance(m, GradientCheckpointingLayer)]
        for layer in self.recomputable:
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        self.adapted = [m for m in model.modules() if isinstance(m, LoraLayer)]

    @property
    def unembedding(self) -> Tensor:
        """(V, H) frozen output matrix of the next-token head."""
        return self.model.get_base_model().get_output_embeddings().weight

    @property
    def parameters_total(self) -> int:
        """Parameters of base and adapters; a 4-bit byte counts as the two it holds."""
        return sum(
            2 * p.numel() if p.dtype == torch.uint8 else p.numel() for p in self.parameters()
        )

    def reset(self) -> None:
        """Draw the LoRA weights anew from the default generator, by PEFT's law (B = 0)."""
        for layer in self.adapted:
            layer.reset_lora_parameters("default", True)
        for parameter in self.parameters():
            parameter.grad = None

    @property
    def adapter_config(self) -> LoraConfig:
        return self.model.peft_config["default"]

    def adapter_state(self) -> dict[str, Tensor]:
        """LoRA weights under PEFT's own names."""
        return get_peft_model_state_dict(self.model)

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        """Take LoRA weights; ValueError or RuntimeError if they are another model's."""
        if state.keys() != self.adapter_state().keys():
            raise ValueError("the adapters are those of other layers")
        set_peft_model_state_dict(self.model, state)

    def make_lean(self, resident_bytes: float = 0.0) -> None:
        """Give PEFT's LoRA layers over linear ones a lean forward: same weights, same law.

        Args:
            resident_bytes: 4-bit weights are dequantised once and kept, layer after layer, while
                this lasts; the rest are dequantised whenever they are used.
        """
        for layer in self.adapted:
            base = layer.get_base_layer()
            if not isinstance(base, nn.Linear):
                continue  # GPT-2's Conv1D: PEFT's own forward serves
            weight = _weight_of(base, resident_bytes)
            resident_bytes -= 2 * base.in_features * base.out_features
            layer.forward = LeanLora(
                layer.lora_A["default"].weight,
                layer.lora_B["default"].weight,
                weight,
                base.bias,
                layer.scaling["default"],
                getattr(layer.lora_dropout["default"], "p", 0.0),
                layer,
            )

    def forward(
        self, batch: Batch, prefix: Tensor | None = None, layers: list[Tensor] | None = None
    ) -> Tensor:
        """Hidden states of a packed batch.

        Args:
            batch: B texts, T tokens.
            prefix: (B, H) state that stands before token 0 of each text.
            layers: receives DEPTHS states (T, H): the first after the embedding, the last after
                the final norm.
        Returns:
            (T, H) after the final norm, prefix rows left out, in the compute dtype.
        """
        causal, tokens = self.model.get_base_model(), len(batch.tokens)
        x = causal.get_input_embeddings()(batch.tokens)
        positions = batch.positions
        if prefix is not None:
            # after the tokens here, before them in attention: the order of rows means nothing
            x = torch.cat([x, prefix.to(x.dtype)])
            positions = F.pad(positions + 1, (0, len(batch)))
        rows = len(x) + -len(x) % ROW_MULTIPLE
        layout = Layout.of(batch, prefix is not None, rows)
        recompute = self.recompute == "on" or (
            self.recompute == "auto" and rows * self.row_bytes > self.memory
        )
        for layer in self.recomputable:
            layer.gradient_checkpointing = recompute
        out = causal.base_model(
            inputs_embeds=F.pad(x, (0, 0, 0, rows - len(x))).unsqueeze(0),
            position_ids=F.pad(positions, (0, rows - len(positions))).unsqueeze(0),
            use_cache=False,  # its default switches transformers' own packing detection about
            output_hidden_states=layers is not None,
            packed=layout,
        )
        if layers is not None:
            picked = torch.linspace(0, self.layer_count, DEPTHS).round().int().tolist()
            layers.extend(out.hidden_states[i][0, :tokens] for i in picked)
        return out.last_hidden_state[0, :tokens]


def _weight_of(base: nn.Linear, resident_bytes: float) -> Callable[[], Tensor]:
    if getattr(base.weight, "quant_state", None) is None:
        return lambda: base.weight
    import bitsandbytes

    def dense() -> Tensor:
        return bitsandbytes.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)

    if resident_bytes < 2 * base.in_features * base.out_features:
        return dense
    kept = dense()
    return lambda: kept


@dataclass(frozen=True)
class Pretrained:
    """A loaded base with its tokenizer; one for all arms.

    Args:
        source: the hub id or path it was loaded from.
        name: for figures and tables, e.g. "SmolLM2-135M-Instruct, NF4".
        slug: for folders.
        identity: what makes its numbers its own: revision of the weights, quantisation, dtype.
        notes: what a reader of the numbers must know.
    """

    source: str
    backbone: CausalBackbone
    tokenizer: transformers.PreTrainedTokenizerBase
    name: str
    slug: str
    device: torch.device
    identity: dict[str, Any]
    notes: tuple[str, ...]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; a text that spells a special token stays text."""
        return self.tokenizer(
            list(texts), split_special_tokens=True, return_attention_mask=False
        ).input_ids

    def make_backbone(self, arm: Arm) -> CausalBackbone:
        """The one base with LoRA weights drawn anew from the default generator."""
        if not arm.causal:
            raise UserError(f"{arm.name} is not causal; a pretrained backbone is. Leave it out.")
        self.backbone.reset()
        return self.backbone


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' advice and bars, which drown the one line that matters."""
    level, bars = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        library_logging.set_verbosity(level)
        if bars:
            library_logging.enable_progress_bar()


def _config(source: str) -> tuple[Any, bool]:
    """The configuration of a local folder or hub id, and whether only the cache may be used."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"--backbone {source} has no config.json. Pass a whole model folder.")
        try:
            return AutoConfig.from_pretrained(path), True
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path / 'config.json'}: {_first_line(error)}") from None
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        raise UserError(f"--backbone {source} is no model folder, GGUF file or hub id. Pass one.")
    with contextlib.suppress(OSError, ValueError):  # what the cache holds needs no network
        return AutoConfig.from_pretrained(source, local_files_only=True), True
    trouble = sources._hub_trouble(source)
    if not trouble:
        try:
            return AutoConfig.from_pretrained(source), False
        except ValueError as error:
            raise UserError(f'"{source}": {_first_line(error)}') from None
        except OSError:
            trouble = "it is not on the hub, or it is gated (`hf auth login`)"
    raise UserError(
        f'cannot get model "{source}": it is not in this machine\'s cache and {trouble}. '
        "Pass --backbone with a local folder, a GGUF file or another hub id."
    )


def _named_size(source: str) -> float:
    """Parameters that a hub id's name claims, e.g. 7e9; 0 where it claims none."""
    found = re.findall(r"(?<![\d.])(\d+(?:\.\d+)?)b\b", source.lower())
    return float(found[-1]) * 1e9 if found else 0.0


def _refuse_large_on_cpu(source: str, parameters: float) -> None:
    if parameters > LARGE and not torch.cuda.is_available():
        raise UserError(
            f'"{source}" has {parameters / 1e9:.1f} billion parameters and this machine has no '
            "CUDA GPU. Pass a --backbone of at most 2 billion, or --smoke, or use a 16 GB GPU."
        )


def _shape_of(config: Any, source: str) -> nn.Module:
    """The model without memory, for counting; UserError if it is not a causal LM."""
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f'"{source}" ({config.model_type}) is not a causal language model. '
            "Use e.g. Qwen2.5, Llama or GPT-2."
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _weight_bytes(shape: nn.Module, quantise: str, dtype: torch.dtype) -> float:
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


def _room(
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


def _from_gguf(path: Path) -> Path:
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
        tokenizer = AutoTokenizer.from_pretrained(**where)
        extra = {}
        if hasattr(transformers, "GgufConfig"):  # older versions always dequantise
            extra = {"quantization_config": transformers.GgufConfig(dequantize=True)}
        loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16, **extra)
    except ImportError:
        raise UserError(f"reading {path.name} needs the package gguf: pip install gguf") from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: not a readable GGUF model ({_first_line(error)}).") from None
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


def _dtype(wanted: str, device: torch.device, notes: list[str]) -> torch.dtype:
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    notes.append("this GPU has no bfloat16: computed in float32, several times slower")
    return torch.float32


def _weights(source: str, cached: bool, dtype: torch.dtype, quantise: str, device: torch.device):
    """The causal LM, whole, frozen and in evaluation mode."""
    extra: dict[str, Any] = {}
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
            f'the weights of "{source}" are truncated or damaged ({_first_line(error)}). '
            "Download them again."
        ) from None
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f'cannot load "{source}" ({_first_line(error)}).') from None
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if wrong := info.get(kind):
            first = sorted(map(str, wrong))[0]
            raise UserError(
                f'the weights of "{source}" are not whole: {len(wrong)} {kind.replace("_", " ")}, '
                f"first {first}. Download the model again."
            )
    return model.requires_grad_(False).eval()


@torch.no_grad()
def _probe(model: nn.Module, source: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (2, 9) and the model's own logits, one text at a time; refuses a look ahead."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2, 9), generator=torch.Generator().manual_seed(0)).to(device)
    ids[1, :8] = ids[0, :8]
    ids[1, 8] = (ids[0, 8] + 1) % vocabulary
    first, second = (model(input_ids=i[None], use_cache=False).logits[0].float() for i in ids)
    if not torch.allclose(first[:8], second[:8], rtol=1e-3, atol=1e-3 * float(first.std())):
        raise UserError(
            f'"{source}" is not a causal language model (it sees later words). '
            "Use e.g. Qwen2.5, Llama or GPT-2."
        )
    return ids, torch.stack([first, second])


@torch.no_grad()
def _check_packed(backbone: CausalBackbone, source: str, ids: Tensor, own: Tensor) -> None:
    """Refuse an architecture whose own logits our packed pass and plain head do not give."""
    device, lengths = ids.device, torch.tensor([9, 5], device=ids.device)
    zeros = torch.zeros(2, dtype=torch.int64, device=device)
    batch = Batch(torch.cat([ids[0], ids[1, :5]]), lengths, zeros, zeros)
    hidden = backbone.eval()(batch)
    logits = F.linear(hidden, backbone.unembedding).float()
    expected = torch.cat([own[0], own[1, :5]])
    error = float((logits - expected).norm() / expected.norm())
    if not error < 0.1:  # bfloat16 through many layers: 0.01 to 0.03
        raise UserError(
            f'"{source}" computes something that a packed pass does not ({error:.2g} of its '
            "logits). Use e.g. Qwen2.5, Llama or GPT-2."
        )


def _targets(model: nn.Module, wanted: Sequence[str] | None, source: str) -> list[str]:
    """Last names of the linear layers to adapt: as asked, the seven, or all but the head."""
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    head = model.get_output_embeddings()
    names = {
        n.rsplit(".", 1)[-1]
        for n, m in model.named_modules()
        if isinstance(m, kinds) and m is not head
    }
    if wanted is None:
        return [n for n in PROJECTIONS if n in names] or sorted(names)
    absent = [name for name in wanted if name not in names]
    if absent:
        raise UserError(
            f'no layer named {" ".join(absent)} in "{source}". '
            f"Pass --lora-targets from: {' '.join(sorted(names))}."
        )
    return list(wanted)


def _revision(folder: Path | None, config: Any) -> str:
    """The hub's commit, or sha256 of the headers, sizes and first megabyte of local weights."""
    if folder is None:
        return getattr(config, "_commit_hash", None) or "unknown"
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(2**20))
    return digest.hexdigest()[:16]


def load(
    source: str,
    *,
    quantise: str = "nf4",
    dtype: str = "auto",
    lora_targets: Sequence[str] | None = None,
    max_tokens: int = 128,
    pass_tokens: int = 1800,
    recompute: str = "auto",
    vram_gib: float | None = None,
    lean: bool = True,
) -> Pretrained:
    """Load a causal LM once, quantise it and put LoRA on it.

    Args:
        source: hub id, local folder or GGUF file.
        quantise: "nf4" (double quantisation) or "none".
        dtype: compute and residual type; "auto": bfloat16, or float32 on a GPU without it
            (Qwen2 in float16 gives NaN).
        lora_targets: last names of layers; None for the usual seven, or all linear ones.
        max_tokens: longest text.
        pass_tokens: most tokens of a training pass, for the memory estimate.
        recompute: see CausalBackbone.
        vram_gib: cap on GPU memory, in GiB; None for what is free.
        lean: False keeps PEFT's own forward, the reference that the lean one is tested against.
    Raises:
        UserError: it cannot be had, is not causal, is not whole, or does not fit this machine.
    """
    notes, folder, name = [], None, source
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() == ".gguf":
        with _quiet():
            folder = _from_gguf(path)
        name = f"{path.stem} from GGUF"
        notes.append(f"weights dequantised from the GGUF file {path.name}")
    elif path.is_dir():
        folder, name = path, path.resolve().name
    else:
        _refuse_large_on_cpu(source, _named_size(source))
    with _quiet():
        config, cached = _config(str(folder or source))
        shape = _shape_of(config, source)
        parameters = sum(p.numel() for p in shape.parameters())
        _refuse_large_on_cpu(source, parameters)
        text_config = config.get_text_config()
        limit = getattr(text_config, "max_position_embeddings", None) or 2**31
        if max_tokens >= limit:
            raise UserError(f"--max-tokens must be 2..{limit - 1} for {name}, got {max_tokens}.")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        chosen = _dtype(dtype, device, notes)
        rows = pass_tokens * activation_bytes(text_config)
        room = _room(name, _weight_bytes(shape, quantise, chosen), rows, device, vram_gib)
        where = str(folder or source)
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=cached)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f'no tokenizer in "{source}" ({_first_line(error)}).') from None
        model = _weights(where, cached, chosen, quantise, device)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            raise UserError(f'the tokenizer of "{source}" has more tokens than its embedding.')
        ids, own = _probe(model, source, device)
        targets = _targets(model, lora_targets, source)
        lora = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=DROPOUT,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        backbone = CausalBackbone(get_peft_model(model, lora), recompute, room.activations)
        if lean:
            backbone.make_lean(room.resident)
        _check_packed(backbone, source, ids, own)
    label = {"nf4": "NF4", "none": str(chosen).removeprefix("torch.")}[quantise]
    return Pretrained(
        source=source,
        backbone=backbone,
        tokenizer=tokenizer,
        name=f"{name}, {label}",
        slug=re.sub(r"[^\w.-]+", "-", name.rsplit("/", 1)[-1]).strip("-"),
        device=device,
        identity={
            "revision": _revision(folder, config),
            "quantise": quantise,
            "dtype": str(chosen).removeprefix("torch."),
            "lora_targets": sorted(targets),
        },
        notes=tuple(notes),
    )


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
    with torch.random.fork_rng(), _quiet():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        fast.save_pretrained(folder)
