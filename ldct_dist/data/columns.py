"""A block in memory, one column of chunks after the other.

Within a column every chunk is contiguous, so it is decoded to where it stays. If the block were one array, every chunk
would have to be copied into it after decoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ldct_dist.data.blocks import Block
from ldct_dist.store.shards import Region, Triple


class Columns:
    """The voxels of `block`, int16 HU, in `memory`: a flat array of at least as many elements."""

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
        """Call `read(region, array)` for each column, to read the voxels of that region into that array."""
        for region, hu in self._parts:
            read(region, hu)
        return self

    def cut(self, start: Triple, crop: np.ndarray) -> None:
        """Copy to `crop` (z, y, x), whose first voxel is at `start` in the volume, what it shares with the block."""
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
