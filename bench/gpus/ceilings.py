"""(a) What the device does at best: a large matrix product, a copy, the best single convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gpus.timing import LAYOUTS, seconds

IN_A_ROW = 8
"""calls timed together: waiting for the device takes as long as a small kernel, and would lower a ceiling"""


def ceilings(device: torch.device, tiny: bool) -> dict[str, float]:
    """matmul and conv in FLOPs a second (bf16), copy in bytes a second, read and written."""
    n = 256 if tiny else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * n**3 / _each(lambda: a @ b, device)
    given = torch.empty(1 << (20 if tiny else 28), device=device)
    to = torch.empty_like(given)
    copy = 2 * given.nbytes / _each(lambda: to.copy_(given), device)
    return {"matmul_flops": matmul, "copy_bytes_per_s": copy, **_best_convolution(device, tiny)}


def _best_convolution(device: torch.device, tiny: bool) -> dict[str, float]:
    shapes = [(16, (4, 16, 16))] if tiny else [(256, (32, 64, 64)), (512, (32, 48, 48)), (1024, (32, 24, 24))]
    best = {}
    for layout, memory_format in LAYOUTS.items():
        rates = []
        for channels, size in shapes:
            conv = nn.Conv3d(channels, channels, 3, padding=1, device=device, dtype=torch.bfloat16)
            conv = conv.to(memory_format=memory_format)
            x = torch.randn(2, channels, *size, device=device, dtype=torch.bfloat16)
            x = x.contiguous(memory_format=memory_format)
            with torch.inference_mode():
                took = _each(lambda conv=conv, x=x: conv(x), device)
            rates.append(2 * 27 * channels**2 * x[:, 0].numel() / took)
        best[layout] = max(rates)
    return {"conv_flops": max(best.values()), **{f"conv_flops_channels_{k}": v for k, v in best.items()}}


def _each(act: Callable[[], Any], device: torch.device) -> float:
    """Seconds."""

    def row() -> None:
        for _ in range(IN_A_ROW):
            act()

    return seconds(row, device, 0.2) / IN_A_ROW
