"""HU bias by tissue: a network may lower the noise and move the numbers that radiologists read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.ndimage import binary_erosion

from ldct_dist.ct.noise import LocalMoments
from ldct_dist.ct.volume import Volume, padding_of

TISSUES = {
    "air": (-1023.0, -930.0),
    "lung": (-930.0, -500.0),
    "fat": (-140.0, -50.0),
    "soft": (0.0, 120.0),
    "bone": (200.0, 3071.0),
}
"""Local means in HU, lowest and highest."""

_IN_PLANE = np.ones((1, 3, 3), bool)


def tissue_bias(image_hu: np.ndarray, full: Volume, classes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean of image - full dose, HU, in each of the full dose's `tissues` of which there is some; image_hu (z, y, x)."""
    error = image_hu.astype(np.float32) - full.hu
    return {
        name: float(error[where].mean(dtype=np.float64)) for name, where in classes.items() if where.any()
    }


def tissues(full: Volume, moments: LocalMoments) -> dict[str, np.ndarray]:
    """Class -> bool (z, y, x), told by the full dose's local mean, of its `moments`.

    By single voxels, noise would choose its own class, and the best denoiser would look biased. A rim of one voxel is
    left out, where tissues mix.
    """
    scanned = ~padding_of(full.hu)
    return {
        name: binary_erosion((moments.mean > low) & (moments.mean <= high), _IN_PLANE) & scanned
        for name, (low, high) in TISSUES.items()
    }
