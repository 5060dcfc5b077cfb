"""Networks by name and size, and the Denoiser that wraps each: HU in, HU out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from ldct_dist.config import Config
from ldct_dist.errors import UserError
from ldct_dist.models.blocks import DETAIL_HU, Widths, detail_and_mean
from ldct_dist.models.redcnn3d import REDCNN3d
from ldct_dist.models.unet3d import nafnet3d, unet3d


def _doubling(width: int) -> Widths:
    return (width, 2 * width, 4 * width)


# Larger sizes are wider, not deeper, which would widen the receptive field. Multiples of 8 suit tensor cores.
WIDTHS: dict[str, dict[str, Widths]] = {
    "unet3d": {"xs": (24, 24, 24)}
    | {size: _doubling(w) for size, w in {"s": 24, "m": 96, "l": 256, "xl": 448, "xxl": 832}.items()},
    "nafnet3d": {
        size: _doubling(w)
        for size, w in {"xs": 16, "s": 48, "m": 192, "l": 512, "xl": 880, "xxl": 1616}.items()
    },
    "redcnn3d": {
        size: (w,)
        for size, w in {"xs": 16, "s": 40, "classic": 96, "m": 160, "l": 408, "xl": 704, "xxl": 1296}.items()
    },
}
NETWORKS: dict[str, Callable[[Widths, bool, int], Any]] = {
    "unet3d": unet3d,
    "nafnet3d": nafnet3d,
    "redcnn3d": REDCNN3d,
}

RECOMPUTED = {"none": 0, "selective": 1, "full": 3}
"""how many levels, from the finest on, recompute their activations in the backward pass"""


class ModelConfig(Config):
    """Which network. Parameters by size: xs below 0.4 M, s 1 M, m 15 M, l 100 M, xl 300 M, xxl 1 B."""

    name: Literal["unet3d", "nafnet3d", "redcnn3d"] = "unet3d"
    size: str = "s"
    thick_slices: bool = False
    """kernels of 1 in z at the finest level, for slices much thicker than the pixels"""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """which levels recompute their activations in the backward pass: all (full), or only the finest (selective). With
    full, or selective, unet3d takes less than half of the memory, or three quarters, for 17 % or 7 % more arithmetic;
    nafnet3d 40 %, or three quarters, for 32 % or 13 %; redcnn3d, which has one level, two thirds for 17 %"""


class Denoiser(nn.Module):
    """A residual network on HU: forward takes and gives float HU (b, 1, z, y, x).

    A new one is the identity, bit for bit. radius: how many voxels (z, y, x) an output voxel depends on to each side, at
    most. stride: sizes of the input must be multiples of it, or forward raises UserError. widest: the most numbers that a
    layer outputs for each voxel of the input.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        recompute = RECOMPUTED[config.activation_checkpointing]
        self.network = NETWORKS[config.name](_widths(config), config.thick_slices, recompute)
        nn.init.zeros_(self.network.last.weight)
        nn.init.zeros_(self.network.last.bias)
        z, y, x = self.network.radius
        self.radius = (z, y + 1, x + 1)  # the mean of 3 x 3 reaches one further
        self.stride: tuple[int, int, int] = self.network.stride
        self.widest: float = self.network.widest

    def lay_out(self, layout: torch.memory_format) -> None:
        """Set the memory layout of all activations; at first it is channels-last."""
        self.network.layout = layout

    def forward(self, hu: torch.Tensor) -> torch.Tensor:
        if any(n % s for n, s in zip(hu.shape[2:], self.stride, strict=True)):
            raise UserError(
                f"crop {tuple(hu.shape[2:])}: {self.config.name} takes multiples of {self.stride} voxels (z, y, x)"
            )
        residual = self.network(detail_and_mean(hu))
        # The sum is taken in the precision of hu: bf16 could not distinguish 1000 HU from 1002.
        return hu + DETAIL_HU * residual.to(hu.dtype)


def build(config: ModelConfig) -> Denoiser:
    """A new network. Raises UserError for a size that the network does not come in."""
    return Denoiser(config)


def outline(config: ModelConfig) -> Denoiser:
    """The network without memory for its weights, for what follows from their shapes. Raises UserError as `build`."""
    with torch.device("meta"):
        return build(config)


def _widths(config: ModelConfig) -> Widths:
    sizes = WIDTHS[config.name]
    if config.size not in sizes:
        raise UserError(f"model.size={config.size}: {config.name} comes in {', '.join(sizes)}")
    return sizes[config.size]
