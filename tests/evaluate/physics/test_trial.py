import zlib
from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d, uniform_filter1d

from ldct_dist.ct import noise
from ldct_dist.ct.dose import DoseConfig, simulate_full_dose, simulate_low_dose
from ldct_dist.ct.phantom import body
from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError
from ldct_dist.evaluate.physics.lesions import BALL, ROD, TISSUE_HU, Layout
from ldct_dist.evaluate.physics.trial import Reading, Trial, make_trial

CUTOFF = 0.4


@pytest.fixture(scope="module")
def case():
    clean = body((4, 200, 200), (3.0, 1.5, 1.5), seed=0)
    full = simulate_full_dose(clean.hu, clean.spacing, 0, DoseConfig(photons=3e5, cutoff_per_mm=CUTOFF))
    return full, simulate_low_dose(full, 0.25, 1, DoseConfig(photons=3e5, cutoff_per_mm=CUTOFF))


@pytest.fixture(scope="module")
def trial(case):
    return make_trial(*case, lesion_mm=7.0, lesion_hu=25.0, seed=zlib.crc32(b"case"))


def untouched(volume):
    return volume.hu


def blurred(volume):
    return gaussian_filter1d(gaussian_filter1d(volume.hu.astype(float), 1.2, axis=1), 1.2, axis=2)


def test_phantom_is_as_noisy_as_the_case_at_low_dose(case, trial):
    def level(volume):
        moments = noise.local_moments(volume.hu, volume.spacing)
        return noise.noise_std(moments, moments.homogeneous)

    assert level(trial.lesions[BALL][0].scan) == pytest.approx(level(case[1]), rel=0.15)


def test_edges_are_as_sharp_as_the_kernel_and_a_blur_shows(trial):
    sharp, soft = trial.transfers(untouched), trial.transfers(blurred)
    assert [round(t.contrast_hu / 10) * 10 for t in sharp] == pytest.approx([-150, 40, 120, 400], abs=20)
    # Half of the Hann window is at half its cutoff; the kernel is matched, not known.
    assert sharp[-1].falls_to(0.5) == pytest.approx(CUTOFF / 2, rel=0.2)
    assert all(b.falls_to(0.5) < 0.8 * a.falls_to(0.5) for a, b in zip(sharp[2:], soft[2:], strict=True))


def test_lesions_are_detected_and_erasing_them_is_found_out(trial):
    assert all(seen.low > 1 for seen in trial.detection(untouched).values())
    rng = np.random.default_rng(0)  # as a denoiser of these images would: each comes out another

    def erased(volume):
        return np.where(np.abs(volume.hu - 60) < 150, rng.normal(50, 10, volume.shape), 0)

    assert all(seen.d_prime < 0.6 for seen in trial.detection(erased).values())


def test_means_over_slices_show_rods_better_and_lose_balls(trial):
    def averaged(volume):
        return uniform_filter1d(volume.hu.astype(float), 3, axis=0)

    before, after = trial.detection(untouched), trial.detection(averaged)
    assert after[ROD].d_prime > 1.3 * before[ROD].d_prime
    assert after[BALL].d_prime < 1.1 * before[BALL].d_prime
    assert before[BALL].d_prime < before[ROD].d_prime  # a slice of 3 mm holds a ball's cap, too


def test_a_ball_has_its_volume_and_stays_clear_of_the_next():
    for spacing in ((5.0, 0.8, 0.8), (1.0, 0.7, 0.9), (2.9, 1.5, 1.5), (8.0, 2.0, 2.0)):
        layout = Layout(6.0, 20.0, spacing)
        present, _ = layout.places
        signal = layout.phantom(BALL, present) - layout.slices(5 * layout.levels.step)
        volume = signal.sum() * np.prod(spacing) / 20.0
        assert volume == pytest.approx(len(present) * 5 * np.pi / 6 * 6.0**3, rel=1e-6)
        assert signal.max() == pytest.approx(20.0 * min(1, 6.0 / spacing[0]), rel=0.1)


@pytest.mark.parametrize("voxel", [(0.8, 0.8), (1.5, 0.8), (0.8, 1.5), (1.9, 1.0)])
def test_lesions_and_what_is_shown_around_them_lie_in_the_body(voxel):
    layout = Layout(6.0, 15.0, (5.0, *voxel))
    half, hu = layout.patch // 2, layout.slices(1)[0]
    for y, x in sum(layout.places, ()):
        patch = hu[y - half : y + half + 1, x - half : x + half + 1]
        np.testing.assert_allclose(patch, TISSUE_HU)


