"""Visual information fidelity in the pixel domain.

The share of the information that an observer could get from the source which is left in the image. At four scales, both
are modelled as locally Gaussian, the image as the attenuated source plus noise; the observer's own noise has a variance
of 2 HU^2 (Sheikh & Bovik, IEEE Trans Image Process 15 (2006), in the pixel-domain form that they published with it).
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import correlate1d

_SCALES = 4
_OBSERVER_HU2 = 2.0
_TINY = 1e-10
DEPTH = 3  # slices under a window in 3-D: they are several times as thick as voxels are wide
LEAST_SIDE = 41  # voxels: at the fourth scale one window is left


def shared_information(
    source: np.ndarray, image: np.ndarray, mask: np.ndarray, depth: int = 1
) -> tuple[float, float]:
    """(the information in `source` that `image` keeps, all information in `source`), in decimal digits.

    source, image: float64 HU, (z, y, x). depth: slices under a window, 1 or DEPTH.
    mask: bool of the same shape; a window counts by its centre.
    """
    kept = whole = 0.0
    mask = mask[depth // 2 : len(mask) - depth // 2]
    for scale in range(_SCALES):
        line = _gaussian(2 ** (_SCALES - scale) + 1)
        half = len(line) // 2
        if scale:
            source, image = (_smooth(x, line)[:, ::2, ::2] for x in (source, image))
            mask = mask[:, half:-half, half:-half][:, ::2, ::2]
        counted = mask[:, half:-half, half:-half]

        def local(x: np.ndarray, line: np.ndarray = line, counted: np.ndarray = counted) -> np.ndarray:
            return _across(_smooth(x, line), depth)[counted]

        a, b = local(source), local(image)
        var_a, var_b = ((local(x * x) - mean * mean).clip(0) for x, mean in ((source, a), (image, b)))
        covariance = local(source * image) - a * b
        # Where one of the images is flat, or their correlation negative, no information of the source is kept.
        structured = (var_a >= _TINY) & (var_b >= _TINY) & (covariance > 0)
        gain = np.where(structured, covariance / (var_a + _TINY), 0)
        noise = np.where(structured, var_b - gain * covariance, np.where(var_b < _TINY, 0, var_b)).clip(_TINY)
        var_a = np.where(var_a < _TINY, 0, var_a)
        kept += float(np.log10(1 + gain**2 * var_a / (noise + _OBSERVER_HU2)).sum())
        whole += float(np.log10(1 + var_a / _OBSERVER_HU2).sum())
    return kept, whole


def _gaussian(size: int) -> np.ndarray:
    """`size` weights of a Gaussian with a sigma of size / 5."""
    at = np.arange(size) - size // 2
    weights = np.exp(-(at**2) / (2 * (size / 5) ** 2))
    return weights / weights.sum()


def _smooth(hu: np.ndarray, line: np.ndarray) -> np.ndarray:
    """`hu` (z, y, x) averaged with a 2-D window, without the border where the window does not fit."""
    half = len(line) // 2
    return correlate1d(correlate1d(hu, line, axis=1), line, axis=2)[:, half:-half, half:-half]


def _across(hu: np.ndarray, depth: int) -> np.ndarray:
    """`hu` (z, y, x) averaged over windows of `depth` slices, without slices around which the window does not fit."""
    if depth == 1:
        return hu
    inner = len(hu) - depth + 1
    return np.tensordot(_gaussian(depth), np.stack([hu[i : i + inner] for i in range(depth)]), axes=1)
