import numpy as np
import pytest

from ldct_dist.errors import UserError
from ldct_dist.evaluate.physics.observer import detectability, laguerre_gauss

SIZE, VOXEL, DIAMETER, STD = 25, 0.7, 8.0, 20.0
Y, X = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
CHANNELS = laguerre_gauss(SIZE, (VOXEL, VOXEL), DIAMETER)
DISC = 10.0 * (np.hypot(Y, X) * VOXEL < DIAMETER / 2)
BLOB = 10.0 * np.exp(-(Y**2 + X**2) * VOXEL**2 / (2 * (DIAMETER / 4) ** 2))


def patches(n, lesion, seed):
    return np.random.default_rng(seed).normal(0, STD, (n, SIZE, SIZE)) + lesion


@pytest.mark.parametrize("lesion", [DISC, BLOB], ids=["disc", "blob"])
def test_white_noise_gives_the_ideal_observer(lesion):
    ideal = np.sqrt((lesion**2).sum()) / STD
    found = detectability(patches(2000, lesion, 1), patches(2000, 0, 2), CHANNELS)
    assert found.d_prime == pytest.approx(ideal, rel=0.05)
    assert found.low < found.d_prime < found.high
    assert found.high - found.low < 0.25


def test_few_samples_are_not_optimistic_and_the_interval_holds_the_truth():
    ideal = np.sqrt((BLOB**2).sum()) / STD
    found = [detectability(patches(30, BLOB, 2 * s), patches(30, 0, 2 * s + 1), CHANNELS) for s in range(100)]
    assert np.sqrt(np.mean([f.d_prime**2 for f in found])) == pytest.approx(ideal, rel=0.06)
    covered = np.mean([f.low <= ideal <= f.high for f in found])
    assert 0.88 <= covered <= 0.99  # 95 % of 100, give or take three standard errors


def test_no_lesion_is_not_seen():
    found = detectability(patches(300, 0, 1), patches(300, 0, 2), CHANNELS)
    assert found.low == 0
    assert found.d_prime < 0.3


def test_too_few_patches_are_refused():
    with pytest.raises(UserError, match="too few"):
        detectability(patches(4, DISC, 1), patches(4, 0, 2), CHANNELS)
