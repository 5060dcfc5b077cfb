import numpy as np

from ldct_dist.ct.phantom import Disc, body, discs, water_cylinder
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
    hu = discs((2, 128, 128), (5.0, 1.0, 1.0), filled).hu
    assert hu[1, 54, 84] == 200  # 10 mm up, 20 mm to the right of the middle
    assert hu[0, 74, 44] == 50
    assert hu[0, 0, 0] == -1000
