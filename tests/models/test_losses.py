from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldct_dist.config import validate
from ldct_dist.errors import UserError
from ldct_dist.models.losses import OWN, LossConfig, build_loss, mask_from_box, refuse_unfit
from networks import random_network


def line(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(1, 1, 1, 1, -1)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LossConfig(name="l1"), 4.0),
        (LossConfig(name="mse"), 17.0),
        (LossConfig(name="charbonnier", eps_hu=4.0), (5 - 4 + math.sqrt(41) - 4) / 2),
    ],
)
def test_losses_are_the_mean_of_their_formula_over_the_mask(config, expected):
    denoised, full, mask = line(13.0, 995.0, 7.0), line(10.0, 1000.0, 900.0), line(1, 1, 0).bool()
    assert build_loss(config)(denoised, full, mask).tolist() == pytest.approx([expected])


def test_a_voxel_of_weight_three_counts_like_three_voxels():
    loss = build_loss(LossConfig())
    once = loss(line(3, 50, 0), line(0, 0, 0), line(3, 1, 0))
    assert once.tolist() == pytest.approx(
        loss(line(3, 3, 3, 50), line(0, 0, 0, 0), line(1, 1, 1, 1).bool()).tolist()
    )


@pytest.mark.parametrize("name", ["charbonnier", "l1", "mse"])
def test_each_sample_has_its_own_mean(name):
    loss = build_loss(LossConfig(name=name))
    denoised, full = torch.randn(3, 1, 2, 4, 4), torch.randn(3, 1, 2, 4, 4)
    mask = torch.rand(3, 1, 2, 4, 4) < 0.5
    together = loss(denoised, full, mask)
    alone = [loss(denoised[i : i + 1], full[i : i + 1], mask[i : i + 1])[0] for i in range(3)]
    assert together.tolist() == pytest.approx([a.item() for a in alone])


def test_a_sample_that_is_all_padding_counts_nothing_and_moves_nothing():
    denoised = torch.ones(1, 1, 2, 2, 2, requires_grad=True)
    loss = build_loss(LossConfig())(denoised, torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2).bool())
    loss.sum().backward()
    assert loss.item() == 0
    assert not denoised.grad.any()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    starts=st.tuples(*[st.integers(-20, 9)] * 3),
    sizes=st.tuples(*[st.integers(1, 40)] * 3),
    margin=st.tuples(*[st.integers(0, 12)] * 3),
)
def test_masked_is_what_lies_beyond_the_volume_or_sees_over_the_crop_into_it(starts, sizes, margin):
    shape = (6, 9, 10)
    box = [(a, a + n) for a, n in zip(starts, sizes, strict=True)]
    mask = mask_from_box(torch.tensor([box]), torch.Size(shape), margin)[0, 0]
    inside = [
        # of all that voxel i sees along the axis, each place is either in the crop or beyond the volume
        torch.tensor(
            [
                a <= i < b and all(0 <= j < n or not a <= j < b for j in range(i - m, i + m + 1))
                for i in range(n)
            ]
        )
        for n, (a, b), m in zip(shape, box, margin, strict=True)
    ]
    z, y, x = inside
    assert torch.equal(mask, z[:, None, None] & y[:, None] & x)


def test_with_the_radius_as_margin_crops_that_count_are_what_the_volume_gives():
    """What the margin is for: over the mask, the network says the same on the crop as on the whole volume."""
    model = random_network("redcnn3d", thick_slices=True)
    volume = torch.randn(1, 1, 3, 40, 64) * 50
    crop = volume[..., 8:64]  # x: the volume begins 8 voxels before it and ends with it
    mask = mask_from_box(torch.tensor([[(0, 3), (0, 40), (-8, 56)]]), crop.shape[2:], model.radius)
    with torch.inference_mode():
        same = (model(crop) - model(volume)[..., 8:64]).abs() < 1e-3
    assert mask.sum() == 3 * 40 * (56 - model.radius[2])
    assert same[mask].all()
    assert not same[~mask].all()


@pytest.mark.parametrize(
    ("margin", "crop", "expected"),
    [
        (None, (64, 128, 128), (10, 48, 48)),
        (None, (32, 96, 128), (10, 0, 48)),  # 96 voxels are no more than twice 48: none would be left
        (None, (20, 48, 48), (0, 0, 0)),
        ((1, 4, 4), (8, 48, 48), (1, 4, 4)),
        ((0, 0, 0), (64, 128, 128), (0, 0, 0)),
    ],
)
def test_the_margin_is_the_radius_where_a_crop_is_large_enough_or_what_is_said(margin, crop, expected):
    assert LossConfig(margin=margin).margin_for((10, 48, 48), crop) == expected


