from __future__ import annotations

import numpy as np
import pytest
from skimage.io import imread
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ldct_dist.ct.volume import AIR_HU, Volume
from ldct_dist.errors import UserError
from ldct_dist.evaluate.baselines import gaussian, tune_gaussian
from ldct_dist.evaluate.figures import planes_strip, three_planes
from ldct_dist.evaluate.metrics import evaluate_volume, psnr_db
from ldct_dist.evaluate.protocols import PROTOCOLS, protocol

RANDOM = np.random.default_rng(0)
FULL = (40 + 60 * np.sin(np.linspace(0, 9, 64))[None, :, None] + np.zeros((5, 64, 72))).astype(np.int16)
LOW = (FULL + RANDOM.normal(0, 20, FULL.shape)).round().astype(np.int16)


def test_a_constant_error_has_the_rmse_and_psnr_of_the_formula():
    figures = evaluate_volume(FULL + np.int16(10), FULL, protocol("full-range"))
    assert figures["rmse_hu"] == pytest.approx(10)
    assert figures["psnr_db"] == pytest.approx(20 * np.log10(4095 / 10))


def test_the_mean_over_slices_is_that_of_scikit_image_on_each_windowed_slice():
    low, high = protocol("ldctbench-abdomen").window
    a, b = (np.clip(x.astype(float), low, high) for x in (LOW, FULL))
    figures = evaluate_volume(LOW, FULL, protocol("ldctbench-abdomen"))
    expected = [peak_signal_noise_ratio(y, x, data_range=400) for x, y in zip(a, b, strict=True)]
    assert figures["psnr_db"] == pytest.approx(np.mean(expected))
    options = {"data_range": 400, "gaussian_weights": True, "use_sample_covariance": False, "full": True}
    maps = [structural_similarity(x, y, **options)[1] for x, y in zip(a, b, strict=True)]
    assert figures["ssim"] == pytest.approx(np.mean([m.mean() for m in maps]))


def test_the_same_error_reads_otherwise_in_each_window():
    full = np.full((1, 256, 256), 50.0)
    noisy = full + RANDOM.normal(0, 20, full.shape)
    chest = np.full((1, 256, 256), -600.0)
    assert psnr_db(chest + (noisy - full), chest, protocol("ldctbench-chest").window) == pytest.approx(
        37.5, abs=0.1
    )
    assert psnr_db(noisy, full, protocol("ldctbench-abdomen").window) == pytest.approx(26.0, abs=0.1)


def test_perfect_is_zero_infinite_and_one():
    assert evaluate_volume(FULL, FULL, protocol("redcnn-l506")) == {
        "rmse_hu": 0,
        "psnr_db": np.inf,
        "ssim": 1,
    }


def test_padding_does_not_flatter():
    inside = evaluate_volume(LOW, FULL, protocol("full-range"))
    ring = ((0, 0), (64, 64), (64, 64))
    low, full = (np.pad(x, ring, constant_values=AIR_HU) for x in (LOW, FULL))
    assert evaluate_volume(low, full, protocol("full-range"))["rmse_hu"] == pytest.approx(inside["rmse_hu"])


def test_an_unknown_protocol_names_those_there_are():
    with pytest.raises(UserError, match=r"'mayo': there are ldctbench-chest"):
        protocol("mayo")
    assert all(p.data_range == p.window[1] - p.window[0] > 0 for p in PROTOCOLS.values())


def test_the_tuned_gaussian_is_the_best_there_is():
    sigma = tune_gaussian(LOW, FULL)
    errors = {
        s: evaluate_volume(gaussian(LOW, s), FULL, protocol("full-range"))["rmse_hu"]
        for s in (sigma, 0.5, 3.0)
    }
    assert min(errors, key=errors.get) == sigma
    assert errors[sigma] < 0.5 * evaluate_volume(LOW, FULL, protocol("full-range"))["rmse_hu"]


def test_the_picture_shows_four_columns_and_three_planes_in_proportion(tmp_path):
    images = {
        name: Volume(hu, (5.0, 0.7, 0.7)) for name, hu in (("low", LOW), ("denoised", FULL), ("full", FULL))
    }
    three_planes(tmp_path / "p.png", images, (-150, 250), "phantom")
    picture = imread(tmp_path / "p.png")[..., :3]
    assert picture.shape[1] > picture.shape[0] > 200
    assert picture.std() > 20


def test_the_strip_has_square_pixels_and_the_head_on_top():
    hu = np.full((4, 10, 12), -1000, np.int16)
    hu[-1] = 1000  # the slice nearest the head
    strip = planes_strip(hu, (2.0, 1.0, 1.0), (-1000, 1000))
    assert strip.shape == (10, 12 + 4 + 12 + 4 + 10 + 4)
    coronal = strip[:8, 16:28]
    assert (coronal[:2] == 255).all()
    assert (coronal[2:] == 0).all()
