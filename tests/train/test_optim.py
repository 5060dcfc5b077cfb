"""The optimizer against torch's own plain loop."""

from __future__ import annotations

import copy

import pytest
import torch

from ldct_dist.models.registry import build
from ldct_dist.train.config import RunConfig
from ldct_dist.train.strategy.ddp import DDPStrategy
from ldct_dist.world import World


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_weights_in_any_layout_step_as_adam_says(name):
    """A fused kernel walks through memory: weight, gradient and moments in different layouts would be mixed up."""
    config = RunConfig(
        name="x",
        store="x",
        steps=1,
        channels_last=True,
        model={"size": "xs"},
        optim={"name": name, "weight_decay": 0.1},
    )
    torch.manual_seed(0)
    plain = build(config.model)
    strategy = DDPStrategy(copy.deepcopy(plain), config, World())
    assert not all(p.is_contiguous() for p in strategy.model.parameters())
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    adam = kind(plain.parameters(), lr=1e-3, betas=config.optim.betas, weight_decay=0.1, foreach=False)
    for _ in range(3):
        hu = torch.randn(2, 1, 4, 16, 16)
        strategy.backward((strategy(hu) - 1).square().mean())
        strategy.step(1e-3)
        strategy.forget_gradients()
        (plain(hu) - 1).square().mean().backward()
        adam.step()
        adam.zero_grad()
    for mine, theirs in zip(strategy.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
