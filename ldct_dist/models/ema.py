"""The exponential moving average of the weights: what validation and denoising use."""

from __future__ import annotations

import copy

import torch

from ldct_dist.models.registry import Denoiser


class Ema:
    """`module` follows a network with `decay`, and faster at first, as `decay_after` says.

    decay 0 makes it a copy. `updates` belongs in a checkpoint beside the module's weights.
    """

    def __init__(self, model: Denoiser, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: Denoiser) -> None:
        """Move towards `model`, which has the same shapes, device and dtype."""
        decay = decay_after(self.updates, self.decay)
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - decay)
        self.updates += 1


def decay_after(updates: int, decay: float) -> float:
    """The share of the average that the next update leaves: min(decay, (1 + n) / (10 + n)) after n of them."""
    return min(decay, (1 + updates) / (10 + updates))
