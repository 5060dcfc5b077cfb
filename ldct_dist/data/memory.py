"""Large arrays that reuse each other's memory."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike


class Recycler:
    """Hands out arrays of up to `size` bytes, and reuses the memory of an array once nothing refers to it.

    Touching new memory for the first time takes as long as cutting a crop. An array lives as long as anything refers to
    it, such as a tensor made from it by torch.from_numpy, so data in use is never overwritten. Safe to share between
    threads.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._free: deque[np.ndarray] = deque()

    def take(self, shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
        """An array with undefined contents. Keep the array itself: a numpy view of it does not keep it alive."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._size, np.uint8)
        array = np.ndarray(shape, dtype, buffer=memory.data)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array
