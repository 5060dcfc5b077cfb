"""RED-CNN (Chen et al., IEEE Trans Med Imaging 36, 2017), the field's classic, in 3-D.

Five convolutions, five transposed ones, shortcuts between them. The original shrinks by its valid
convolutions and grows again; here both keep the size, with zeros beyond the border.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ldct_dist.models.blocks import Widths


class REDCNN3d(nn.Module):
    """(b, 2, z, y, x) to (b, 1, z, y, x), of any size."""

    stride = (1, 1, 1)

    def __init__(self, widths: Widths, flat: bool, recompute: bool) -> None:
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
        shortcuts = []
        for i, layer in enumerate(self.encoder):
            x = F.relu(self._run(layer, x))
            if i in (1, 3):
                shortcuts.append(x)
        for i, layer in enumerate(self.decoder):
            x = self._run(layer, x)
            if i in (0, 2):
                x = x + shortcuts.pop()
            if i < 4:  # the last shortcut, from the input, is the Denoiser's own residual
                x = F.relu(x)
        return x

    def _run(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        again = self.recompute and self.training and torch.is_grad_enabled()
        return checkpoint(layer, x, use_reentrant=False) if again else layer(x)

    @property
    def last(self) -> nn.Module:
        return self.decoder[-1]
