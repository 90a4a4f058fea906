"""Files that are complete or invisible; needs neither torch nor anything else to be installed."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoRoomError(OSError):
    """A disk, quota or file size limit is full; the file that was there is as it was."""


def free_bytes(folder: Path) -> int:
    """Of the disk that holds a folder."""
    return shutil.disk_usage(folder).free


def write_atomic(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Write a file so that a reader, or a power cut, sees the old one or the new one, whole.

    Args:
        path: the file; its folder exists.
        content: the bytes, or a function that writes them to the path it is given.
    Raises:
        NoRoomError: with the bytes needed and free.
    """
    try:
        _write_atomic(path, content)
    except OSError as error:
        if error.errno not in FULL:
            raise
        needed = "" if callable(content) else f" {len(content):,} bytes needed,"
        raise NoRoomError(
            f"cannot write {path} ({error.strerror}):{needed} {free_bytes(path.parent):,} free"
        ) from None


def _write_atomic(path: Path, content: bytes | Callable[[Path], None]) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: object) -> None:
    """Write strict JSON (no NaN) atomically."""
    write_atomic(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def json_sha256(value: object) -> str:
    """sha256 of a value as JSON gives it back, whatever the order of its keys."""
    read_back = json.loads(json.dumps(value))  # whose keys are text, as in a file
    return hashlib.sha256(json.dumps(read_back, sort_keys=True).encode()).hexdigest()


def plain(value: object) -> object:
    """JSON values: numpy scalars become numbers, keys text, and what is not finite null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
