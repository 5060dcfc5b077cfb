"""Augmentation on the device, drawn from the sample's index alone."""

from __future__ import annotations

import numpy as np
import torch

from ldct_dist.config import Config


class AugmentConfig(Config):
    flips: bool = True
    """mirror along z, y and x"""
    transpose: bool = True
    """swap y and x"""
    dose_mix: tuple[float, float] = (1.0, 1.0)
    """the noise low - full is scaled by a factor drawn from this range, as if the dose had been
    another: the noise of dose a, scaled by f, has the variance of dose a / f^2 (quantum noise)"""


def draw(config: AugmentConfig, seed: int, indices: list[int]) -> np.ndarray:
    """(n, 5) float: flip z, flip y, flip x, transpose (each 0 or 1) and the noise factor, by sample index."""
    rows = []
    for index in indices:
        u = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 4, index]))).random(5)
        flips = (u[:3] < 0.5) & config.flips
        low, high = config.dose_mix
        rows.append([*flips, (u[3] < 0.5) & config.transpose, low + u[4] * (high - low)])
    return np.array(rows, dtype=np.float64)


def apply(
    low: torch.Tensor, full: torch.Tensor, box: torch.Tensor, drawn: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Augment a batch: low and full (b, 1, z, y, x) float HU alike, and the box (b, 3, 2) with them."""
    factor = torch.as_tensor(drawn[:, 4], dtype=low.dtype).to(low.device, non_blocking=True)
    if (drawn[:, 4] != 1.0).any():
        low = full + factor.view(-1, 1, 1, 1, 1) * (low - full)
    pair = torch.stack((low, full), 1)  # both move alike, in one pass
    for axis in range(3):
        chosen = drawn[:, axis] > 0
        if chosen.any():
            pair = _where(chosen, pair.flip(axis + 3), pair)
            size = pair.shape[axis + 3]
            box = box.clone()
            box[chosen, axis] = size - box[chosen, axis].flip(-1)
    chosen = drawn[:, 3] > 0
    if chosen.any() and pair.shape[-1] == pair.shape[-2]:
        pair = _where(chosen, pair.transpose(-1, -2), pair)
        box = box.clone()
        box[chosen] = box[chosen][:, [0, 2, 1]]
    return pair[:, 0], pair[:, 1], box


def _where(chosen: np.ndarray, then: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    mask = torch.from_numpy(chosen).to(then.device, non_blocking=True)
    return torch.where(mask.view(-1, *[1] * (then.ndim - 1)), then, otherwise)
