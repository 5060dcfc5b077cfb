import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ldct_dist.ct.noise import local_moments
from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError
from ldct_dist.evaluate.physics.nps import flat_regions, noise_power

SPACING = (0.8, 0.5)


def coloured(n, size=64, seed=0):
    """Noise with the spectrum of (0.1 + f) exp(-(2 f)^2), HU^2 mm^2, and that spectrum."""
    fy, fx = (np.fft.fftfreq(size, mm) for mm in SPACING)
    f = np.hypot(fy[:, None], fx)
    spectrum = 400 * (0.1 + f) * np.exp(-((2 * f) ** 2))
    white = np.random.default_rng(seed).normal(size=(n, size, size))
    filtered = np.fft.ifft2(np.fft.fft2(white) * np.sqrt(spectrum / (SPACING[0] * SPACING[1]))).real
    return filtered, spectrum


def test_white_noise_is_flat_and_its_integral_the_variance():
    regions = np.random.default_rng(0).normal(30, 12, (200, 64, 64))
    nps = noise_power(regions, SPACING)
    assert nps.variance == pytest.approx(144, rel=0.01)
    f, power = nps.radial()
    # Ring k averages about pi k independent values of each of 200 regions: within four standard errors.
    k = np.arange(3, len(power))
    off = power[3:] / (144 * SPACING[0] * SPACING[1]) - 1
    assert (np.abs(off) < 4 / np.sqrt(np.pi * k * 200)).all()
    assert f[-1] == pytest.approx(1 / (2 * 0.8))  # the Nyquist frequency of the coarser axis


def test_coloured_noise_has_its_known_spectrum_variance_and_mean_frequency():
    regions, spectrum = coloured(200)
    nps = noise_power(regions, SPACING, detrend=False)
    cell = 1 / (64 * SPACING[0] * 64 * SPACING[1])
    assert nps.variance == pytest.approx(spectrum.sum() * cell - spectrum[0, 0] * cell, rel=0.01)
    assert nps.variance == pytest.approx(regions.var(), rel=0.01)
    at, power = nps.radial()
    truth = 400 * (0.1 + at) * np.exp(-((2 * at) ** 2))
    np.testing.assert_allclose(power[3:20], truth[3:20], rtol=0.08)
    assert nps.mean_frequency == pytest.approx((at * truth).sum() / truth.sum(), rel=0.02)


def test_smoothing_moves_the_mean_frequency_down():
    regions = np.random.default_rng(0).normal(0, 10, (50, 32, 32))
    smooth = gaussian_filter(regions, (0, 1.5, 1.5), mode="wrap")
    assert noise_power(smooth, SPACING).mean_frequency < 0.5 * noise_power(regions, SPACING).mean_frequency


@pytest.mark.parametrize(
    "spectrum",
    [
        np.ones_like,
        lambda f: f * (0.5 + 0.5 * np.cos(np.pi * np.minimum(f / 0.6, 1))) ** 2,  # of a soft kernel
        lambda f: f * np.exp(-((2 * np.pi * f) ** 2)),  # the same, blurred by 1 mm
        lambda f: f * np.exp(-((4 * np.pi * f) ** 2)),  # by 2 mm
    ],
)
def test_small_regions_hardly_bias_the_mean_frequency(spectrum):
    """Of 22 mm, they resolve 0.045 / mm, and without their means and slopes they have nothing at 0."""
    white = np.random.default_rng(0).normal(0, 10, (8, 384, 384))
    f = np.hypot(np.fft.fftfreq(384, 0.9)[:, None], np.fft.fftfreq(384, 0.9))
    noise = np.fft.ifft2(np.fft.fft2(white) * np.sqrt(spectrum(f))).real
    regions = noise.reshape(8, 16, 24, 16, 24).swapaxes(2, 3).reshape(-1, 24, 24)
    at = np.linspace(0, 0.5 / 0.9, 4001)
    truth = np.trapezoid(at * spectrum(at), at) / np.trapezoid(spectrum(at), at)
    assert noise_power(regions, (0.9, 0.9)).mean_frequency == pytest.approx(truth, rel=0.06)


def test_rings_end_where_the_coarser_axis_does():
    """Beyond, a ring would be what one direction alone shows."""
    noise = np.random.default_rng(0).normal(0, 20, (400, 32, 32))
    for spacing in ((1.0, 0.5), (0.5, 1.0)):
        nps = noise_power(noise, spacing)
        f, power = nps.radial()
        assert f[-1] == pytest.approx(0.5)
        np.testing.assert_allclose(power[1:], 20**2 * 0.5, rtol=0.1)
        assert nps.mean_frequency == pytest.approx(0.25, rel=0.15)


def test_no_noise_has_no_mean_frequency():
    assert math.isnan(noise_power(np.full((4, 16, 16), 50), (1.0, 1.0)).mean_frequency)


def test_a_slope_across_regions_is_not_noise():
    regions = np.random.default_rng(0).normal(0, 10, (100, 32, 32))
    sloping = regions + np.arange(32)[:, None] * 3.0 - np.arange(32) * 2.0
    assert noise_power(sloping, SPACING).variance == pytest.approx(noise_power(regions, SPACING).variance)
    assert noise_power(sloping, SPACING, detrend=False).variance > 5 * 100


def test_flat_regions_lie_in_soft_tissue_and_apart():
    hu = np.full((2, 160, 160), -1000.0)
    hu[:, 20:140, 20:140] = -100
    hu[:, 40:120, 30:130] = 60
    hu = hu + np.random.default_rng(0).normal(0, 10, hu.shape)
    volume = Volume(np.rint(hu).astype(np.int16), (5.0, 1.0, 1.0))
    found = flat_regions(volume, local_moments(volume.hu, volume.spacing))
    assert len(found) >= 8
    covered = np.zeros(hu.shape, int)
    for region in found:
        covered[region] += 1
    assert covered.max() == 1
    assert (hu[covered > 0] > 0).mean() > 0.99


def test_regions_that_are_too_small_are_refused():
    with pytest.raises(UserError, match="too small"):
        noise_power(np.zeros((3, 4, 4)), SPACING)