def test_a_margin_that_leaves_nothing_is_refused():
    with pytest.raises(
        UserError, match=r"loss.margin=\[4, 4, 4\] leaves nothing of a crop of \[8, 48, 48\] voxels"
    ):
        LossConfig(margin=(4, 4, 4)).margin_for((10, 48, 48), (8, 48, 48))


def each(off, weights):
    return (off * weights).flatten(1).sum(1) / weights.flatten(1).sum(1).clamp(min=1)


UNFIT = {
    "mean": (lambda d, f, w: each((d - f).abs(), w).mean(), r"gives \(\) for two crops"),
    "float": (lambda d, f, w: each((d - f).abs(), w).mean().item(), "gives float for two crops"),
    "detached": (lambda d, f, w: each((d - f).abs(), w).detach(), r"gives \(2,\) .* with a gradient"),
    "random": (lambda d, f, w: each((d - f).abs() * torch.rand_like(d), w), "gives two results"),
    "shared": (
        lambda d, f, w: (n := each((d - f).abs(), w)) * n / n.detach().max(),
        "depends on the other crops",
    ),
    "batch's range": (
        lambda d, f, w: each((d - f).abs(), w) / (f.max() - f.min()),
        "depends on the other crops",
    ),
    "batch's weights": (
        lambda d, f, w: ((d - f).abs() * w).flatten(1).sum(1) / w.sum().clamp(min=1),
        "depends on the other crops",
    ),
    "unweighted": (lambda d, f, w: each((d - f).abs(), torch.ones_like(w)), "voxels of weight 0 count"),
    "crop's range": (
        lambda d, f, w: each((d - f).abs(), w) / (f.flatten(1).amax(1) - f.flatten(1).amin(1)),
        "voxels of weight 0 count",
    ),
    "nothing": (lambda d, f, w: each((d - f).abs() * 0, w), "gives 0, or less"),
    "value": (lambda d, f, w: each((d - f).abs(), w) * int("no number"), "fails on weights"),
    "ratio": (
        lambda d, f, w: ((d - f).abs() * w).flatten(1).sum(1) / w.flatten(1).sum(1),
        "gives no 0 for a crop without",
    ),
    "negative": (lambda d, f, w: -each((-(d - f).abs()).exp(), w), "gives 0, or less"),
    "root": (lambda d, f, w: each((d - f).square(), w).sqrt(), "gradient is not finite where"),
    "bool alone": (lambda d, f, w: each((d - f).abs().where(w, 0), w), "fails on weights of torch.float32"),
    "float alone": (
        lambda d, f, w: each((d - f).abs(), w) * (1 - w).mean().exp(),
        "fails on weights of torch.bool",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_loss_of_another_package_is_refused_where_it_breaks_a_promise(name, monkeypatch):
    loss, words = UNFIT[name]
    monkeypatch.setattr("ldct_dist.models.losses.build_loss", lambda config, device: loss)
    for _ in range(3):
        with pytest.raises(UserError, match=f"loss.name=charbonnier: .*{words}"):
            refuse_unfit(LossConfig(), (4, 8, 8))


@pytest.mark.parametrize("name", OWN)
def test_our_own_keep_theirs(name):
    refuse_unfit(LossConfig(name=name), (4, 8, 8))


@pytest.mark.usefixtures("my_nets")
def test_a_loss_of_another_package_is_made_with_its_options():
    denoised, full, mask = line(13.0, 995.0, 7.0), line(10.0, 1000.0, 900.0), line(1, 1, 0).bool()
    config = validate(LossConfig, {"name": "edges", "options": {"share": 0.25}}, "run.yaml")
    assert build_loss(config)(denoised, full, mask).tolist() == [(3 + 5 + 0.25 * 8) / 2]
    refuse_unfit(config, (4, 8, 8))
    with pytest.raises(UserError, match=r"loss.options=\{'shares': 1\}: edges takes others"):
        build_loss(LossConfig(name="edges", options={"shares": 1}))
    with pytest.raises(UserError, match="name: there is no huber, but charbonnier, l1, mse, edges"):
        validate(LossConfig, {"name": "huber"}, "run.yaml")
    with pytest.raises(UserError, match="eps_hu: edges has no such setting"):
        validate(LossConfig, {"name": "edges", "eps_hu": 3}, "run.yaml")
    with pytest.raises(UserError, match="options: l1 has no such setting"):
        validate(LossConfig, {"name": "l1", "options": {"share": 1}}, "run.yaml")
