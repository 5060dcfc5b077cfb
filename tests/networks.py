"""Networks for tests that must not meet the identity."""

from __future__ import annotations

import torch

from ldct_dist.models.registry import Denoiser, ModelConfig, build


def random_network(name: str, *, gain: float = 1.5, **config) -> Denoiser:
    """The xs network with all its weights random, the last layer included; the same at every call."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3)
        model = build(ModelConfig(name=name, size="xs", **config))
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1:
                    p.copy_(torch.randn(p.shape) * (gain / p[0].numel()) ** 0.5)
    return model
