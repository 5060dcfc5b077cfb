"""The blocks that networks are built from. Each is local: none takes statistics over space."""

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
    """part(*inputs). again: recompute its activations in the backward pass, and do not keep them until then."""
    if again and torch.is_grad_enabled():
        # The random state need not be kept, since no layer draws random numbers.
        return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
    return part(*inputs)


def same_conv(channels_in: int, channels_out: int, kernel: Kernel, groups: int = 1) -> nn.Conv3d:
    """A convolution that keeps the size, with zeros beyond the border."""
    z, y, x = kernel
    return nn.Conv3d(channels_in, channels_out, kernel, padding=(z // 2, y // 2, x // 2), groups=groups)


class ResidualBlock(nn.Module):
    """x + conv(act(conv(act(x)))), dense kernels."""

    convolutions = 2
    """convolutions with `kernel` in a row, which give the receptive field"""

    def __init__(self, channels: int, kernel: Kernel) -> None:
        super().__init__()
        self.first = same_conv(channels, channels, kernel)
        self.second = same_conv(channels, channels, kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # In place: its backward needs only its output, which the next convolution keeps anyhow.
        return x + self.second(F.leaky_relu_(self.first(F.leaky_relu(x, 0.1)), 0.1))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each single voxel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class NAFBlock(nn.Module):
    """NAFNet's block (Chen et al. 2022) in 3-D: depthwise convolution and gates by multiplication.

    NAFNet's channel attention is left out: it pools over the whole image, so a crop would not give what the volume does.
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
        # As in NAFNet, the branches start at zero, which lets deep stacks train without further normalisation.
        self.scale = nn.Parameter(torch.zeros(2, channels, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.scale[0] * self.project(_gate(self.depthwise(self.expand(self.norm(x)))))
        return x + self.scale[1] * self.feed_project(_gate(self.feed_expand(self.feed_norm(x))))


def _gate(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=1)
    return a * b


# Typical differences between neighbouring voxels and between tissues, so that the network's inputs are around 1.
DETAIL_HU, MEAN_HU = 30.0, 300.0


def detail_and_mean(hu: torch.Tensor) -> torch.Tensor:
    """(b, 1, z, y, x) HU to (b, 2, z, y, x): each voxel's difference from the mean of its 3 x 3 pixels, and that mean.

    Noise of 10 HU is on top of tissues 1000 HU apart. With both separated beforehand, each in its own unit, the network
    need not learn to find small differences of large numbers, which is slow, and bf16 rounds the noise to 0.4 % of
    itself and not to 3 HU.
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
