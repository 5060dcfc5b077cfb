from __future__ import annotations

import pytest
import torch

from ldct_dist.config import validate
from ldct_dist.errors import UserError
from ldct_dist.models.execution import lay_out
from ldct_dist.models.registry import WIDTHS, ModelConfig, build
from networks import random_network

NAMES = sorted(WIDTHS)
PARAMETERS = {
    "xs": (0, 0.5e6),
    "s": (0.8e6, 1.3e6),
    "m": (13e6, 17e6),
    "l": (90e6, 110e6),
    "xl": (280e6, 320e6),
    "xxl": (1e9, 1.2e9),
}


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_what_their_names_say(name):
    with torch.device("meta"):
        models = {size: build(ModelConfig(name=name, size=size)) for size in WIDTHS[name]}
    for size, (low, high) in PARAMETERS.items():
        assert low < sum(p.numel() for p in models[size].parameters()) < high
    # They grow in width alone, so what is measured below on the smallest holds for all.
    assert len({model.radius for model in models.values()}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_network_changes_no_bit(name):
    hu = torch.randint(-1024, 3072, (2, 1, 6, 16, 24)).float()
    assert torch.equal(build(ModelConfig(name=name, size="xs"))(hu), hu)


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_network_learns_from_its_first_step(name):
    model = build(ModelConfig(name=name, size="xs"))
    hu = torch.randn(2, 1, 4, 16, 16) * 100
    step = torch.optim.SGD(model.parameters(), lr=1e-9)
    for _ in range(2):  # the last layer, which starts at zero, lets gradients through once it has moved
        model.zero_grad()
        model(hu).square().mean().backward()
        step.step()
    # NAFNet's branches start at zero too, and open one step later
    still = {n for n, p in model.named_parameters() if not p.grad.any() and "blocks" not in n}
    assert not still


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("thick_slices", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_an_output_voxel_sees_as_far_as_stated_and_no_further(name, thick_slices, axis):
    model = random_network(name, thick_slices=thick_slices)
    radius, stride = model.radius[axis], model.stride[axis]
    assert radius <= (24, 48, 48)[axis]
    shape = [1, 8, 8]
    shape[axis] = (2 * (radius // stride) + 5) * stride
    # Of a stride's voxels, those beside its middle see furthest: one of them down, the other one up.
    middle = shape[axis] // 2 // stride * stride + stride // 2
    places = (middle - 1, middle)
    hu = torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    answer = model(hu).movedim(2 + axis, -1)
    (answer[0, ..., places[0]].sum() + answer[1, ..., places[1]].sum()).backward()
    seen = hu.grad.movedim(2 + axis, -1).flatten(1, 3).any(1)
    reach = [(seen[i].nonzero() - place).abs().max().item() for i, place in enumerate(places)]
    assert max(reach) == radius


@pytest.mark.parametrize("name", NAMES)
def test_the_residual_is_added_in_fp32_under_autocast(name):
    model = random_network(name)
    hu = torch.full((1, 1, 4, 16, 16), 1003.0)
    with torch.autocast("cpu", torch.bfloat16):
        answer = model(hu)
        nothing = build(model.config)(hu)
    assert answer.dtype == torch.float32
    assert torch.equal(nothing, hu)  # bf16 knows 1000 and 1004


@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_changes_no_gradient(name):
    hu = torch.randn(2, 1, 4, 16, 16) * 100
    gradients = []
    for mode in ("none", "selective", "full"):
        model = random_network(name, activation_checkpointing=mode)
        model(hu).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for none, *others in zip(*gradients, strict=True):
        assert all(torch.equal(none, other) for other in others)


@pytest.mark.parametrize("name", ["unet3d", "nafnet3d"])
def test_a_size_between_strides_is_refused(name):
    with pytest.raises(UserError, match=rf"crop \(4, 16, 20\): {name} takes multiples of \(1, 8, 8\)"):
        build(ModelConfig(name=name, size="xs"))(torch.zeros(1, 1, 4, 16, 20))


def test_an_unknown_network_or_size_names_those_there_are():
    with pytest.raises(UserError, match=r"size: unet3d comes in xs, s, m, l, xl, xxl"):
        validate(ModelConfig, {"size": "huge"}, "run.yaml")
    with pytest.raises(UserError, match=r"name: there is no unet, but unet3d, nafnet3d, redcnn3d"):
        validate(ModelConfig, {"name": "unet"}, "run.yaml")


@pytest.fixture
def two_threads():
    """On a single one, torch computes some convolutions in the plain layout."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_is_the_layout_of_all_that_convolutions_take_and_give(name, two_threads):
    """A tensor in another one is copied by each convolution that it meets, forward and backward."""
    model = random_network(name)
    hu = torch.randn(2, 1, 16, 64, 64) * 100
    lay_out(model, channels_last=False)
    expected = model(hu)
    lay_out(model, channels_last=True)
    strangers = []

    def heard(layer, given, answer):
        many = [t for t in (*given, answer) if t.shape[1] > 1]
        strangers.extend(layer for t in many if not t.is_contiguous(memory_format=torch.channels_last_3d))

    for layer in model.network.modules():
        if isinstance(layer, (torch.nn.Conv3d, torch.nn.ConvTranspose3d)):
            layer.register_forward_hook(heard)
    answer = model(hu)
    assert not strangers
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_no_layer_gives_more_numbers_for_a_voxel_than_the_network_says(name):
    model = random_network(name)
    given = []
    for layer in model.network.modules():
        layer.register_forward_hook(lambda layer, inputs, answer: given.append(answer.numel()))
        layer.register_forward_pre_hook(lambda layer, inputs: given.append(inputs[0].numel()))
    model(torch.zeros(1, 1, 4, 16, 24))
    assert max(n for n in given) == model.widest * 4 * 16 * 24
