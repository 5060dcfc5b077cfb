"""Large arrays whose memory is used again."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike


class Recycler:
    """Hands out arrays of up to `size` bytes, and takes their memory back when nobody holds them any more.

    Memory fresh from the system costs as much to touch for the first time as a crop costs to cut. Since an
    array lives as long as anything refers to it, a tensor made from it by torch.from_numpy included, nobody's
    data is ever overwritten. Safe to share between threads.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._free: deque[np.ndarray] = deque()

    def take(self, shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
        """An array with whatever its memory held before. A numpy view of it does not keep it alive."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._size, np.uint8)
        array = np.ndarray(shape, dtype, buffer=memory.data)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array
