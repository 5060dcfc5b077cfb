"""A network that misstates what it sees is found out, one that does not is let through."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldct_dist.errors import UserError
from ldct_dist.models.locality import refuse_misstated
from ldct_dist.models.registry import NETWORKS, ModelConfig, build


class Plain(nn.Module):
    """Three convolutions, along all axes."""

    radius, stride = (3, 3, 3), (1, 1, 1)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *[nn.Sequential(nn.Conv3d(2 if i == 0 else 4, 4, 3, padding=1), nn.GELU()) for i in range(2)]
        )
        self.last = nn.Conv3d(4, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layers(x))


class Strided(Plain):
    """Halved in plane, and back."""

    radius, stride = (3, 9, 9), (1, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halved = nn.functional.avg_pool3d(x, (1, 2, 2))
        return nn.functional.interpolate(super().forward(halved), scale_factor=(1, 2, 2))


class Hidden(Plain):
    """What looks further starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.far = nn.Conv3d(2, 1, (1, 1, 15), padding=(0, 0, 7))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.gate * self.far(x)


class Dropping(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.dropout(x, training=self.training))


class Normed(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.instance_norm(x))


class Pooled(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * x.mean((2, 3, 4), keepdim=True)[:, :1]


class Twice(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).expand(-1, 2, -1, -1, -1)


class Idle(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Conv3d(2, 1, 1)


def denoiser(network: nn.Module, **stated: tuple[int, int, int]) -> nn.Module:
    model = build(ModelConfig(size="xs"))
    for key, value in stated.items():
        setattr(network, key, value)
    model.network, model.stride = network, network.stride
    z, y, x = network.radius
    model.radius = (z, y + 1, x + 1)
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_that_come_with_the_package_pass(name):
    refuse_misstated(build(ModelConfig(name=name, size="xs")))


@pytest.mark.parametrize(
    "network",
    [Plain(), Strided(), Dropping(), denoiser(Plain(), radius=(5, 9, 4)).network],
    ids=["plain", "strided", "dropping", "modest"],
)
def test_what_sees_no_further_than_it_says_passes(network):
    refuse_misstated(denoiser(network))


@pytest.mark.parametrize(
    ("network", "stated", "words"),
    [
        (Plain(), {"radius": (2, 3, 3)}, r"sees further along z than its radius \(2, 3, 3\) says"),
        (Plain(), {"radius": (3, 3, 2)}, "sees further along x"),
        (Strided(), {"radius": (3, 6, 9)}, "sees further along y"),
        (Strided(), {"radius": (3, 20, 20), "stride": (1, 1, 1)}, r"forward fails on .* stride \(1, 1, 1\)"),
        (Strided(), {"radius": (3, 20, 20), "stride": (1, 2, 1)}, r"forward fails on .* stride \(1, 2, 1\)"),
        (Hidden(), {}, "sees further along x"),
        (Normed(), {}, "do without statistics over space"),
        (Pooled(), {}, "do without statistics over space"),
        (
            Twice(),
            {},
            r"forward gives \(1, 2, 11, 4, 4\) for \(1, 2, 11, 4, 4\); it has to give \(1, 1, 11, 4, 4\)",
        ),
        (Idle(), {}, "extra.weight takes no part in forward"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_it_misstates_is_named(network, stated, words):
    with pytest.raises(UserError, match=words):
        refuse_misstated(denoiser(network, **stated))


def test_a_network_that_moves_with_part_of_its_stride_only_is_found_by_moving_it():
    """Every second voxel is passed over: none sees too far, but where the input begins makes a difference."""

    class Combed(Plain):
        radius = (3, 3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            comb = torch.arange(x.shape[-1], device=x.device) % 2
            return super().forward(x * comb)

    with pytest.raises(UserError, match=r"moved by 1 along x .* stride \(1, 1, 1\) has to be the total"):
        refuse_misstated(denoiser(Combed()))
