from __future__ import annotations

import numpy as np
import pytest

from ldct_dist.ct import noise
from ldct_dist.ct.volume import AIR_HU, Volume

SPACING = (2.5, 0.7, 0.7)


def tissue(shape=(6, 512, 512), std=12.0):
    return np.rint(np.random.default_rng(0).normal(50, std, shape)).astype(np.int16)


@pytest.mark.parametrize("stride", [2, 3])
def test_strided_windows_are_those_of_every_place(stride):
    hu = tissue((2, 61, 70))
    dense, sparse = (noise.local_moments(hu, SPACING, n, neighbours=True) for n in (1, stride))
    for name in ("mean", "slope", "variance", "neighbour"):
        expected = getattr(dense, name)[:, ::stride, ::stride]
        np.testing.assert_allclose(getattr(sparse, name), expected, atol=1e-3)


def test_a_sample_tells_the_noise_of_the_whole():
    moments = noise.sampled_moments(Volume(tissue(), SPACING))
    assert moments.stride == 3
    assert noise.noise_std(moments, moments.homogeneous) == pytest.approx(12, rel=0.05)


def test_little_noise_among_edges_is_found():
    """Rough windows, fifty times as much, are no reason to take it for less than it is."""
    rng = np.random.default_rng(0)
    std = np.concatenate([rng.normal(1, 0.05, 1000), rng.uniform(2, 60, 3000)]).reshape(1, 40, 100)
    moments = noise.LocalMoments(np.full(std.shape, 50.0), np.zeros(std.shape), std**2)
    assert noise.noise_std(moments, moments.homogeneous) == pytest.approx(1, rel=0.1)


def test_where_soft_tissue_is_scarce_every_window_is_looked_at():
    hu = np.full((6, 512, 512), AIR_HU, np.int16)
    hu[:, 230:270, 230:270] = tissue((6, 40, 40))
    moments = noise.sampled_moments(Volume(hu, SPACING))
    assert moments.stride == 1
    assert noise.noise_std(moments, moments.homogeneous) == pytest.approx(12, rel=0.1)
