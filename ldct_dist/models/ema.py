"""The exponential moving average of the weights: what validation and denoising use."""

from __future__ import annotations

import copy

import torch

from ldct_dist.models.registry import Denoiser


class Ema:
    """`module` follows a network with `decay`, and faster at first: min(decay, (1 + n) / (10 + n)).

    decay 0 makes it a copy. `updates` is n, which belongs into a checkpoint beside the module's weights.
    """

    def __init__(self, model: Denoiser, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: Denoiser) -> None:
        """Move towards `model`, which has the same shapes, device and dtype."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - decay)
        self.updates += 1
