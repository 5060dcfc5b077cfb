"""Faint lesions, inserted into both doses alike on the device, and the weights of their voxels in the loss.

Small faint structure is so rare in scans that smoothing it away hardly raises the loss. With these lesions it does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Annotated

import numpy as np
import torch
from pydantic import AfterValidator, Field

from ldct_dist.config import Config, rising

TISSUE_HU = -200.0
"""Lesions are inserted in tissue only: voxels that are darker at full dose, lung and air, stay as they are."""

Millimetres = Annotated[float, Field(gt=0, le=50)]
Contrast = Annotated[float, Field(gt=0, le=1000)]

_NUMBERS = 8  # reserved for each lesion, of which six are used: two counts of Philox, four numbers each
_USE = 5  # what the random numbers are for: the moves' are use 0, those of the sample order 1 to 4
_BLUR_MM = 0.6  # sigma of what a soft kernel does to edges in plane: a line becomes 1.4 mm wide
# The blur as a mean of shifted images: Gauss-Hermite quadrature of the Gaussian with two points an axis.
_SHIFTS = tuple(product((-_BLUR_MM, _BLUR_MM), repeat=2))


class LesionConfig(Config):
    count: int = Field(0, ge=0, le=1000)
    """lesions in a crop, with those that fall into air or lung and do not show; 0: none"""
    diameter_mm: Annotated[tuple[Millimetres, Millimetres], AfterValidator(rising)] = (4.0, 9.0)
    contrast_hu: Annotated[tuple[Contrast, Contrast], AfterValidator(rising)] = (15.0, 60.0)
    """brighter or darker than the tissue around them. Diameter and contrast are drawn evenly on a logarithmic scale. Of
    what the noise hides, a network learns to show less than there is: take contrasts that low dose still shows"""
    weight: float = Field(100.0, ge=1, le=1e4)
    """of a lesion's voxel in the loss; that of others is 1"""


def draw(config: LesionConfig, seed: int, samples: Sequence[int]) -> np.ndarray:
    """(samples, count, 5): centre z, y, x as fractions of the crop; diameter, mm; contrast, HU, negative if darker.

    A sample's lesions follow from the seed and the sample's index.
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

    spacings: mm (z, y, x) of each of the b samples. drawn: their lesions, of `draw`.
    Returns the weight of each voxel in the loss, (b, 1, z, y, x): config.weight in a lesion, else 1.
    """
    largest = config.diameter_mm[1] / 2 + _BLUR_MM
    reach = [math.ceil(largest / min(each)) for each in zip(*spacings, strict=True)]
    lesions = _rendered(drawn, np.array(spacings), pair[1, :, 0], reach)
    lesions *= pair[1] > TISSUE_HU
    pair += lesions
    return torch.where(lesions != 0, config.weight, 1.0)


def _rendered(drawn: np.ndarray, mm: np.ndarray, like: torch.Tensor, reach: Sequence[int]) -> torch.Tensor:
    """HU of the lesions alone, (b, 1, z, y, x), for crops `like` (b, z, y, x).

    mm: (b, 3) spacings. reach: voxels (z, y, x) from a lesion's centre beyond which it is 0. HU are rounded to whole ones,
    whose sums are exact, so that the order of adding, which a GPU does not guarantee, makes no difference.
    """
    size = like.shape[1:]
    # In double precision: otherwise one centre in some millions would be rounded to beyond the last voxel.
    middle = drawn[..., :3] * size
    voxel = [np.floor(middle[..., axis, None]) + np.arange(-n, n + 1) for axis, n in enumerate(reach)]
    offset = [(v + 0.5 - middle[..., i, None]) * mm[:, i, None, None] for i, v in enumerate(voxel)]

    def there(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(like.device)

    radius, contrast = (there(a)[..., None, None, None] for a in (drawn[..., 3] / 2, drawn[..., 4]))
    share = share_of_ball(_across(map(there, offset)), radius, there(mm[:, 0]).view(-1, 1, 1, 1, 1))
    # Each crop has a frame as wide as a lesion's reach, for the parts of lesions that stick out of the crop.
    framed = like.new_zeros((len(like), *(n + 2 * r for n, r in zip(size, reach, strict=True))))
    sample = torch.arange(len(like), device=like.device).view(-1, 1, 1, 1, 1)
    index = _across(there(v + r).long() for v, r in zip(voxel, reach, strict=True))
    framed.index_put_((sample, *index), (contrast * share).round(), accumulate=True)
    return framed[:, None, *(slice(r, r + n) for n, r in zip(size, reach, strict=True))]


def share_of_ball(
    offset: Sequence[torch.Tensor], radius: torch.Tensor, thickness: torch.Tensor
) -> torch.Tensor:
    """The share of each voxel that a ball fills, from 0 to 1: exact along z, for thick slices, and blurred in plane.

    offset: of the voxels from the ball's centre, z, y and x. All lengths are in mm.
    """
    z, y, x = offset
    share = radius.new_zeros(())
    for dy, dx in _SHIFTS:
        half = (radius**2 - (y + dy) ** 2 - (x + dx) ** 2).clamp(min=0).sqrt()  # of the chord along z
        covered = torch.minimum(z + thickness / 2, half) - torch.maximum(z - thickness / 2, -half)
        share = share + covered.clamp(min=0) / thickness / len(_SHIFTS)
    return share


def _across(along: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three tensors (b, count, n), reshaped to broadcast along z, y and x of (b, count, z, y, x)."""
    z, y, x = along
    return z[..., :, None, None], y[..., None, :, None], x[..., None, None, :]
