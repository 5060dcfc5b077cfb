import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ldct_dist.errors import UserError
from ldct_dist.evaluate.physics.ttf import transfer

VOXEL = 0.7
RADIUS = 12.0
CENTRE = (47.3, 48.1)


def disc(contrast, sigma_mm, fine=5):
    """(96, 96) HU: a disc under a Gaussian of sigma_mm, averaged over each voxel."""
    y, x = ((np.arange(96 * fine) + 0.5) / fine - 0.5 - c for c in CENTRE)
    sharp = contrast * (np.hypot(y[:, None], x) * VOXEL < RADIUS)
    blurred = gaussian_filter(sharp.astype(float), sigma_mm / VOXEL * fine)
    return blurred.reshape(96, fine, 96, fine).mean((1, 3))


@pytest.mark.parametrize("sigma", [0.6, 1.0])
def test_ttf_of_a_gaussian_blur_is_known(sigma):
    found = transfer(disc(100, sigma), (VOXEL, VOXEL), CENTRE, RADIUS)
    f = found.frequency
    # The voxel's own width blurs too: as a Gaussian of sigma = voxel / sqrt(12).
    truth = np.exp(-2 * np.pi**2 * (sigma**2 + VOXEL**2 / 12) * f**2)
    np.testing.assert_allclose(found.ttf, truth, atol=0.02)
    assert found.contrast_hu == pytest.approx(100, rel=0.01)
    half = np.sqrt(np.log(2) / (2 * np.pi**2 * (sigma**2 + VOXEL**2 / 12)))
    assert found.falls_to(0.5) == pytest.approx(half, rel=0.03)


def test_ttf_is_of_the_edge_and_not_of_its_sign_or_height():
    up, down = (transfer(disc(c, 0.8), (VOXEL, VOXEL), CENTRE, RADIUS) for c in (300, -90))
    np.testing.assert_allclose(up.ttf, down.ttf, atol=1e-9)
    assert down.contrast_hu == pytest.approx(-90, rel=0.01)


def test_averaged_noise_leaves_the_ttf():
    noise = np.random.default_rng(0).normal(0, 10, (64, 96, 96)).mean(0)
    clean, noisy = (transfer(disc(150, 0.8) + n, (VOXEL, VOXEL), CENTRE, RADIUS) for n in (0, noise))
    assert noisy.falls_to(0.5) == pytest.approx(clean.falls_to(0.5), rel=0.05)


def test_a_sharp_edge_never_falls_to_a_tenth():
    assert np.isnan(transfer(disc(100, 0.05), (VOXEL, VOXEL), CENTRE, RADIUS).falls_to(0.1))


def test_discs_too_small_or_too_near_to_the_border_are_refused():
    with pytest.raises(UserError, match="too small"):
        transfer(disc(100, 0.5), (VOXEL, VOXEL), CENTRE, 2.0)
    with pytest.raises(UserError, match="border"):
        transfer(disc(100, 0.5), (VOXEL, VOXEL), (20, 48), RADIUS)
