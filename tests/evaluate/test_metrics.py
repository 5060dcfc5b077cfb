import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import visual_information_fidelity

from ldct_dist.ct.phantom import body
from ldct_dist.ct.volume import AIR_HU
from ldct_dist.errors import UserError
from ldct_dist.evaluate.metrics import MEASURES, evaluate_volume
from ldct_dist.evaluate.protocols import PROTOCOLS, protocol_named

SCANNED = sorted(name for name, p in PROTOCOLS.items() if p.counts == "scanned" and p.dims == 2)


@pytest.fixture(scope="module")
def pair():
    full = body((12, 64, 64), (5.0, 6.0, 6.0), seed=0).hu
    noise = np.random.default_rng(1).normal(0, 20, full.shape)
    return np.rint(full + noise).astype(np.int16), full


@pytest.fixture(scope="module")
def padded(pair):
    """With nothing in the corners of either image, as scans are: the field of view is a circle."""
    return tuple(np.where(pair[1] == AIR_HU, AIR_HU, x).astype(np.int16) for x in pair)


def test_values_worked_out_by_hand():
    full = np.full((2, 16, 16), 40, np.int16)
    image = full.copy()
    image[0] += 10
    image[1] -= 30
    figures = evaluate_volume(image, full, "ldctbench-abdomen")
    assert figures["rmse_hu"] == pytest.approx((10 + 30) / 2)
    assert figures["psnr_db"] == pytest.approx((20 * math.log10(399 / 10) + 20 * math.log10(399 / 30)) / 2)

    pooled = evaluate_volume(image, full, "full-range")
    assert pooled["rmse_hu"] == pytest.approx(math.sqrt((10**2 + 30**2) / 2))
    assert pooled["psnr_db"] == pytest.approx(20 * math.log10(4095 / pooled["rmse_hu"]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_have_no_figures(pair, value):
    """A slice of nan would be left out of PSNR like one that equals the full dose, and raise the mean."""
    image, full = pair[0].astype(np.float32), pair[1]
    image[1, 5, 5] = value
    for two in ((image, full), (full, image)):
        with pytest.raises(UserError, match="values that are not finite"):
            evaluate_volume(*two, "abdomen")


def test_a_mask_along_the_border_has_no_ssim(pair):
    mask = np.zeros(pair[1].shape, bool)
    mask[:, :, :2] = True
    assert evaluate_volume(*pair, "abdomen", mask, ("rmse_hu",))["rmse_hu"] > 0
    with pytest.raises(UserError, match="fits around no voxel that counts"):
        evaluate_volume(*pair, "abdomen", mask)


def test_what_lies_outside_the_window_counts_for_rmse_alone():
    full = np.full((1, 16, 16), 40, np.int16)
    full[0, :8] = 700  # bone, white in the window
    image = full.copy()
    image[0, :8] += 100
    image[0, 0, 0] = 690
    figures = evaluate_volume(image, full, "ldctbench-abdomen")
    assert figures["psnr_db"] == math.inf
    assert figures["ssim"] == pytest.approx(1)
    assert figures["rmse_hu"] == pytest.approx(math.sqrt((127 * 100**2 + 10**2) / 256))
    # The RED-CNN implementation windows its RMSE too.
    assert evaluate_volume(image, full, "redcnn-l506")["rmse_hu"] == 0


@pytest.mark.parametrize(
    ("name", "decibel"), [("ldctbench-chest", 37.5), ("ldctbench-abdomen", 26.0), ("ldctbench-neuro", 12.4)]
)
def test_the_same_error_reads_differently_by_window(name, decibel):
    """20 log10(width / 20), and a little more where the window cuts the noise at two standard deviations."""
    full = np.full((2, 128, 128), 40, np.int16)
    image = full + np.random.default_rng(0).normal(0, 20, full.shape)
    assert evaluate_volume(image, full, name)["psnr_db"] == pytest.approx(decibel, abs=0.15)


@pytest.mark.parametrize("name", ["ldctbench-chest", "ldctbench-abdomen", "ldctbench-neuro"])
def test_agrees_with_scikit_image_padding_counted(padded, name):
    image, full = padded
    protocol = protocol_named(name)
    figures = evaluate_volume(image, full, name)
    # ldct-benchmark scales the window to [0, 1] before it compares.
    a, b = ((np.clip(x, *protocol.window) - protocol.window[0]) / protocol.data_range for x in (full, image))
    slices = list(zip(a, b, strict=True))
    assert figures["psnr_db"] == pytest.approx(
        np.mean([peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in slices])
    )
    assert figures["ssim"] == pytest.approx(
        np.mean([structural_similarity(x, y, data_range=1.0) for x, y in slices])
    )


def test_gaussian_ssim_is_the_red_cnn_one(padded):
    """Convolutions with an 11 x 11 Gaussian of sigma 1.5 and zeros around the slice, as that implementation has them."""
    image, full = (torch.from_numpy(x.astype(np.float64)).clip(-160, 240)[:, None] for x in padded)
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]

    def mean(x):
        return torch.nn.functional.conv2d(x, window, padding=5)

    c1, c2 = (0.01 * 400) ** 2, (0.03 * 400) ** 2
    a, b = mean(image), mean(full)
    covariance = mean(image * full) - a * b
    variances = mean(image * image) - a * a + mean(full * full) - b * b
    expected = ((2 * a * b + c1) * (2 * covariance + c2)) / ((a * a + b * b + c1) * (variances + c2))
    figures = evaluate_volume(*padded, "redcnn-l506")
    assert figures["ssim"] == pytest.approx(expected.mean().item(), abs=1e-6)
    left_out = replace(protocol_named("redcnn-l506"), ssim_border="left out")
    inner = expected[..., 5:-5, 5:-5].mean().item()
    assert evaluate_volume(*padded, left_out)["ssim"] == pytest.approx(inner, abs=1e-6)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_equal_images_are_perfect(pair, name):
    _, full = pair
    assert evaluate_volume(full, full, name, measures=MEASURES) == {
        "rmse_hu": 0.0,
        "psnr_db": math.inf,
        "ssim": pytest.approx(1),
        "vif": pytest.approx(1),
    }


def test_vif_is_that_of_torchmetrics_with_either_image_as_the_source(pair):
    image, full = pair

    def theirs(image, full, low, high):
        a, b = (torch.from_numpy(x.astype(np.float64)).clip(low, high)[:, None] for x in (image, full))
        return visual_information_fidelity(a, b, reduction="none").mean().item()

    ours = {
        name: evaluate_volume(image, full, name, measures=["vif"])["vif"]
        for name in ("redcnn-l506", "ldctbench-chest")
    }
    assert ours["redcnn-l506"] == pytest.approx(theirs(image, full, -160, 240), abs=1e-6)
    # ldct-benchmark asks how much of the image is in the full dose.
    assert ours["ldctbench-chest"] == pytest.approx(theirs(full, image, -1024, 1900), abs=1e-6)


def test_vif_falls_with_noise_and_a_flat_volume_has_none(pair):
    image, full = pair
    noisier = full + 3 * (image.astype(int) - full)
    little, much = (
        evaluate_volume(x, full, "redcnn-l506", measures=["vif"])["vif"] for x in (image, noisier)
    )
    assert 0 < much < little < 1
    flat = np.zeros((1, 48, 48), np.int16)
    assert math.isnan(evaluate_volume(flat, flat, "redcnn-l506", measures=["vif"])["vif"])


def test_ssim_in_3d_is_scikit_images_of_the_whole_volume():
    full = body((24, 40, 40), (3.0, 8.0, 8.0), seed=0).hu
    image = full + np.random.default_rng(1).normal(0, 20, full.shape)
    protocol = protocol_named("ldctbench-abdomen-3d")
    a, b = (np.clip(x.astype(float), *protocol.window) for x in (full, image))
    figures = evaluate_volume(image, full, protocol)
    assert figures["ssim"] == pytest.approx(structural_similarity(a - a.min(), b - a.min(), data_range=399))
    assert figures["psnr_db"] == pytest.approx(peak_signal_noise_ratio(a, b, data_range=399))


def test_vif_in_3d_of_slices_all_alike_is_that_of_one(pair):
    image, full = (np.broadcast_to(x[0], x.shape) for x in pair)
    one, many = (
        evaluate_volume(image, full, name, measures=["vif"])["vif"]
        for name in ("redcnn-l506", "redcnn-l506-3d")
    )
    assert many == pytest.approx(one)
    assert evaluate_volume(*pair, "redcnn-l506-3d", measures=["vif"])["vif"] != pytest.approx(one, rel=0.01)


def test_a_slice_without_error_does_not_make_the_mean_infinite(pair):
    image, full = pair[0].copy(), pair[1]
    image[0] = full[0]
    some = evaluate_volume(image, full, "ldctbench-abdomen")["psnr_db"]
    rest = evaluate_volume(image[1:], full[1:], "ldctbench-abdomen")["psnr_db"]
    assert some == pytest.approx(rest)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(rows=st.integers(1, 40), slices=st.integers(0, 2), name=st.sampled_from(SCANNED))
def test_padding_does_not_flatter(rows, slices, name):
    rng = np.random.default_rng(0)
    full = rng.integers(-100, 200, (2, 16, 16)).astype(np.int16)
    image = full + rng.normal(0, 20, full.shape)
    plain = evaluate_volume(image, full, name)
    around = ((0, slices), (0, rows), (0, 0))
    padded = evaluate_volume(
        np.pad(image, around, constant_values=AIR_HU), np.pad(full, around, constant_values=AIR_HU), name
    )
    assert padded["rmse_hu"] == pytest.approx(plain["rmse_hu"])
    assert padded["psnr_db"] == pytest.approx(plain["psnr_db"])


@pytest.mark.parametrize("name", ["chest", "abdomen", "neuro"])
def test_our_windows_differ_from_the_benchmarks_by_padding_alone(pair, padded, name):
    middle = [x[:, 16:48, 16:48] for x in pair]
    assert evaluate_volume(*middle, name) == evaluate_volume(*middle, f"ldctbench-{name}")
    ours, theirs = (evaluate_volume(*padded, each) for each in (name, f"ldctbench-{name}"))
    share = 1 - (padded[1] == AIR_HU).mean()
    assert theirs["rmse_hu"] == pytest.approx(ours["rmse_hu"] * math.sqrt(share), rel=1e-3)
    assert theirs["psnr_db"] == pytest.approx(ours["psnr_db"] - 10 * math.log10(share), rel=1e-3)
    assert theirs["ssim"] > ours["ssim"]


def test_a_mask_wins_over_what_the_protocol_counts(padded):
    image, full = padded
    for name, like in (("abdomen", "ldctbench-abdomen"), ("ldctbench-abdomen", "abdomen")):
        mask = np.ones(full.shape, bool) if name == "abdomen" else full > AIR_HU
        figures = evaluate_volume(image, full, name, mask)
        assert figures == pytest.approx(evaluate_volume(image, full, like), rel=1e-3)


def test_noise_that_is_cut_off_in_air_counts():
    """It lies at the HU of padding here and there."""
    rng = np.random.default_rng(0)
    full = rng.normal(-1000, 24, (2, 64, 64)).clip(AIR_HU).round().astype(np.int16)
    image = full + np.where(full == AIR_HU, 40, 0)
    expected = 40 * math.sqrt((full == AIR_HU).mean())
    assert evaluate_volume(image, full, "abdomen")["rmse_hu"] == pytest.approx(expected, rel=0.01)


def test_only_the_mask_counts(pair):
    image, full = pair
    mask = np.zeros(full.shape, bool)
    mask[:, 20:40, 20:40] = True
    spoilt = np.where(mask, image, full + 500)
    spoilt[:, 10:50, 10:50] = image[:, 10:50, 10:50]  # SSIM looks as far as its window
    assert evaluate_volume(spoilt, full, "ldctbench-abdomen", mask) == pytest.approx(
        evaluate_volume(image, full, "ldctbench-abdomen", mask)
    )


def test_mistakes_are_named(pair):
    image, full = pair
    with pytest.raises(UserError, match=r"'liver'.* abdomen, neuro, ldctbench-chest, .*redcnn-l506"):
        evaluate_volume(image, full, "liver")
    with pytest.raises(UserError, match="shapes differ"):
        evaluate_volume(image[1:], full, "full-range")
    with pytest.raises(UserError, match="no voxel to count"):
        evaluate_volume(image, np.full_like(full, AIR_HU), "full-range")
    with pytest.raises(UserError, match="smaller than its window"):
        evaluate_volume(image[:, :6], full[:, :6], "full-range")
    with pytest.raises(UserError, match=r"VIF: .* smaller than its window, 1 x 41 x 41"):
        evaluate_volume(image[:, :40], full[:, :40], "full-range", measures=["vif"])
    with pytest.raises(UserError, match=r"SSIM: 6 slices .* take a protocol in 2-D"):
        evaluate_volume(image[:6], full[:6], "full-range-3d")


def test_a_protocol_says_its_window_what_it_counts_and_dose():
    said = [str(protocol_named(name)) for name in ("abdomen", "ldctbench-abdomen-3d", "redcnn-l506")]
    assert said == [
        "abdomen, window [-150, 249] HU (RMSE, VIF: [-1024, 1900]), padding left out",
        "ldctbench-abdomen-3d, window [-150, 249] HU (RMSE, VIF: [-1024, 1900]), padding counted",
        "redcnn-l506, window [-160, 240] HU, padding counted",
    ]
    assert protocol_named("ldctbench-chest").dose == 0.10
    assert protocol_named("redcnn-l506").window == (-160, 240)
