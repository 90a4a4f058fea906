"""A results folder: its files, written whole; one process at a time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from checkpoints import DAMAGE, differences
from common import UserError
from files import NoRoomError, json_sha256, write_atomic, write_json

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
DIGESTED = ("rows", "tuning")  # what a rerun takes from results.json
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "transformers", "peft", "bitsandbytes")


class ResultsFolder:
    """results.json, features.npz, log.txt and checkpoints/ of one run; one process at a time.

    Args:
        folder: made if missing.
        identity: JSON of everything that makes it this run; another one in the folder is refused.
        defaults: of identity's keys, for results older than a key.
        restart: discard what the folder holds.
    Raises:
        UserError: not writable, in use, or holding another run.
    """

    def __init__(self, folder: Path, identity: dict, defaults: dict, restart: bool) -> None:
        self.folder, self.identity, self.defaults = folder, identity, defaults
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(folder / ".lock")
            self._acquire()
            try:
                started = datetime.now(UTC).isoformat(timespec="seconds")
                holder = f"process {os.getpid()} on {platform.node()} since {started}"
                write_atomic(folder / ".lock.json", holder.encode())
                self.results = self._read(restart)
                self.features = self._read_features()
                self.log_file = (folder / "log.txt").open("a", buffering=1)
            except BaseException:
                self.lock.release()
                raise
        except NoRoomError:
            raise
        except OSError as error:
            raise UserError(
                f"cannot write to {folder} ({error.strerror}). Pass a writable --out."
            ) from None

    def _acquire(self) -> None:
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            path = self.folder / ".lock.json"
            holder = path.read_text(errors="replace").strip() if path.exists() else "?"
            raise UserError(
                f"{self.folder} is in use by {holder}. Wait for it, or use another --out."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(
                f"warning: the file system of {self.folder} has no locks: make sure that no other "
                "process uses this folder",
                file=sys.stderr,
            )

    def __enter__(self) -> ResultsFolder:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self.log_file.close()
        self.lock.release()

    @property
    def path(self) -> Path:
        return self.folder / "results.json"

    @property
    def fingerprint(self) -> str:
        """sha256 of the identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def _read(self, restart: bool) -> dict[str, Any]:
        for place in (".", "checkpoints/*", "adapters/*"):  # not the subfolders, of other runs
            for stray in self.folder.glob(f"{place}/.*.tmp"):
                stray.unlink(missing_ok=True)
        if restart:
            print(f"--restart: discarding the run in {self.folder}", file=sys.stderr)
            for path in (self.path, self.folder / "features.npz"):
                path.unlink(missing_ok=True)
            for part in ("checkpoints", "adapters"):
                for path in sorted(self.folder.glob(f"{part}/*/*")):
                    path.unlink()
        if not self.path.exists():
            return {"rows": {}}
        try:
            results = json.loads(self.path.read_text())
            held = results["identity"]
            results["rows"], results["provenance"]
            for part in DIGESTED:
                digest = results.get(f"{part}_sha256")  # older ones have none
                if digest not in (None, json_sha256(results.get(part))):
                    raise ValueError(f"its {part} do not match their sha256")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path} is not a whole results file ({error}). Put a good copy back, or pass "
                "--restart to discard it."
            ) from None
        changed = differences(held, self.identity, self.defaults)
        if changed:
            raise UserError(
                f"{self.folder} holds another run ({'; '.join(changed)}). "
                "Use another --out, or pass --restart to discard it."
            )
        return results

    def _read_features(self) -> dict[str, np.ndarray]:
        path = self.folder / "features.npz"
        if not path.exists():
            # rows without features cannot be analysed: train them again (from their checkpoints)
            if self.results["rows"]:
                print(f"warning: {path} is gone: its rows are made again", file=sys.stderr)
            self.results["rows"] = {}
            return {}
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (*DAMAGE, BadZipFile, zlib.error) as error:
            raise UserError(
                f"{path} is damaged ({error}). Put a good copy back, or delete it: its arms are "
                "then read again from their checkpoints."
            ) from None

    def has(self, arm: str, seed: int) -> bool:
        return (
            str(seed) in self.results["rows"].get(arm, {})
            and f"{arm}/{seed}/pooled" in self.features
        )

    def add(self, arm: str, seed: int, row: dict, features: Mapping[str, np.ndarray]) -> None:
        """Write one finished row; features first, so a row in results.json means both are there."""
        self.features.update({f"{arm}/{seed}/{name}": value for name, value in features.items()})
        self.write_features()
        self.results["rows"].setdefault(arm, {})[str(seed)] = row
        self.write()

    def drop(self, arm: str, seed: str) -> None:
        """Forget a row; the files follow with the next write."""
        del self.results["rows"][arm][seed]
        for name in [n for n in self.features if n.startswith(f"{arm}/{seed}/")]:
            del self.features[name]

    def write(self) -> None:
        for part in DIGESTED:
            if part in self.results:
                self.results[f"{part}_sha256"] = json_sha256(self.results[part])
        write_json(self.path, self.results)

    def write_features(self) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **dict(sorted(self.features.items())))
        write_atomic(self.folder / "features.npz", buffer.getvalue())

    def log(self, line: str, show: bool = True) -> None:
        """Keep a line in log.txt and show it; a full disk costs the line, not the run."""
        with contextlib.suppress(OSError):
            self.log_file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {line}\n")
        if show:
            tqdm.write(line)
            sys.stdout.flush()


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit() -> str | None:
    """The commit of this code, None outside a checkout."""
    return _git("rev-parse", "HEAD")


def provenance(device: torch.device) -> dict[str, Any]:
    """Where numbers come from: commit, dirty code, argv, versions, hardware, start."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    changed = _git("status", "--porcelain", "--", "*.py", "requirements.txt")
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    hardware = {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
    return {
        "commit": commit(),
        "dirty": None if changed is None else bool(changed),
        "argv": sys.argv,
        "versions": versions,
        "hardware": hardware,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_seconds": 0.0,
    }
