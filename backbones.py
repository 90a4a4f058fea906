"""Pretrained causal language models in 4 bits with LoRA, behind the small study's interface."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from arms import Arm
from common import Batch, UserError
from decoder import Decoder
from lora import Frozen, LeanLora, Residents, siblings_of
from packing import Layout, packed_attention, whole_rows
from pretrained import (
    NO_CODE,
    RANK,
    choose_dtype,
    first_line,
    from_gguf,
    load_weights,
    named_size,
    probe,
    quiet,
    read_config,
    refuse_large_on_cpu,
    revision,
    shape_of,
    share_memory,
    weight_bytes,
)
from recipe import Recipe

if TYPE_CHECKING:
    # peft imports bitsandbytes, which writes to stderr unless `quiet` has been called
    from peft import LoraConfig, PeftModel


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALPHA, DROPOUT = 32, 0.05
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
        from peft.tuners.lora import LoraLayer

        super().__init__()
        self.model, self.recompute, self.memory = model, recompute, memory
        causal = model.get_base_model()
        config = causal.config.get_text_config()
        self.hidden_size = config.hidden_size
        self.layer_count = config.num_hidden_layers
        self.row_bytes = activation_bytes(config)
        causal.set_attn_implementation(ATTENTION)
        self.recomputable = [
            m for m in causal.modules() if isinstance(m, GradientCheckpointingLayer)
        ]
        for layer in self.recomputable:
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        self.adapted = [m for m in model.modules() if isinstance(m, LoraLayer)]
        self.decoder: Decoder | None = None
        self.frozen_head: Frozen | None = None  # the next-token head's products, where it is packed

    @property
    def unembedding(self) -> Tensor:
        """(V, H) frozen output matrix of the next-token head."""
        return self.model.get_base_model().get_output_embeddings().weight

    @property
    def parameters_packed_away(self) -> int:
        """Parameters that counting elements misses: a 4-bit byte holds two."""
        return sum(p.numel() for p in self.parameters() if p.dtype == torch.uint8)

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
        from peft.utils import get_peft_model_state_dict

        return get_peft_model_state_dict(self.model, save_embedding_layers=False)

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        """Take LoRA weights; ValueError or RuntimeError if they are another model's."""
        from peft.utils import set_peft_model_state_dict

        if state.keys() != self.adapter_state().keys():
            raise ValueError("the adapters are those of other layers")
        set_peft_model_state_dict(self.model, state)

    def make_lean(self, resident_bytes: float = 0.0) -> None:
        """Give layers of the Llama family a lean forward, or else PEFT's LoRA layers: same law.

        Args:
            resident_bytes: 4-bit weights are dequantised once and kept, layer after layer, while
                this lasts; the rest are dequantised whenever they are used.
        """
        base, residents = self.model.get_base_model().base_model, Residents(resident_bytes)
        if Decoder.fits(base):
            self.decoder = Decoder(base, residents)
            head = residents([self.model.get_base_model().get_output_embeddings()])
            self.frozen_head = head if head.packed else None
            return
        for layer in self.adapted:
            if isinstance(layer.get_base_layer(), nn.Linear):
                layer.forward = LeanLora(siblings_of([layer], residents), layer)
            # else GPT-2's Conv1D: PEFT's own forward serves

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
        rows = whole_rows(len(x))
        layout = Layout.of(batch, prefix is not None, rows)
        recompute = self.recompute == "on" or (
            self.recompute == "auto" and rows * self.row_bytes > self.memory
        )
        picked = []
        if layers is not None:
            picked = torch.linspace(0, self.layer_count, DEPTHS).round().int().tolist()
        if self.decoder is not None:
            padded = F.pad(x, (0, 0, 0, rows - len(x)))
            places = F.pad(positions, (0, rows - len(positions)))
            out, states = self.decoder(padded, places, layout, recompute, picked)
            if layers is not None:
                layers.extend(state[:tokens] for state in states)
            return out[:tokens]
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
            layers.extend(out.hidden_states[i][0, :tokens] for i in picked)
        return out.last_hidden_state[0, :tokens]


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

    @property
    def eval_tokens(self) -> int:
        """Of an evaluation pass: on a CPU one that stays in its cache takes a fifth less time."""
        return 2000 if self.device.type == "cpu" else Recipe.eval_tokens

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
    jobs: int = 1,
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
        jobs: processes that will share it; only a CPU's memory can be.
        lean: False keeps PEFT's own forward, the reference that the lean one is tested against.
    Raises:
        UserError: it cannot be had, is not causal, is not whole, or does not fit this machine.
    """
    notes, folder, name = [], None, source
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() == ".gguf":
        with quiet():
            folder = from_gguf(path)
        name = f"{path.stem} from GGUF"
        notes.append(f"weights dequantised from the GGUF file {path.name}")
    elif path.is_dir():
        folder, name = path, path.resolve().name
    else:
        refuse_large_on_cpu(source, named_size(source))
    with quiet():
        config, cached = read_config(str(folder or source))
        shape = shape_of(config, source)
        parameters = sum(p.numel() for p in shape.parameters())
        refuse_large_on_cpu(source, parameters)
        text_config = config.get_text_config()
        limit = getattr(text_config, "max_position_embeddings", None) or 2**31
        if max_tokens >= limit:
            raise UserError(f"--max-tokens must be 2..{limit - 1} for {name}, got {max_tokens}.")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda" and jobs > 1:
            raise UserError(f"--jobs {jobs} needs as many GPUs. Leave it out on a GPU.")
        chosen = choose_dtype(dtype, device, notes)
        rows = pass_tokens * activation_bytes(text_config)
        room = share_memory(name, weight_bytes(shape, quantise, chosen), rows, device, vram_gib)
        where = str(folder or source)
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=cached, **NO_CODE)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f'no tokenizer in "{source}" ({first_line(error)}).') from None
        model = load_weights(where, cached, chosen, quantise, device)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            raise UserError(f'the tokenizer of "{source}" has more tokens than its embedding.')
        ids, own = probe(model, source, device)
        targets = _targets(model, lora_targets, source)
        from peft import LoraConfig, get_peft_model

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
            "revision": revision(folder, config),
            "quantise": quantise,
            "dtype": str(chosen).removeprefix("torch."),
            "lora_targets": sorted(targets),
        },
        notes=tuple(notes),
    )
