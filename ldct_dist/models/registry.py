"""Networks by name and size, and the Denoiser that wraps each: HU in, HU out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field, JsonValue, ValidationInfo, field_validator
from torch import nn
from torch.utils._pytree import tree_leaves

from ldct_dist.config import Config
from ldct_dist.errors import UserError
from ldct_dist.models import installed
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
    """Which network. Parameters by size: xs below 0.4 M, s 1 M, m 15 M, l 100 M, xl 300 M, xxl 1 B.

    A network of another package (see `models.installed`) has `options` in place of the other settings.
    """

    name: str = "unet3d"
    size: str = "s"
    thick_slices: bool = False
    """kernels of 1 in z at the finest level, for slices much thicker than the pixels"""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """which levels recompute their activations in the backward pass: all (full), or only the finest (selective). With
    full, or selective, unet3d takes less than half of the memory, or three quarters, for 17 % or 7 % more arithmetic;
    nafnet3d 40 %, or three quarters, for 32 % or 13 %; redcnn3d, which has one level, two thirds for 17 %"""
    options: dict[str, JsonValue] = Field({})
    """what a network of another package is made with"""

    @field_validator("name")
    @classmethod
    def _is_there(cls, name: str) -> str:
        return installed.known(installed.NETWORKS, name, NETWORKS)

    @field_validator("size", "thick_slices", "activation_checkpointing", "options")
    @classmethod
    def _is_of_this_network(cls, value: Any, field: ValidationInfo) -> Any:
        name, key = field.data.get("name"), str(field.field_name)
        if name is None:  # refused already
            return value
        own = name in NETWORKS
        if own == (key == "options") and value != cls.model_fields[key].default:
            raise ValueError(
                f"{name} has no such setting"
                + ("" if own else "; leave it out, its own are model.options.KEY=VALUE")
            )
        if own and key == "size" and value not in WIDTHS[name]:
            raise ValueError(f"{name} comes in {', '.join(WIDTHS[name])}")
        return value

    @property
    def label(self) -> str:
        """Name and size, as people call the network."""
        return f"{self.name}-{self.size}" if self.name in NETWORKS else self.name

    @property
    def origin(self) -> str | None:
        """Which code it is (see `installed.origin`); None for this package's own."""
        return None if self.name in NETWORKS else installed.origin(installed.NETWORKS, self.name)


class Denoiser(nn.Module):
    """A residual network on HU: forward takes and gives float HU (b, 1, z, y, x).

    network: (b, 2, z, y, x) of `detail_and_mean` to the residual (b, 1, z, y, x), in units of DETAIL_HU, with the attributes
    radius and stride. If it has one called last, a layer with weight and bias that makes its output, that starts at zero,
    so that a new Denoiser is the identity, bit for bit.

    radius: how many voxels (z, y, x) an output voxel depends on to each side, at most. stride: sizes of the input must be
    multiples of it, or forward raises UserError.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.network = _network(config)
        if (last := getattr(self.network, "last", None)) is not None:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        z, y, x = self.network.radius
        self.radius = (z, y + 1, x + 1)  # the mean of 3 x 3 reaches one further
        self.stride: tuple[int, int, int] = self.network.stride

    def lay_out(self, layout: torch.memory_format) -> None:
        """Set the memory layout of all activations; at first it is channels-last. Networks of other packages have theirs."""
        if self.config.name in NETWORKS:
            self.network.layout = layout

    @cached_property
    def widest(self) -> float:
        """The most numbers that a layer takes or gives for each voxel of the input."""
        model = outline(self.config)
        numbers: list[int] = []
        for layer in model.network.modules():
            layer.register_forward_hook(
                lambda _, *given: numbers.extend(
                    t.numel() for t in tree_leaves(given) if isinstance(t, torch.Tensor)
                )
            )
        hu = torch.empty(1, 1, *(8 * s for s in self.stride), device="meta")
        model(hu)
        return max(numbers) / hu.numel()

    def forward(self, hu: torch.Tensor) -> torch.Tensor:
        if any(n % s for n, s in zip(hu.shape[2:], self.stride, strict=True)):
            raise UserError(
                f"crop {tuple(hu.shape[2:])}: {self.config.name} takes multiples of {self.stride} voxels (z, y, x)"
            )
        residual = self.network(detail_and_mean(hu))
        # The sum is taken in the precision of hu: bf16 could not distinguish 1000 HU from 1002.
        return hu + DETAIL_HU * residual.to(hu.dtype)


def build(config: ModelConfig) -> Denoiser:
    """A new network. Raises UserError as `installed.make_network` does."""
    return Denoiser(config)


def outline(config: ModelConfig) -> Denoiser:
    """The network without memory for its weights, for what follows from their shapes. Raises UserError as `build`."""
    with torch.device("meta"):
        return build(config)


def _network(config: ModelConfig) -> Any:
    if config.name not in NETWORKS:
        return installed.make_network(config.name, config.options)
    widths = WIDTHS[config.name][config.size]
    return NETWORKS[config.name](widths, config.thick_slices, RECOMPUTED[config.activation_checkpointing])
