"""Small training runs in real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

CONFIG = """
name: run
store: {store}
runs: {runs}
steps: 8
threads: 1
data: {{crop: [8, 24, 24], batch: 4, reuse: 1.0, memory_mib: 64}}
model: {{size: xs}}
optim: {{lr: 1e-3, warmup: 2, ema: 0.9}}
checkpoint: {{every: 3}}
validation: {{every: 4, split: val}}
log: {{every: 4}}
"""


def write_config(folder: Path, store: Path, text: str = CONFIG) -> Path:
    path = folder / "run.yaml"
    path.write_text(text.format(store=store, runs=folder / "runs"))
    return path


def cli(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ldct_dist", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, check=False
    )


def losses(run: Path) -> list[dict]:
    """What losses.jsonl says: JSON floats are exact, so equality is bitwise."""
    return [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]


def final_state(run: Path) -> dict:
    """All tensors of the newest checkpoint, by name."""
    newest = max((run / "checkpoints").glob("step-*"))
    return {f"{f.name}/{k}": t for f in newest.glob("*.safetensors") for k, t in load_file(f).items()}


def unsharded(state: dict) -> dict:
    """The same, whatever number of optimizer files it was written in."""
    return {
        k if not k.startswith("optimizer") else "optimizer/" + k.split("/", 1)[1]: t for k, t in state.items()
    }


def starts(run: Path) -> Sequence[dict]:
    return json.loads((run / "environment.json").read_text())
