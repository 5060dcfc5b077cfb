import numpy as np
import pytest
import torch

from ldct_dist.ct.projector import Scan, filtered_backprojection, forward

WATER = 0.0192


def a_scan(beam="fan", shape=(128, 128), spacing=(2.0, 2.0), views=256, columns=256):
    return Scan(beam, views, columns, 595.0, shape, spacing)


def disc(scan, radius_mm, x_mm=0.0, y_mm=0.0):
    """(y, x) share of each voxel inside a disc."""
    fine = 8
    y, x = (
        torch.as_tensor((np.arange(n * fine) - (n * fine - 1) / 2) * mm / fine)
        for n, mm in zip(scan.shape, scan.spacing, strict=True)
    )
    inside = (x[None] - x_mm) ** 2 + (y[:, None] - y_mm) ** 2 < radius_mm**2
    return inside.double().reshape(scan.shape[0], fine, scan.shape[1], fine).mean((1, 3)).float()


def chords(scan, radius_mm, x_mm=0.0, y_mm=0.0):
    """The exact line integrals of that disc, mm."""
    theta, t = scan.rays()
    distance = t - x_mm * torch.cos(theta) - y_mm * torch.sin(theta)
    return 2 * (radius_mm**2 - distance.square()).clamp(min=0).sqrt()


@pytest.mark.parametrize("beam", ["fan", "parallel"])
def test_line_integrals_are_the_chords_of_a_disc(beam):
    scan = a_scan(beam, shape=(96, 128), spacing=(2.5, 1.5))
    p = forward(disc(scan, 60, 20, -15)[None], scan, step_mm=0.75)[0]
    exact = chords(scan, 60, 20, -15)
    assert (p - exact).abs().max() < 12  # at the rim, where the grid's voxels are partial
    assert (p - exact)[exact > 60].abs().max() < 1.5


@pytest.mark.parametrize("beam", ["fan", "parallel"])
@pytest.mark.parametrize("at", [(0.0, 0.0), (50.0, -30.0)])
def test_a_projected_disc_comes_back_at_its_value(beam, at):
    scan = a_scan(beam)
    phantom = torch.stack([disc(scan, 60, *at), 2 * disc(scan, 60, *at)]) * WATER
    image = filtered_backprojection(forward(phantom, scan, step_mm=1.0), scan, cutoff=0.25)
    inside, outside = disc(scan, 50, *at) == 1, disc(scan, 75, *at) == 0
    hu = (image / WATER - 1) * 1000
    assert hu[0][inside].mean().abs() < 2
    assert (hu[0][inside]).std() < 5
    assert (image[0][outside] / WATER * 1000).mean().abs() < 2
    torch.testing.assert_close(image[1], 2 * image[0], rtol=1e-4, atol=1e-6)


def test_fan_and_parallel_reconstruct_the_same_image():
    images = []
    for beam in ("fan", "parallel"):
        scan = a_scan(beam, shape=(96, 128), spacing=(2.5, 1.5), views=360)
        images.append(
            filtered_backprojection((WATER * chords(scan, 60, 20, -15))[None].float(), scan, 0.2)[0]
        )
    assert ((images[0] - images[1]) / WATER * 1000)[disc(scan, 50, 20, -15) == 1].abs().max() < 8


def test_a_slice_alone_comes_out_bit_for_bit_as_among_others():
    scan = a_scan(shape=(64, 64), spacing=(4.0, 4.0), views=96, columns=96)
    mu = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * WATER
    together = forward(mu, scan, step_mm=4.0)
    assert torch.equal(forward(mu[:1], scan, step_mm=4.0), together[:1])
    image = filtered_backprojection(together, scan)
    assert torch.equal(filtered_backprojection(together[:1], scan), image[:1])


def test_a_field_of_view_beyond_the_source_is_reconstructed_as_far_as_rays_reach():
    scan = a_scan(shape=(64, 64), spacing=(15.0, 15.0))  # corners at 679 mm, the source at 595
    image = filtered_backprojection(torch.ones(1, scan.views, scan.columns), scan)
    assert torch.isfinite(image).all()
    assert image[0, 0, 0] == 0
    assert image[0, 32, 32] != 0
