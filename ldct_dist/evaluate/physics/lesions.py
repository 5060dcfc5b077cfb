"""Lesions of one size in a phantom of plain tissue: where they lie, and the phantoms with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ldct_dist.ct.phantom import Disc, ball, discs
from ldct_dist.errors import UserError

WIDTH = 160
"""voxels along each side of a slice"""
TISSUE_HU = 50.0
BALL, ROD = "ball", "rod"
"""Shapes: a ball, whose contrast in a slice depends on the slice's thickness, and a rod, which is the same in all slices,
as vessels and the rods of most phantoms are. Taking signal from neighbouring slices helps with rods, not with balls."""

_LEVELS = 5
_APART = 3  # slices, at least: nearer ones have noise in common after a 3-D denoiser

Place = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """Lesions of `diameter_mm` and of `contrast_hu` to the tissue, in voxels of `spacing` mm (z, y, x).

    Raises UserError for lesions that are under 3 voxels wide or too wide for the phantom.
    """

    diameter_mm: float
    contrast_hu: float
    spacing: tuple[float, float, float]

    def __post_init__(self) -> None:
        least = 3 * max(self.spacing[1:])
        if not least <= self.diameter_mm:
            raise UserError(f"lesion of {self.diameter_mm:g} mm: give at least 3 voxels, {least:.2g} mm")
        if min(map(len, self.places)) < 4:
            raise UserError(
                f"lesion of {self.diameter_mm:g} mm: too wide for the phantom of {2 * self.body.radius_mm:.0f} mm; "
                "give a smaller"
            )

    @property
    def body(self) -> Disc:
        return Disc(0, 0, 0.46 * WIDTH * min(self.spacing[1:]), TISSUE_HU)

    @property
    def patch(self) -> int:
        """Voxels along each side of what the observer is shown: odd, and two and a half lesions wide."""
        return 2 * round(1.25 * self.diameter_mm / min(self.spacing[1:])) + 1

    @property
    def levels(self) -> range:
        """The slices through the lesions' middles, far enough apart for balls not to meet."""
        apart = max(_APART, math.ceil(2 * self.diameter_mm / self.spacing[0]))
        return range(apart // 2, _LEVELS * apart, apart)

    @cached_property
    def places(self) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
        """Like the fields of a chess board, black and white: (row, column) voxels, a patch apart and inside the body."""
        high, wide = self.spacing[1:]
        reach_mm = self.body.radius_mm - self.patch * math.hypot(high, wide) / math.sqrt(2)
        found: tuple[list[Place], list[Place]] = ([], [])
        count = max(0, int(2 * reach_mm / min(high, wide) // self.patch))
        for i in range(count):
            for j in range(count):
                dy, dx = ((k - (count - 1) / 2) * self.patch for k in (i, j))
                if math.hypot(dy * high, dx * wide) <= reach_mm:
                    found[(i + j) % 2].append((round(WIDTH / 2 + dy), round(WIDTH / 2 + dx)))
        return tuple(found[0]), tuple(found[1])

    def phantom(self, shape: str, present: Sequence[Place]) -> np.ndarray:
        """HU (z, y, x) with a lesion of that shape at each place: balls at each level, or rods.

        Free of noise, and not rounded: a faint lesion would lose its rim.
        """
        slices = _LEVELS * self.levels.step
        if shape == ROD:
            return self.slices(slices, [self._rod(*place) for place in present])
        hu = self.slices(slices)
        lesion = self.contrast_hu * ball(self.diameter_mm, self.spacing)
        dz, dy, dx = (n // 2 for n in lesion.shape)
        for z in self.levels:
            for y, x in present:
                hu[z - dz : z + dz + 1, y - dy : y + dy + 1, x - dx : x + dx + 1] += lesion
        return hu

    def slices(self, count: int, filled: Sequence[Disc] = ()) -> np.ndarray:
        """HU (z, y, x) of the body alone, or with discs in it."""
        return discs((count, WIDTH, WIDTH), self.spacing, [self.body, *filled])

    def _rod(self, y: int, x: int) -> Disc:
        middle = (WIDTH - 1) / 2
        at = (x - middle) * self.spacing[2], (y - middle) * self.spacing[1]
        return Disc(*at, self.diameter_mm / 2, TISSUE_HU + self.contrast_hu)
