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


# A family grows in width alone: depth would widen the receptive field. Multiples of 8 suit tensor cores.
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
"""Levels, from the finest on, whose activations are computed again in the backward pass."""


class ModelConfig(Config):
    """Which network. Parameters by size: xs below 0.4 M, s 1 M, m 15 M, l 100 M, xl 300 M, xxl 1 B."""

    name: Literal["unet3d", "nafnet3d", "redcnn3d"] = "unet3d"
    size: str = "s"
    thick_slices: bool = False
    """kernels of 1 in z at the finest level, for slices much thicker than the pixels"""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """which levels' activations are computed again in the backward pass: all (full), or those of the finest alone
    (selective). unet3d takes less than half the memory for 17 % more arithmetic, or a quarter less for 7 %; nafnet3d
    40 % of it for 32 %, or a quarter less for 13 %; redcnn3d has one level, and takes a third less for 17 %"""


class Denoiser(nn.Module):
    """A residual network on HU: forward takes and gives float HU (b, 1, z, y, x).

    A fresh one is the identity, bit for bit. `radius` is how many voxels (z, y, x) an output voxel sees to
    each side, at most; `stride` what the input's size must be a multiple of, or forward raises UserError; `widest`
    how many numbers a layer gives for each voxel of the input, at most.
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
        """How all activations lie in memory from here on; channels-last, unless told otherwise."""
        self.network.layout = layout

    def forward(self, hu: torch.Tensor) -> torch.Tensor:
        if any(n % s for n, s in zip(hu.shape[2:], self.stride, strict=True)):
            raise UserError(
                f"crop {tuple(hu.shape[2:])}: {self.config.name} takes multiples of {self.stride} voxels (z, y, x)"
            )
        residual = self.network(detail_and_mean(hu))
        # The sum stays in the precision of hu: bf16 could not tell 1000 HU from 1002.
        return hu + DETAIL_HU * residual.to(hu.dtype)


def build(config: ModelConfig) -> Denoiser:
    """A fresh network. Raises UserError for a size that the network does not come in."""
    return Denoiser(config)


def outline(config: ModelConfig) -> Denoiser:
    """The network without memory for its weights: whatever follows from their shapes. Raises UserError as `build`."""
    with torch.device("meta"):
        return build(config)


def _widths(config: ModelConfig) -> Widths:
    sizes = WIDTHS[config.name]
    if config.size not in sizes:
        raise UserError(f"model.size={config.size}: {config.name} comes in {', '.join(sizes)}")
    return sizes[config.size]
