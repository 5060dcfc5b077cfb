"""What strategy=deepspeed can be told besides its ZeRO stage."""

from __future__ import annotations

from typing import Literal

from ldct_dist.config import Config

BUCKET = 50_000_000
"""elements of the gradients that are reduced at a time, and of ZeRO 3's weights that are gathered at a time"""
PERSISTENT = 100_000
"""elements of a weight up to which ZeRO 3 keeps it whole on every rank, rather than gather it"""
Place = Literal["gpu", "cpu", "nvme"]


class DeepSpeedConfig(Config):
    """Where a rank keeps its share of the state."""

    optimizer: Place = "gpu"
    """fp32 weights, their average and Adam's means; cpu: 16 bytes a parameter less on the GPUs together, for a step
    by the CPU, on as many threads as `threads` says; nvme: nor in the node's memory"""
    parameters: Place = "gpu"
    """the working weights, with zero=3"""
    nvme_path: str | None = None
    """for nvme: a folder on a disk of each node, such as /local/nvme or $SLURM_TMPDIR (looked up on the node). What
    lies there is gone when the process ends; checkpoints do not need it"""
