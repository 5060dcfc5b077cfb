"""What the networks are built from. Every block is local: no statistics over space anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Kernel = tuple[int, int, int]
Widths = tuple[int, ...]  # channels, level by level


def run(part: Callable[..., torch.Tensor], *inputs: Any, again: bool) -> torch.Tensor:
    """part(*inputs); with `again`, what it keeps for the backward pass is computed again there."""
    if again and torch.is_grad_enabled():
        # No layer draws random numbers, whose state need not be kept then.
        return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
    return part(*inputs)


def same_conv(channels_in: int, channels_out: int, kernel: Kernel, groups: int = 1) -> nn.Conv3d:
    """A convolution that keeps the size; beyond the border are zeros."""
    z, y, x = kernel
    return nn.Conv3d(channels_in, channels_out, kernel, padding=(z // 2, y // 2, x // 2), groups=groups)


class ResidualBlock(nn.Module):
    """x + conv(act(conv(act(x)))), dense kernels."""

    convolutions = 2
    """of `kernel`, one after the other: how far a block sees"""

    def __init__(self, channels: int, kernel: Kernel) -> None:
        super().__init__()
        self.first = same_conv(channels, channels, kernel)
        self.second = same_conv(channels, channels, kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # In place: its backward needs the answer alone, which the next convolution keeps anyhow.
        return x + self.second(F.leaky_relu_(self.first(F.leaky_relu(x, 0.1)), 0.1))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each voxel alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class NAFBlock(nn.Module):
    """NAFNet's block (Chen et al. 2022) in 3-D: depthwise convolution and gates by multiplication.

    Its channel attention pools over the whole image, which would make a crop mean something else than a
    volume; it is left out.
    """

    convolutions = 1

    def __init__(self, channels: int, kernel: Kernel) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.expand = nn.Conv3d(channels, 2 * channels, 1)
        self.depthwise = same_conv(2 * channels, 2 * channels, kernel, groups=2 * channels)
        self.project = nn.Conv3d(channels, channels, 1)
        self.feed_norm = ChannelNorm(channels)
        self.feed_expand = nn.Conv3d(channels, 2 * channels, 1)
        self.feed_project = nn.Conv3d(channels, channels, 1)
        # NAFNet starts its branches at zero: deep stacks without further normalisation train from there
        self.scale = nn.Parameter(torch.zeros(2, channels, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.scale[0] * self.project(_gate(self.depthwise(self.expand(self.norm(x)))))
        return x + self.scale[1] * self.feed_project(_gate(self.feed_expand(self.feed_norm(x))))


def _gate(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=1)
    return a * b


# Usual differences between neighbouring voxels, and between tissues: what the network sees is then about 1.
DETAIL_HU, MEAN_HU = 30.0, 300.0


def detail_and_mean(hu: torch.Tensor) -> torch.Tensor:
    """(b, 1, z, y, x) HU to (b, 2, z, y, x): what a voxel differs from the mean of its 3 x 3 pixels, and that mean.

    Noise of 10 HU rides on tissues 1000 HU apart. Told apart beforehand and each in its own unit, the network
    need not find the small difference of large numbers itself, which is slow to learn, and bf16 rounds the noise
    to 0.4 % of itself, not to 3 HU.
    """
    mean = F.avg_pool3d(hu, (1, 3, 3), stride=1, padding=(0, 1, 1), count_include_pad=False)
    return torch.cat(((hu - mean) / DETAIL_HU, mean / MEAN_HU), 1)


def unshuffle_plane(x: torch.Tensor) -> torch.Tensor:
    """(b, c, z, 2y, 2x) to (b, 4c, z, y, x): each 2 x 2 square of a slice becomes channels."""
    b, c, z, y, w = x.shape
    squares = x.reshape(b, c, z, y // 2, 2, w // 2, 2)
    return squares.permute(0, 1, 4, 6, 2, 3, 5).reshape(b, 4 * c, z, y // 2, w // 2)


def shuffle_plane(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `unshuffle_plane`."""
    b, c, z, y, w = x.shape
    squares = x.reshape(b, c // 4, 2, 2, z, y, w)
    return squares.permute(0, 1, 4, 5, 2, 6, 3).reshape(b, c // 4, z, 2 * y, 2 * w)
