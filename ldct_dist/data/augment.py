"""Augmentation on the device, drawn from the sample's index alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
from pydantic import AfterValidator, Field

from ldct_dist.config import Config, rising
from ldct_dist.data.lesions import LesionConfig

Factor = Annotated[float, Field(ge=0, le=4)]
_DRAWS = 8  # numbers reserved for each sample: two counts of Philox, four numbers each


class AugmentConfig(Config):
    flips: bool = True
    """mirror along z, y and x"""
    transpose: bool = True
    """swap y and x, for crops that are as wide as they are high"""
    dose_mix: Annotated[tuple[Factor, Factor], AfterValidator(rising)] = (1.0, 1.0)
    """what the low dose adds, low - full, is multiplied by a factor f drawn from this range, as if the dose had been
    another: a / (a + f^2 (1 - a)) in place of a, for a quarter and f from 0.6 to 1.5 doses from 0.48 to 0.13. So it is
    where the low dose is the full one with noise inserted. Where two scans were acquired, the full dose's own noise
    goes into the input as well, 1 - f of it: leave f at 1 there"""
    lesions: LesionConfig = LesionConfig()

    @property
    def moves(self) -> bool:
        """Whether any voxel changes its place."""
        return self.flips or self.transpose


def draw(config: AugmentConfig, seed: int, first: int, count: int) -> np.ndarray:
    """(count, 5) for `count` samples from index `first` on: flip z, flip y, flip x, transpose (each 0 or 1), noise factor.

    Philox is counter-based: sample i has the numbers at counter 2 i, however many samples are drawn at once.
    """
    philox = np.random.Philox(key=[seed, 0], counter=first * _DRAWS // 4)
    u = np.random.Generator(philox).random((count, _DRAWS))
    drawn = np.empty((count, 5))
    drawn[:, :3] = (u[:, :3] < 0.5) & config.flips
    drawn[:, 3] = (u[:, 3] < 0.5) & config.transpose
    low, high = config.dose_mix
    drawn[:, 4] = low + u[:, 4] * (high - low)
    return drawn


def apply(
    config: AugmentConfig,
    pair: torch.Tensor,
    box: torch.Tensor,
    drawn: np.ndarray,
    empty_like: Callable[[torch.Tensor], torch.Tensor] = torch.empty_like,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment a batch: pair (2, b, 1, z, y, x) float HU, low dose and full dose, and its box (b, 3, 2); returns both.

    Low and full dose are moved alike. drawn: of `draw`, for the b samples. `pair` may be overwritten. On a CPU, moving
    voxels takes the memory of a second batch, which `empty_like` provides.
    """
    if config.dose_mix != (1.0, 1.0):
        factor = torch.from_numpy(drawn[:, 4]).to(pair.device, pair.dtype)
        pair[0].sub_(pair[1]).mul_(factor.view(-1, 1, 1, 1, 1)).add_(pair[1])
    if config.moves:
        if pair.shape[-1] != pair.shape[-2]:
            drawn = drawn * [1, 1, 1, 0, 1]
        flips, swap = torch.from_numpy(drawn[:, :4] > 0).to(pair.device).split((3, 1), dim=1)
        if pair.device.type == "cpu":
            pair = move_each(pair, drawn, empty_like(pair))
        else:
            pair = move_all(pair, flips, swap[:, 0])
        size = torch.tensor(pair.shape[3:], device=box.device)[:, None]
        box = torch.where(flips[:, :, None], size - box.flip(-1), box)
        box = torch.where(swap[:, :, None], box[:, [0, 2, 1]], box)
    return pair, box


def move_each(pair: torch.Tensor, drawn: np.ndarray, moved: torch.Tensor) -> torch.Tensor:
    """Flip, then swap y and x, sample by sample, from `pair` to `moved`: on a CPU each is a single strided copy."""
    source, target = pair.numpy(), moved.numpy()
    for i, (*flips, swap, _) in enumerate(drawn):
        z, y, x = (slice(None, None, -1 if flip else 1) for flip in flips)
        sample = source[:, i, :, z, y, x]
        target[:, i] = sample.swapaxes(-1, -2) if swap else sample
    return moved


def move_all(pair: torch.Tensor, flips: torch.Tensor, swap: torch.Tensor) -> torch.Tensor:
    """The same in one gather for the whole batch: an index says for each voxel where it comes from.

    flips: (b, 3) bool; swap: (b,) bool.
    """
    _, b, _, *size = pair.shape
    grid = [torch.arange(n, device=pair.device) for n in size]
    z, y, x = (torch.where(f[:, None], n - 1 - i, i) for f, n, i in zip(flips.T, size, grid, strict=True))
    row, column = y[:, :, None], x[:, None, :]
    if size[1] == size[2]:  # the rows of a swapped sample run along the columns of what it was
        swap = swap[:, None, None]
        row, column = torch.where(swap, row.mT, row), torch.where(swap, column.mT, column)
    sample = torch.arange(b, device=pair.device)[:, None, None, None]
    return pair[:, sample, 0, z[:, :, None, None], row[:, None], column[:, None]][:, :, None]
