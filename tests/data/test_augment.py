from __future__ import annotations

import numpy as np
import pytest
import torch

from ldct_dist.ct.dose import DoseConfig, simulate_full_dose, simulate_low_dose
from ldct_dist.data.augment import AugmentConfig, apply, draw, move_all, move_each

EVERY_MOVE = np.array(
    [[z, y, x, swap, 1.0] for z in (0, 1) for y in (0, 1) for x in (0, 1) for swap in (0, 1)]
)


def some_pair(*size):
    """Sixteen times the same sample, each voxel another number."""
    return torch.arange(2 * np.prod(size)).float().view(2, 1, 1, *size).repeat(1, 16, 1, 1, 1, 1)


def test_a_samples_numbers_do_not_depend_on_what_is_drawn_with_them():
    config = AugmentConfig(dose_mix=(0.5, 2.0))
    many = draw(config, seed=3, first=0, count=64)
    assert np.array_equal(many[40:48], draw(config, seed=3, first=40, count=8))
    assert not np.array_equal(many, draw(config, seed=4, first=0, count=64))


def test_all_symmetries_come_up_evenly_and_factors_lie_in_their_range():
    drawn = draw(AugmentConfig(dose_mix=(0.5, 2.0)), seed=0, first=10**9, count=4096)
    _, counts = np.unique(drawn[:, :4], axis=0, return_counts=True)
    assert len(counts) == 16
    assert counts.min() > 200
    assert 0.5 <= drawn[:, 4].min() < 0.51 < 1.99 < drawn[:, 4].max() < 2.0


def test_the_one_gather_for_gpus_does_what_moving_each_sample_does():
    pair = some_pair(3, 5, 5)
    flips, swap = torch.from_numpy(EVERY_MOVE[:, :4] > 0).split((3, 1), dim=1)
    moved = move_each(pair, EVERY_MOVE, torch.empty_like(pair))
    assert torch.equal(move_all(pair, flips, swap[:, 0]), moved)
    assert len({tuple(sample.flatten().tolist()) for sample in moved[0]}) == 16


def test_oblong_crops_are_flipped_but_not_transposed():
    pair = some_pair(3, 4, 5)
    moved, _ = apply(AugmentConfig(), pair, torch.zeros(16, 3, 2, dtype=torch.int64), EVERY_MOVE)
    assert torch.equal(moved[:, 0], moved[:, 1])  # these two differ in the transposition alone
    assert torch.equal(moved[:, -1], pair[:, -1].flip(-1, -2, -3))


@pytest.mark.parametrize("alone", ["flips", "transpose"])
def test_flips_and_transposition_can_each_be_had_alone(alone):
    off = {"flips", "transpose"} - {alone}
    config = AugmentConfig(**dict.fromkeys(off, False))
    drawn = draw(config, seed=0, first=0, count=16)
    pair = some_pair(3, 5, 5)
    moved, _ = apply(config, pair.clone(), torch.zeros(16, 3, 2, dtype=torch.int64), drawn)
    ways = {tuple(sample.flatten().tolist()) for sample in moved[0]}
    assert 2 <= len(ways) <= (8 if alone == "flips" else 2)


def test_a_flip_twice_is_no_flip():
    pair, box = some_pair(3, 5, 5), torch.tensor([[[0, 3], [-1, 4], [2, 9]]] * 16)
    config, flips = AugmentConfig(), EVERY_MOVE * [1, 1, 1, 0, 1]
    once = apply(config, pair, box, flips)
    twice = apply(config, *once, flips)
    assert torch.equal(twice[0], pair)
    assert torch.equal(twice[1], box)


def test_the_box_moves_with_the_voxels():
    box = torch.tensor([[[1, 3], [0, 4], [2, 5]]] * 16)
    pair = torch.zeros(2, 16, 1, 3, 5, 5)
    pair[..., 1:3, 0:4, 2:5] = 1
    moved, boxes = apply(AugmentConfig(), pair, box, EVERY_MOVE)
    for i in range(16):
        z, y, x = (slice(*edges) for edges in boxes[i].tolist())
        assert moved[:, i, 0, z, y, x].all()
        assert moved[:, i].sum() == pair[:, i].sum()


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_dose_mixing_scales_the_noise_and_leaves_full_dose_alone(factor):
    config = AugmentConfig(flips=False, transpose=False, dose_mix=(0.5, 1.5))
    low, full = torch.full((16, 1, 2, 2, 2), 30.0), torch.full((16, 1, 2, 2, 2), 10.0)
    drawn = EVERY_MOVE * [0, 0, 0, 0, factor]
    (mixed, same), _ = apply(config, torch.stack((low, full)), torch.zeros(16, 3, 2), drawn)
    assert torch.equal(same, full)
    assert torch.equal(mixed, torch.full_like(low, 10 + 20 * factor))


@pytest.mark.parametrize("factor", [0.6, 1.5])
def test_mixed_noise_is_that_of_the_dose_which_the_setting_names(factor):
    scanner = DoseConfig(photons=2e5, cutoff_per_mm=0.6)
    water = np.zeros((8, 64, 64))
    full = simulate_full_dose(water, (3.0, 2.0, 2.0), 0, scanner)
    low, another = (
        simulate_low_dose(full, dose, seed, scanner).hu
        for dose, seed in ((0.25, 1), (0.25 / (0.25 + factor**2 * 0.75), 2))
    )
    pair = torch.from_numpy(np.stack((low, full.hu))[:, None, None]).float()
    drawn = np.array([[0, 0, 0, 0, factor]])
    (mixed, _), _ = apply(AugmentConfig(dose_mix=(0.5, 2.0)), pair, torch.zeros(1, 3, 2), drawn)
    assert float(mixed.std()) == pytest.approx(another.std(), rel=0.03)


def test_a_range_of_doses_goes_from_small_to_large():
    with pytest.raises(ValueError, match=r"not from 1\.5 to 0\.5"):
        AugmentConfig(dose_mix=(1.5, 0.5))
