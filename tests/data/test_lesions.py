from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldct_dist.ct.phantom import ball
from ldct_dist.data.lesions import LesionConfig, draw, insert, share_of_ball

THICK, THIN = (5.0, 0.8, 0.8), (0.7, 0.7, 0.7)


def some_tissue(*size, samples=3):
    """Low dose and full: muscle with noise of its own in each."""
    noise = torch.randn((2, samples, 1, *size), generator=torch.Generator().manual_seed(0))
    return (50 + 20 * noise).round()


def test_a_samples_lesions_follow_from_its_index_alone():
    config = LesionConfig(count=5)
    many = draw(config, seed=3, samples=range(10**9, 10**9 + 8))
    assert np.array_equal(many[[6, 2]], draw(config, seed=3, samples=[10**9 + 6, 10**9 + 2]))
    assert not np.array_equal(many, draw(config, seed=4, samples=range(10**9, 10**9 + 8)))
    assert len(np.unique(many)) == many.size  # nothing is drawn twice


def test_sizes_and_contrasts_fill_their_ranges_and_half_of_the_lesions_are_darker():
    drawn = draw(LesionConfig(count=1000, diameter_mm=(4, 9), contrast_hu=(5, 40)), seed=0, samples=range(4))
    middle, diameter, contrast = drawn[..., :3], drawn[..., 3], drawn[..., 4]
    assert 0 <= middle.min() < 0.01 < 0.99 < middle.max() < 1
    assert 4 <= diameter.min() < 4.05 < 8.95 < diameter.max() <= 9
    assert 5 <= abs(contrast).min() < 5.1 < 39 < abs(contrast).max() <= 40
    assert 0.45 < (contrast < 0).mean() < 0.55
    assert np.median(diameter) == pytest.approx(6, rel=0.03)  # the middle of a logarithmic scale


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    spacing=st.tuples(st.floats(0.5, 8), st.floats(0.4, 1.2), st.floats(0.4, 1.2)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 24), st.integers(1, 24)),
    seed=st.integers(0, 99),
)
def test_both_doses_gain_the_same_whole_hu_and_their_difference_none(spacing, size, seed):
    before, config = some_tissue(*size), LesionConfig(count=6, weight=7)
    pair = before.clone()
    weights = insert(config, pair, [spacing] * 3, draw(config, seed, range(3)))
    gained = pair - before
    assert torch.equal(pair[0] - pair[1], before[0] - before[1])
    assert torch.equal(gained, gained.round())
    assert torch.equal(weights == 7, gained[0] != 0)
    assert torch.equal(weights == 1, gained[0] == 0)


@pytest.mark.parametrize("spacing", [THICK, THIN])
@pytest.mark.parametrize("diameter", [5.0, 12.0])
def test_a_lesion_has_its_size_and_contrast_and_lies_where_it_was_drawn(spacing, diameter):
    config = LesionConfig(count=1, diameter_mm=(diameter, diameter))
    pair = torch.zeros(2, 1, 1, 41, 61, 61)
    insert(config, pair, [spacing], np.array([[[20.5 / 41, 20.5 / 61, 40.5 / 61, diameter, 1000.0]]]))
    hu = pair[1, 0, 0].double()
    at = (hu.sum(dim=d) for d in ((1, 2), (0, 2), (0, 1)))
    for along, expected in zip(at, (20, 20, 40), strict=True):
        middle = (along * torch.arange(len(along))).sum() / along.sum()
        assert middle == pytest.approx(expected, abs=0.01)
    sharp = ball(diameter, spacing)
    assert hu.sum() / 1000 == pytest.approx(sharp.sum(), rel=0.02)
    assert 0.9 * sharp.max() < hu.max() / 1000 < 1.02 * sharp.max()  # a kernel takes little from the top


def test_a_thick_slice_shows_as_much_of_a_ball_as_thin_ones_add_up_to():
    y = torch.linspace(-6, 6, 49)
    radius, thin = torch.tensor(3.0), torch.tensor(0.5)
    z = torch.arange(-2.25, 2.5, 0.5)[:, None]  # ten slices in place of one of 5 mm
    whole = share_of_ball((torch.tensor(0.0), y, torch.tensor(0.0)), radius, torch.tensor(5.0))
    parts = share_of_ball((z, y, torch.tensor(0.0)), radius, thin)
    assert torch.allclose(parts.mean(0), whole, atol=1e-6)


def test_a_lesion_in_the_last_corner_is_cut_off_by_the_crop():
    pair = torch.zeros(2, 1, 1, 8, 64, 64)
    corner = [np.nextafter(1, 0)] * 3
    insert(LesionConfig(count=1), pair, [THICK], np.array([[[*corner, 8.0, 40.0]]]))
    assert pair[0, 0, 0, -1, -1, -1] == 31  # four fifths of the slice, seen through the kernel
    assert pair[..., :-1, :, :].sum() < pair.sum()
    assert not pair[..., :32].any()


def test_air_and_lung_take_no_lesions():
    pair = some_tissue(4, 32, 32, samples=1)
    pair[..., :16] = -850
    config = LesionConfig(count=200)
    before = pair.clone()
    weights = insert(config, pair, [THICK], draw(config, 0, [0]))
    assert torch.equal(pair[..., :16], before[..., :16])
    assert (weights[..., :16] == 1).all()
    assert (weights[..., 16:] > 1).float().mean() > 0.5


def test_each_sample_has_the_voxels_of_its_own_scan():
    config = LesionConfig(count=1)
    pair = torch.zeros(2, 2, 1, 21, 41, 41)
    insert(config, pair, [THICK, THIN], np.array([[[0.5, 0.5, 0.5, 6.0, 30.0]]] * 2))
    thick, thin = (pair[0, :, 0] != 0).sum((1, 2, 3)).tolist()
    assert thin > 5 * thick


@pytest.mark.parametrize("words", [{"diameter_mm": (9, 4)}, {"contrast_hu": (40, 5)}])
def test_a_range_goes_from_small_to_large(words):
    with pytest.raises(ValueError, match="from small to large"):
        LesionConfig(**words)
