"""What is padding, and what is air that a scanner saw."""

from __future__ import annotations

import numpy as np
import pytest

from ldct_dist.ct.volume import AIR_HU, padding_of


def air(shape: tuple[int, int, int] = (3, 128, 128)) -> np.ndarray:
    """HU of air under the noise of a sharp kernel: a sixth of it is cut off."""
    return np.random.default_rng(0).normal(-1000, 24, shape).clip(AIR_HU).astype(np.int16)


def outside_circle(size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return x * x + y * y > (size / 2) ** 2


@pytest.mark.parametrize("size", [40, 128, 512])
def test_the_corners_outside_a_circle_are_padding_to_their_tips(size):
    """They taper off to a voxel's width where the circle touches the border."""
    corners = np.broadcast_to(outside_circle(size), (2, size, size))
    found = padding_of(np.where(corners, AIR_HU, 40).astype(np.int16))
    assert (found & ~corners).sum() == 0
    assert (found == corners).mean() > 0.999


def test_air_whose_noise_is_cut_off_is_no_padding():
    assert (air() == AIR_HU).mean() > 0.15
    assert padding_of(air()).mean() < 1e-3


def test_padding_is_found_in_the_midst_of_air():
    padded = np.broadcast_to(outside_circle(128), (3, 128, 128))
    found = padding_of(np.where(padded, AIR_HU, air()).astype(np.int16))
    assert found[padded].mean() > 0.99
    assert found[~padded].mean() < 0.01


def test_slices_are_judged_one_by_one():
    hu = air()
    hu[1, 20:40, 30:50] = AIR_HU
    found = padding_of(hu)
    assert found[1, 20:40, 30:50].all()
    assert not found[::2, 20:40, 30:50].any()


def test_volumes_smaller_than_the_square_are_judged_too():
    assert padding_of(np.full((2, 1, 3), AIR_HU, np.int16)).all()
    assert not padding_of(np.full((2, 1, 3), -1000, np.int16)).any()
