import numpy as np
import pytest

from ldct_dist.ct.phantom import Disc, ball, body, discs, water_cylinder
from ldct_dist.ct.volume import AIR_HU


def test_cylinder_is_water_in_air_and_of_the_right_size():
    hu = water_cylinder((2, 64, 80), (3.0, 2.0, 1.5), radius_mm=40).hu
    assert hu[0, 32, 40] == 0
    assert hu[0, 0, 0] == -1000
    water_mm2 = ((hu[0] + 1000) / 1000).sum() * 2.0 * 1.5
    assert abs(water_mm2 / (np.pi * 40**2) - 1) < 0.01


def test_body_holds_its_tissues_and_padding():
    hu = body((16, 96, 96), (5.0, 4.0, 4.0), seed=0).hu
    for tissue in (AIR_HU, -1000, -100, 55, 105, 300):
        assert (hu == tissue).sum() > 50
    assert (hu[:, 0, 0] == AIR_HU).all()


def test_another_seed_is_another_patient():
    first, again, other = (body((8, 64, 64), (5.0, 6.0, 6.0), seed).hu for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).mean() > 0.01


def test_discs_lie_where_they_are_put_the_later_on_top():
    filled = [Disc(0, 0, 50, 50), Disc(20, -10, 8, 200)]
    hu = discs((2, 128, 128), (5.0, 1.0, 1.0), filled)
    assert hu[1, 54, 84] == pytest.approx(200)  # 10 mm up, 20 mm to the right of the middle
    assert hu[0, 74, 44] == pytest.approx(50)
    assert hu[0, 0, 0] == -1000


@pytest.mark.parametrize("voxel", [(0.4, 0.4), (0.7, 0.9), (1.5, 1.5), (2.0, 2.0)])
@pytest.mark.parametrize("radius", [0.3, 2.0, 3.0, 5.3])
@pytest.mark.parametrize("middle", [(0.0, 0.0), (0.31, -0.17)])
def test_a_disc_has_its_area_wherever_it_lies(voxel, radius, middle):
    share = discs((1, 41, 41), (5.0, *voxel), [Disc(*middle, radius, -999.0)])[0] + 1000
    assert share.sum() * voxel[0] * voxel[1] == pytest.approx(np.pi * radius**2, rel=1e-9)
    inside = _inside(np.hypot, (voxel[0], middle[1]), (voxel[1], middle[0]), radius)
    assert np.abs(share - inside).max() < 0.01


def test_no_radius_is_too_odd_to_draw():
    """The square of some is not what rounding makes of the product."""
    for radius in np.random.default_rng(0).uniform(1, 19, 20000).tolist():
        if radius**2 < radius * radius:
            assert np.isfinite(discs((1, 41, 41), (5.0, 1.0, 1.0), [Disc(0, 0, radius, 20.0)])).all()


@pytest.mark.parametrize("spacing", [(1.0, 0.7, 0.9), (2.9, 1.5, 1.5), (5.0, 0.8, 0.8), (8.0, 2.0, 2.0)])
def test_a_ball_has_its_volume_and_each_slice_its_part(spacing):
    radius = 3.0
    share = ball(2 * radius, spacing)
    depth = spacing[0] * (np.arange(len(share) + 1) - len(share) / 2)
    below = np.pi * (radius**2 * depth - depth**3 / 3)[(np.abs(depth) < radius)]
    whole = np.pi * radius**3 * 2 / 3
    parts = np.diff(np.concatenate([[-whole], below, [whole]]))
    filled = share.sum((1, 2)) * np.prod(spacing)
    np.testing.assert_allclose(filled[filled > 1e-9], parts[parts > 1e-9], rtol=1e-6)
    assert share.max() <= 1 + 1e-9
    np.testing.assert_allclose(share, share[::-1, ::-1, ::-1], atol=1e-9)


def _inside(distance, y, x, radius):
    """Share of each of 41 x 41 voxels within `radius`, by 50 x 50 subsamples; y, x: voxel size and middle, mm."""
    at = [((np.arange(41 * 50) + 0.5) / 50 - 20.5) * mm - middle for mm, middle in (y, x)]
    inside = distance(at[0][:, None], at[1]) < radius
    return inside.reshape(41, 50, 41, 50).mean((1, 3))