def test_rods_are_alike_in_all_slices():
    layout = Layout(6.0, 20.0, (5.0, 0.8, 0.8))
    hu = layout.phantom(ROD, layout.places[0])
    assert (hu == hu[0]).all()
    assert hu[0, *layout.places[0][0]] == pytest.approx(TISSUE_HU + 20)


@pytest.mark.parametrize(("diameter", "voxel"), [(4.0, 0.4), (6.0, 0.7), (6.0, 1.0), (6.0, 1.5), (6.0, 2.0)])
def test_rods_have_their_area(diameter, voxel):
    layout = Layout(diameter, 15.0, (5.0, voxel, voxel))
    signal = layout.phantom(ROD, layout.places[0])[0] - layout.slices(1)[0]
    assert signal.sum() * voxel**2 / 15 == pytest.approx(len(layout.places[0]) * np.pi / 4 * diameter**2)


@pytest.mark.parametrize(("voxel", "photons"), [(0.7, 6e5), (1.5, 4e5)])
def test_scans_hold_as_much_of_a_faint_lesion_as_it_has(voxel, photons):
    """Blurred by the kernel, it has a wide rim of less than half a HU, which whole HU would lose."""
    spacing, exact = (3.0, voxel, voxel), DoseConfig(photons=photons, cutoff_per_mm=0.6 / voxel / 2)
    full = simulate_full_dose(body((2, 200, 200), spacing, seed=0).hu, spacing, 0, exact)
    low = simulate_low_dose(full, 0.25, 1, exact)
    trial = make_trial(full, low, lesion_mm=6.0, lesion_hu=15.0, seed=3)
    plain = trial.layout.slices(1)
    depth = len(trial.lesions[ROD][0].scan.hu) * spacing[0]
    for shape, mm3 in ((BALL, 5 * np.pi / 6 * 6.0**3), (ROD, depth * np.pi * 3.0**2)):
        readings = trial.lesions[shape]
        found = sum((reading.scan.hu - plain).sum() for reading in readings) * np.prod(spacing) / 15
        assert found == pytest.approx(sum(len(reading.present) for reading in readings) * mm3, rel=0.015)


@pytest.mark.parametrize("shape", [BALL, ROD])
def test_white_noise_gives_the_ideal_observer_of_the_phantom_s_lesions(shape):
    layout = Layout(6.0, 15.0, (5.0, 0.7, 0.7))
    readings = []
    for seed in range(8):
        present, absent = layout.places[:: -1 if seed % 2 else 1]
        hu = layout.phantom(shape, present)
        hu = np.rint(hu + np.random.default_rng(seed).normal(0, 40, hu.shape)).astype(np.int16)
        readings.append(Reading(Volume(hu, layout.spacing), present, absent))
    signal = layout.phantom(shape, layout.places[0][:1])[layout.levels[0]] - layout.slices(1)[0]
    seen = Trial(readings[0].scan, (), layout, {shape: tuple(readings)}).detection(untouched)[shape]
    assert seen.d_prime == pytest.approx(np.sqrt((signal**2).sum()) / 40, rel=0.05)


def test_scans_have_noise_of_their_own_and_cases_too(case, trial):
    def residual(scan):
        return (scan.hu - scan.hu.mean(0, dtype=np.float64))[:, 60:100, 60:100].ravel()

    scans = [reading.scan for reading in trial.lesions[ROD]]
    other = make_trial(*case, lesion_mm=7.0, lesion_hu=25.0, seed=zlib.crc32(b"other")).lesions[ROD][0].scan
    for one in (*scans[1:], other):
        assert abs(np.corrcoef(residual(scans[0]), residual(one))[0, 1]) < 0.05


def test_images_without_noise_are_told_of(trial):
    def constant(volume):
        return np.full(volume.shape, 50.0)

    with pytest.raises(UserError, match="no noise of their own"):
        trial.detection(constant)


def test_a_low_dose_without_noise_is_refused(case):
    full, low = case
    with pytest.raises(UserError, match="low dose shows no noise"):
        make_trial(full, replace(low, hu=np.full_like(low.hu, 50)), lesion_mm=7.0, lesion_hu=25.0, seed=0)


def test_lesions_too_small_or_too_wide_are_refused(case):
    with pytest.raises(UserError, match="at least 3 voxels"):
        make_trial(*case, lesion_mm=3.0, lesion_hu=25.0, seed=0)
    with pytest.raises(UserError, match="give a smaller"):
        make_trial(*case, lesion_mm=60.0, lesion_hu=25.0, seed=0)
