"""RMSE, PSNR and SSIM of whole volumes against full dose, as the protocol says.

All are 2-D figures, computed slice by slice as the papers do. SSIM comes from scikit-image, because the
benchmarks' own numbers do; its map leaves out the border that its window does not fit into.

Padding is the same in both volumes, so counting it would flatter every figure: without a mask, the voxels counted
are those whose full dose is not padding. A mask of ones gives what the reference implementations print.
"""

from __future__ import annotations

import math

import numpy as np
from skimage.metrics import structural_similarity

from ldct_dist.ct.volume import AIR_HU
from ldct_dist.errors import UserError
from ldct_dist.evaluate.protocols import Protocol, Range, protocol_named


def evaluate_volume(
    image_hu: np.ndarray, full_hu: np.ndarray, protocol: Protocol | str, mask: np.ndarray | None = None
) -> dict[str, float]:
    """{"rmse_hu", "psnr_db", "ssim"} of `image_hu` against `full_hu`, all (z, y, x), HU.

    mask: bool (z, y, x), the voxels that count; None: those where `full_hu` is not padding. Slices of which nothing
    counts are left out. psnr_db is inf for equal images.

    Raises UserError for an unknown protocol, for volumes of different shapes, and where no voxel counts.
    """
    if isinstance(protocol, str):
        protocol = protocol_named(protocol)
    if image_hu.shape != full_hu.shape:
        raise UserError(
            f"evaluate: shapes differ, image {image_hu.shape} and full dose {full_hu.shape}; give one grid"
        )
    mask = full_hu > AIR_HU if mask is None else mask
    counted = np.flatnonzero(mask.any(axis=(1, 2)))
    if not len(counted):
        raise UserError("evaluate: no voxel to count; the mask is empty, or the full dose is all padding")
    image_hu, full_hu, mask = image_hu[counted], full_hu[counted], mask[counted]
    return {
        "rmse_hu": rmse_hu(image_hu, full_hu, protocol, mask),
        "psnr_db": psnr_db(image_hu, full_hu, protocol, mask),
        "ssim": ssim(image_hu, full_hu, protocol, mask),
    }


def rmse_hu(image_hu: np.ndarray, full_hu: np.ndarray, protocol: Protocol, mask: np.ndarray) -> float:
    """Root mean square error in HU over the mask, both images clipped to the protocol's rmse_range."""
    return float(np.sqrt(_mean_squares(image_hu, full_hu, protocol.rmse_range, protocol, mask)).mean())


def psnr_db(image_hu: np.ndarray, full_hu: np.ndarray, protocol: Protocol, mask: np.ndarray) -> float:
    """10 log10(data_range^2 / mean square error) over the mask, both images clipped to the protocol's window.

    A slice whose two images are equal inside the window has no finite PSNR. The mean is over the other slices, and
    inf where there is none.
    """
    squares = _mean_squares(image_hu, full_hu, protocol.window, protocol, mask)
    squares = squares[squares > 0]
    return float(np.mean(10 * np.log10(protocol.data_range**2 / squares))) if len(squares) else math.inf


def ssim(image_hu: np.ndarray, full_hu: np.ndarray, protocol: Protocol, mask: np.ndarray) -> float:
    """Structural similarity, 1 for equal images: the mean of its 2-D map over the mask, both images clipped to the
    protocol's window."""
    if protocol.ssim == "gaussian11":
        border, options = 5, {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    else:
        border, options = 3, {"win_size": 7}
    if min(full_hu.shape[1:]) <= 2 * border:
        raise UserError(f"SSIM: slices of {full_hu.shape[1:]} voxels are smaller than its window; crop less")
    inner = (slice(border, -border), slice(border, -border))
    zero = protocol.window[0] if protocol.ssim_zero is None else protocol.ssim_zero
    sums, counts = [], []
    for image, full, counted in zip(image_hu, full_hu, mask, strict=True):
        a, b = (np.clip(x.astype(np.float64), *protocol.window) - zero for x in (full, image))
        _, similarity = structural_similarity(a, b, data_range=protocol.data_range, full=True, **options)
        sums.append(similarity[inner][counted[inner]].sum())
        counts.append(counted[inner].sum())
    return float(_average(np.array(sums), np.array(counts), protocol).mean())


def _mean_squares(
    image_hu: np.ndarray, full_hu: np.ndarray, hu_range: Range, protocol: Protocol, mask: np.ndarray
) -> np.ndarray:
    """Mean square errors in HU^2: (z,) of the slices, or (1,) of the volume."""
    sums = [
        np.square(
            np.clip(image[m].astype(np.float64), *hu_range) - np.clip(full[m].astype(np.float64), *hu_range)
        ).sum()
        for image, full, m in zip(image_hu, full_hu, mask, strict=True)
    ]
    return _average(np.array(sums), mask.sum(axis=(1, 2)), protocol)


def _average(sums: np.ndarray, counts: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Slices' sums (z,) over slices' counts (z,): each slice's own mean, or one mean of the volume as (1,)."""
    if protocol.average == "volume":
        return np.array([sums.sum() / counts.sum()])
    return sums[counts > 0] / counts[counts > 0]
