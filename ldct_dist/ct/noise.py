"""How much noise a scan has, and how fine it is, measured in its own soft tissue.

After the global noise level of Christianson et al., "Automated technique to measure noise in clinical CT examinations",
AJR 205 (2015): the standard deviations in small windows all over the soft tissue. Those of windows with anatomy scatter
upwards, and those of windows with noise alone are all alike, so the peak of their histogram is the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from ldct_dist.ct.volume import Volume

SOFT_TISSUE_HU = (0.0, 120.0)
"""Local means taken for soft tissue: muscle, liver, spleen, blood, with and without contrast."""

_WINDOW_MM = 6.0
_MIN_WINDOW = 5  # voxels
_FLAT = 0.1
_SAMPLED_SLICES = 4
_ENOUGH = 128  # windows along a side of a slice
_MIN_WINDOWS = 500  # fewer make no histogram
_SMOOTH = np.exp(-(np.arange(-16, 17) ** 2) / 32)  # a Gaussian of 4 bins


@dataclass(frozen=True)
class LocalMoments:
    """Moments in the window around every voxel, or every `stride`-th in y and in x, each (z, y, x).

    mean: HU. The others are of the image minus its local mean, which leaves edges, and nothing of an even gradient.
    slope: the variance in HU^2 that a plane fitted to the window explains. variance, neighbour: of the voxels, and the
    covariance of in-plane neighbours, both HU^2 about that plane; None where the latter was not asked for.
    """

    mean: np.ndarray
    slope: np.ndarray
    variance: np.ndarray
    neighbour: np.ndarray | None = None
    stride: int = 1

    @property
    def flat(self) -> np.ndarray:
        """The windows without an edge. Noise alone has a slope as well, but that is large in a fixed share of
        windows only."""
        return self.slope <= _FLAT * self.variance

    @cached_property
    def homogeneous(self) -> np.ndarray | None:
        """(z, y, x) bool: the windows of soft tissue with noise alone, whose standard deviation is within a fifth of the
        histogram's peak. None if there is too little soft tissue to tell."""
        low, high = SOFT_TISSUE_HU
        soft = (self.mean > low) & (self.mean < high) & self.flat
        if soft.sum() < _MIN_WINDOWS:
            return None
        std = np.sqrt(self.variance)
        counts, edges = np.histogram(std[soft], bins=200, range=(0.0, float(np.percentile(std[soft], 95))))
        # Zeros beyond the ends: mirrored at 0, the counts would draw a peak near it, of little noise, to 0.
        peak = int(np.argmax(np.convolve(counts, _SMOOTH, mode="same")))
        level = (edges[peak] + edges[peak + 1]) / 2
        return soft & (np.abs(std - level) <= max(0.2 * level, edges[1] - edges[0]))


def local_moments(
    hu: np.ndarray,
    spacing: tuple[float, float, float],
    stride: int = 1,
    neighbours: bool = False,
    share_out: Callable[..., Iterable[list[np.ndarray]]] = map,
) -> LocalMoments:
    """Moments of `hu` (z, y, x) in square in-plane windows of about 6 mm, at least 5 voxels wide.

    neighbours: whether also their covariance. share_out: the builtin `map`, or one that distributes the slices over threads.
    """
    sizes = [max(_MIN_WINDOW, 2 * round(_WINDOW_MM / mm / 2) + 1) for mm in spacing[1:]]
    # Slice by slice, since one slice and what is made of it fit into the processor's cache.
    in_plane = partial(_moments_in_plane, sizes=sizes, stride=stride, neighbours=neighbours)
    moments = share_out(in_plane, hu)
    mean, slope, variance, *neighbour = (np.stack(parts) for parts in zip(*moments, strict=True))
    return LocalMoments(mean, slope, variance, neighbour[0] if neighbours else None, stride)


