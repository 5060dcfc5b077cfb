"""What is particular to a site: a profile in configs/sites/NAME.yaml, chosen by --site NAME."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StringConstraints, model_validator

from ldct_dist import config as configs
from ldct_dist.config import Config
from ldct_dist.errors import UserError


def _as_written(value: Any) -> Any:
    """Raises ValueError for what YAML has read as a number: it makes 86400 of 24:00:00, and 83 of 0123."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError("YAML reads it as a number; write it in quotes")
    return value


Text = BeforeValidator(_as_written)
Word = Annotated[str, Text, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$")]
"""Text without control characters, since a line break, say, would end a line of the job script."""
Place = Annotated[Word, AfterValidator(lambda path: os.path.expanduser(os.path.expandvars(path)))]
"""A path with ~ and variables expanded here, since the job script quotes it; no Path, since images may be URIs."""
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Option = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*$")]
FOLDER = Path("configs/sites")


class Container(Config):
    """An Apptainer (Singularity) image that every rank runs in."""

    image: Place
    binds: list[Place] = Field(default_factory=list)
    """SOURCE[:TARGET[:ro]]; the working directory and the run's folder are bound anyhow"""
    nv: bool = True
    """bring the node's NVIDIA driver along"""
    python: Word = "python3"
    """the interpreter inside, which has this package's dependencies"""
    command: Word = "apptainer"


class Site(Config):
    """Defaults for jobs at one site, which the command line overrides."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    options: dict[Option, Annotated[Word | StrictBool, Text]] = Field(default_factory=dict)
    """further options of sbatch, by their long names without dashes; true for those without a value"""
    cpus_per_task: int | None = Field(None, gt=0)
    warn_s: int = Field(300, gt=0)
    """how long before the time limit, and at preemption, Slurm asks the ranks to save and stop: half of a limit that is
    shorter than twice that"""
    requeue: bool = True
    """false where jobs may not be requeued: the next job is then chained to this one"""
    gpu_bind: Word | None = None
    """srun's --gpu-bind, such as per_task:1 or none"""
    modules: list[Word] = Field(default_factory=list)
    """arguments of `module load`, a line each"""
    venv: Place | None = None
    conda: Place | None = None
    """name or path of an environment; `conda` must be on the PATH, by a module or otherwise"""
    container: Container | None = None
    env: dict[Variable, Word] = Field(default_factory=dict)
    """such as NCCL_IB_HCA: mlx5"""
    interface: Word | None = None
    """network interface between the nodes, for gloo and NCCL; without it, each rank finds its own"""

    @model_validator(mode="after")
    def _one_python(self) -> Site:
        chosen = [name for name in ("venv", "conda", "container") if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)}: a rank runs in one of them")
        return self

    def sbatch_options(self) -> dict[str, str | bool]:
        """All options of sbatch that the profile sets, by their long names."""
        named = {key: getattr(self, key) for key in ("partition", "account", "qos", "constraint")}
        if self.cpus_per_task is not None:
            named["cpus-per-task"] = str(self.cpus_per_task)
        return {key: value for key, value in named.items() if value is not None} | self.options


def read_site(name: str | None) -> Site:
    """The profile NAME of configs/sites, or at a path that ends in .yaml; None: an empty one."""
    if name is None:
        return Site()
    if name.endswith(".yaml"):
        return configs.read(Site, Path(name))
    known = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
    if name not in known:
        there = ", ".join(known) or "none"
        raise UserError(f"--site {name}: no {FOLDER}/{name}.yaml here (there are: {there})")
    return configs.read(Site, known[name])
