"""The settings of strategy=deepspeed besides its ZeRO stage."""

from __future__ import annotations

from typing import Literal

from ldct_dist.config import Config

BUCKET = 50_000_000
"""elements of gradients that are reduced at a time, and of weights that ZeRO 3 gathers at a time"""
PERSISTENT = 100_000
"""elements up to which ZeRO 3 keeps a weight whole on every rank, rather than gather it"""
Place = Literal["gpu", "cpu", "nvme"]


class DeepSpeedConfig(Config):
    """Where a rank keeps its share of the state."""

    optimizer: Place = "gpu"
    """where the fp32 weights, their average and Adam's means are. cpu: in the node's memory, which takes 16 bytes a
    parameter off the GPUs together; the CPU then does the step, on as many threads as `threads` says. nvme: on a disk"""
    parameters: Place = "gpu"
    """where the working weights are, with zero=3"""
    nvme_path: str | None = None
    """for nvme: a folder on a disk of each node, such as /local/nvme or $SLURM_TMPDIR (expanded on the node). What is
    written there is gone when the process ends; checkpoints do not depend on it"""
