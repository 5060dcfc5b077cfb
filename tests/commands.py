"""The command line in a process of its own, a run small enough for a test, and stand-ins for Slurm's commands."""

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


def commands_on_path(folder: Path, **scripts: str) -> str:
    """A PATH on which each named command is this shell script."""
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:/usr/bin:/bin"
