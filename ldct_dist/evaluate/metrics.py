"""RMSE, PSNR, SSIM and VIF of whole volumes against full dose, as a protocol defines them.

Slice by slice as in papers, or in 3-D. SSIM is scikit-image's, because the benchmarks' own figures are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from skimage.metrics import structural_similarity

from ldct_dist.ct.volume import padding_of
from ldct_dist.errors import UserError
from ldct_dist.evaluate.protocols import Protocol, Range, protocol_named
from ldct_dist.evaluate.slices import over_slices
from ldct_dist.evaluate.vif import DEPTH, LEAST_SIDE, shared_information

_SLAB = 8
"""Slices that are worked on at a time with 3-D windows, so that memory does not grow with the volume."""


def evaluate_volume(
    image_hu: np.ndarray,
    full_hu: np.ndarray,
    protocol: Protocol | str,
    mask: np.ndarray | None = None,
    measures: Sequence[str] = ("rmse_hu", "psnr_db", "ssim"),
) -> dict[str, float]:
    """The `measures` of `image_hu` against `full_hu`, both (z, y, x) HU; "vif" is one of those that may be asked for.

    mask: bool (z, y, x), the voxels that count; None: those that the protocol counts. Slices without a voxel that counts
    are left out. psnr_db is inf for equal images, vif nan if no slice has any structure.

    Raises UserError for an unknown protocol, for volumes of different shapes or with values that are not finite, where no
    voxel counts, or for SSIM none around which its window fits, and where slices are smaller, or in 3-D fewer, than a
    measure's window needs.
    """
    if isinstance(protocol, str):
        protocol = protocol_named(protocol)
    if image_hu.shape != full_hu.shape:
        raise UserError(
            f"evaluate: shapes differ, image {image_hu.shape} and full dose {full_hu.shape}; give one grid"
        )
    if not (np.isfinite(image_hu).all() and np.isfinite(full_hu).all()):
        raise UserError("evaluate: an image has values that are not finite; give HU")
    if mask is None:
        mask = np.ones(full_hu.shape, bool) if protocol.counts == "all" else ~padding_of(full_hu)
    if not mask.any():
        raise UserError("evaluate: no voxel to count; the mask is empty, or the full dose is all padding")
    return {name: _MEASURES[name](image_hu, full_hu, protocol, mask) for name in measures}


def rmse_hu(image_hu: np.ndarray, full_hu: np.ndarray, protocol: Protocol, mask: np.ndarray) -> float:
    """Root mean square error in HU over the mask, both images clipped to the protocol's rmse_range."""
    return float(np.sqrt(_mean_squares(image_hu, full_hu, protocol.rmse_range, protocol, mask)).mean())


def psnr_db(image_hu: np.ndarray, full_hu: np.ndarray, protocol: Protocol, mask: np.ndarray) -> float:
    """10 log10(data_range^2 / mean square error) over the mask, both images clipped to the protocol's window.

    A slice whose two images are equal inside the window has no finite PSNR. The mean is over the other slices, and inf if
    there are none.
    """
    squares = _mean_squares(image_hu, full_hu, protocol.window, protocol, mask)
    squares = squares[squares > 0]
    return float(np.mean(10 * np.log10(protocol.data_range**2 / squares))) if len(squares) else math.inf


def ssim(image_hu: np.ndarray, full_hu: np.ndarray, protocol: Protocol, mask: np.ndarray) -> float:
    """Structural similarity, 1 for equal images: the mean of its map over the mask, both images clipped to the
    protocol's window (Wang et al., IEEE Trans Image Process 13 (2004))."""
    if protocol.ssim == "gaussian11":
        border, options = 5, {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    else:
        border, options = 3, {"win_size": 7}
    deep = border if protocol.dims == 3 else 0
    _check_fits("SSIM", full_hu, (2 * deep + 1, 2 * border + 1))
    beyond = border if protocol.ssim_border == "zeros" else 0
    around = ((0, 0), (beyond, beyond), (beyond, beyond))
    inner = (slice(deep, -deep or None), slice(border, -border), slice(border, -border))
    zero = protocol.window[0] if protocol.ssim_zero is None else protocol.ssim_zero

    def of_slab(read: slice) -> tuple[float, int]:
        a, b = (
            np.pad(np.clip(x[read].astype(np.float64), *protocol.window) - zero, around)
            for x in (full_hu, image_hu)
        )
        whole = a.shape
        if protocol.dims == 2:
            a, b = a[0], b[0]
        _, similarity = structural_similarity(a, b, data_range=protocol.data_range, full=True, **options)
        counted = np.pad(mask[read], around)[inner]
        return similarity.reshape(whole)[inner][counted].sum(), counted.sum()

    sums, counts = map(np.array, zip(*over_slices(of_slab, _slabs(len(full_hu), deep)), strict=True))
    if not counts.any():
        raise UserError("SSIM: its window fits around no voxel that counts; they lie too near to the border")
    return float(_average(sums, counts, protocol).mean())


def vif(image_hu: np.ndarray, full_hu: np.ndarray, protocol: Protocol, mask: np.ndarray) -> float:
    """Visual information fidelity in the pixel domain, 1 for equal images: see `ldct_dist.evaluate.vif`. Both images
    are clipped to the protocol's rmse_range.

    A slice without structure has no VIF. The mean is over the other slices, and nan where there is none.
    """
    deep = DEPTH // 2 if protocol.dims == 3 else 0
    _check_fits("VIF", full_hu, (2 * deep + 1, LEAST_SIDE))
    source, image = (full_hu, image_hu) if protocol.vif_source == "full" else (image_hu, full_hu)

    def of_slab(read: slice) -> tuple[float, float]:
        a, b = (np.clip(x[read].astype(np.float64), *protocol.rmse_range) for x in (source, image))
        return shared_information(a, b, mask[read], 2 * deep + 1)

    kept, whole = zip(*over_slices(of_slab, _slabs(len(full_hu), deep)), strict=True)
    if protocol.average == "volume":
        kept, whole = (sum(kept),), (sum(whole),)
    ratios = [k / w for k, w in zip(kept, whole, strict=True) if w > 0]
    return float(np.mean(ratios)) if ratios else math.nan


_MEASURES = {"rmse_hu": rmse_hu, "psnr_db": psnr_db, "ssim": ssim, "vif": vif}
MEASURES = tuple(_MEASURES)
LABELS = {"rmse_hu": "RMSE, HU", "psnr_db": "PSNR, dB", "ssim": "SSIM", "vif": "VIF"}
"""What tables call them."""
LIMITS = {"rmse_hu": (0.0, math.inf), "ssim": (-1.0, 1.0), "vif": (0.0, math.inf)}
"""The lowest and highest possible value, of the measures that have such limits."""


def _check_fits(measure: str, hu: np.ndarray, window: tuple[int, int]) -> None:
    if len(hu) < window[0] or min(hu.shape[1:]) < window[1]:
        raise UserError(
            f"{measure}: {len(hu)} slices of {hu.shape[1:]} voxels are smaller than its window, "
            f"{window[0]} x {window[1]} x {window[1]}; crop less, or take a protocol in 2-D"
        )


def _slabs(slices: int, deep: int) -> Iterator[slice]:
    """Ranges of slices to read so that windows that reach `deep` slices up and down are centred once on every slice around
    which they fit."""
    step = _SLAB if deep else 1
    for start in range(deep, slices - deep, step):
        yield slice(start - deep, min(start + step, slices - deep) + deep)


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
