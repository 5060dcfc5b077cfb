"""A block in memory, a column of chunks after the other: each chunk is decoded to where it stays, for in a column it
is contiguous. In one array, all would have to be copied to join the others."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ldct_dist.data.blocks import Block, Region, Triple


class Columns:
    """The voxels of `block`, int16 HU, in `memory`, which is flat and at least as large."""

    def __init__(self, block: Block, memory: np.ndarray) -> None:
        self.memory = memory  # held, because a view of it does not keep it alive
        self._parts: list[tuple[Region, np.ndarray]] = []
        start = 0
        for region in block.columns:
            shape = [r.stop - r.start for r in region]
            stop = start + math.prod(shape)
            self._parts.append((region, memory[start:stop].reshape(shape)))
            start = stop

    def fill(self, read: Callable[[Region, np.ndarray], object]) -> Columns:
        """Have `read` put each column's voxels where they belong."""
        for region, hu in self._parts:
            read(region, hu)
        return self

    def cut(self, start: Triple, crop: np.ndarray) -> None:
        """What a crop (z, y, x) with its corner at `start`, voxels of the volume, shares with the block."""
        for region, hu in self._parts:
            source, target = [], []
            for r, s, size in zip(region, start, crop.shape, strict=True):
                low, high = max(r.start, s), min(r.stop, s + size)
                if low >= high:
                    break
                source.append(slice(low - r.start, high - r.start))
                target.append(slice(low - s, high - s))
            else:
                crop[tuple(target)] = hu[tuple(source)]  # converts on the way
