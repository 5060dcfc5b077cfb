"""Seconds of what runs on a device, and the most memory it takes there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

LONG = 5.0
"""seconds; what takes longer is timed once, or a kernel without a fast implementation would use up the other parts' time"""
LAYOUTS = {"last": torch.channels_last_3d, "first": torch.contiguous_format}


def seconds(act: Callable[[], Any], device: torch.device, least: float = 0.5) -> float:
    """Median of as many repetitions as take `least` seconds, after two that warm up. The second of the two where it takes
    over LONG. On a CPU, where figures mean nothing, the first."""
    if device.type == "cpu":
        return once(act, device)
    once(act, device)
    if (second := once(act, device)) > LONG:
        return second
    took: list[float] = []
    while sum(took) < least or len(took) < 3:
        took.append(once(act, device))
    return statistics.median(took)


def once(act: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    act()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak(device: torch.device) -> int:
    """Bytes that are there already, such as cuBLAS's workspace."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak(device: torch.device) -> int | None:
    """Bytes of tensors since `forget_peak`; None on CPU, where bench/plan.py measures."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
