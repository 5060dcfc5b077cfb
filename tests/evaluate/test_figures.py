from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread

from ldct_dist.ct.phantom import body
from ldct_dist.ct.volume import Volume
from ldct_dist.evaluate.figures import planes_strip, three_planes

WINDOW = (-160.0, 240.0)


@pytest.fixture
def images():
    full = body((20, 64, 64), (5.0, 6.0, 6.0), seed=0)
    noise = np.random.default_rng(0).normal(0, 30, full.shape)
    low = replace(full, hu=np.rint(full.hu + noise).astype(np.int16))
    denoised = replace(full, hu=np.rint(full.hu + noise / 3).astype(np.int16))
    return {"low dose": low, "denoised": denoised, "full dose": full}


def test_png_has_four_columns_in_a_scale_of_mm(images, tmp_path):
    three_planes(tmp_path / "planes.png", images, WINDOW, "a phantom")
    picture = imread(tmp_path / "planes.png")
    height, width = picture.shape[:2]
    assert 1600 < width < 2000
    assert 0.3 < height / width < 0.9
    # Every column holds something bright, and something of every row's plane.
    for column in np.array_split(picture[..., :3].mean(-1)[:, 60:], 4, axis=1):
        assert column.max() > 0.4
        assert column.std() > 0.03


def test_the_same_picture_twice(images, tmp_path):
    for name in ("a.png", "b.png"):
        three_planes(tmp_path / name, images, WINDOW, "a phantom")
    assert (imread(tmp_path / "a.png") == imread(tmp_path / "b.png")).all()


def test_head_is_up_and_millimetres_are_square():
    hu = np.full((20, 40, 40), -1000, np.int16)
    hu[:, 10:30, 5:35] = 0  # 40 mm deep, 60 mm wide, 100 mm long
    hu[15:, 10:30, 5:35] = 240  # the head, white
    volume = Volume(hu, (5.0, 2.0, 2.0))
    strip = planes_strip({"low": volume, "full": volume}, WINDOW)
    assert strip.dtype == np.uint8
    # Axial 20 rows, coronal 50, sagittal 50, two black ones between; three columns of 30.
    assert strip.shape == (3, 20 + 2 + 50 + 2 + 50, 30 + 2 + 30 + 2 + 30)
    coronal = strip[0, 22:72, :30]
    assert coronal[:10].mean() > 240 > coronal[-10:].mean() > 50
    sagittal = strip[0, 74:, 5:25]
    assert sagittal[:10].mean() > 240 > sagittal[-10:].mean() > 50
    assert strip[0, 74:, :4].max() == 0  # 20 pixels deep, in the middle of 30


def test_difference_is_dark_where_equal_blue_below_and_red_above():
    hu = np.zeros((8, 32, 32), np.int16)
    other = hu.copy()
    other[:, :, :10] -= 40
    other[:, :, 22:] += 40
    strip = planes_strip(
        {"image": Volume(other, (1.0, 1.0, 1.0)), "full": Volume(hu, (1.0, 1.0, 1.0))}, WINDOW
    )
    red, _, blue = strip[:, :32, -32:].astype(int)
    assert (blue[:, :8] > red[:, :8]).all()
    assert (red[:, 24:] > blue[:, 24:]).all()
    assert strip[:, 10:20, -18:-14].max() < 30


def test_wide_volumes_are_shrunk_to_the_strip():
    volume = Volume(np.zeros((4, 600, 700), np.int16), (5.0, 0.7, 0.7))
    _, _, width = planes_strip({"low": volume, "full": volume}, WINDOW).shape
    assert width == 3 * 256 + 4


def test_a_column_half_a_pixel_wider_than_whole_ones():
    """45 voxels of 0.62 mm are 46.5 of 0.6 mm, or in floats a little more."""
    volume = Volume(np.zeros((3, 30, 45), np.int16), (0.6, 0.62, 0.62))
    assert planes_strip({"low": volume, "full": volume}, WINDOW).shape[2] == 3 * 46 + 4
