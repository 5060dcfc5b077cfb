"""The exponential moving average of the weights: what validation and denoising use."""

from __future__ import annotations

import copy

import torch

from ldct_dist.models.registry import Denoiser


class Ema:
    """`module` has the average of a network's weights, with `decay`, or less at first: see `decay_after`.

    With decay 0 it is a copy. A checkpoint needs `updates` besides the module's weights.
    """

    def __init__(self, model: Denoiser, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: Denoiser) -> None:
        """Update the average with the weights of `model`, which have the same shapes, device and dtype."""
        decay = decay_after(self.updates, self.decay)
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - decay)
        self.updates += 1


def decay_after(updates: int, decay: float) -> float:
    """The weight of the old average in the next update, after n updates: min(decay, (1 + n) / (10 + n))."""
    return min(decay, (1 + updates) / (10 + updates))
