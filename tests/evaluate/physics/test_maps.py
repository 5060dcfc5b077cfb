import numpy as np
import pytest

from ldct_dist.ct import noise
from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError
from ldct_dist.evaluate.physics.maps import CONSPICUOUS, hallucination_map, noise_map, smoothed_noise

SPACING = (5.0, 1.0, 1.0)


def volume(hu):
    return Volume(np.rint(hu).astype(np.int16), SPACING)


@pytest.fixture(scope="module")
def scan():
    """truth, full dose and quarter dose; the right half is twice as noisy."""
    rng = np.random.default_rng(0)
    truth = np.full((3, 128, 128), 60.0)
    std = np.where(np.arange(128) < 64, 8.0, 16.0)
    full = truth + rng.normal(0, 1, truth.shape) * std
    low = full + rng.normal(0, 1, truth.shape) * std * np.sqrt(3)
    return truth, volume(full), volume(low)


def hallucinated(image, low, full):
    moments = noise.local_moments(full.hu, full.spacing)
    return hallucination_map(image, full, smoothed_noise(low, full, moments))


def test_noise_map_shows_where_noise_is(scan):
    _, full, _ = scan
    found = noise_map(full.hu, SPACING)
    assert np.median(found[:, :, :60]) == pytest.approx(8, rel=0.05)
    assert np.median(found[:, :, 68:]) == pytest.approx(16, rel=0.05)


def test_a_perfect_denoiser_adds_nothing_beyond_chance(scan):
    truth, full, low = scan
    found = hallucinated(truth, low, full)
    for half in (found[:, 10:-10, 10:54], found[:, 10:-10, 74:-10]):
        assert half.std() == pytest.approx(1, rel=0.25)
    assert (np.abs(found) > CONSPICUOUS).mean() < 2e-3
    assert (hallucinated(full.hu, low, full) == 0).all()


@pytest.mark.parametrize("cutoff_per_mm", [0.4, 0.6, 0.9])
def test_the_map_is_a_standard_normal_whatever_the_kernel(cutoff_per_mm):
    """A local noise level does not see the blotches of a soft kernel, which stand out of it if they are not allowed for."""
    f = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256))
    kernel = f**0.5 * (0.5 + 0.5 * np.cos(np.pi * np.minimum(f / cutoff_per_mm, 1)))
    white = np.random.default_rng(0).normal(0, 1, (2, 8, 256, 256))
    own, added = (10 * n / n.std() for n in np.fft.ifft2(np.fft.fft2(white) * kernel).real)
    truth = np.full(own.shape, 60.0)
    found = hallucinated(truth, volume(truth + own + np.sqrt(3) * added), volume(truth + own))
    found = found[:, 10:-10, 10:-10]
    assert found.std() == pytest.approx(1, abs=0.03)
    assert (np.abs(found) > CONSPICUOUS).mean() < 2e-4


def test_an_invented_lesion_and_an_erased_one_stand_out(scan):
    truth, full, low = scan
    image = truth.copy()
    image[1, 38:44, 28:34] += 30
    image[1, 88:94, 28:34] -= 30
    found = hallucinated(image, low, full)
    assert found[1, 41, 31] > CONSPICUOUS + 2
    assert found[1, 91, 31] < -CONSPICUOUS - 2
    assert np.unravel_index(found.argmax(), found.shape)[0] == 1


def test_without_soft_tissue_there_is_no_measure():
    air = Volume(np.full((2, 64, 64), -1000, np.int16), SPACING)
    with pytest.raises(UserError, match="too little soft tissue"):
        hallucinated(air.hu, air, air)


def test_where_a_dose_has_no_noise_there_is_no_measure(scan):
    """A phantom as the full dose, or a low dose that is the full dose."""
    truth, full, low = scan
    with pytest.raises(UserError, match="full dose shows no noise"):
        hallucinated(low.hu, low, volume(truth))
    with pytest.raises(UserError, match="low dose adds no noise"):
        hallucinated(low.hu, full, full)
