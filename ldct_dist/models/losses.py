"""Losses: weighted means over voxels, one value for each sample.

There is one for each sample so that the mean over a global batch does not depend on how the ranks share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field

from ldct_dist.config import Config
from ldct_dist.errors import UserError

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Triple = tuple[int, int, int]
Voxels = Annotated[int, Field(ge=0)]


class LossConfig(Config):
    name: Literal["charbonnier", "l1", "mse"] = "charbonnier"
    eps_hu: float = Field(1.0, gt=0)
    """of charbonnier, sqrt(d^2 + eps^2) - eps: quadratic for differences below it, linear above"""
    margin: tuple[Voxels, Voxels, Voxels] | None = None
    """voxels (z, y, x) that do not count along faces of a crop beyond which the volume goes on: in use, the network
    sees more there. None: the network's radius along axes where the crop is more than twice as long, else 0"""

    def margin_for(self, radius: Triple, crop: Triple) -> Triple:
        """The margin for a network of this radius and a crop. Raises UserError if no voxel of a crop would count."""
        if self.margin is None:
            z, y, x = (r if c > 2 * r else 0 for r, c in zip(radius, crop, strict=True))
            return z, y, x
        if any(c <= 2 * m for m, c in zip(self.margin, crop, strict=True)):
            raise UserError(
                f"loss.margin={list(self.margin)} leaves nothing of a crop of {list(crop)} voxels: take data.crop "
                "larger than twice the margin"
            )
        return self.margin


def build_loss(config: LossConfig) -> Loss:
    """A function loss(denoised, full, weights) -> (b,), of float HU (b, 1, z, y, x) and weights that broadcast to them.

    It is the weighted mean over each sample, in HU, or HU^2 for mse. A weight is 0, or at least 1; a bool mask will do. A
    sample whose weights are all 0 has loss 0.
    """

    def charbonnier(d: torch.Tensor) -> torch.Tensor:
        # sqrt(d^2 + eps^2) - eps without its cancellation where d is small
        return d.square() / ((d.square() + config.eps_hu**2).sqrt() + config.eps_hu)

    penalties: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "charbonnier": charbonnier,
        "l1": torch.abs,
        "mse": torch.square,
    }
    penalty = penalties[config.name]

    def loss(denoised: torch.Tensor, full: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        counted = penalty(denoised - full) * weights
        return counted.flatten(1).sum(1) / weights.flatten(1).sum(1).clamp(min=1)

    return loss


def mask_from_box(box: torch.Tensor, shape: torch.Size, margin: Triple) -> torch.Tensor:
    """Which voxels of the crops count: bool (b, 1, z, y, x), for box (b, 3, 2) and crops of `shape` (z, y, x).

    Padding, which is outside the box, does not count, nor do voxels within `margin` of a face of the crop beyond which
    the volume goes on: their receptive field is cut off there, as it would not be in use.
    """
    inside = None
    for axis, (size, reach) in enumerate(zip(shape, margin, strict=True)):
        start, stop = box[:, axis, 0], box[:, axis, 1]
        low = torch.where(start < 0, reach, start)[:, None]
        high = torch.where(stop > size, size - reach, stop)[:, None]
        i = torch.arange(size, device=box.device)[None]
        view = [len(box), 1, 1, 1, 1]
        view[2 + axis] = size
        along = ((i >= low) & (i < high)).view(view)
        inside = along if inside is None else inside & along
    assert inside is not None
    return inside


def share_counted(margin: Triple, crop: Triple) -> float:
    """The share of voxels that count, in a crop (z, y, x) that touches no border of its volume."""
    return math.prod(1 - 2 * m / c for m, c in zip(margin, crop, strict=True))
