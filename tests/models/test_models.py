from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldct_dist.errors import UserError
from ldct_dist.models.ema import Ema
from ldct_dist.models.losses import LossConfig, build_loss, mask_from_box
from ldct_dist.models.registry import WIDTHS, ModelConfig, build
from ldct_dist.models.weights import load_weights, save_weights

NAMES = sorted(WIDTHS)
PARAMETERS = {"xs": (0, 0.4e6), "s": (0.8e6, 1.3e6), "m": (13e6, 17e6), "l": (90e6, 110e6), "xl": (280e6, 320e6)}


def randomised(config: ModelConfig):
    torch.manual_seed(3)
    model = build(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) * (1.5 / p[0].numel()) ** 0.5)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_what_their_names_say(name):
    with torch.device("meta"):
        for size, (low, high) in PARAMETERS.items():
            assert low < sum(p.numel() for p in build(ModelConfig(name=name, size=size)).parameters()) < high
        assert sum(p.numel() for p in build(ModelConfig(name=name, size="xxl")).parameters()) > 1e9


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_network_changes_no_bit(name):
    hu = torch.randn(2, 1, 6, 16, 24) * 700
    assert torch.equal(build(ModelConfig(name=name, size="xs"))(hu), hu)


@pytest.mark.parametrize("thick", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_receptive_field_is_as_stated(name, thick):
    model = randomised(ModelConfig(name=name, size="xs", thick_slices=thick)).double()
    z, y, x = model.radius
    assert z <= 24
    assert max(y, x) <= 48
    shape = (2 * z + 5, 120, 120)
    reach = [0, 0, 0]
    for offset in range(0, 8, 7):  # the corners of a block of 8 x 8 see furthest
        hu = torch.randn(1, 1, *shape, dtype=torch.float64, requires_grad=True)
        centre = (shape[0] // 2, 56 + offset, 56 + offset)
        (model(hu)[0, 0][centre]).backward()
        seen = hu.grad[0, 0].nonzero()
        for axis in range(3):
            reach[axis] = max(reach[axis], int((seen[:, axis] - centre[axis]).abs().max()))
    assert reach[0] == z
    assert max(y - 1, 1) <= max(reach[1:]) <= y


@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_changes_no_gradient(name):
    gradients = []
    for mode in ("none", "full"):
        model = randomised(ModelConfig(name=name, size="xs", activation_checkpointing=mode))
        torch.manual_seed(0)
        model(torch.randn(1, 1, 4, 16, 16) * 100).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_an_unknown_size_names_those_there_are():
    with pytest.raises(UserError, match=r"model.size=huge: unet3d comes in xs, s, m, l, xl, xxl"):
        build(ModelConfig(size="huge"))


def test_losses_are_what_the_formulas_say():
    denoised, full = torch.tensor([[3.0, 5.0]]).view(1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 2)
    all_of, first = torch.ones(1, 1, 1, 1, 2, dtype=bool), torch.tensor([[True, False]]).view(1, 1, 1, 1, 2)
    assert build_loss(LossConfig(name="l1"))(denoised, full, all_of).tolist() == [4.0]
    assert build_loss(LossConfig(name="mse"))(denoised, full, all_of).tolist() == [17.0]
    assert build_loss(LossConfig(name="mse"))(denoised, full, first).tolist() == [9.0]
    eps = build_loss(LossConfig(name="charbonnier", eps_hu=4.0))
    assert eps(denoised, full, first).item() == pytest.approx(5.0 - 4.0)


def test_a_sample_that_is_all_padding_counts_nothing():
    loss = build_loss(LossConfig())
    assert loss(torch.ones(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2, dtype=bool)).item() == 0


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    starts=st.tuples(*[st.integers(-20, 12)] * 3),
    sizes=st.tuples(*[st.integers(1, 40)] * 3),
    margin=st.tuples(*[st.integers(0, 4)] * 3),
)
def test_the_mask_keeps_voxels_of_the_volume_that_see_what_they_would_see_in_use(starts, sizes, margin):
    shape = (10, 12, 9)
    box = torch.tensor([[(a, a + n) for a, n in zip(starts, sizes, strict=True)]])
    mask = mask_from_box(box, shape, margin)[0, 0]
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape)).tolist():
        counts = True
        for i, n, (start, stop), m in zip(index, shape, box[0].tolist(), margin, strict=True):
            in_volume = start <= i < stop
            # what it sees beyond the crop must not be volume
            sees = i - m >= max(0, start) if start < 0 else True
            sees = sees and (i + m < n if stop > n else True)
            counts = counts and in_volume and sees
        assert mask[tuple(index)].item() == counts


def test_weights_travel_with_their_network(tmp_path):
    model = randomised(ModelConfig(name="nafnet3d", size="xs"))
    save_weights(tmp_path / "w.safetensors", model, step="7")
    loaded = load_weights(tmp_path / "w.safetensors")
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_damaged_or_foreign_weights_are_one_line(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match="no such weights file"):
        load_weights(path)
    save_weights(path, build(ModelConfig(size="xs")))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not readable as safetensors"):
        load_weights(path)
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="not a denoiser of this package"):
        load_weights(path)


def test_the_average_follows_faster_at_first_and_resumes_from_its_count():
    model = build(ModelConfig(size="xs"))
    ema = Ema(model, decay=0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    start = [p.clone() for p in ema.module.parameters()]
    ema.update(model)  # decay (1 + 0) / (10 + 0)
    moved = next(ema.module.parameters()) - start[0]
    assert torch.allclose(moved, torch.full_like(moved, 0.9))
    for _ in range(200):
        ema.update(model)
    assert ema.updates == 201
    assert torch.allclose(next(ema.module.parameters()), next(model.parameters()), atol=1e-5)
