"""What a denoiser has to beat: a Gaussian filter of the best width."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.optimize import minimize_scalar

from ldct_dist.ct.volume import AIR_HU, Volume

_WIDEST_MM = 6.0


def gaussian(volume: Volume, sigma_mm: float) -> Volume:
    """`volume` under a 3-D Gaussian of standard deviation `sigma_mm` along every axis; padding stays."""
    sigma = [sigma_mm / mm for mm in volume.spacing]
    smooth = np.rint(gaussian_filter(volume.hu.astype(np.float32), sigma, mode="nearest")).astype(np.int16)
    return replace(volume, hu=np.where(volume.hu == AIR_HU, np.int16(AIR_HU), smooth))


def tune_gaussian(low: Volume, full: Volume) -> float:
    """The sigma in mm, up to 6, that brings `low` nearest to `full`: least RMSE in HU over the full dose's voxels that
    are not padding."""
    counted = full.hu > AIR_HU
    target = full.hu[counted].astype(np.float32)

    def mean_square(sigma_mm: float) -> float:
        error = gaussian(low, sigma_mm).hu[counted] - target
        return float(np.square(error).mean())

    return float(
        minimize_scalar(mean_square, bounds=(0, _WIDEST_MM), method="bounded", options={"xatol": 0.02}).x
    )
