"""The noise power spectrum: how much noise there is at which frequency, in HU^2 mm^2.

Formulas: ICRU Report 87 (2012), 5.3; the mean frequency as AAPM Report 233 (2019) has it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ldct_dist.ct import noise
from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError

_REGION_MM = 22.0  # fits into a liver, and resolves frequencies 0.05 / mm apart
_LEAST_VOXELS = 12
_FILLED = 0.95  # least share of a region that holds nothing but noise
_LOUD = 1.4  # times the volume's noise: a window with more holds an edge, too


@dataclass(frozen=True)
class NoisePower:
    """spectrum: (y, x) HU^2 mm^2, zero frequency first, at `fy` and `fx`, cycles/mm. regions: how many it averages."""

    spectrum: np.ndarray
    fy: np.ndarray
    fx: np.ndarray
    regions: int

    @property
    def variance(self) -> float:
        """Its integral over all frequencies, HU^2: by Parseval's theorem the noise's variance."""
        return float(self.spectrum.sum() * (self.fy[1] - self.fy[0]) * (self.fx[1] - self.fx[0]))

    def radial(self) -> tuple[np.ndarray, np.ndarray]:
        """(frequencies in cycles/mm, mean HU^2 mm^2 on the ring around each), up to the coarser axis's Nyquist."""
        f = np.hypot(self.fy[:, None], self.fx)
        step = max(self.fy[1], self.fx[1])
        ring = np.rint(f / step).astype(int)
        rings = round(min(self.fy.max(), self.fx.max()) / step) + 1
        counts = np.bincount(ring.ravel())[:rings]
        sums = np.bincount(ring.ravel(), self.spectrum.ravel())[:rings]
        return np.arange(rings) * step, sums / counts

    @property
    def mean_frequency(self) -> float:
        """Of the radial spectrum, cycles/mm: low where a denoiser leaves only blotches. nan where there is no noise.

        Subtracting the regions' means has emptied the ring at zero; it is taken to be as full as the next one.
        """
        f, power = self.radial()
        power[0] = power[1]
        return float(np.trapezoid(f * power, f) / np.trapezoid(power, f)) if power.any() else math.nan


def noise_power(regions: np.ndarray, spacing: tuple[float, float], detrend: bool = True) -> NoisePower:
    """The mean spectrum of `regions`, (n, y, x) HU. From each, its mean is subtracted, and with `detrend` a fitted plane.

    spacing: mm, (y, x). Raises UserError for regions under 8 voxels wide.
    """
    _, rows, columns = regions.shape
    if min(rows, columns) < 8:
        raise UserError(f"noise power: regions of {rows} x {columns} voxels are too small; give 8 or more")
    rough = regions - regions.mean(axis=(1, 2), keepdims=True, dtype=np.float64)
    if detrend:
        y, x = (np.arange(n) - (n - 1) / 2 for n in (rows, columns))
        for slope, weight in (
            (y[:, None] + 0 * x, columns * (y**2).sum()),
            (x + 0 * y[:, None], rows * (x**2).sum()),
        ):
            rough = rough - slope * (np.tensordot(rough, slope, axes=2) / weight)[:, None, None]
    power = (np.abs(np.fft.fft2(rough)) ** 2).mean(axis=0)
    fy, fx = (np.abs(np.fft.fftfreq(n, mm)) for n, mm in zip((rows, columns), spacing, strict=True))
    return NoisePower(power * (spacing[0] * spacing[1] / (rows * columns)), fy, fx, len(regions))


def flat_regions(volume: Volume, moments: noise.LocalMoments) -> list[tuple[int, slice, slice]]:
    """Squares (slice, rows, columns) of about 22 mm, at least 12 voxels, in soft tissue with nothing but noise.

    moments: the volume's own. The squares do not overlap; there may be none. Choose them in the full dose, and measure
    every image at the same places. The full dose itself has there some 2 % (sharp kernels) to 8 % (soft ones) less variance
    than another scan like it would have, since what is loud by chance is taken for an edge.
    """
    size = max(_LEAST_VOXELS, round(_REGION_MM / max(volume.spacing[1:])))
    homogeneous = moments.homogeneous
    if homogeneous is None:
        return []
    low, high = noise.SOFT_TISSUE_HU
    loud = _LOUD * noise.noise_std(moments, homogeneous)
    soft = (moments.mean > low) & (moments.mean < high) & (moments.variance + moments.slope <= loud**2)
    # Inclusive sums, so that every square's share is four look-ups.
    sums = np.pad(soft, ((0, 0), (1, 0), (1, 0))).cumsum(1).cumsum(2)
    filled = sums[:, size:, size:] - sums[:, :-size, size:] - sums[:, size:, :-size] + sums[:, :-size, :-size]
    found = []
    for z, plane in enumerate(filled / size**2):
        free = plane >= _FILLED
        while free.any():
            y, x = np.unravel_index(int(np.where(free, plane, 0).argmax()), plane.shape)
            found.append((z, slice(int(y), int(y) + size), slice(int(x), int(x) + size)))
            free[max(0, y - size + 1) : y + size, max(0, x - size + 1) : x + size] = False
    return found
