"""What a denoiser has to beat: the classic filters, each with the strength that is best for the data.

All but the Gaussian come from scikit-image and work slice by slice, because slices are thick. Their strengths are in
units of the volume's own noise, so that a strength tuned on some patients suits others with another noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.optimize import minimize_scalar
from skimage.restoration import denoise_bilateral, denoise_nl_means, denoise_tv_chambolle

from ldct_dist.ct import noise
from ldct_dist.ct.volume import AIR_HU, Volume, padding_of
from ldct_dist.errors import UserError
from ldct_dist.evaluate.slices import over_slices
from ldct_dist.store.layout import BODY_HU

_LEAST_NOISE = 0.3  # HU: the noise of rounding to whole ones
_TUNED_SLICES = 4  # of each pair

Filter = Callable[[Volume, float], Volume]


def gaussian(volume: Volume, sigma_mm: float) -> Volume:
    """`volume` under a 3-D Gaussian of standard deviation `sigma_mm` along every axis; padding stays."""
    sigma = [sigma_mm / mm for mm in volume.spacing]
    return _like(volume, gaussian_filter(volume.hu.astype(np.float32), sigma, mode="nearest"))


def bilateral(volume: Volume, times_noise: float) -> Volume:
    """Means over 1.5 mm in plane, of voxels that differ by less than about `times_noise` standard deviations of the noise
    (Tomasi & Manduchi 1998)."""
    sigma, range_hu = 1.5 / min(volume.spacing[1:]), times_noise * _noise(volume)

    def smooth(hu: np.ndarray) -> np.ndarray:
        positive = hu.astype(np.float64) - AIR_HU  # scikit-image's function takes no others
        return denoise_bilateral(positive, sigma_color=range_hu, sigma_spatial=sigma, bins=2000, mode="edge")

    return _like(volume, np.stack(over_slices(smooth, volume.hu)) + AIR_HU)


def nlm(volume: Volume, times_noise: float) -> Volume:
    """Non-local means over 13 x 13 voxels, of 5 x 5 patches that differ by up to about `times_noise` standard deviations of
    the noise (Buades et al. 2005)."""
    h_hu = times_noise * _noise(volume)

    def smooth(hu: np.ndarray) -> np.ndarray:
        return denoise_nl_means(hu.astype(np.float32), patch_size=5, patch_distance=6, h=h_hu, fast_mode=True)

    return _like(volume, np.stack(over_slices(smooth, volume.hu)))


def tv(volume: Volume, times_noise: float) -> Volume:
    """Total-variation denoising with a weight of `times_noise` standard deviations of the noise (Chambolle 2004)."""
    weight_hu = times_noise * _noise(volume)

    def smooth(hu: np.ndarray) -> np.ndarray:
        return denoise_tv_chambolle(hu.astype(np.float32), weight=weight_hu, eps=1e-4, max_num_iter=100)

    return _like(volume, np.stack(over_slices(smooth, volume.hu)))


@dataclass(frozen=True)
class Baseline:
    """A filter, and the greatest strength that is tried, in the filter's own unit."""

    filter: Filter
    strongest: float
    unit: str


BASELINES = {
    "gaussian": Baseline(gaussian, 6.0, "mm"),
    "bilateral": Baseline(bilateral, 10.0, "x noise"),
    "nlm": Baseline(nlm, 5.0, "x noise"),
    "tv": Baseline(tv, 5.0, "x noise"),
}


def baseline_named(name: str) -> Baseline:
    """Raises UserError that lists the names there are."""
    if name not in BASELINES:
        raise UserError(f"baseline {name!r}: there is no such filter; choose from {', '.join(BASELINES)}")
    return BASELINES[name]


def tune(name: str, pairs: Sequence[tuple[Volume, Volume]]) -> float:
    """The strength of the named baseline, up to its strongest, that leaves the smallest share of the mean square error.

    It is measured on a few middle slices of each of `pairs` of low and full dose, and averaged over the pairs. Padding
    does not count, nor do pairs whose doses are equal there. Raises UserError if no pair is left.
    """
    baseline = baseline_named(name)
    parts = [(_middle(low), _middle(full)) for low, full in pairs]
    parts = [(low, full) for low, full in parts if (low.hu != full.hu)[~padding_of(full.hu)].any()]
    if not parts:
        raise UserError(
            f"baseline {name}: low and full dose are equal in all cases to tune it on; do without: --baselines ''"
        )

    def left(value: float) -> float:
        return sum(
            _mean_square(baseline.filter(low, value), full) / _mean_square(low, full) for low, full in parts
        )

    found = minimize_scalar(
        left, bounds=(0, baseline.strongest), method="bounded", options={"xatol": 0.02 * baseline.strongest}
    )
    return float(found.x)


def _middle(volume: Volume) -> Volume:
    start = max(0, (len(volume.hu) - _TUNED_SLICES) // 2)
    return replace(volume, hu=volume.hu[start : start + _TUNED_SLICES])


def _mean_square(volume: Volume, full: Volume) -> float:
    counted = ~padding_of(full.hu)
    return float(np.square(volume.hu[counted].astype(np.float32) - full.hu[counted]).mean())


def _noise(volume: Volume) -> float:
    """Standard deviation of the noise in HU; of the whole body, if there is too little soft tissue to measure it."""
    moments = noise.sampled_moments(volume)
    where = moments.homogeneous
    if where is None:
        where = moments.mean > BODY_HU
    flat = (where & moments.flat).any()
    return max(_LEAST_NOISE, noise.noise_std(moments, where)) if flat else _LEAST_NOISE


def _like(volume: Volume, hu: np.ndarray) -> Volume:
    """`hu` as whole HU on the volume's grid; padding stays."""
    whole = np.rint(hu).clip(AIR_HU, np.iinfo(np.int16).max).astype(np.int16)
    return replace(volume, hu=np.where(padding_of(volume.hu), np.int16(AIR_HU), whole))
