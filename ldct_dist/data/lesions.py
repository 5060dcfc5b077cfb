"""Faint lesions, inserted into both doses alike on the device, and what their voxels weigh in the loss.

What is small and faint is so rare in a scan that a network loses nothing by smoothing it away; with these, it does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Annotated

import numpy as np
import torch
from pydantic import AfterValidator, Field

from ldct_dist.config import Config, rising

TISSUE_HU = -200.0
"""Lesions lie in tissue: darker voxels of the full dose, lung and air, take no part in them."""

Millimetres = Annotated[float, Field(gt=0, le=50)]
Contrast = Annotated[float, Field(gt=0, le=1000)]

_NUMBERS = 8  # reserved for each lesion, of which six are used: two counts of Philox, four numbers each
_USE = 5  # what the random numbers are for: the moves' are use 0, those of the sample order 1 to 4
_BLUR_MM = (
    0.6  # sigma of what the scanner's kernel does to edges in plane: 1.4 mm wide at half, as soft kernels do
)


class LesionConfig(Config):
    count: int = Field(0, ge=0, le=1000)
    """lesions a crop, of which those in air and lung do not show; 0: none"""
    diameter_mm: Annotated[tuple[Millimetres, Millimetres], AfterValidator(rising)] = (4.0, 9.0)
    contrast_hu: Annotated[tuple[Contrast, Contrast], AfterValidator(rising)] = (5.0, 40.0)
    """brighter or darker than what they lie in; both ranges are drawn from evenly on a logarithmic scale"""
    weight: float = Field(100.0, ge=1, le=1e4)
    """how many times as much as others a voxel of a lesion counts in the loss"""


def draw(config: LesionConfig, seed: int, samples: Sequence[int]) -> np.ndarray:
    """(samples, count, 5): middle z, y, x in shares of a crop; diameter, mm; contrast, HU, below 0 if darker.

    A sample's lesions follow from its index alone.
    """
    counts = config.count * _NUMBERS // 4  # of Philox, a sample
    philox = (np.random.Philox(key=[seed, _USE], counter=i * counts) for i in samples)
    u = np.stack([np.random.Generator(p).random((config.count, _NUMBERS)) for p in philox])
    diameter, contrast = (
        small * (large / small) ** u[..., i]
        for i, (small, large) in ((3, config.diameter_mm), (4, config.contrast_hu))
    )
    contrast *= np.where(u[..., 5] < 0.5, -1, 1)
    return np.concatenate((u[..., :3], diameter[..., None], contrast[..., None]), axis=-1)


def insert(
    config: LesionConfig,
    pair: torch.Tensor,
    spacings: Sequence[tuple[float, float, float]],
    drawn: np.ndarray,
) -> torch.Tensor:
    """Add lesions to a batch in place: pair (2, b, 1, z, y, x) float HU, low dose and full.

    spacings: mm (z, y, x) of each of the b samples; drawn: their lesions, from `draw`.
    Returns what each voxel weighs in the loss, (b, 1, z, y, x): config.weight in a lesion, else 1.
    """
    size = pair.shape[3:]
    drawn_there, mm = (torch.tensor(a, dtype=torch.float32, device=pair.device) for a in (drawn, spacings))
    middle, diameter, contrast = drawn_there.split((3, 1, 1), dim=-1)
    middle = middle * torch.tensor(size, device=pair.device)
    largest = config.diameter_mm[1] / 2 + _BLUR_MM
    reach = [math.ceil(largest / min(each)) for each in zip(*spacings, strict=True)]
    # A frame as wide as a lesion's reach around each crop: what sticks out falls into it.
    index, offset = [], []
    for axis, n in enumerate(reach):
        at = middle[..., axis, None]
        voxel = at.floor() + torch.arange(-n, n + 1, device=pair.device)
        index.append(voxel.long() + n)
        offset.append((voxel + 0.5 - at) * mm[:, axis, None, None])
    share = share_of_ball(_across(*offset), diameter[..., None, None] / 2, mm[:, 0].view(-1, 1, 1, 1, 1))
    # Of whole HU, sums are exact: the order of adding, which no GPU promises, does not matter.
    hu = (contrast[..., None, None] * share).round()
    framed = hu.new_zeros((len(mm), *(n + 2 * r for n, r in zip(size, reach, strict=True))))
    sample = torch.arange(len(mm), device=pair.device).view(-1, 1, 1, 1, 1)
    framed.index_put_((sample, *_across(*index)), hu, accumulate=True)
    inner = [slice(r, r + n) for n, r in zip(size, reach, strict=True)]
    lesions = framed[:, None, *inner] * (pair[1] > TISSUE_HU)
    pair += lesions
    return torch.where(lesions != 0, config.weight, 1.0)


def share_of_ball(
    offset: tuple[torch.Tensor, torch.Tensor, torch.Tensor], radius: torch.Tensor, thickness: torch.Tensor
) -> torch.Tensor:
    """How much of each voxel a ball fills, from 0 to 1: exactly along z, as thick slices show it, and blurred in plane.

    offset: of the voxel from the ball's middle (z, y, x); all in mm.
    """
    z, y, x = offset
    shares = []
    for dy, dx in product(
        (-_BLUR_MM, _BLUR_MM), repeat=2
    ):  # Gauss and Hermite's rule for a Gaussian, two points an axis
        half = (radius**2 - (y + dy) ** 2 - (x + dx) ** 2).clamp(min=0).sqrt()  # of the chord along z
        covered = torch.minimum(z + thickness / 2, half) - torch.maximum(z - thickness / 2, -half)
        shares.append(covered.clamp(min=0) / thickness)
    return torch.stack(shares).mean(0)


def _across(
    z: torch.Tensor, y: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(b, count, n) each, along the last three axes of (b, count, z, y, x)."""
    return z[..., :, None, None], y[..., None, :, None], x[..., None, None, :]
