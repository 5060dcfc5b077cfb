"""A U-Net that sees far in the plane and little along z, as CT volumes are sampled.

The input's 2 x 2 squares become channels first (as in FFDNet, Zhang et al. 2018), so that no convolution
runs at full resolution, where it would cost most and see least. Strides are in the plane alone.
`nafnet3d` is the same network made of other blocks.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldct_dist.models.blocks import Kernel, NAFBlock, ResidualBlock, Widths, shuffle_plane, unshuffle_plane

DOWN: Kernel = (1, 2, 2)


class Stage(nn.Module):
    """Blocks in a row; with `recompute`, their activations are computed again in the backward pass."""

    def __init__(
        self, block: type[nn.Module], number: int, channels: int, kernel: Kernel, recompute: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(channels, kernel) for _ in range(number))
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            again = self.recompute and self.training and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return x


class UNet3d(nn.Module):
    """Three levels at strides 2, 4 and 8 in the plane, with `widths` channels.

    (b, 2, z, y, x) to (b, 1, z, y, x); y and x are multiples of 8.
    """

    stride = (1, 8, 8)

    def __init__(
        self, widths: Widths, block: type[ResidualBlock | NAFBlock], number: int, flat: bool, recompute: bool
    ) -> None:
        super().__init__()
        # flat: where slices are thick, neighbours in z say little about fine structure
        kernels: list[Kernel] = [(1, 3, 3) if flat else (3, 3, 3), (3, 3, 3), (3, 3, 3)]

        def stage(level: int) -> Stage:
            return Stage(block, number, widths[level], kernels[level], recompute)

        self.head = nn.Conv3d(2 * 4, widths[0], 1)
        self.encoders = nn.ModuleList([stage(0), stage(1)])
        self.downs = nn.ModuleList(nn.Conv3d(a, b, DOWN, stride=DOWN) for a, b in pairwise(widths))
        self.middle = stage(2)
        self.ups = nn.ModuleList(nn.ConvTranspose3d(b, a, DOWN, stride=DOWN) for a, b in pairwise(widths))
        self.merges = nn.ModuleList(nn.Conv3d(2 * w, w, 1) for w in widths[:2])
        self.decoders = nn.ModuleList([stage(0), stage(1)])
        self.tail = nn.Conv3d(widths[0], 4, 1)

        seen = number * block.convolutions  # convolutions in a stage
        along_z = seen * (2 * (kernels[0][0] // 2) + 3)
        # a convolution at stride s reaches s voxels further; blocks of 8 x 8 are then seen whole or not at all
        in_plane = seen * (2 * 2 + 2 * 4 + 8) + 7
        self.radius = (along_z, in_plane, in_plane)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head(unshuffle_plane(x))
        skips = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x = encoder(x)
            skips.append(x)
            x = down(x)
        x = self.middle(x)
        for level in (1, 0):
            x = self.merges[level](torch.cat((self.ups[level](x), skips[level]), 1))
            x = self.decoders[level](x)
        return shuffle_plane(self.tail(x))

    @property
    def last(self) -> nn.Conv3d:
        return self.tail


def unet3d(widths: Widths, flat: bool, recompute: bool) -> UNet3d:
    return UNet3d(widths, ResidualBlock, 1, flat, recompute)


def nafnet3d(widths: Widths, flat: bool, recompute: bool) -> UNet3d:
    return UNet3d(widths, NAFBlock, 2, flat, recompute)
