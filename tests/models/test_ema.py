from __future__ import annotations

import copy

import torch

from ldct_dist.models.ema import Ema
from ldct_dist.models.registry import ModelConfig, build
from ldct_dist.models.weights import load_weights, save_weights
from networks import random_network


def trained(model, steps: int, seed: int):
    """The model after some steps of what stands for training, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.01)
        yield model


def test_the_average_follows_faster_at_first():
    model = build(ModelConfig(size="xs"))
    ema = Ema(model, decay=0.9)
    before = [p.clone() for p in ema.module.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    left = 1.0
    for n in range(100):
        ema.update(model)
        left *= min(0.9, (1 + n) / (10 + n))
        if n in (0, 5, 99):
            for a, b in zip(ema.module.parameters(), before, strict=True):
                torch.testing.assert_close(a - b, torch.full_like(a, 1 - left), rtol=0, atol=1e-5)
    assert ema.updates == 100


def test_the_average_is_apart_from_the_model():
    model = random_network("unet3d")
    ema = Ema(model, decay=0.5)
    for _ in trained(model, 1, seed=0):
        pass
    assert not torch.equal(next(ema.module.parameters()), next(model.parameters()))
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_saved_and_loaded_it_goes_on_bit_for_bit(tmp_path):
    model = random_network("unet3d").to(memory_format=torch.channels_last_3d)
    unbroken = Ema(model, decay=0.9)
    for step, _ in enumerate(trained(model, 20, seed=0)):
        unbroken.update(model)
        if step == 9:
            save_weights(tmp_path / "ema.safetensors", unbroken.module)
            middle, updates = copy.deepcopy(model), unbroken.updates
        if step == 10:
            resumed = Ema(middle, decay=0.9)
            resumed.module.load_state_dict(load_weights(tmp_path / "ema.safetensors").state_dict())
            resumed.updates = updates
        if step >= 10:
            resumed.update(model)
    assert resumed.updates == unbroken.updates == 20
    for a, b in zip(unbroken.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(a, b)
