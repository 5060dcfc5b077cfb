"""Whether two series show the same anatomy, voxel by voxel: a network that learns from a pair that is off
by a pixel learns to blur, and from one that is off by 20 HU to be wrong by 20 HU."""

from __future__ import annotations

import numpy as np
from pydantic import Field
from skimage.registration import phase_cross_correlation

from ldct_dist.config import Config
from ldct_dist.ct import noise
from ldct_dist.ct.dicom import Series
from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError

_SLAB = 16  # slices in the middle of the volume whose shift is looked at
_WIDTH = 256  # pixels of the middle of each slice: the body, and Fourier transforms that cost little
_BODY_WINDOW_HU = (-200.0, 300.0)  # keeps air, couch and bone from ruling the correlation
_SUBVOXEL = 20  # shifts are measured to a twentieth of a voxel


class PairCheckConfig(Config):
    """What a full-dose and a low-dose series may differ by and still be a pair."""

    position_mm: float = Field(0.1, ge=0)
    """largest distance between the two voxels of one index, mm, as the headers say"""
    shift_voxels: float = Field(0.5, ge=0)
    """largest shift between the two images, voxels along any axis, as phase correlation finds it"""
    offset_hu: float = Field(5.0, ge=0)
    """largest difference of their soft tissue, HU"""
    noise_ratio: float = Field(1.0, ge=0)
    """least noise of the low dose over that of the full dose: below it the two were probably swapped"""


def check_grid(full: Series, low: Series, limits: PairCheckConfig) -> None:
    """Raises UserError, with the measured number, unless both series have the same voxels. Reads no pixels."""
    if full.series_uid == low.series_uid:
        raise UserError("full and low dose are one and the same series; name two")
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
    where = noise.homogeneous(moments)
    if where is None:
        return
    others = noise.sampled_moments(low)
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
            f"(least ratio {limits.noise_ratio:g}, pairing.check.noise_ratio)"
        )


def residual_shift(full: Volume, low: Volume) -> np.ndarray:
    """How many voxels (z, y, x) `low` lies displaced from `full`, in the middle of the volume.

    By subvoxel phase correlation: Guizar-Sicairos et al., Opt Lett 33 (2008).
    """
    tapered = []
    for volume in (full, low):
        hu = np.clip(_slab(volume), *_BODY_WINDOW_HU)
        # to zero at the borders, which the Fourier transform takes to adjoin their opposites
        taper = [np.hanning(n + 2)[1:-1] for n in hu.shape]
        tapered.append((hu - hu.mean()) * np.einsum("i,j,k->ijk", *taper).astype(np.float32))
    shift, *_ = phase_cross_correlation(*tapered, upsample_factor=_SUBVOXEL)
    return -np.asarray(shift)


def _slab(volume: Volume) -> np.ndarray:
    middle = []
    for size, width in zip(volume.hu.shape, (_SLAB, _WIDTH, _WIDTH), strict=True):
        start = max(0, (size - width) // 2)
        middle.append(slice(start, start + width))
    return volume.hu[tuple(middle)].astype(np.float32)


def _corners(series: Series) -> np.ndarray:
    """The centres of the eight corner voxels in patient coordinates, mm, (8, 3)."""
    index = np.array([[k >> 2 & 1, k >> 1 & 1, k & 1] for k in range(8)]) * (np.array(series.shape) - 1)
    return np.asarray(series.origin) + (index * series.spacing) @ np.asarray(series.direction)


def _size(series: Series) -> str:
    return " x ".join(map(str, series.shape))


def _spacing(series: Series) -> str:
    return " x ".join(f"{mm:.4g}" for mm in series.spacing) + " mm"