def _moments_in_plane(
    image: np.ndarray, sizes: Sequence[int], stride: int, neighbours: bool
) -> list[np.ndarray]:
    """The arrays of LocalMoments for one slice, each (y, x), in windows of `sizes` voxels (y, x)."""
    half_y, half_x = (n // 2 for n in sizes)
    flat_y, flat_x = (np.full(n, 1 / n) for n in sizes)
    at_y, at_x = (np.arange(n) - n // 2 for n in sizes)
    # Mirrored at the borders twice as far as a window reaches: around what is in the windows there are windows, too.
    margins = ((2 * half_y, 2 * half_y), (2 * half_x, 2 * half_x))
    image = np.pad(image.astype(np.float32), margins, mode="symmetric")
    mean = _windows(_windows(image, 0, flat_y), 1, flat_x)
    # First, because squares of HU would drown the noise in float32.
    rough = image[half_y:-half_y, half_x:-half_x] - mean

    def average(values: np.ndarray) -> np.ndarray:
        return _windows(_windows(values, 0, flat_y, stride), 1, flat_x, stride)

    # What a straight slope along y and one along x, fitted in each window, contribute to its variance.
    rows = _windows(rough, 0, flat_y, stride)
    along_y = _windows(_windows(rough, 0, at_y * flat_y, stride), 1, flat_x, stride)
    along_x = _windows(rows, 1, at_x * flat_x, stride)
    slope = along_y**2 / (at_y * at_y).mean() + along_x**2 / (at_x * at_x).mean()
    plane = _windows(rows, 1, flat_x, stride) ** 2 + slope
    centres = mean[half_y:-half_y:stride, half_x:-half_x:stride]
    moments = [centres, slope, (average(rough * rough) - plane).clip(min=0)]
    if neighbours:
        # Beyond the inner part, every border voxel has its mirror image beside it.
        inner = rough[half_y:-half_y, half_x:-half_x]
        beside = inner * np.roll(inner, -1, 0) + inner * np.roll(inner, -1, 1)
        margins = ((half_y, half_y), (half_x, half_x))
        moments.append(average(np.pad(beside / 2, margins, mode="symmetric")) - plane)
    return moments


def sampled_moments(volume: Volume, stride: int | None = None) -> LocalMoments:
    """Moments of a few slices from all over the volume: enough to measure its noise and the mean HU of its tissue.

    stride: between windows. None: one in nine for slices of 512 x 512, which overlap enough; or all, if that leaves too
    little soft tissue to tell.
    """
    count = min(_SAMPLED_SLICES, len(volume.hu))
    rim_y, rim_x = (size // 8 for size in volume.hu.shape[1:])
    middle = volume.hu[:, rim_y : -rim_y or None, rim_x : -rim_x or None]  # patients lie there
    hu = middle[(np.arange(count) * 2 + 1) * len(middle) // (2 * count)]
    if stride is not None:
        return local_moments(hu, volume.spacing, stride)
    sparse = local_moments(hu, volume.spacing, max(1, min(hu.shape[1:]) // _ENOUGH))
    if sparse.stride == 1 or sparse.homogeneous is not None:
        return sparse
    return local_moments(hu, volume.spacing)


def _windows(values: np.ndarray, axis: int, weights: np.ndarray, stride: int = 1) -> np.ndarray:
    """Sums of `values` times `weights` in every `stride`-th of the windows that fit into `values` along `axis`."""
    along = np.moveaxis(values, axis, 0)
    size = len(along) - len(weights) + 1
    taps = [along[i : i + size : stride] for i in range(len(weights))]
    weights = weights.astype(values.dtype)
    if (weights == weights[0]).all():
        total = taps[0] + taps[1]
        for tap in taps[2:]:
            total += tap
        total *= weights[0]
    else:
        total = taps[0] * weights[0]
        weighted = np.empty_like(total)  # once: memory taken anew for each would cost more than the sums
        for tap, weight in zip(taps[1:], weights[1:], strict=True):
            total += np.multiply(tap, weight, out=weighted)
    return np.moveaxis(total, 0, axis)


def neighbour_correlation(moments: LocalMoments, where: np.ndarray) -> float:
    """Correlation of the noise of in-plane neighbours over the flat windows of `where`: near 1 for a smooth kernel,
    near 0 for a sharp one. It identifies the kernel without its name. `moments` must have neighbours."""
    assert moments.neighbour is not None
    where = where & moments.flat
    return float(moments.neighbour[where].sum() / moments.variance[where].sum())


def noise_std(moments: LocalMoments, where: np.ndarray) -> float:
    """Standard deviation of the noise in the median flat window of `where`, HU; metal streaks do not move it."""
    return float(np.sqrt(np.median(moments.variance[where & moments.flat])))
