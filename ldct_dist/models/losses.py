"""Losses: weighted means over voxels, one value for each sample.

There is one for each sample so that the mean over a global batch does not depend on how the ranks share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field, JsonValue, ValidationInfo, field_validator
from torch import nn

from ldct_dist.config import Config
from ldct_dist.errors import UserError
from ldct_dist.models import installed
from ldct_dist.models.installed import told

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Triple = tuple[int, int, int]
Voxels = Annotated[int, Field(ge=0)]

OWN = ("charbonnier", "l1", "mse")


class LossConfig(Config):
    """Which loss; one of another package (see `models.installed`) is made with `options`."""

    name: str = "charbonnier"
    eps_hu: float = Field(1.0, gt=0)
    """of charbonnier, sqrt(d^2 + eps^2) - eps: quadratic for differences below it, linear above"""
    margin: tuple[Voxels, Voxels, Voxels] | None = None
    """voxels (z, y, x) that do not count along faces of a crop beyond which the volume goes on: in use, the network
    sees more there. None: the network's radius along axes where the crop is more than twice as long, else 0"""
    options: dict[str, JsonValue] = Field({})
    """what a loss of another package is made with"""

    @field_validator("name")
    @classmethod
    def _is_there(cls, name: str) -> str:
        return installed.known(installed.LOSSES, name, OWN)

    @field_validator("eps_hu", "options")
    @classmethod
    def _is_of_this_loss(cls, value: Any, field: ValidationInfo) -> Any:
        name, key = field.data.get("name"), str(field.field_name)
        if (
            name is not None
            and (name in OWN) == (key == "options")
            and value != cls.model_fields[key].default
        ):
            raise ValueError(f"{name} has no such setting")
        return value

    @property
    def origin(self) -> str | None:
        """Which code it is (see `installed.origin`); None for this package's own."""
        return None if self.name in OWN else installed.origin(installed.LOSSES, self.name)

    def margin_for(self, radius: Triple, crop: Triple) -> Triple:
        """The margin for a network of this radius and a crop. Raises UserError if no voxel of a crop would count."""
        if self.margin is None:
            z, y, x = (r if c > 2 * r else 0 for r, c in zip(radius, crop, strict=True))
            return z, y, x
        if any(c <= 2 * m for m, c in zip(self.margin, crop, strict=True)):
            raise UserError(
                f"loss.margin={list(self.margin)} leaves nothing of a crop of {list(crop)} voxels: take data.crop "
                "larger than twice the margin"
            )
        return self.margin


