"""How a network is computed: memory layout and precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ldct_dist.models.registry import Denoiser


def lay_out(model: Denoiser, channels_last: bool) -> None:
    """Set the memory layout of weights and activations. Channels-last is fastest for 3-D convolutions on CPU and GPU.

    Kernels of one voxel keep their strides, with which they are in both layouts at once: DDP wants a gradient's strides
    to be those of its parameter.
    """
    model.lay_out(torch.channels_last_3d if channels_last else torch.contiguous_format)
    for p in model.parameters():
        if channels_last and p.ndim == 5 and p[0, 0].numel() > 1:
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d)


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """Around a forward pass on `device`; may be entered repeatedly. Without bf16 it changes nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
