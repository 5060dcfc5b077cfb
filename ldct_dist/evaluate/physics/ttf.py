"""The task transfer function: how sharp an edge of a given contrast is.

It is measured on the rim of a disc, which samples every direction and every position between voxels. Denoisers are not
linear, so it depends on contrast and noise (Richard et al., Med Phys 39 (2012); AAPM Report 233).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldct_dist.errors import UserError

_BINS_A_VOXEL = 5


@dataclass(frozen=True)
class Transfer:
    """frequency: cycles/mm. ttf: 1 at zero frequency. contrast_hu: of the disc to its surroundings, as measured."""

    frequency: np.ndarray
    ttf: np.ndarray
    contrast_hu: float

    def falls_to(self, level: float) -> float:
        """The first frequency at which the TTF is down to `level`, such as 0.5, cycles/mm; nan where it never is."""
        below = np.flatnonzero(self.ttf <= level)
        if not len(below):
            return float("nan")
        i = int(below[0])
        return float(np.interp(-level, -self.ttf[i - 1 : i + 1], self.frequency[i - 1 : i + 1]))


def transfer(
    image: np.ndarray, spacing: tuple[float, float], centre: tuple[float, float], radius_mm: float
) -> Transfer:
    """TTF from the rim of the disc around `centre` (row, column), voxels.

    image: (y, x) HU; average many slices of a disc along z first, because noise adds to the TTF of single ones.
    spacing: mm, (y, x). Nothing else may lie within twice the radius.
    Raises UserError if the disc is under 8 voxels wide, or reaches too near to the border.
    """
    voxel = max(spacing)
    if radius_mm < 4 * voxel:
        raise UserError(f"TTF: a disc of {radius_mm:g} mm radius is too small for voxels of {voxel:g} mm")
    y, x = ((np.arange(n) - c) * mm for n, c, mm in zip(image.shape, centre, spacing, strict=True))
    reach = 0.9 * radius_mm
    if min(-y[0], y[-1], -x[0], x[-1]) < radius_mm + reach:
        raise UserError(
            f"TTF: twice the disc's radius, {2 * radius_mm:g} mm, reaches beyond the image's border"
        )
    width = voxel / _BINS_A_VOXEL
    half = int(reach / width)
    bins = np.floor((np.hypot(y[:, None], x) - radius_mm) / width).astype(int) + half
    near = (bins >= 0) & (bins < 2 * half)
    counts = np.bincount(bins[near], minlength=2 * half)
    sums = np.bincount(bins[near], image[near].astype(np.float64), minlength=2 * half)
    edge = np.interp(np.arange(2 * half), np.flatnonzero(counts), sums[counts > 0] / counts[counts > 0])

    outer = half // 2  # a quarter of what is seen, at either end
    contrast = float(edge[:outer].mean() - edge[-outer:].mean())
    line = np.diff(edge) * np.hanning(2 * half + 1)[1:-1]
    length = 8 * len(line)
    frequency = np.fft.rfftfreq(length, width)
    ttf = np.abs(np.fft.rfft(line, length))
    ttf = ttf / ttf[0] / np.sinc(frequency * width) ** 2  # bins average, and differences are no derivative
    seen = frequency <= 1 / (2 * voxel)
    return Transfer(frequency[seen], ttf[seen], contrast)
