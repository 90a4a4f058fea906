"""The checkpoints of one (arm, seed): complete or invisible, and never another run's."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from common import UserError
from files import NoRoomError, free_bytes, json_sha256, write_atomic, write_json

FORMAT = "dual-objective-engrams/checkpoint/1"
KEPT = 2
# how much of a step fits into memory at a time: the same texts and loss, on whatever machine
MACHINES = {"micro_batch_tokens", "recipe.micro_batch_tokens"}
TRIES = 3  # saves in a row that may find no room
# what reading a damaged, foreign or malicious checkpoint raises
DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    RuntimeError,
    pickle.UnpicklingError,
    SafetensorError,
)


class CheckpointStore:
    """The checkpoints of one (arm, seed): `N.safetensors`, `N.state`, and last `N.json`.

    The manifest N.json is readable without torch: format, identity (what must match to go on),
    progress, the sha256 of the two other files, which have no checksum of their own that loading
    would check, and its own. Without its manifest a checkpoint does not exist. The newest two stay.

    Args:
        folder: of this (arm, seed); made when first saved to.
        identity: JSON of everything that must be equal for a resumed run to be the same run.
        defaults: of identity's keys, for checkpoints older than a key.
    """

    def __init__(
        self, folder: Path, identity: dict, defaults: Mapping[str, object] | None = None
    ) -> None:
        self.folder, self.identity, self.defaults = folder, identity, defaults
        self.failures = 0

    def require_room(self, size: int) -> None:
        """Refuse to start where two checkpoints of `size` bytes do not fit.

        Raises:
            UserError: with the bytes needed and free.
        """
        there = next(path for path in (self.folder, *self.folder.parents) if path.is_dir())
        if (free := free_bytes(there)) < 2 * size:
            raise UserError(
                f"checkpoints need {2 * size:,} bytes and the disk of {there} has {free:,} free. "
                "Free some, or use another --out."
            )

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint; None if there is none."""
        return max(self._steps(), default=None)

    def save(self, step: int, weights: dict[str, Tensor], rest: dict, progress: dict) -> None:
        """Write the checkpoint of `step`, then drop all but the newest KEPT.

        A full disk is a warning: the checkpoint before stays, and the next save tries again.

        Raises:
            NoRoomError: the disk was full TRIES times in a row.
        """
        try:
            self._write(step, weights, rest, progress)
        except NoRoomError as full:
            self.failures += 1
            if step not in self._steps():
                for path in self._paths(step):
                    path.unlink(missing_ok=True)
            kept = self.newest
            last = "no checkpoint" if kept is None else f"the checkpoint of step {kept}"
            if self.failures >= TRIES:
                raise NoRoomError(
                    f"{full}; {TRIES} tries, {last} is kept. "
                    "Free some space and run the same command to continue."
                ) from None
            print(f"warning: {full}; {last} is kept, will try again", file=sys.stderr)
        else:
            self.failures = 0

    def _write(self, step: int, weights: dict[str, Tensor], rest: dict, progress: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        weights_path, rest_path, manifest = self._paths(step)
        state = io.BytesIO()
        torch.save(rest, state)
        contents = {
            weights_path: save_safetensors({k: v.contiguous() for k, v in weights.items()}),
            rest_path: state.getvalue(),
        }
        for path, content in contents.items():
            write_atomic(path, content)
        meta = {
            "format": FORMAT,
            "step": step,
            "identity": self.identity,
            "progress": progress,
            "sha256": {p.name: hashlib.sha256(c).hexdigest() for p, c in contents.items()},
        }
        write_json(manifest, meta | {"manifest_sha256": json_sha256(meta)})
        for old in self._steps()[:-KEPT]:
            for path in reversed(self._paths(old)):  # the manifest first
                path.unlink(missing_ok=True)

    def load(self) -> tuple[dict[str, Tensor], dict, dict] | None:
        """The newest complete checkpoint: weights, rest and progress; None if there is none.

        A damaged one is named on stderr and the one before it is taken.

        Raises:
            UserError: every checkpoint is damaged, or the newest is another run's.
        """
        if not self.folder.is_dir():
            return None
        for stray in self.folder.glob(".*.tmp"):
            stray.unlink(missing_ok=True)
        damaged = []
        for step in reversed(self._steps()):
            weights_path, rest_path, manifest = self._paths(step)
            try:
                meta = json.loads(manifest.read_text())
                if meta.get("format") != FORMAT:
                    raise ValueError(f"its format is {meta.get('format')!r}, not {FORMAT!r}")
                own = meta.pop("manifest_sha256", None)  # older ones have none
                if own not in (None, json_sha256(meta)):
                    raise ValueError("it does not match its own sha256")
                changed = differences(meta["identity"], self.identity, self.defaults)
                if not changed:
                    for path in (weights_path, rest_path):
                        if _sha256(path) != meta["sha256"][path.name]:
                            raise ValueError(f"{path.name} does not match its sha256")
                    weights = load_safetensors(weights_path.read_bytes())
                    rest = torch.load(rest_path, weights_only=True)
                    return weights, rest, meta["progress"]
            except DAMAGE as bad:
                damaged.append(manifest)
                reason = str(bad).splitlines()[0]
                print(f"warning: checkpoint {manifest} is damaged: {reason}", file=sys.stderr)
                continue
            raise UserError(
                f"{self.folder} holds a checkpoint of another run ({'; '.join(changed)}). "
                "Set these back, use another --out, or pass --restart to discard it."
            )
        if damaged:
            raise UserError(
                f"no checkpoint in {self.folder} is whole ({len(damaged)} damaged). "
                "Put a good copy back, or pass --restart to train this arm from the start."
            )
        return None

    def finished(self) -> None:
        """Drop all but the newest checkpoint, once the arm's results are written."""
        for step in self._steps()[:-1]:
            for path in reversed(self._paths(step)):
                path.unlink(missing_ok=True)

    def _steps(self) -> list[int]:
        names = [path.stem for path in self.folder.glob("*.json")]
        return sorted(int(name) for name in names if name.isdigit())

    def _paths(self, step: int) -> tuple[Path, Path, Path]:
        stem = f"{step:08d}"
        return tuple(self.folder / f"{stem}.{end}" for end in ("safetensors", "state", "json"))


def differences(old: dict, new: dict, defaults: Mapping[str, object] | None = None) -> list[str]:
    """`key old -> new` for every key whose value differs, in order of name.

    Args:
        defaults: what a key means where it is missing, so that a run made before a flag existed
            is still the run it was.
    """
    fallback = defaults or {}
    pairs = {k: [d.get(k, fallback.get(k)) for d in (old, new)] for k in old.keys() | new.keys()}
    changed = {k for k, (before, after) in pairs.items() if before != after}
    # a recipe's value that repeats a flag's is said once
    changed -= {f"recipe.{k}" for k in changed} | MACHINES
    return [f"{k} {pairs[k][0]} -> {pairs[k][1]}" for k in sorted(changed)]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
