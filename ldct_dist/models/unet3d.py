"""A U-Net with a large receptive field in the plane and a small one along z, as CT volumes are sampled.

The input's 2 x 2 squares become channels first (as in FFDNet, Zhang et al. 2018), so that no convolution runs at full
resolution, where it would cost most and see least. Strides are in the plane only. `nafnet3d` is the same network made of
other blocks.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from ldct_dist.models.blocks import (
    Kernel,
    NAFBlock,
    ResidualBlock,
    Widths,
    run,
    shuffle_plane,
    unshuffle_plane,
)

DOWN: Kernel = (1, 2, 2)


class Stage(nn.Module):
    """Blocks in a row."""

    def __init__(self, block: type[nn.Module], number: int, channels: int, kernel: Kernel) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(channels, kernel) for _ in range(number))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class UNet3d(nn.Module):
    """Three levels at strides 2, 4 and 8 in the plane, with `widths` channels.

    (b, 2, z, y, x) to (b, 1, z, y, x); y and x are multiples of 8. flat: kernels of 1 in z at the finest level. recompute:
    how many levels, from the finest on, keep only the inputs and outputs of their stages for the backward pass.
    """

    stride = (1, 8, 8)
    layout = torch.channels_last_3d
    """of all activations; the input's own says nothing, where it has one channel"""

    def __init__(
        self, widths: Widths, block: type[ResidualBlock | NAFBlock], number: int, flat: bool, recompute: int
    ) -> None:
        super().__init__()
        # Where slices are thick, neighbours along z say little about fine structure.
        kernels: list[Kernel] = [(1, 3, 3) if flat else (3, 3, 3), (3, 3, 3), (3, 3, 3)]

        def stage(level: int) -> Stage:
            return Stage(block, number, widths[level], kernels[level])

        self.recompute = recompute
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
        x = unshuffle_plane(x).contiguous(memory_format=self.layout)
        skips = []
        for level in range(3):
            x = run(self._encode, level, x, again=level < self.recompute)
            skips.append(x)
        x = skips.pop()
        for level in (1, 0):
            x = run(self._join, level, x, skips.pop(), again=level < self.recompute)
            x = run(self.decoders[level], x, again=level < self.recompute)
        return shuffle_plane(self.tail(x))

    def _encode(self, level: int, x: torch.Tensor) -> torch.Tensor:
        """From the level above into this level, and through its stage."""
        if level == 0:
            return self.encoders[0](self.head(x))
        return [*self.encoders, self.middle][level](self.downs[level - 1](x))

    def _join(self, level: int, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """From the level below back into this level, merged with what was kept of it."""
        return self.merges[level](torch.cat((self.ups[level](x), skip), 1))

    @property
    def last(self) -> nn.Conv3d:
        return self.tail


def unet3d(widths: Widths, flat: bool, recompute: int) -> UNet3d:
    return UNet3d(widths, ResidualBlock, 1, flat, recompute)


def nafnet3d(widths: Widths, flat: bool, recompute: int) -> UNet3d:
    return UNet3d(widths, NAFBlock, 2, flat, recompute)
