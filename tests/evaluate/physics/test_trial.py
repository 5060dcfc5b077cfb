import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

from ldct_dist.ct import noise
from ldct_dist.ct.dose import DoseConfig, simulate_full_dose, simulate_low_dose
from ldct_dist.ct.phantom import body
from ldct_dist.errors import UserError
from ldct_dist.evaluate.physics.trial import make_trial

CUTOFF = 0.4


@pytest.fixture(scope="module")
def case():
    clean = body((4, 200, 200), (3.0, 1.5, 1.5), seed=0)
    full = simulate_full_dose(clean, 0, DoseConfig(photons=3e5, cutoff_per_mm=CUTOFF))
    return full, simulate_low_dose(full, 0.25, 1, DoseConfig(photons=3e5, cutoff_per_mm=CUTOFF))


@pytest.fixture(scope="module")
def trial(case):
    return make_trial(*case, lesion_mm=7.0, lesion_hu=25.0)


def untouched(volume):
    return volume.hu


def blurred(volume):
    return gaussian_filter1d(gaussian_filter1d(volume.hu.astype(float), 1.2, axis=1), 1.2, axis=2)


def test_phantom_is_as_noisy_as_the_case_at_low_dose(case, trial):
    def level(volume):
        moments = noise.local_moments(volume.hu, volume.spacing)
        return noise.noise_std(moments, moments.homogeneous)

    assert level(trial.lesions) == pytest.approx(level(case[1]), rel=0.15)


def test_edges_are_as_sharp_as_the_kernel_and_a_blur_shows(trial):
    sharp, soft = trial.transfers(untouched), trial.transfers(blurred)
    assert [round(t.contrast_hu / 10) * 10 for t in sharp] == pytest.approx([-150, 40, 120, 400], abs=20)
    # Half of the Hann window is at half its cutoff; the kernel is matched, not known.
    assert sharp[-1].falls_to(0.5) == pytest.approx(CUTOFF / 2, rel=0.2)
    assert all(b.falls_to(0.5) < 0.8 * a.falls_to(0.5) for a, b in zip(sharp[2:], soft[2:], strict=True))


def test_lesions_are_detected_and_erasing_them_is_found_out(trial):
    seen = trial.detection(untouched)
    assert seen.low > 1

    def erased(volume):
        return np.where(
            np.abs(volume.hu - 60) < 150, np.random.default_rng(0).normal(50, 10, volume.shape), 0
        )

    assert trial.detection(erased).d_prime < 0.6
    assert len(trial.present) >= 4


def test_lesions_too_small_or_too_wide_are_refused(case):
    with pytest.raises(UserError, match="at least 3 voxels"):
        make_trial(*case, lesion_mm=3.0, lesion_hu=25.0)
    with pytest.raises(UserError, match="give a smaller"):
        make_trial(*case, lesion_mm=60.0, lesion_hu=25.0)
