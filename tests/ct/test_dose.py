import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import ldct_dist
from ldct_dist.cli import app
from ldct_dist.ct import dose as dose_module
from ldct_dist.ct.dicom import one_series, read_series
from ldct_dist.ct.dose import DoseConfig, matched, simulate_full_dose, simulate_low_dose, simulate_low_doses
from ldct_dist.ct.noise import local_moments
from ldct_dist.ct.phantom import body, water_cylinder
from ldct_dist.ct.projector import filtered_backprojection
from ldct_dist.ct.scanner import scan_of, transmission
from ldct_dist.ct.volume import AIR_HU, Acquisition, Volume
from ldct_dist.errors import UserError
from ldct_dist.evaluate.physics.nps import flat_regions, noise_power
from on_gpu import on_gpu
from sources import anatomy
from synthetic_dicom import Options, write_series

DEMO = Path(ldct_dist.__file__).parent / "demo_data"
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


def test_air_whose_noise_is_cut_off_gets_noise_too():
    """It would show through the low dose, and through what is denoised of it, as specks that have none."""
    air = np.random.default_rng(0).normal(-1000, 24, (2, 64, 64)).clip(AIR_HU).astype(np.int16)
    low = simulate_low_dose(Volume(air, (5.0, 6.0, 6.0)), 0.25, seed=0, config=CONFIG)
    specks = air == AIR_HU
    assert specks.mean() > 0.1
    assert (low.hu[specks] > AIR_HU).mean() > 0.3


@pytest.mark.parametrize("beam", ["fan", "parallel"])
def test_photons_and_kernel_are_found_in_the_scan(beam):
    truth = DoseConfig(beam=beam, photons=2e5, cutoff_per_mm=0.3)
    scanned = simulate_full_dose(muscle_cylinder(6).hu, SPACING, seed=4, config=truth)
    assert matched(scanned, DoseConfig(beam=beam)).cutoff_per_mm == pytest.approx(0.3, rel=0.1)
    assert matched(scanned, DoseConfig(beam=beam, cutoff_per_mm=0.3)).photons == pytest.approx(2e5, rel=0.1)


def test_what_is_given_is_not_matched():
    scanned = simulate_full_dose(muscle_cylinder(2).hu, SPACING, 4, DoseConfig(photons=2e5))
    assert matched(scanned, DoseConfig(photons=1e5)).photons == 1e5
    assert matched(scanned, DoseConfig(cutoff_per_mm=0.1)).cutoff_per_mm == 0.1


@pytest.mark.parametrize("beam", ["fan", "parallel"])
def test_matched_quarter_dose_doubles_the_noise_whichever_beam_is_assumed(beam):
    clean = muscle_cylinder(8)
    truth = DoseConfig(photons=2e5, cutoff_per_mm=0.25, electronic_noise=0)
    full = simulate_full_dose(clean.hu, SPACING, seed=6, config=truth)
    low = simulate_low_dose(full, 0.25, seed=7, config=DoseConfig(beam=beam, electronic_noise=0))
    middle = rings()["middle"]
    assert noise_std(low.hu, middle) == pytest.approx(2 * noise_std(full.hu, middle), rel=0.08)


def test_several_doses_at_once_are_those_of_single_runs():
    volume = body((3, 64, 64), (5.0, 6.0, 6.0), seed=0)
    together = simulate_low_doses(volume, [0.5, 1.0, 0.1], seed=7, config=CONFIG)
    for dose, low in zip((0.5, 1.0, 0.1), together, strict=True):
        assert (low.hu == simulate_low_dose(volume, dose, seed=7, config=CONFIG).hu).all()
    assert together[1] is volume


def test_source_distance_is_the_config_s_or_the_tag_s():
    tagged = replace(water_cylinder((1, 32, 32), SPACING, 20), acquisition=Acquisition(source_mm=541.0))
    assert scan_of(tagged, DoseConfig()).source_mm == 541
    assert scan_of(tagged, DoseConfig(source_mm=500)).source_mm == 500
    assert scan_of(replace(tagged, acquisition=Acquisition()), DoseConfig()).source_mm == 595


def chords(scan):
    _, t = scan.rays()
    return 2 * torch.sqrt((RADIUS**2 - t.square()).clamp(min=0))[None].float()


def test_bowtie_evens_out_its_cylinder():
    config = CONFIG.model_copy(update={"bowtie_mm": RADIUS})
    scan = scan_of(Volume(np.zeros((1, 128, 128), np.int16), SPACING), config)
    through_water = transmission(chords(scan) * config.water_per_mm, scan, config)
    expected = np.exp(-2 * RADIUS * config.water_per_mm)
    assert through_water.numpy() == pytest.approx(expected, rel=1e-4)


