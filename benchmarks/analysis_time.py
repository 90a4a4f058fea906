"""How long does the analysis of one seed of the three models take? Measured on made-up features.

    python benchmarks/analysis_time.py

Three arms, ITEMS items, engrams of ENGRAM dimensions, lengths, no layers but the pooled state; the
study's own settings. Writes benchmarks/analysis_time.json, which FINDINGS.md prints. It runs in one
thread whatever the machine has; the time asked is LIMIT seconds.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from analysis import analyse

ITEMS, CLASSES, POOLED, TAP, ENGRAM, LIMIT = 7600, 4, 576, 256, 128, 90
ARMS = ("classification", "dual", "dual_engram")


def features() -> dict[str, np.ndarray]:
    """Class means far enough apart that nine items in ten can be told, as of a trained network."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(ITEMS) % CLASSES)
    out = {"labels": labels, "lengths": rng.integers(10, 60, ITEMS)}
    for arm in ARMS:
        here = f"{arm}/0/"
        for name, width in (("pooled", POOLED), ("intermediate", TAP)):
            means = rng.normal(size=(CLASSES, width)) * 3 / np.sqrt(width)
            out[here + name] = (means[labels] + rng.normal(size=(ITEMS, width))).astype(np.float16)
        out[here + "logits"] = 3 * np.eye(CLASSES)[labels] + rng.normal(size=(ITEMS, CLASSES))
        if arm == "dual_engram":
            for end in ("0", ""):
                bound = 1 / np.sqrt(TAP)
                out[here + "W" + end] = rng.uniform(-bound, bound, (ENGRAM, TAP))
                out[here + "b" + end] = rng.uniform(-bound, bound, ENGRAM)
            code = out[here + "intermediate"] @ out[here + "W"].T + out[here + "b"]
            out[here + "engram"] = np.tanh(code).astype(np.float16)
    return out


def main() -> None:
    made = features()
    wall, cpu = time.monotonic(), time.process_time()
    found = analyse(made, {"dataset": {"slug": "ag-news", "name": "made up"}})
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(UTC).date().isoformat(),
        "arms": len(ARMS),
        "items": ITEMS,
        "engram_width": ENGRAM,
        "wall_seconds": round(time.monotonic() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "limit_seconds": LIMIT,
        "settings": found["settings"],
    }
    path = Path(__file__).with_name("analysis_time.json")
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
