"""What a network has to beat."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.optimize import minimize_scalar

from ldct_dist.ct.volume import AIR_HU
from ldct_dist.evaluate.metrics import rmse_hu


def gaussian(hu: np.ndarray, sigma: float) -> np.ndarray:
    """int16 HU (z, y, x) smoothed within each slice; sigma in voxels. Padding stays padding."""
    smooth = gaussian_filter(hu.astype(np.float32), (0, sigma, sigma), mode="nearest")
    return np.where(hu <= AIR_HU, hu, smooth.round().astype(np.int16))


def tune_gaussian(low: np.ndarray, full: np.ndarray) -> float:
    """The sigma, in voxels, whose filtered low dose is nearest to full dose in RMSE."""
    counted = full > AIR_HU

    def error(sigma: float) -> float:
        return rmse_hu(gaussian(low, sigma), full, counted)

    return float(minimize_scalar(error, bounds=(0.1, 3.0), method="bounded", options={"xatol": 0.01}).x)
