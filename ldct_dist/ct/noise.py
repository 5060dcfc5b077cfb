"""How noisy a scan is, and how fine its noise, measured in its own soft tissue.

After the global noise level of Christianson et al., "Automated technique to measure noise in clinical CT
examinations", AJR 205 (2015): standard deviations in small windows over all soft tissue; windows that hold
anatomy scatter upwards, windows that hold noise alone pile up, so the histogram's peak is the noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import correlate1d, gaussian_filter1d, uniform_filter

from ldct_dist.ct.volume import Volume

SOFT_TISSUE_HU = (0.0, 120.0)
"""Local means taken for soft tissue: muscle, liver, spleen, blood, with and without contrast."""

_WINDOW_MM = 6.0
_MIN_WINDOW = 5  # voxels
_FLAT = 0.1
_SAMPLED_SLICES = 4
_MIN_WINDOWS = 500  # fewer make no histogram


@dataclass(frozen=True)
class LocalMoments:
    """Moments in the window around every voxel, each (z, y, x).

    mean: HU. slope: the variance in HU^2 that a plane fitted to the window explains: edges and gradients.
    variance, neighbour: of the voxels, and the covariance of in-plane neighbours, both HU^2 about that plane.
    """

    mean: np.ndarray
    slope: np.ndarray
    variance: np.ndarray
    neighbour: np.ndarray

    @property
    def flat(self) -> np.ndarray:
        """The windows without an edge or gradient. Noise alone slopes too, but in a fixed share of windows."""
        return self.slope <= _FLAT * self.variance


def local_moments(hu: np.ndarray, spacing: tuple[float, float, float]) -> LocalMoments:
    """Moments of `hu` (z, y, x) in square in-plane windows of about 6 mm, at least 5 voxels wide."""
    hu = hu.astype(np.float32)
    size = (1, *(max(_MIN_WINDOW, 2 * round(_WINDOW_MM / mm / 2) + 1) for mm in spacing[1:]))
    mean = uniform_filter(hu, size)
    rough = hu - mean  # first, because squares of HU would drown the noise in float32
    offset = uniform_filter(rough, size)
    below, beside = (rough * np.roll(rough, -1, axis) for axis in (1, 2))
    slope = _slope_variance(rough, 1, size) + _slope_variance(rough, 2, size)
    plane = offset**2 + slope
    return LocalMoments(
        mean=mean,
        slope=slope,
        variance=(uniform_filter(rough * rough, size) - plane).clip(min=0),
        neighbour=uniform_filter((below + beside) / 2, size) - plane,
    )


def sampled_moments(volume: Volume) -> LocalMoments:
    """Moments of a few slices from all over the volume: enough to tell its noise and its mean tissue."""
    count = min(_SAMPLED_SLICES, len(volume.hu))
    slices = (np.arange(count) * 2 + 1) * len(volume.hu) // (2 * count)
    return local_moments(volume.hu[slices], volume.spacing)


def _slope_variance(hu: np.ndarray, axis: int, size: tuple[int, ...]) -> np.ndarray:
    """What a straight slope along `axis`, fitted in each window, contributes to the window's variance, HU^2."""
    at = np.arange(size[axis]) - size[axis] // 2
    across = uniform_filter(hu, tuple(1 if i == axis else n for i, n in enumerate(size)))
    return correlate1d(across, at / len(at), axis) ** 2 / (at * at).mean()


def homogeneous(moments: LocalMoments) -> np.ndarray | None:
    """(z, y, x) bool: the soft-tissue windows whose standard deviation lies within a fifth of the
    histogram's peak, so that they hold noise alone. None where there is too little soft tissue to tell."""
    low, high = SOFT_TISSUE_HU
    soft = (moments.mean > low) & (moments.mean < high) & moments.flat
    if soft.sum() < _MIN_WINDOWS:
        return None
    std = np.sqrt(moments.variance)
    counts, edges = np.histogram(std[soft], bins=200, range=(0.0, float(np.percentile(std[soft], 95))))
    peak = int(np.argmax(gaussian_filter1d(counts.astype(float), 4)))
    level = (edges[peak] + edges[peak + 1]) / 2
    return soft & (np.abs(std - level) <= max(0.2 * level, edges[1] - edges[0]))


def neighbour_correlation(moments: LocalMoments, where: np.ndarray) -> float:
    """Correlation of the noise of in-plane neighbours over the flat windows of `where`: near 1 for a smooth kernel,
    near 0 for a sharp one. It identifies the kernel without its name."""
    where = where & moments.flat
    return float(moments.neighbour[where].sum() / moments.variance[where].sum())


def noise_std(moments: LocalMoments, where: np.ndarray) -> float:
    """Standard deviation of the noise in the median flat window of `where`, HU; metal streaks do not move it."""
    return float(np.sqrt(np.median(moments.variance[where & moments.flat])))
