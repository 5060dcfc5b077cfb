"""What GPUs can do, from their data sheets: without sparsity, and of SXM boards, where there are such."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ldct_dist.errors import UserError
from ldct_dist.files import GIB

Precision = Literal["fp32", "bf16", "fp64"]


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node. Bandwidths are in bytes a second and one direction, FLOPs in FLOPs a second."""

    memory: int
    """bytes in all, of which the allocator gets a part"""
    bf16: float | None
    fp32: float
    """of convolutions, which torch runs in TF32 where the GPU can"""
    bandwidth: float
    """of its memory"""
    nvlink: float
    """to the GPUs of the same node, all together"""
    network: float
    """to other nodes: this GPU's share of the node's adapters"""
    host: float
    """to the node's memory"""
    per_node: int

    def peak(self, precision: Precision) -> float | None:
        """FLOPs a second in a run's precision; None where the GPU has no such units."""
        return {"bf16": self.bf16, "fp32": self.fp32, "fp64": None}[precision]

    def between(self, gpus: int) -> float:
        """Bytes a second that each GPU sends, and receives, in a ring of so many."""
        return self.nvlink if gpus <= self.per_node else min(self.nvlink, self.network * self.per_node)


# Networks: an adapter of 400 Gb/s beside each GPU of Hopper and Blackwell, of 200 Gb/s beside A100; four of 100 Gb/s for
# a node's eight V100; one of 200 Gb/s for a node's eight A40 or L40S, which talk to each other by PCIe.
_HOPPER = {"bf16": 989e12, "fp32": 494e12, "nvlink": 450e9, "network": 50e9, "host": 55e9, "per_node": 8}
_AMPERE = {"bf16": 312e12, "fp32": 156e12, "nvlink": 300e9, "network": 25e9, "host": 25e9, "per_node": 8}
_PCIE = {"memory": 44 * GIB, "nvlink": 25e9, "network": 3.1e9, "host": 25e9, "per_node": 8}
GPUS = {
    "b200-180g": Gpu(178 * GIB, 2250e12, 1100e12, 7.7e12, 900e9, 50e9, 55e9, 8),
    "h200-141g": Gpu(memory=139 * GIB, bandwidth=4.8e12, **_HOPPER),  # type: ignore[arg-type]
    "h100-80g": Gpu(memory=79 * GIB, bandwidth=3.35e12, **_HOPPER),  # type: ignore[arg-type]
    "a100-80g": Gpu(memory=79 * GIB, bandwidth=2.04e12, **_AMPERE),  # type: ignore[arg-type]
    "a100-40g": Gpu(memory=39 * GIB, bandwidth=1.56e12, **_AMPERE),  # type: ignore[arg-type]
    "l40s-48g": Gpu(bf16=362e12, fp32=183e12, bandwidth=0.864e12, **_PCIE),  # type: ignore[arg-type]
    "a40-48g": Gpu(bf16=150e12, fp32=75e12, bandwidth=0.696e12, **_PCIE),  # type: ignore[arg-type]
    "v100-32g": Gpu(31 * GIB, None, 15.7e12, 0.9e12, 150e9, 6.25e9, 12e9, 8),
}
# By words of torch.cuda.get_device_name. Boards other than SXM have lower clocks, so they have peaks of their own.
_BOARDS = {
    "B200": "b200-180g",
    "H200": "h200-141g",
    "GH200": "h200-141g",
    "H100": "h100-80g",
    "A100": "a100-80g",
    "L40S": "l40s-48g",
    "A40": "a40-48g",
    "V100": "v100-32g",
}
_NAMES = (
    ("H100 PCIe", 756e12, 378e12),
    ("H100 NVL", 835e12, 417e12),
    *((part, GPUS[name].bf16, GPUS[name].fp32) for part, name in _BOARDS.items()),
)


def gpu_named(name: str) -> Gpu:
    """Raises UserError for a GPU that is not in the table."""
    if name not in GPUS:
        raise UserError(f"--gpu {name}: known are {', '.join(GPUS)}")
    return GPUS[name]


def peak_of_device(name: str, precision: Precision) -> float | None:
    """FLOPs a second that the data sheet of the device with this name gives; None if it is not known."""
    for words, bf16, fp32 in _NAMES:
        if re.search(rf"\b{words}\b", name):
            return {"bf16": bf16, "fp32": fp32, "fp64": None}[precision]
    return None
