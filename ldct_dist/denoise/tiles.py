"""Whole volumes in tiles that meet exactly: no seams, no blending, memory bounded by the tile.

The networks see a stated radius. A tile is read with a halo of at least that, aligned to the network's
stride; where it ends at the volume's border it ends there for the network too, so that the zeros which
convolutions put beyond the border stand where they stand for the whole volume. Each output voxel is then
what the whole volume would have given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from ldct_dist.ct.volume import AIR_HU
from ldct_dist.models.registry import Denoiser

Triple = tuple[int, int, int]
Slices = tuple[slice, slice, slice]

TILE: Triple = (32, 256, 256)  # voxels of output; with the halo about 4 times as many are computed at xxl
HU_RANGE = (AIR_HU, 32767)


@dataclass(frozen=True)
class Tile:
    """read: what the network is given; keep: what is taken from its answer, to be written to `write`."""

    read: Slices
    keep: Slices
    write: Slices


def tiles(shape: Triple, tile: Triple, radius: Triple, stride: Triple) -> Iterator[Tile]:
    """Cover a volume of `shape`, a multiple of `stride`, writing each voxel once."""
    axes = [
        [_span(start, min(start + t, n), n, r, s) for start in range(0, n, t)]
        for n, t, r, s in zip(
            shape, (_up(t, s) for t, s in zip(tile, stride, strict=True)), radius, stride, strict=True
        )
    ]
    for z, y, x in product(*axes):
        yield Tile(*((z[i], y[i], x[i]) for i in range(3)))


def denoise_volume(
    model: Denoiser,
    hu: np.ndarray,
    *,
    tile: Triple = TILE,
    device: torch.device | str | None = None,
    bf16: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """`model` on a whole volume: int16 HU (z, y, x) in and out, rounded to the nearest HU.

    Padding (AIR_HU) stays padding. `progress` hears (tiles done, tiles in all).
    """
    device = torch.device(device) if device is not None else next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    padded = np.pad(
        hu, [(0, -n % s) for n, s in zip(hu.shape, model.stride, strict=True)], constant_values=AIR_HU
    )
    shape: Triple = padded.shape
    out = np.empty_like(padded)
    cut = list(tiles(shape, tile, model.radius, model.stride))
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    training = model.training
    model.eval()
    with torch.inference_mode(), autocast:
        for i, t in enumerate(cut):
            given = torch.from_numpy(padded[t.read]).to(device, dtype)[None, None]
            answer = model(given)[0, 0][t.keep]
            out[t.write] = answer.round().clamp(*HU_RANGE).to("cpu", torch.int16).numpy()
            progress(i + 1, len(cut))
    model.train(training)
    out = out[tuple(slice(0, n) for n in hu.shape)]
    return np.where(hu <= AIR_HU, hu, out)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _span(start: int, stop: int, size: int, radius: int, stride: int) -> Slices:
    """read, keep and write along one axis."""
    halo = _up(radius, stride)
    first, last = max(0, start - halo), min(size, _up(stop, stride) + halo)
    return slice(first, last), slice(start - first, stop - first), slice(start, stop)
