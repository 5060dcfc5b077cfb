"""Checking that two series show the same anatomy, voxel by voxel.

From a pair that is shifted by a pixel, a network learns to blur, and from one that differs by 20 HU, to be off by 20 HU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from ldct_dist.config import Config
from ldct_dist.ct import noise
from ldct_dist.ct.dicom import Series
from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError

_SLAB = 16  # slices in the middle of the volume whose shift is looked at
_WIDTH = 128  # pixels in the middle of each slice; half of it would still find shifts to 0.1 voxels in 60 HU of noise
_BODY_WINDOW_HU = (-200, 300)  # so that air, couch and bone do not dominate the correlation
_SUBVOXEL = 20  # shifts are measured to a twentieth of a voxel


class PairCheckConfig(Config):
    """How much a full-dose and a low-dose series may differ and still be a pair."""

    position_mm: float = Field(0.1, ge=0)
    """largest distance between the two voxels of one index, mm, as the headers say"""
    shift_voxels: float = Field(0.5, ge=0)
    """largest shift between the two images, voxels along any axis, as phase correlation finds it"""
    offset_hu: float = Field(5.0, ge=0)
    """largest difference of their soft tissue, HU"""
    noise_ratio: float = Field(1.0, ge=0)
    """least ratio of the low dose's noise to the full dose's: below it, the two have probably been swapped"""


def check_grid(full: Series, low: Series, limits: PairCheckConfig) -> None:
    """Raises UserError, with the measured number, unless both series have the same voxels. Reads no pixels."""
    if full.series_uid == low.series_uid:
        raise UserError(
            "full and low dose are the same series (SeriesInstanceUID); give two, or give one of them a UID of its own"
        )
    if full.shape != low.shape:
        raise UserError(f"grids differ: {_size(full)} voxels at full dose, {_size(low)} at low dose")
    apart = np.abs(np.subtract(full.positions, low.positions))
    if apart.max() > limits.position_mm:
        raise UserError(
            f"slice positions differ by up to {apart.max():.2f} mm (limit {limits.position_mm:g} mm, "
            "pairing.check.position_mm)"
        )
    apart = np.linalg.norm(_corners(full) - _corners(low), axis=1)
    if apart.max() > limits.position_mm:
        raise UserError(
            f"grids differ: voxels lie up to {apart.max():.2f} mm apart, spacing {_spacing(full)} at full and "
            f"{_spacing(low)} at low dose (limit {limits.position_mm:g} mm, pairing.check.position_mm)"
        )


def check_images(full: Volume, low: Volume, moments: noise.LocalMoments, limits: PairCheckConfig) -> None:
    """Raises UserError, with the measured number, unless both volumes, on one grid, show the same.

    moments: the sampled moments of `full`. HU and noise are compared where there is enough soft tissue to measure them.
    """
    shift = residual_shift(full, low)
    if np.abs(shift).max() > limits.shift_voxels:
        z, y, x = shift
        raise UserError(
            f"the images are shifted by ({z:.2f}, {y:.2f}, {x:.2f}) voxels (z, y, x) against each other "
            f"(limit {limits.shift_voxels:g}, pairing.check.shift_voxels)"
        )
    where = moments.homogeneous
    if where is None:
        return
    others = noise.sampled_moments(low, moments.stride)
    offset = float(np.median((others.mean - moments.mean)[where]))
    if abs(offset) > limits.offset_hu:
        raise UserError(
            f"soft tissue differs by {offset:+.1f} HU at low dose (limit {limits.offset_hu:g} HU, "
            "pairing.check.offset_hu)"
        )
    std_full, std_low = (float(np.sqrt(np.median(m.variance[where]))) for m in (moments, others))
    if std_low < limits.noise_ratio * std_full:
        raise UserError(
            f"the low dose is less noisy ({std_low:.1f} HU) than the full dose ({std_full:.1f} HU): swapped? "
            f"(lowest ratio allowed {limits.noise_ratio:g}, pairing.check.noise_ratio)"
        )


def residual_shift(full: Volume, low: Volume) -> np.ndarray:
    """The shift of `low` against `full`, voxels (z, y, x), in the middle of the volume.

    By subvoxel phase correlation (Guizar-Sicairos et al., Opt Lett 33 (2008)): the peak of the correlation is found on
    the voxel grid by an inverse FFT, and then on a finer grid around it by a Fourier sum at the grid's points.
    """
    shape = _slab(full).shape
    product = _spectrum(full).conj() * _spectrum(low)
    least = 100 * np.finfo(np.float32).eps / math.prod(shape) ** 2
    product /= np.maximum(np.abs(product), least)
    coarse = np.fft.irfftn(product, shape, axes=(0, 1, 2))
    peak = np.array(np.unravel_index(coarse.argmax(), shape))
    peak = np.where(peak > np.array(shape) // 2, peak - shape, peak)
    fine = [
        place + np.arange(-_SUBVOXEL, _SUBVOXEL + 1) / _SUBVOXEL if size > 1 else np.zeros(1)
        for place, size in zip(peak, shape, strict=True)
    ]
    correlation = _fourier_sum(product, fine, shape)
    best = np.unravel_index(correlation.argmax(), correlation.shape)
    return np.array([places[i] for places, i in zip(fine, best, strict=True)])


def _spectrum(volume: Volume) -> np.ndarray:
    """The spectrum of the middle of `volume`, tapered at its borders: the half that determines it, divided by its voxels."""
    hu = np.clip(_slab(volume), *_BODY_WINDOW_HU).astype(np.float32)
    hu -= hu.mean()
    # Tapered to zero at the borders, as the Fourier transform continues the image periodically.
    for axis, size in enumerate(hu.shape):
        taper = np.hanning(size + 2)[1:-1].astype(np.float32)
        hu *= taper.reshape([-1 if i == axis else 1 for i in range(3)])
    # With another norm, numpy would compute in float64, which takes three times as long.
    return np.fft.rfftn(hu, norm="forward")


def _fourier_sum(half: np.ndarray, places: Sequence[np.ndarray], shape: Sequence[int]) -> np.ndarray:
    """The image with the half spectrum `half`, up to a factor, at all combinations of `places` along its axes."""
    frequencies = [np.fft.fftfreq(shape[0]), np.fft.fftfreq(shape[1]), np.fft.rfftfreq(shape[2])]
    z, y, x = (
        np.exp(2j * np.pi * np.outer(at, f)).astype(half.dtype)
        for at, f in zip(places, frequencies, strict=True)
    )
    # All frequencies but the first and the middle one stand for their mirror images as well.
    both = np.ones(len(frequencies[2]), np.float32)
    both[1 : (shape[2] + 1) // 2] = 2
    rows = np.matmul(y, half * both)  # (z, places in y, x)
    layers = np.tensordot(z, rows, (1, 0))
    return np.tensordot(layers, x, (2, 1)).real


def _slab(volume: Volume) -> np.ndarray:
    middle = []
    for size, width in zip(volume.hu.shape, (_SLAB, _WIDTH, _WIDTH), strict=True):
        start = max(0, (size - width) // 2)
        middle.append(slice(start, start + width))
    return volume.hu[tuple(middle)]


def _corners(series: Series) -> np.ndarray:
    """The centres of the eight corner voxels in patient coordinates, mm, (8, 3)."""
    index = np.array([[k >> 2 & 1, k >> 1 & 1, k & 1] for k in range(8)]) * (np.array(series.shape) - 1)
    return np.asarray(series.origin) + (index * series.spacing) @ np.asarray(series.direction)


def _size(series: Series) -> str:
    return " x ".join(map(str, series.shape))


def _spacing(series: Series) -> str:
    return " x ".join(f"{mm:.4g}" for mm in series.spacing) + " mm"
