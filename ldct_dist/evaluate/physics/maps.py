"""Where the noise is, and where an image shows what the full dose does not."""

from __future__ import annotations

from functools import partial

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from ldct_dist.ct import noise
from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError
from ldct_dist.evaluate.slices import over_slices

STRUCTURE_MM = 2.0  # sigma of the finest structure that one would read as anatomy
CONSPICUOUS = 4.0  # standard deviations of noise: chance alone passes it in 0.006 % of voxels


def noise_map(hu: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Standard deviation in HU within about 6 mm in plane, (z, y, x), about a plane fitted there."""
    return np.sqrt(noise.local_moments(hu, spacing, share_out=over_slices).variance)


def hallucination_map(image_hu: np.ndarray, full: Volume, std: np.ndarray) -> np.ndarray:
    """Structure that the image has and the full dose has not, in standard deviations of the full dose's noise.

    The difference image - full dose, smoothed by 2 mm in plane, over `std` of `smoothed_noise`: (z, y, x), near a
    standard normal for a perfect denoiser; above 0 where brightness was added, below 0 where it was lost.
    """

    def in_plane(image: np.ndarray, truth: np.ndarray, std: np.ndarray) -> np.ndarray:
        return _smooth(image.astype(np.float32) - truth, full.spacing) / std

    return np.stack(over_slices(in_plane, image_hu, full.hu, std))


def smoothed_noise(low: Volume, full: Volume, moments: noise.LocalMoments) -> np.ndarray:
    """Standard deviation in HU, (z, y, x), of the full dose's own noise after smoothing by 2 mm.

    Where the noise is higher or lower is taken from low - full, which contains no anatomy, and its level from the full
    dose's soft tissue, by its `moments`. Raises UserError if there is too little soft tissue, or no noise in it.
    """
    soft = moments.homogeneous
    if soft is None:
        raise UserError("hallucination map: too little soft tissue to measure the full dose's noise")
    added = low.hu.astype(np.float32) - full.hu
    local = noise.local_moments(added, full.spacing, share_out=over_slices)
    # Both by the same measure, which leaves out a share of the noise that depends on the kernel.
    spread, level = noise.noise_std(local, soft), noise.noise_std(moments, soft)
    if spread == 0 or level == 0:
        whose = "the full dose shows no noise" if level == 0 else "the low dose adds no noise"
        raise UserError(f"hallucination map: {whose} in soft tissue")
    smooth = np.stack(over_slices(partial(_smooth, spacing=full.spacing), added))
    left = float(smooth[soft].std()) / spread
    blur = [0, *(3 * STRUCTURE_MM / mm for mm in full.spacing[1:])]
    where = gaussian_filter(np.sqrt(local.variance), blur)
    middle = float(np.median(where[soft]))
    # Outside the body, low dose adds hardly any noise, and dividing by that would mean nothing.
    return np.maximum(where, 0.2 * middle) * (level * left / middle)


def _smooth(hu: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """A slice (y, x), smoothed by STRUCTURE_MM."""
    for axis, mm in enumerate(spacing[1:]):
        hu = gaussian_filter1d(hu, STRUCTURE_MM / mm, axis=axis)
    return hu
