"""How noisy a scan is, and how fine its noise, measured in its own soft tissue.

After the global noise level of Christianson et al., "Automated technique to measure noise in clinical CT
examinations", AJR 205 (2015): standard deviations in small windows over all soft tissue; windows that hold
anatomy scatter upwards, windows that hold noise alone pile up, so the histogram's peak is the noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d, uniform_filter

SOFT_TISSUE_HU = (0.0, 120.0)
"""Local means taken for soft tissue: muscle, liver, spleen, blood, with and without contrast."""

_WINDOW_MM = 8.0
_MIN_WINDOW = 5  # voxels
_MIN_WINDOWS = 500  # fewer make no histogram


@dataclass(frozen=True)
class LocalMoments:
    """Moments in the window around every voxel, each (z, y, x): mean in HU, variance in HU^2, and the
    covariance in HU^2 of in-plane neighbours."""

    mean: np.ndarray
    variance: np.ndarray
    neighbour: np.ndarray


def local_moments(hu: np.ndarray, spacing: tuple[float, float, float]) -> LocalMoments:
    """Moments of `hu` (z, y, x) in square in-plane windows of about 8 mm, at least 5 voxels wide."""
    hu = hu.astype(np.float32)
    size = (1, *(max(_MIN_WINDOW, 2 * round(_WINDOW_MM / mm / 2) + 1) for mm in spacing[1:]))
    mean = uniform_filter(hu, size)
    residual = hu - mean  # first, because squares of HU would drown the noise in float32
    offset = uniform_filter(residual, size)
    below, beside = (residual * np.roll(residual, -1, axis) for axis in (1, 2))
    return LocalMoments(
        mean=mean,
        variance=uniform_filter(residual * residual, size) - offset * offset,
        neighbour=uniform_filter((below + beside) / 2, size) - offset * offset,
    )


def homogeneous(moments: LocalMoments) -> np.ndarray | None:
    """(z, y, x) bool: the soft-tissue windows whose standard deviation lies within a fifth of the
    histogram's peak, so that they hold noise alone. None where there is too little soft tissue to tell."""
    low, high = SOFT_TISSUE_HU
    soft = (moments.mean > low) & (moments.mean < high) & (moments.variance > 0)
    if soft.sum() < _MIN_WINDOWS:
        return None
    std = np.sqrt(moments.variance, where=soft, out=np.zeros_like(moments.variance))
    counts, edges = np.histogram(std[soft], bins=200, range=(0.0, float(np.percentile(std[soft], 95))))
    peak = int(np.argmax(gaussian_filter1d(counts.astype(float), 4)))
    level = (edges[peak] + edges[peak + 1]) / 2
    return soft & (np.abs(std - level) <= 0.2 * level)


def neighbour_correlation(moments: LocalMoments, where: np.ndarray) -> float:
    """Correlation of the noise of in-plane neighbours over the windows `where`: near 1 for a smooth kernel,
    near 0 for a sharp one. It identifies the kernel without its name."""
    return float(moments.neighbour[where].sum() / moments.variance[where].sum())


def noise_std(moments: LocalMoments, where: np.ndarray) -> float:
    """Standard deviation of the noise in the median window of `where`, HU; metal streaks do not move it."""
    return float(np.sqrt(np.median(moments.variance[where])))
