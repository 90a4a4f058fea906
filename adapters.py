"""Trained adapters and heads on disk, and a trained model that classifies texts again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors
from torch import Tensor

from arms import Arm
from backbones import Pretrained, load
from batches import encode, eval_order
from common import StudyModel, UserError
from data import Split
from files import write_atomic, write_json

FORMAT = "dual-objective-engrams/adapters/1"


def _heads(model: StudyModel) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if not n.startswith("backbone.")}


def save(
    pretrained: Pretrained, model: StudyModel, folder: Path, classes: Sequence[str], cut: int
) -> None:
    """Write adapters in PEFT's own format, heads.safetensors and, last, study.json.

    Without study.json, which holds the sha256 of the others, `load_trained` takes none of them.

    Args:
        pretrained: the base that `model` was trained on.
        folder: of this arm and seed; made if missing.
        classes: names, in order.
        cut: longest text in tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").unlink(missing_ok=True)
    states = {"adapter_model": model.backbone.adapter_state(), "heads": _heads(model)}
    contents = {
        f"{name}.safetensors": save_safetensors(
            {key: value.detach().cpu().contiguous() for key, value in state.items()}
        )
        for name, state in states.items()
    }
    settings = {  # as PEFT's own save_pretrained, which does not write atomically
        key: sorted(value) if isinstance(value, set) else value
        for key, value in model.backbone.adapter_config.to_dict().items()
    }
    contents["adapter_config.json"] = json.dumps(settings, indent=2, sort_keys=True).encode()
    for name, content in contents.items():
        write_atomic(folder / name, content)
    compressor = model.compressor
    write_json(
        folder / "study.json",
        {
            "format": FORMAT,
            "backbone": {"source": pretrained.source} | pretrained.identity,
            "arm": asdict(model.arm),
            "classes": list(classes),
            "engram_dim": 1 if compressor is None else compressor.linear.out_features,
            "max_tokens": cut,
            "sha256": {name: hashlib.sha256(c).hexdigest() for name, c in contents.items()},
        },
    )


@dataclass(frozen=True)
class Predictions:
    """probabilities (N, C) float32; engrams (N, E) float32, or None where the arm has none."""

    probabilities: Tensor
    engrams: Tensor | None


@dataclass(frozen=True)
class Trained:
    """A study's model read back from its adapters folder."""

    pretrained: Pretrained
    model: StudyModel
    classes: tuple[str, ...]
    max_tokens: int

    @torch.no_grad()
    def predict(self, texts: Sequence[str], tokens_per_batch: int = 8000) -> Predictions:
        """Class probabilities and engrams of texts, under the zero engram (as evaluated)."""
        split = Split("texts", tuple(texts), np.zeros(len(texts), np.int64))
        data = encode(split, self.pretrained.tokenize, self.max_tokens)
        self.model.eval()
        order = eval_order(data.lengths, tokens_per_batch)
        outs = []
        for items in order:
            batch = data.batch(items).to(self.pretrained.device)
            outs.append(self.model(batch, self.model.zero_engram(batch)))
        back = torch.from_numpy(np.argsort(np.concatenate(order)))
        logits = torch.cat([out.logits for out in outs]).cpu()[back]
        engrams = None
        if self.model.compressor is not None:
            engrams = torch.cat([out.engram for out in outs]).cpu()[back]
        return Predictions(logits.softmax(1), engrams)


def load_trained(folder: Path | str, backbone: str | None = None, **options: Any) -> Trained:
    """Read back what `save` wrote.

    Args:
        folder: of one arm and seed, below a results folder's adapters/.
        backbone: where the base is now, if it has moved.
        options: of `backbones.load`.
    Raises:
        UserError: a file is missing or damaged, or the base has other weights.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / "study.json").read_text())
        if meta["format"] != FORMAT:
            raise ValueError(f"its format is {meta['format']!r}, not {FORMAT!r}")
        base, arm, classes = meta["backbone"], Arm(**meta["arm"]), meta["classes"]
        for name, digest in meta.get("sha256", {}).items():  # older ones have none
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                raise ValueError(f"{name} does not match its sha256")
        adapters, heads = (
            load_file(folder / f"{n}.safetensors") for n in ("adapter_model", "heads")
        )
        targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} is no whole adapters folder ({reason}).") from None
    pretrained = load(
        backbone or base["source"],
        quantise=base["quantise"],
        dtype=base["dtype"],
        lora_targets=targets,
        max_tokens=meta["max_tokens"],
        **options,
    )
    if pretrained.identity["revision"] != base["revision"]:
        raise UserError(
            f"{folder} was trained on other weights than {pretrained.source} holds "
            f"({base['revision']}, {pretrained.identity['revision']}). Pass the right base."
        )
    model = StudyModel(pretrained.backbone, arm, len(classes), meta["engram_dim"])
    try:
        pretrained.backbone.load_adapter_state(adapters)
        model.load_state_dict(heads, strict=False)
        if heads.keys() != _heads(model).keys():
            raise ValueError(f"the heads are not those of {arm.name}")
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} does not fit {pretrained.source} ({reason}).") from None
    model.to(pretrained.device).eval()
    return Trained(pretrained, model, tuple(classes), meta["max_tokens"])
