"""What a denoiser has to beat: the classic filters, each of the strength that serves the data best.

All but the Gaussian come from scikit-image and work slice by slice, because slices are thick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.optimize import minimize_scalar
from skimage.restoration import denoise_bilateral, denoise_nl_means, denoise_tv_chambolle

from ldct_dist.ct.volume import AIR_HU, Volume
from ldct_dist.errors import UserError

_TUNED_SLICES, _TUNED_WIDTH = 4, 256  # slices, and voxels either way around their middle

Filter = Callable[[Volume, float], Volume]


def gaussian(volume: Volume, sigma_mm: float) -> Volume:
    """`volume` under a 3-D Gaussian of standard deviation `sigma_mm` along every axis; padding stays."""
    sigma = [sigma_mm / mm for mm in volume.spacing]
    return _like(volume, gaussian_filter(volume.hu.astype(np.float32), sigma, mode="nearest"))


def bilateral(volume: Volume, range_hu: float) -> Volume:
    """Means over 1.5 mm in plane, of voxels that differ by less than about `range_hu` (Tomasi & Manduchi 1998)."""
    sigma = 1.5 / min(volume.spacing[1:])

    def smooth(hu: np.ndarray) -> np.ndarray:
        return denoise_bilateral(hu, sigma_color=range_hu, sigma_spatial=sigma, bins=2000, mode="edge")

    # scikit-image wants its values to be positive.
    return _like(volume, np.stack([smooth(hu.astype(np.float64) - AIR_HU) for hu in volume.hu]) + AIR_HU)


def nlm(volume: Volume, h_hu: float) -> Volume:
    """Non-local means of 5 x 5 patches that differ by about `h_hu` within 13 x 13 voxels (Buades et al. 2005)."""

    def smooth(hu: np.ndarray) -> np.ndarray:
        return denoise_nl_means(hu, patch_size=5, patch_distance=6, h=h_hu, fast_mode=True)

    return _like(volume, np.stack([smooth(hu.astype(np.float32)) for hu in volume.hu]))


def tv(volume: Volume, weight_hu: float) -> Volume:
    """Least total variation at that weight (Chambolle 2004)."""

    def smooth(hu: np.ndarray) -> np.ndarray:
        return denoise_tv_chambolle(hu, weight=weight_hu, eps=1e-4, max_num_iter=100)

    return _like(volume, np.stack([smooth(hu.astype(np.float32)) for hu in volume.hu]))


@dataclass(frozen=True)
class Baseline:
    """A filter and the strongest that is tried of it, in its own unit."""

    filter: Filter
    strongest: float
    unit: str


BASELINES = {
    "gaussian": Baseline(gaussian, 6.0, "mm"),
    "bilateral": Baseline(bilateral, 300.0, "HU"),
    "nlm": Baseline(nlm, 150.0, "HU"),
    "tv": Baseline(tv, 150.0, "HU"),
}


def baseline_named(name: str) -> Baseline:
    """Raises UserError that lists the names there are."""
    if name not in BASELINES:
        raise UserError(f"baseline {name!r}: there is no such filter; choose from {', '.join(BASELINES)}")
    return BASELINES[name]


def tune(name: str, low: Volume, full: Volume) -> float:
    """The strength of the named baseline that brings a few middle slices of `low` nearest to `full`: see `strength`."""
    baseline = baseline_named(name)
    z, y, x = (n // 2 for n in low.shape)
    half = _TUNED_WIDTH // 2
    some = (
        slice(max(0, z - _TUNED_SLICES // 2), z + _TUNED_SLICES // 2),
        slice(max(0, y - half), y + half),
        slice(max(0, x - half), x + half),
    )
    part = [replace(volume, hu=volume.hu[some]) for volume in (low, full)]
    return strength(
        baseline.filter, part[0], part[1], baseline.strongest, tolerance=0.02 * baseline.strongest
    )


def tune_gaussian(low: Volume, full: Volume) -> float:
    """The sigma in mm, up to 6, that brings `low` nearest to `full`: see `strength`."""
    return strength(gaussian, low, full, BASELINES["gaussian"].strongest, tolerance=0.02)


def strength(filtered: Filter, low: Volume, full: Volume, strongest: float, tolerance: float) -> float:
    """The strength, from 0 to `strongest`, of least RMSE in HU over the full dose's voxels that are not padding."""
    counted = full.hu > AIR_HU
    target = full.hu[counted].astype(np.float32)

    def mean_square(value: float) -> float:
        return float(np.square(filtered(low, value).hu[counted] - target).mean())

    found = minimize_scalar(
        mean_square, bounds=(0, strongest), method="bounded", options={"xatol": tolerance}
    )
    return float(found.x)


def _like(volume: Volume, hu: np.ndarray) -> Volume:
    """`hu` as whole HU on the volume's grid; padding stays."""
    whole = np.rint(hu).clip(AIR_HU, np.iinfo(np.int16).max).astype(np.int16)
    return replace(volume, hu=np.where(volume.hu == AIR_HU, np.int16(AIR_HU), whole))