def test_tube_current_follows_attenuation_and_keeps_its_mean():
    config = CONFIG.model_copy(update={"modulation": 0.5})
    scan = scan_of(Volume(np.zeros((1, 128, 128), np.int16), SPACING), config)
    p = torch.linspace(2, 6, scan.views)[None, :, None].expand(1, -1, scan.columns)
    current = transmission(p, scan, config) / torch.exp(-p)
    assert current.mean().item() == pytest.approx(1, rel=1e-5)
    assert (current[0, -1] / current[0, 0]).numpy() == pytest.approx(np.exp(0.5 * (6 - 2)), rel=1e-4)


def test_modulation_lowers_the_noise_of_an_oval_at_the_same_dose():
    oval = body((12, 96, 96), (5.0, 4.0, 4.0), seed=0)
    middle = np.hypot(*(np.mgrid[:96, :96] - 47.5)) < 10
    std = []
    for modulation in (0.0, 0.5):
        config = CONFIG.model_copy(update={"modulation": modulation, "photons": 2e5, "cutoff_per_mm": 0.12})
        std.append(
            noise_std(simulate_full_dose(oval.hu, oval.spacing, 3, config).hu - oval.hu.astype(float), middle)
        )
    assert std[1] < 0.95 * std[0]


@pytest.mark.parametrize("electronic", [0.0, 5.0])
@pytest.mark.parametrize("config", [{}, {"modulation": 1.0}, {"bowtie_mm": 4000.0}])
def test_rays_that_no_photon_gets_through_have_finite_noise(electronic, config):
    """Metal on an extended scale of HU; the exponential of what it attenuates is 0 in single precision."""
    hu = water_cylinder((2, 128, 128), SPACING, RADIUS).hu.copy()
    hu[0, 50:78, 20:108] = 30000
    config = CONFIG.model_copy(update={"electronic_noise": electronic, **config})
    full = simulate_full_dose(hu, SPACING, seed=1, config=config)
    low = simulate_low_dose(full, 0.25, seed=0, config=config)
    for scan in (full.hu, low.hu):
        assert scan[0, 60:68, 40:88].mean() == pytest.approx(30000, rel=0.02)
        streaks, plain = ((scan[i].astype(float) - hu[i])[rings()["middle"]].std() for i in (0, 1))
        assert plain < streaks < 1e4


def test_rays_that_metal_starves_at_full_dose_get_no_more_noise_at_a_lower_one():
    hu = np.repeat(water_cylinder((1, 128, 128), SPACING, RADIUS).hu, 16, axis=0)
    hu[:, 60:68, 24:34] = hu[:, 60:68, 94:104] = 20000  # two hips
    full = simulate_full_dose(hu, SPACING, seed=1, config=CONFIG)
    low = simulate_low_dose(full, 0.25, seed=2, config=CONFIG)
    quarter = CONFIG.model_copy(update={"photons": 0.25 * CONFIG.photons})
    truth = simulate_full_dose(hu, SPACING, seed=3, config=quarter)
    where = rings()["middle"]
    assert noise_std(low.hu, where) == pytest.approx(noise_std(truth.hu, where), rel=0.05)


def test_detector_blur_filters_the_noise_by_its_own_transfer_function():
    water = water_cylinder((16, 128, 128), SPACING, RADIUS)
    spectra = []
    for blur in (0.0, 1.0):
        config = CONFIG.model_copy(update={"blur_columns": blur, "beam": "parallel"})
        noise = simulate_full_dose(water.hu, SPACING, 3, config).hu.astype(float) - water.hu
        spectra.append(noise_power(noise[:, 44:84, 44:84], SPACING[1:]).radial())
    (f, sharp), (_, blurred) = spectra
    sigma_mm = scan_of(water, CONFIG.model_copy(update={"beam": "parallel"})).pitch_mm
    np.testing.assert_allclose(
        (blurred / sharp)[2:10], np.exp(-((2 * np.pi * sigma_mm * f) ** 2))[2:10], rtol=0.12
    )


