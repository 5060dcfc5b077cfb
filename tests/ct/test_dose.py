import numpy as np
import pytest
import torch

from ldct_dist.ct import dose as dose_module
from ldct_dist.ct.dose import DoseConfig, matched, scan_of, simulate_full_dose, simulate_low_dose
from ldct_dist.ct.phantom import body, water_cylinder
from ldct_dist.ct.projector import filtered_backprojection
from ldct_dist.ct.volume import AIR_HU, Volume
from ldct_dist.errors import UserError

SPACING = (5.0, 2.0, 2.0)
RADIUS = 90.0
PHOTONS = 5e4
# A cutoff at the image's Nyquist frequency.
CONFIG = DoseConfig(photons=PHOTONS, cutoff_per_mm=0.25, electronic_noise=6.0)


def monte_carlo(config, dose, slices, seed, shape=(128, 128)):
    """A water cylinder as photons would show it: counted, logged, reconstructed. (z, y, x) HU, float.

    Exact chords, Poisson counts and electronic noise; nothing of the simulation but the reconstruction.
    """
    rng = np.random.default_rng(seed)
    scan = scan_of(Volume(np.zeros((1, *shape), np.int16), SPACING), config)
    _, t = scan.rays()
    p = 2 * config.water_per_mm * np.sqrt(np.clip(RADIUS**2 - t.numpy() ** 2, 0, None))
    incident = config.photons * dose
    counts = rng.poisson(incident * np.exp(-p), (slices, *p.shape)) + rng.normal(
        0, config.electronic_noise, (slices, *p.shape)
    )
    measured = torch.from_numpy(np.log(incident / np.maximum(counts, 1))).float()
    mu = filtered_backprojection(measured, scan, config.cutoff_per_mm).numpy()
    return (mu / config.water_per_mm - 1) * 1000


def to_volume(hu):
    return Volume(np.rint(hu).clip(AIR_HU, 3071).astype(np.int16), SPACING)


def muscle_cylinder(slices):
    water = water_cylinder((slices, 128, 128), SPACING, RADIUS)
    return Volume(water.hu + np.int16(55), SPACING)


def rings():
    """Voxels in the middle, and near the rim of the cylinder."""
    y, x = np.mgrid[:128, :128] - 63.5
    r = np.hypot(y, x) * 2.0
    return {"middle": r < 35, "rim": (r > 60) & (r < 80)}


def noise_std(hu, where):
    """Over slices of the same object, so that what all slices share is not noise."""
    return np.sqrt(hu.astype(float).var(axis=0, ddof=1)[where].mean())


@pytest.mark.parametrize("beam", ["fan", "parallel"])
def test_quarter_dose_is_as_noisy_as_counted_photons(beam):
    config = CONFIG.model_copy(update={"beam": beam})
    full = to_volume(monte_carlo(config, 1.0, slices=24, seed=1))
    low = simulate_low_dose(full, 0.25, seed=2, config=config)
    truth = monte_carlo(config, 0.25, slices=24, seed=3)
    for where in rings().values():
        assert noise_std(low.hu, where) == pytest.approx(noise_std(truth, where), rel=0.05)
        assert noise_std(full.hu, where) < 0.6 * noise_std(truth, where)


def test_noise_texture_is_that_of_counted_photons():
    full = to_volume(monte_carlo(CONFIG, 1.0, slices=24, seed=1))
    low = simulate_low_dose(full, 0.25, seed=2, config=CONFIG).hu.astype(float)
    truth = monte_carlo(CONFIG, 0.25, slices=24, seed=3)

    def power(hu):
        """Noise power in four bands of radial frequency, from the middle of the cylinder."""
        patch = (hu - hu.mean(0))[:, 44:84, 44:84]
        spectrum = np.abs(np.fft.fft2(patch)) ** 2
        f = np.hypot(*np.meshgrid(np.fft.fftfreq(40, 2.0), np.fft.fftfreq(40, 2.0)))
        return np.array([spectrum[:, (f > a) & (f <= a + 0.05)].mean() for a in (0.02, 0.07, 0.12, 0.17)])

    np.testing.assert_allclose(power(low), power(truth), rtol=0.12)


def test_mean_is_untouched():
    full = to_volume(monte_carlo(CONFIG, 1.0, slices=16, seed=1))
    low = simulate_low_dose(full, 0.25, seed=2, config=CONFIG)
    for where in rings().values():
        assert abs((low.hu.astype(float) - full.hu)[:, where].mean()) < 1


