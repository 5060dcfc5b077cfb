"""RMSE, PSNR and SSIM of a volume against full dose, slice by slice."""

from __future__ import annotations

import numpy as np
from skimage.metrics import structural_similarity

from ldct_dist.ct.volume import AIR_HU
from ldct_dist.evaluate.protocols import Protocol


def rmse_hu(image: np.ndarray, full: np.ndarray, counted: np.ndarray | None = None) -> float:
    """Root mean square difference in HU, over the voxels `counted` (all, if None)."""
    difference = image.astype(np.float64) - full
    return float(np.sqrt(np.mean(np.square(difference if counted is None else difference[counted]))))


def psnr_db(
    image: np.ndarray, full: np.ndarray, window: tuple[float, float], counted: np.ndarray | None = None
) -> float:
    """20 log10(data range / RMSE) of the windowed images, data range being the window's width; inf if equal."""
    error = rmse_hu(np.clip(image.astype(np.float64), *window), np.clip(full, *window), counted)
    return float("inf") if error == 0 else float(20 * np.log10((window[1] - window[0]) / error))


def ssim(
    image: np.ndarray, full: np.ndarray, window: tuple[float, float], counted: np.ndarray | None = None
) -> float:
    """Structural similarity of one windowed slice (Wang et al. 2004): Gaussian weights of sigma 1.5, the
    paper's constants, data range the window's width; the mean over the voxels `counted`."""
    a, b = (np.clip(x.astype(np.float64), *window) for x in (image, full))
    mean, local = structural_similarity(
        a, b, data_range=window[1] - window[0], gaussian_weights=True, use_sample_covariance=False, full=True
    )
    return float(mean if counted is None else local[counted].mean())


def evaluate_volume(image: np.ndarray, full: np.ndarray, protocol: Protocol) -> dict[str, float]:
    """rmse_hu, psnr_db and ssim of int16 HU (z, y, x) against full dose, each the mean over slices.

    Voxels that are padding in the full dose (AIR_HU: outside the scanner's field of view, and air that
    clipped there) do not count: they are equal in every image and would flatter it. Slices that are all
    padding are left out.
    """
    rows = []
    for one, reference in zip(image, full, strict=True):
        counted = reference > AIR_HU
        if counted.any():
            rows.append(
                (
                    rmse_hu(one, reference, counted),
                    psnr_db(one, reference, protocol.window, counted),
                    ssim(one, reference, protocol.window, counted),
                )
            )
    means = np.mean(rows, axis=0)
    return dict(zip(("rmse_hu", "psnr_db", "ssim"), map(float, means), strict=True))