def test_inserted_noise_has_the_texture_of_the_scan_s_own():
    """In a real scan, at the same places: what was put in against what was there."""
    scan = read_series(one_series(DEMO / "CRLM-CT-1004"))
    full = replace(scan, hu=scan.hu[12:20])
    assert scan_of(full, DoseConfig()).source_mm == 541  # this scanner's, by its tags
    low = simulate_low_dose(full, 0.25, seed=1)
    regions = flat_regions(full, local_moments(full.hu, full.spacing))
    assert len(regions) >= 8
    added = low.hu.astype(float) - full.hu
    own, inserted = (
        noise_power(np.stack([hu[region] for region in regions]), full.spacing[1:]) for hu in (full.hu, added)
    )
    assert inserted.variance == pytest.approx(3 * own.variance, rel=0.1)

    def mean_frequency(nps):
        """Above 0.08 per mm: below it, the liver's own structure adds to the scan's power."""
        f, power = (values[nps.radial()[0] > 0.08] for values in nps.radial())
        return (f * power).sum() / power.sum()

    assert mean_frequency(inserted) == pytest.approx(mean_frequency(own), rel=0.1)


def test_the_command_gives_each_patient_noise_of_his_own(tmp_path):
    """A network trained on a cohort that shares its noise would learn that noise by heart."""
    hu = anatomy(shape=(2, 96, 96), noise=12)
    added = {}
    for patient in ("A", "B"):
        write_series(tmp_path / patient, hu, Options(patient=patient))
        for run in ("first", "again"):
            out = tmp_path / f"{patient}-{run}"
            done = CliRunner().invoke(app, ["simulate", str(tmp_path / patient), str(out)])
            assert done.exit_code == 0, done.output
            added[patient, run] = (read_series(one_series(out)).hu - hu)[:, 24:72, 24:72].ravel()
    assert (added["A", "first"] == added["A", "again"]).all()
    assert added["A", "first"].std() > 12
    assert abs(np.corrcoef(added["A", "first"], added["B", "first"])[0, 1]) < 0.1


@pytest.mark.parametrize("fraction", [0, -0.25, 1.5, 25, float("nan")])
def test_impossible_dose_is_refused(fraction):
    with pytest.raises(UserError, match="fraction of full dose"):
        simulate_low_dose(water_cylinder((1, 32, 32), SPACING, 20), fraction, seed=0)


def test_negative_seed_is_refused():
    with pytest.raises(UserError, match="seed -1"):
        simulate_low_dose(water_cylinder((1, 32, 32), SPACING, 20), 0.25, seed=-1)


def test_slices_across_which_no_fan_turns_are_refused():
    coronal = ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0), (1.0, 0.0, 0.0))
    volume = replace(body((1, 32, 32), (5.0, 12.0, 12.0), seed=0), direction=coronal)
    with pytest.raises(UserError, match="not axial"):
        simulate_low_dose(volume, 0.25, seed=0, config=CONFIG)
    oblique = replace(volume, direction=((0.0, 0.34, 0.94), (0.0, 0.94, -0.34), (1.0, 0.0, 0.0)))
    assert simulate_low_dose(oblique, 0.25, seed=0, config=CONFIG).direction == oblique.direction


def test_a_volume_without_noise_to_match_says_what_to_set():
    with pytest.raises(UserError, match="set photons"):
        simulate_low_dose(Volume(np.full((2, 64, 64), 50, np.int16), SPACING), 0.25, seed=0)
    with pytest.raises(UserError, match="set photons"):
        simulate_low_dose(body((2, 200, 200), (5.0, 2.0, 2.0), seed=0), 0.25, seed=0)
    with pytest.raises(UserError, match="too little soft tissue"):
        simulate_low_dose(Volume(np.full((2, 64, 64), -1000, np.int16), SPACING), 0.25, seed=0)


@pytest.mark.parametrize(
    "config",
    [
        '{"beam": "parallel"}',
        '{"beam": "fan", "bowtie_mm": 180, "modulation": 0.5, "blur_columns": 0.7}',
        '{"electronic_noise": 20, "photons": null, "cutoff_per_mm": null}',
    ],
)
def test_a_gpu_puts_in_the_noise_of_a_cpu(config):
    on_gpu(_same_noise, config)


def _same_noise(config):
    whole = read_series(one_series(DEMO / "CRLM-CT-1004"))
    y, x = (slice(128, 384),) * 2
    volume = replace(whole, hu=whole.hu[10:13, y, x])
    config = DoseConfig(**{"views": 256, "photons": PHOTONS, "cutoff_per_mm": 0.5} | json.loads(config))
    on_cpu, on_its_own = (
        simulate_low_doses(volume, [0.5, 0.1], seed=3, config=config, device=device)
        for device in ("cpu", torch.device("cuda", 0))
    )
    for expected, answer in zip(on_cpu, on_its_own, strict=True):
        added = expected.hu - volume.hu
        assert added.std() > 1
        # a GPU adds in another order
        assert (np.abs(answer.hu - expected.hu) > 1).mean() < 1e-4
        assert np.abs(answer.hu - expected.hu).std() < 0.05 * added.std()
