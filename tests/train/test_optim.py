"""The optimizer against torch's own plain loop."""

from __future__ import annotations

import copy

import pytest
import torch

from ldct_dist.models.registry import build
from ldct_dist.train.config import OptimConfig, RunConfig
from ldct_dist.train.optim import learning_rate
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


def test_the_learning_rate_rises_evenly_then_falls_along_a_cosine_to_its_last_value():
    config = OptimConfig(lr=8.0, warmup=4, final_lr=0.25)
    rates = [learning_rate(config, step, 13) for step in range(13)]
    assert rates[:5] == [2.0, 4.0, 6.0, 8.0, 8.0]
    assert (rates[6], rates[8], rates[12]) == pytest.approx((5 + 3 * 0.5**0.5, 5.0, 2.0))


def test_a_run_of_one_step_after_the_warm_up_takes_it_at_the_full_rate():
    config = OptimConfig(lr=8.0, warmup=4, final_lr=0.25)
    assert [learning_rate(config, step, 5) for step in range(3, 5)] == [8.0, 8.0]