def test_by_way_of_half_dose_is_as_noisy_as_at_once():
    full = water_cylinder((24, 128, 128), SPACING, RADIUS)
    at_once = simulate_low_dose(full, 0.25, seed=1, config=CONFIG)
    half = simulate_low_dose(full, 0.5, seed=2, config=CONFIG)
    quarter = simulate_low_dose(half, 0.5, seed=3, config=CONFIG.model_copy(update={"photons": PHOTONS / 2}))
    middle = rings()["middle"]
    assert noise_std(quarter.hu, middle) == pytest.approx(noise_std(at_once.hu, middle), rel=0.03)


def test_noise_depends_on_seed_and_slice_alone(monkeypatch):
    volume = body((5, 64, 64), (5.0, 6.0, 6.0), seed=0)
    low = simulate_low_dose(volume, 0.25, seed=7, config=CONFIG).hu
    assert (simulate_low_dose(volume, 0.25, seed=7, config=CONFIG).hu == low).all()
    assert (simulate_low_dose(volume, 0.25, seed=8, config=CONFIG).hu != low).mean() > 0.3

    fewer = Volume(volume.hu[:3], volume.spacing)
    assert (simulate_low_dose(fewer, 0.25, seed=7, config=CONFIG).hu == low[:3]).all()
    monkeypatch.setattr(dose_module, "_BATCH", 2)
    assert (simulate_low_dose(volume, 0.25, seed=7, config=CONFIG).hu == low).all()

    added = (low.astype(float) - volume.hu)[:, 24:40, 24:40].reshape(5, -1)
    assert np.abs(np.corrcoef(added) - np.eye(5)).max() < 0.3


def test_full_dose_is_the_volume_itself():
    volume = water_cylinder((1, 32, 32), SPACING, 20)
    assert simulate_low_dose(volume, 1.0, seed=0) is volume


def test_padding_stays_and_nothing_falls_below_it():
    volume = body((2, 64, 64), (5.0, 6.0, 6.0), seed=0)
    low = simulate_low_dose(volume, 0.05, seed=0, config=CONFIG)
    assert (low.hu[volume.hu == AIR_HU] == AIR_HU).all()
    assert low.hu.min() == AIR_HU
    assert low.spacing == volume.spacing


@pytest.mark.parametrize("beam", ["fan", "parallel"])
def test_photons_and_kernel_are_found_in_the_scan(beam):
    truth = DoseConfig(beam=beam, photons=2e5, cutoff_per_mm=0.3)
    scanned = simulate_full_dose(muscle_cylinder(6), seed=4, config=truth)
    assert matched(scanned, DoseConfig(beam=beam)).cutoff_per_mm == pytest.approx(0.3, rel=0.1)
    assert matched(scanned, DoseConfig(beam=beam, cutoff_per_mm=0.3)).photons == pytest.approx(2e5, rel=0.1)


def test_what_is_given_is_not_matched():
    scanned = simulate_full_dose(muscle_cylinder(2), 4, DoseConfig(photons=2e5))
    assert matched(scanned, DoseConfig(photons=1e5)).photons == 1e5
    assert matched(scanned, DoseConfig(cutoff_per_mm=0.1)).cutoff_per_mm == 0.1


@pytest.mark.parametrize("beam", ["fan", "parallel"])
def test_matched_quarter_dose_doubles_the_noise_whichever_beam_is_assumed(beam):
    clean = muscle_cylinder(8)
    truth = DoseConfig(photons=2e5, cutoff_per_mm=0.25, electronic_noise=0)
    full = simulate_full_dose(clean, seed=6, config=truth)
    low = simulate_low_dose(full, 0.25, seed=7, config=DoseConfig(beam=beam, electronic_noise=0))
    middle = rings()["middle"]
    assert noise_std(low.hu, middle) == pytest.approx(2 * noise_std(full.hu, middle), rel=0.08)


@pytest.mark.parametrize("fraction", [0, -0.25, 1.5, 25, float("nan")])
def test_impossible_dose_is_refused(fraction):
    with pytest.raises(UserError, match="fraction of full dose"):
        simulate_low_dose(water_cylinder((1, 32, 32), SPACING, 20), fraction, seed=0)


def test_negative_seed_is_refused():
    with pytest.raises(UserError, match="seed -1"):
        simulate_low_dose(water_cylinder((1, 32, 32), SPACING, 20), 0.25, seed=-1)


def test_a_volume_without_noise_to_match_says_what_to_set():
    with pytest.raises(UserError, match="set photons"):
        simulate_low_dose(Volume(np.full((2, 64, 64), 50, np.int16), SPACING), 0.25, seed=0)
    with pytest.raises(UserError, match="set photons"):
        simulate_low_dose(body((2, 200, 200), (5.0, 2.0, 2.0), seed=0), 0.25, seed=0)
    with pytest.raises(UserError, match="too little soft tissue"):
        simulate_low_dose(Volume(np.full((2, 64, 64), -1000, np.int16), SPACING), 0.25, seed=0)
