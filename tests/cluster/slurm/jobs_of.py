"""Small runs as jobs of the throw-away cluster, and what Slurm says of them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

RANKS = 4
STEPS = 120
CONFIG = """
name: {name}
store: {store}
runs: {runs}
steps: {steps}
threads: 1
data: {{crop: [4, 16, 16], batch: 4, reuse: 1.0, memory_mib: 64}}
model: {{size: xs}}
optim: {{lr: 1e-3, warmup: 2, ema: 0.9}}
checkpoint: {{every: 20}}
validation: {{every: 1000, split: val}}
log: {{every: 20}}
"""


def write_config(folder: Path, store: Path, name: str, steps: int = STEPS) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(CONFIG.format(name=name, store=store, runs=folder / "runs", steps=steps))
    return path


def losses(run: Path) -> list[dict]:
    """One line a step; JSON floats are exact, so equality is bitwise."""
    path = run / "losses.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def starts(run: Path) -> list[dict]:
    return json.loads((run / "environment.json").read_text())


def weights(run: Path) -> dict:
    """The tensors of the last checkpoint, by file and name."""
    last = max((run / "checkpoints").glob("step-*"))
    return {f"{f.name}/{k}": t for f in last.glob("*.safetensors") for k, t in load_file(f).items()}


def same(run: Path, reference: Path) -> bool:
    """Whether every loss and every tensor of the last checkpoint are the same, bit for bit."""
    ours, theirs = weights(run), weights(reference)
    return (
        losses(run) == losses(reference)
        and ours.keys() == theirs.keys()
        and all((tensor == theirs[key]).all() for key, tensor in ours.items())
    )


def wait(ready: Callable[[], object], what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.2)


def field(cluster, job: str, name: str) -> str:
    """What `scontrol show job` says, such as Restarts or JobState."""
    text = cluster.run("scontrol", "--oneliner", "show", "job", job)
    return re.search(rf"\b{name}=(\S*)", text)[1]


def nodes_of(cluster, job: str) -> list[int]:
    """Numbers of the nodes that the job runs on, that of its script first."""
    names = cluster.run("scontrol", "show", "hostnames", field(cluster, job, "NodeList")).split()
    return [int(name.removeprefix("node")) for name in names]
