"""The run folder: everything about a run, in one place that explains itself."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from ldct_dist.checkpoint import retention
from ldct_dist.config import to_yaml
from ldct_dist.errors import UserError
from ldct_dist.files import replace
from ldct_dist.provenance import commit, versions
from ldct_dist.train.config import RunConfig
from ldct_dist.world import World

CHANGEABLE = (
    *("steps", "store", "runs", "data.threads", "data.memory_mib", "data.stage", "micro_batch", "threads"),
    *("strategy", "zero", "deepspeed"),
    *("validation", "checkpoint", "log", "guard", "time_limit_s", "grace_s", "hang_s"),
)
"""Keys, or whole sections, that may differ when a run goes on: they change neither the samples nor, but for
rounding, the arithmetic of a step (steps bends the rest of the learning-rate curve, which is what a user who
changes it asks for)."""
CODE_PACKAGES = ("torch", "numpy", "zarr", "numcodecs", "pydicom", "deepspeed", "ldct_dist")


class RunFolder:
    """Paths of one run, and what is written there once at each start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.generations = path / "generations"
        self.tensorboard = path / "tensorboard"
        self.losses = path / "losses.jsonl"
        self.environment = path / "environment.json"

    def checkpoint(self, step: int) -> Path:
        return retention.directory(self.checkpoints, step)

    def generation(self, number: int) -> Path:
        """The folder that claims a generation; the ranks' heartbeats and stack traces are in it."""
        return self.generations / f"{number:06d}"

    @property
    def has_saved(self) -> bool:
        """Whether there is a checkpoint, valid or not. Until there is, nothing depends on the config of earlier starts."""
        return bool(retention.saved(self.checkpoints))

    def open(self, config: RunConfig) -> list[str]:
        """Create the folder, or go on with the one that is there; its config is then `config`.

        Returns and raises as `check` does, and raises UserError where the folder cannot be written.
        """
        changed = self.check(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if changed or not self.config.exists():
                replace(self.config, to_yaml(config))
        except OSError as e:
            raise UserError(f"run folder {self.path}: {e.strerror}; choose another with runs=FOLDER") from e
        return changed

    def check(self, config: RunConfig) -> list[str]:
        """The keys in which `config` differs from the recorded one, a line each. Writes nothing.

        Raises UserError if there are checkpoints and a key has changed with which they would be another run's.
        """
        changed = list(self._changes(config)) if self.config.exists() else []
        changeable = tuple(f"{key}." for key in CHANGEABLE)
        refused = [line for key, line in changed if not f"{key}.".startswith(changeable)]
        if refused and self.has_saved:
            raise UserError(
                f"{self.path} holds another run: {'; '.join(refused)}. Give the old value, or start a new run "
                f"from these weights: name=NEW init_from={self.checkpoints}/<step>/weights.safetensors"
            )
        return [line for _, line in changed]

    def record_start(self, config: RunConfig, world: World, generation: int, step: int) -> None:
        """Append how this generation was started: step, versions, command, world size, threads."""
        entry = {
            "generation": generation,
            "from_step": step,
            "command": sys.argv,
            "python": platform.python_version(),
            "host": platform.node(),
            "pid": os.getpid(),
            "packages": versions(CODE_PACKAGES),
            "commit": commit(),
            "code_of_others": config.origins,
            "world_size": world.size,
            "device": str(world.device),
            "threads": torch.get_num_threads(),
            "slurm_job": _slurm_job(),
            "slurm_node": os.environ.get("SLURMD_NODENAME"),
            "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        }
        replace(self.environment, json.dumps([*self._starts(), entry], indent=1))

    def _starts(self) -> list[Any]:
        """The starts recorded so far; none if the file is damaged, since no step depends on it."""
        try:
            starts = json.loads(self.environment.read_text())
        except (FileNotFoundError, ValueError):
            return []
        return starts if isinstance(starts, list) else []

    def _changes(self, config: RunConfig) -> Iterator[tuple[str, str]]:
        try:
            recorded = yaml.safe_load(self.config.read_text())
        except (yaml.YAMLError, UnicodeDecodeError):
            recorded = None
        if not isinstance(recorded, dict):
            raise UserError(
                f"{self.config}: damaged; delete it, and start again: the run goes on with the config you give"
            )
        # A setting that is newer than the run counts as having had its default, which is what the run did without it.
        defaults = RunConfig(name=config.name, store=config.store, steps=config.steps)
        old = flat(defaults.model_dump(mode="json")) | flat(recorded)
        new = flat(config.model_dump(mode="json"))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                yield key, f"{key} was {old.get(key)}, now {new.get(key)}"


def _slurm_job() -> str | None:
    """The job's id; for a task of an array ARRAY_TASK, since the last task's own id is also that of the whole array."""
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A config's values by their dotted names."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {k: v for key, sub in tree.items() for k, v in flat(sub, f"{prefix}{key}.").items()}
