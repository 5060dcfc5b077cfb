"""Training runs small enough for a test: how they are configured, and what they leave behind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def write_config(folder: Path, store: Path, **changes: Any) -> Path:
    """The YAML of a run, runs/run in `folder`; `changes`: its keys, or with another value within a section."""
    config: dict[str, Any] = {
        "name": "run",
        "store": str(store),
        "runs": str(folder / "runs"),
        "steps": 8,
        "threads": 1,
        "data": {
            **{"crop": [8, 24, 24], "batch": 4, "reuse": 1.0, "memory_mib": 64},
            "augment": {"dose_mix": [0.8, 1.2], "lesions": {"count": 3}},
        },
        "model": {"size": "xs"},
        "optim": {"lr": 1e-3, "warmup": 2, "ema": 0.9},
        "checkpoint": {"every": 3},
        "validation": {"every": 4, "split": "val"},
        "log": {"every": 4},
    }
    for key, value in changes.items():
        config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def losses(run: Path) -> list[dict]:
    """What losses.jsonl says: JSON floats are exact, so equality is bitwise."""
    path = run / "losses.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, by name."""
    newest = max((run / "checkpoints").glob("step-*"))
    return {f"{f.name}/{k}": t for f in newest.glob("*.safetensors") for k, t in load_file(f).items()}


def unsharded(state: dict) -> dict:
    """The same, whatever number of optimizer files it was written in."""
    return {
        k if not k.startswith("optimizer") else "optimizer/" + k.split("/", 1)[1]: t for k, t in state.items()
    }


def equal(state: dict, expected: dict) -> bool:
    """Whether both hold the same tensors, bit for bit."""
    return state.keys() == expected.keys() and all(torch.equal(state[k], expected[k]) for k in expected)


def same(run: Path, reference: Path) -> bool:
    """Whether every loss and every tensor of the last checkpoint are the same, bit for bit."""
    return losses(run) == losses(reference) and equal(final_state(run), final_state(reference))


def starts(run: Path) -> Sequence[dict]:
    path = run / "environment.json"
    return json.loads(path.read_text()) if path.exists() else []


def board(run: Path) -> EventAccumulator:
    """What TensorBoard shows of it."""
    return EventAccumulator(str(run / "tensorboard")).Reload()


def validations(run: Path) -> list[tuple[int, float]]:
    """(step, RMSE in HU) of each validation that TensorBoard shows."""
    return [(e.step, e.value) for e in board(run).Scalars("validation/rmse_hu (abdomen)")]
