from dataclasses import replace

import numpy as np
import pytest

from ldct_dist.ct.phantom import body
from ldct_dist.ct.volume import AIR_HU, Volume
from ldct_dist.errors import UserError
from ldct_dist.evaluate.baselines import BASELINES, gaussian, tune


@pytest.fixture(scope="module")
def full():
    return body((6, 96, 96), (4.0, 4.0, 4.0), seed=0)


def with_noise(volume, std):
    noise = np.random.default_rng(0).normal(0, std, volume.shape)
    noisy = np.rint(volume.hu + noise).clip(AIR_HU, None)
    return replace(volume, hu=np.where(volume.hu == AIR_HU, AIR_HU, noisy).astype(np.int16))


def test_width_is_in_mm_along_every_axis():
    hu = np.zeros((41, 41, 41), np.int16)
    hu[20, 20, 20] = 30000
    smooth = gaussian(Volume(hu, (2.0, 1.0, 0.5)), sigma_mm=2.0).hu.astype(float)
    for axis, mm in enumerate((2.0, 1.0, 0.5)):
        profile = smooth.sum(axis=tuple({0, 1, 2} - {axis}))
        at = (np.arange(41) - 20) * mm
        assert np.sqrt((profile * at**2).sum() / profile.sum()) == pytest.approx(2.0, rel=0.05)


def test_padding_stays(full):
    smooth = gaussian(full, 5.0)
    assert ((smooth.hu == AIR_HU) >= (full.hu == AIR_HU)).all()
    assert smooth.spacing == full.spacing


def test_tuned_width_beats_its_neighbours(full):
    low = with_noise(full, 80)
    sigma = tune("gaussian", [(low, full)])

    def rmse(width):
        error = gaussian(low, width).hu.astype(float) - full.hu
        return np.sqrt(np.square(error)[full.hu > AIR_HU].mean())

    assert 0.5 < sigma < 6
    assert rmse(sigma) < min(rmse(0.7 * sigma), rmse(1.4 * sigma), rmse(0))


def test_more_noise_wants_a_wider_filter(full):
    few, many = (tune("gaussian", [(with_noise(full, std), full)]) for std in (20, 150))
    assert few < many


@pytest.mark.parametrize("name", ["bilateral", "nlm", "tv"])
def test_a_strength_that_suits_one_noise_suits_another(full, name):
    def left(std, strength):
        low = with_noise(full, std)
        errors = [
            np.square(image.hu.astype(float) - full.hu)[full.hu > AIR_HU].mean()
            for image in (BASELINES[name].filter(low, strength), low)
        ]
        return errors[0] / errors[1]

    tuned = {std: tune(name, [(with_noise(full, std), full)]) for std in (30, 90)}
    for std, other in ((30, 90), (90, 30)):
        assert left(std, tuned[other]) < 1.1 * left(std, tuned[std]) < 0.9


def test_one_pair_that_is_noisier_does_not_outvote_another(full):
    low = [(with_noise(full, std), full) for std in (20, 150)]
    alone = [tune("gaussian", [pair]) for pair in low]
    assert alone[0] + 0.1 < tune("gaussian", low) < alone[1] - 0.1


def test_a_pair_in_which_nothing_differs_takes_no_part(full):
    """Its share of the error that is left is 0 / 0, and one such pair would tune the filter to nothing."""
    noisy = with_noise(full, 20)
    nothing = replace(full, hu=np.full_like(full.hu, AIR_HU))
    alone = tune("gaussian", [(noisy, full)])
    assert tune("gaussian", [(full, full), (noisy, full), (nothing, nothing)]) == alone
    with pytest.raises(UserError, match="equal in all cases"):
        tune("gaussian", [(full, full)])
