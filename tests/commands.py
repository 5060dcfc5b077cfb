"""The command line in a process of its own, and a run small enough for a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CONFIG = """
name: run
store: {store}
runs: {runs}
steps: 4
data: {{crop: [8, 24, 24], batch: 2, reuse: 1.0, memory_mib: 64}}
model: {{size: xs}}
checkpoint: {{every: 2}}
validation: {{every: 4, split: val}}
log: {{every: 2, images: false}}
"""


def write_config(folder: Path, store: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(CONFIG.format(store=store, runs=folder / "runs"))
    return path


def command(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ldct_dist", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )
