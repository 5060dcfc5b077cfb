"""RED-CNN (Chen et al., IEEE Trans Med Imaging 36, 2017), the field's classic, in 3-D.

Five convolutions and five transposed ones, with shortcuts between them. In the original, valid convolutions shrink the
image and transposed ones restore its size; here all keep the size, with zeros beyond the border.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ldct_dist.models.blocks import Widths, run


class REDCNN3d(nn.Module):
    """(b, 2, z, y, x) to (b, 1, z, y, x), of any size."""

    stride = (1, 1, 1)
    layout = torch.channels_last_3d
    """of all activations; the input's own says nothing, where it has one channel"""

    def __init__(self, widths: Widths, flat: bool, recompute: int) -> None:
        super().__init__()
        (width,) = widths
        kernel = (1 if flat else 3, 5, 5)
        padding = (kernel[0] // 2, 2, 2)
        self.recompute = recompute
        self.encoder = nn.ModuleList(
            nn.Conv3d(2 if i == 0 else width, width, kernel, padding=padding) for i in range(5)
        )
        self.decoder = nn.ModuleList(
            nn.ConvTranspose3d(width, 1 if i == 4 else width, kernel, padding=padding) for i in range(5)
        )
        self.radius = tuple(10 * (k // 2) for k in kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=self.layout)
        layers = [*self.encoder, *self.decoder]
        shortcuts = []
        # In pairs: recomputing a single layer would save nothing, since only its input is kept, which is needed anyhow.
        for i in range(0, 10, 2):
            x = run(_pair, layers[i], layers[i + 1], x, again=self.recompute > 0)
            if i < 4:
                x = F.relu(x)
                shortcuts.append(x)
            elif i < 8:  # the last shortcut, from the input, is the Denoiser's own residual
                x = F.relu(x + shortcuts.pop())
        return x

    @property
    def last(self) -> nn.Module:
        return self.decoder[-1]


def _pair(first: nn.Module, second: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return second(F.relu(first(x)))
