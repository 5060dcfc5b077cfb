"""Work on volumes slice by slice, on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_MOST = 16
"""Threads: with more, their slices take much memory, and they wait for the interpreter's lock."""


def over_slices(function: Callable[..., T], *volumes: Iterable[Any]) -> list[T]:
    """What `function` returns for the slices of `volumes` at each z, in order, as by the builtin `map`.

    numpy, scipy and scikit-image calculate outside the interpreter's lock, so threads do. There are as many as torch may
    use. The results are the same with any number.
    """
    with ThreadPoolExecutor(min(_MOST, torch.get_num_threads())) as threads:
        return list(threads.map(function, *volumes))
