"""A network that misstates what it sees is found out, one that does not is let through."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ldct_dist.errors import UserError
from ldct_dist.models.locality import refuse_misstated
from ldct_dist.models.registry import NETWORKS, ModelConfig
from your_own import NAME


class Plain(nn.Module):
    """Three convolutions, along all axes."""

    radius, stride = (3, 3, 3), (1, 1, 1)

    def __init__(self, **stated: tuple[int, int, int]) -> None:
        super().__init__()
        self.first = nn.Conv3d(2, 4, 3, padding=1)
        self.second = nn.Conv3d(4, 4, 3, padding=1)
        self.last = nn.Conv3d(4, 1, 3, padding=1)
        for key, value in stated.items():
            setattr(self, key, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.gelu(self.second(F.gelu(self.first(x)))))


class Strided(Plain):
    """Halved in plane, and back."""

    radius, stride = (3, 9, 9), (1, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(super().forward(F.avg_pool3d(x, (1, 2, 2))), scale_factor=(1, 2, 2))


class Hidden(Plain):
    """What looks further starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.far = nn.Conv3d(2, 1, (1, 1, 15), padding=(0, 0, 7))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.gate * self.far(x)


class Idle(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Conv3d(2, 1, 1)


class Wired(Plain):
    """What it draws is no weight."""

    made = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.order = np.roll(np.arange(4), next(self.made))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x)[:, torch.from_numpy(self.order)]))


def changed(change: Callable[[nn.Module, torch.Tensor], torch.Tensor], after: bool = False) -> type[Plain]:
    """`Plain` with its input, or what it gives, changed."""

    class Changed(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return change(self, super().forward(x)) if after else super().forward(change(self, x))

    return Changed


def comb(_: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Every second voxel is passed over."""
    return x * (torch.arange(x.shape[-1], device=x.device) % 2)


def places(_: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + 0.1 * torch.linspace(-1, 1, x.shape[-1], device=x.device)


class Reentrant(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(checkpoint(lambda given: self.second(self.first(given)), x, use_reentrant=True))


class Recomputing(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(checkpoint(lambda given: self.second(self.first(given)), x, use_reentrant=False))


def spaced(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3, 4), keepdim=True)


class ReentrantLater(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(checkpoint(self.second, self.first(x), use_reentrant=True))


class Listed(Plain):
    """A tensor in a list is on the meta device for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = [torch.ones(1)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.filters[0])


class Flagged(Plain):
    """Layers may be given, and give, what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Scaled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.inner(x, 2)[0])


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, factor: int) -> tuple[torch.Tensor, None]:
        return x * factor, None


class Positive(Plain):
    """Divided by a root of what has to be positive, as in GDN."""

    def __init__(self) -> None:
        super().__init__()
        self.beta, self.gamma = nn.Parameter(torch.ones(4)), nn.Parameter(0.1 * torch.eye(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        norm = F.conv3d(x.square(), self.gamma[:, :, None, None, None], self.beta).sqrt()
        return self.last(self.second(x / norm))


@pytest.fixture
def check(monkeypatch):
    """`refuse_misstated` for a network that is made so."""

    def checked(make: Callable[[], nn.Module]) -> None:
        monkeypatch.setattr("ldct_dist.models.registry.installed.make_network", lambda name, options: make())
        monkeypatch.setattr("ldct_dist.models.registry.installed.names", lambda group: [NAME])
        refuse_misstated(ModelConfig(name=NAME), channels_last=True)

    return checked


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_that_come_with_the_package_pass(name):
    refuse_misstated(ModelConfig(name=name, size="xs"), channels_last=True)


@pytest.mark.parametrize(
    "make",
    [
        Plain,
        Strided,
        lambda: Plain(radius=(5, 9, 4)),
        changed(lambda self, x: F.dropout(x, training=self.training)),
        changed(lambda self, x: F.pad(x, (1,) * 6, mode="reflect")[..., 1:-1, 1:-1, 1:-1]),
        Recomputing,
        Positive,
        Flagged,
    ],
    ids=["plain", "strided", "modest", "dropout", "reflect", "recomputing", "positive", "flagged"],
)
def test_what_sees_no_further_than_it_says_passes(check, make):
    for _ in range(3):  # whatever its weights
        check(make)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Plain(radius=(2, 3, 3)), r"sees further along z than its radius \(2, 3, 3\) says"),
        (lambda: Plain(radius=(3, 3, 2)), "sees further along x"),
        (lambda: Strided(radius=(3, 6, 9)), "sees further along y"),
        (
            lambda: Strided(radius=(3, 20, 20), stride=(1, 1, 1)),
            r"forward gives \(2, 1, 6, 46, 6\) for \(2, 2, 6, 47, 6\)",
        ),
        (Hidden, "sees further along x"),
        (changed(lambda self, x: F.instance_norm(x)), "statistics over space"),
        (changed(lambda self, x: x * spaced(x)), "statistics over space"),
        (changed(lambda self, x: x - spaced(x).detach()), "with 7 voxels of air before it along z"),
        (changed(lambda self, x: x / x.detach().std()), "with 7 voxels of air before it along z"),
        (changed(lambda self, x: x if self.training else x - spaced(x)), "statistics over space"),
        (changed(places), "with 7 voxels of air before it along x"),
        (changed(comb), "with 7 voxels of air before it along x"),
        (changed(lambda self, x: x - x.mean(0)), "depends on the other crops of its batch"),
        (
            changed(lambda self, x: x.expand(-1, 2, -1, -1, -1), after=True),
            r"forward gives \(2, 2, 6, 6, 6\)",
        ),
        (changed(lambda self, x: (x, x), after=True), "forward gives tuple"),
        (changed(lambda self, x: x / 0, after=True), "not finite"),
        (Idle, "extra.weight learns nothing"),
        (Reentrant, "first.weight learns nothing"),
        (changed(lambda self, x: x * (x.sum().item() != 0)), "fails on torch's meta device"),
        (changed(lambda self, x: x.sigmoid_().mul_(2).sigmoid_()), "its gradient cannot be taken"),
        (ReentrantLater, "its gradient cannot be taken"),
        (changed(lambda self, x: x * 0), "does not depend on its input"),
        (Listed, "forward fails on"),
        (Wired, "made twice, it gives two outputs with the same weights"),
    ],
)
def test_what_it_misstates_is_named(check, make, words):
    for _ in range(3):
        with pytest.raises(UserError, match=f"model.name={NAME}: .*{words}"):
            check(make)
