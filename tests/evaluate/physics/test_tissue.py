import numpy as np
import pytest

from ldct_dist.ct.noise import local_moments
from ldct_dist.ct.phantom import body
from ldct_dist.ct.volume import AIR_HU, Volume
from ldct_dist.evaluate.physics.tissue import tissue_bias, tissues


@pytest.fixture(scope="module")
def truth():
    clean = body((6, 160, 160), (5.0, 2.4, 2.4), seed=0)
    return clean


def classes(full):
    return tissues(full, local_moments(full.hu, full.spacing))


def noisy(clean, std, seed):
    noise = np.random.default_rng(seed).normal(0, std, clean.shape)
    return np.where(clean.hu == AIR_HU, AIR_HU, np.rint(clean.hu + noise).clip(AIR_HU + 1)).astype(np.int16)


def test_a_shift_in_one_tissue_is_found_there_alone(truth):
    full = Volume(noisy(truth, 10, 1), truth.spacing)
    image = noisy(truth, 30, 2)
    image[(truth.hu > -140) & (truth.hu < -50)] += 15
    bias = tissue_bias(image, full, classes(full))
    assert bias["fat"] == pytest.approx(15, abs=1.5)
    assert abs(bias["soft"]) < 1
    assert abs(bias["bone"]) < 3
    assert classes(full)["soft"].sum() > 5000


def test_the_perfect_denoiser_has_no_bias(truth):
    """Though its voxels lie nearer to their class's mean than those of the full dose, by which classes are told."""
    full = Volume(noisy(truth, 25, 1), truth.spacing)
    bias = tissue_bias(truth.hu, full, classes(full))
    assert all(abs(bias[name]) < 1 for name in ("fat", "soft"))


def test_air_whose_noise_is_cut_off_is_air():
    """A second scan is as good as the first, though each has voxels at AIR_HU where the other has none."""
    hu = [np.random.default_rng(seed).normal(-1010, 15, (4, 80, 80)).clip(AIR_HU) for seed in (0, 1)]
    full, image = (Volume(np.rint(scan).astype(np.int16), (5.0, 1.0, 1.0)) for scan in hu)
    bias = tissue_bias(image.hu, full, classes(full))
    assert abs(bias["air"]) < 0.5


def test_lung_is_no_air_and_padding_is_nothing():
    hu = np.full((2, 80, 80), -1000, np.int16)
    hu[:, 20:60, 20:60] = -800
    hu[:, :, :10] = AIR_HU
    full = Volume(hu, (5.0, 1.0, 1.0))
    found = classes(full)
    assert found["lung"][0, 40, 40]
    assert found["air"][0, 10, 70]
    assert not found["air"][:, :, :10].any()
    assert set(tissue_bias(hu, full, found)) == {"air", "lung"}
