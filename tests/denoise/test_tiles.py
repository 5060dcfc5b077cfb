from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldct_dist.ct.volume import AIR_HU
from ldct_dist.denoise.tiles import denoise_volume, tiles
from ldct_dist.models.registry import ModelConfig, build


def random_model(name: str, thick: bool = False):
    """A network that is not the identity: all weights random, the last layer included."""
    torch.manual_seed(0)
    model = build(ModelConfig(name=name, size="xs", thick_slices=thick))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) * (1.2 / p[0].numel()) ** 0.5)
    return model


MODELS = {name: random_model(name) for name in ("unet3d", "nafnet3d", "redcnn3d")}


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(1, 60)] * 3),
    tile=st.tuples(*[st.integers(1, 40)] * 3),
    radius=st.tuples(*[st.integers(0, 30)] * 3),
    stride=st.sampled_from([(1, 1, 1), (1, 8, 8), (2, 4, 4)]),
)
def test_tiles_write_each_voxel_once_and_read_all_it_sees(shape, tile, radius, stride):
    shape = tuple(-(-n // s) * s for n, s in zip(shape, stride, strict=True))
    written = np.zeros(shape, int)
    for t in tiles(shape, tile, radius, stride):
        written[t.write] += 1
        for read, keep, write, n, r, s in zip(t.read, t.keep, t.write, shape, radius, stride, strict=True):
            assert read.start <= max(0, write.start - r)
            assert read.stop >= min(n, write.stop + r)
            assert read.start % s == 0
            assert (read.stop - read.start) % s == 0
            assert (read.start + keep.start, read.start + keep.stop) == (write.start, write.stop)
    assert (written == 1).all()


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    name=st.sampled_from(sorted(MODELS)),
    shape=st.tuples(st.integers(1, 30), st.integers(20, 130), st.integers(20, 130)),
    tile=st.tuples(st.integers(4, 20), st.integers(16, 70), st.integers(16, 70)),
)
def test_tiled_is_the_whole_volume_to_rounding(name, shape, tile):
    hu = np.random.default_rng(0).normal(0, 300, shape).clip(-1000, 3000).astype(np.int16)
    whole = denoise_volume(MODELS[name], hu, tile=(10_000, 10_000, 10_000)).astype(int)
    cut = denoise_volume(MODELS[name], hu, tile=tile).astype(int)
    assert np.abs(whole - hu).max() > 20  # the network does something
    difference = np.abs(whole - cut)
    # sums in another order may fall to the other side of a half
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-4


def test_a_fresh_network_is_the_identity_and_padding_stays():
    hu = np.random.default_rng(1).integers(-1024, 3000, (7, 33, 41)).astype(np.int16)
    for name in MODELS:
        assert np.array_equal(denoise_volume(build(ModelConfig(name=name, size="xs")), hu), hu)
    hu[:, :5] = AIR_HU
    assert (denoise_volume(MODELS["unet3d"], hu)[:, :5] == AIR_HU).all()


def test_progress_hears_of_every_tile():
    heard = []
    hu = np.zeros((8, 64, 64), np.int16)
    model = build(ModelConfig(size="xs"))
    denoise_volume(model, hu, tile=(8, 32, 32), progress=lambda *a: heard.append(a))
    assert heard == [(i, 4) for i in range(1, 5)]


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_left_as_it_was(training):
    model = build(ModelConfig(size="xs")).train(training)
    denoise_volume(model, np.zeros((2, 8, 8), np.int16))
    assert model.training is training