def build_loss(config: LossConfig, device: torch.device | str = "cpu") -> Loss:
    """A function loss(denoised, full, weights) -> (b,), of float HU (b, 1, z, y, x) and weights that broadcast to them.

    It is the weighted mean over each sample, in HU, or HU^2 for mse. A weight is 0, or at least 1; a bool mask will do. A
    sample whose weights are all 0 has loss 0. A loss of another package that is an nn.Module is moved to the device, and its
    weights are not trained. Raises UserError as `installed.make` does.
    """
    if config.name not in OWN:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(
                0
            )  # what it draws, such as features, is the same on all ranks and at each start
            made = installed.make(installed.LOSSES, config.name, config.options)
        return made.to(device).eval().requires_grad_(False) if isinstance(made, nn.Module) else made

    def charbonnier(d: torch.Tensor) -> torch.Tensor:
        # sqrt(d^2 + eps^2) - eps without its cancellation where d is small
        return d.square() / ((d.square() + config.eps_hu**2).sqrt() + config.eps_hu)

    penalties: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "charbonnier": charbonnier,
        "l1": torch.abs,
        "mse": torch.square,
    }
    penalty = penalties[config.name]

    def loss(denoised: torch.Tensor, full: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        counted = penalty(denoised - full) * weights
        return counted.flatten(1).sum(1) / weights.flatten(1).sum(1).clamp(min=1)

    return loss


def refuse_unfit(config: LossConfig, crop: Triple, device: torch.device | str = "cpu") -> None:
    """Raises UserError unless the loss keeps what `build_loss` promises, on crops (z, y, x) of noise."""
    box = torch.tensor([[(0, n) for n in crop], [(-1, n // 2 + 1) for n in crop]], device=device)
    mask = mask_from_box(box, torch.Size(crop), (0, 0, 0))
    lesions = torch.where(torch.rand(mask.shape) < 0.1, 100.0, 1.0).to(device)
    loss, again = build_loss(config, device), build_loss(config, device)
    for weights in (mask, mask * lesions):
        with told(
            f"loss.name={config.name}: fails on weights of {weights.dtype}",
            RuntimeError,
            TypeError,
            ValueError,
        ):
            if fault := _fault(loss, again, weights):
                raise UserError(f"loss.name={config.name}: {fault}")


def _fault(loss: Loss, again: Loss, weights: torch.Tensor) -> str | None:
    """The first promise that the loss breaks, with these weights of two crops; `again`: the loss, made once more."""
    unlike = torch.tensor([1.0, 4.0], device=weights.device).view(2, 1, 1, 1, 1)
    full, off = (hu * unlike * torch.randn(weights.shape).to(weights.device) for hu in (50, 20))
    denoised = (full + off).requires_grad_()
    counted, nothing = weights != 0, torch.zeros_like(weights)
    each = loss(denoised, full, weights)
    if not (isinstance(each, torch.Tensor) and each.shape == (2,) and each.requires_grad):
        got = tuple(each.shape) if isinstance(each, torch.Tensor) else type(each).__name__
        return f"gives {got} for two crops; it has to give a number with a gradient for each, (2,)"
    if not (each > 0).all():
        return "gives 0, or less, for images that differ; let it begin at 0, or a leap of it cannot be told"
    if not _same(again(denoised, full, weights), each):
        return "gives two results for the same crops: whatever it draws or reads has to be the same each time"
    if not _same(loss(denoised[:1], full[:1], weights[:1]), each[:1]):
        return "a crop's number depends on the other crops, and so on how many ranks share a batch"
    if not _same(loss(denoised.where(counted, 3000.0), full.where(counted, -3000.0), weights), each):
        return "voxels of weight 0 count: they are padding, or lack a part of what the network sees"
    if loss(denoised, full, nothing).ne(0).any():
        return "gives no 0 for a crop without a voxel that counts"
    for d, w in ((denoised, weights), (full, weights), (denoised, nothing)):
        at = d.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(at, full, w).sum(), at)
        if not gradient.isfinite().all():
            return "its gradient is not finite where the network is right, or where nothing counts: sqrt(0) has none"
    return None


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-3)


def mask_from_box(box: torch.Tensor, shape: torch.Size, margin: Triple) -> torch.Tensor:
    """Which voxels of the crops count: bool (b, 1, z, y, x), for box (b, 3, 2) and crops of `shape` (z, y, x).

    Padding, which is outside the box, does not count, nor do voxels within `margin` of a face of the crop beyond which
    the volume goes on: their receptive field is cut off there, as it would not be in use.
    """
    inside = None
    for axis, (size, reach) in enumerate(zip(shape, margin, strict=True)):
        start, stop = box[:, axis, 0], box[:, axis, 1]
        low = torch.where(start < 0, reach, start)[:, None]
        high = torch.where(stop > size, size - reach, stop)[:, None]
        i = torch.arange(size, device=box.device)[None]
        view = [len(box), 1, 1, 1, 1]
        view[2 + axis] = size
        along = ((i >= low) & (i < high)).view(view)
        inside = along if inside is None else inside & along
    assert inside is not None
    return inside


def share_counted(margin: Triple, crop: Triple) -> float:
    """The share of voxels that count, in a crop (z, y, x) that touches no border of its volume."""
    return math.prod(1 - 2 * m / c for m, c in zip(margin, crop, strict=True))
