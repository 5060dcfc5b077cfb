"""Whether a network sees as far as it says and no further, and moves its output along with its input.

Tiles rest on both: without them a volume in tiles is not the volume as a whole, and the loss counts voxels that lack a part
of what they would see in use.
"""

from __future__ import annotations

import torch

from ldct_dist.errors import UserError
from ldct_dist.models.registry import Denoiser

AXES = ("z", "y", "x")
_THIN = 4  # voxels, at least, along the other axes: enough for most kernels to mirror a border
_ROUNDING = 0.01  # of the largest value, for sums in another order and tensor cores


def refuse_misstated(model: Denoiser) -> None:
    """Raises UserError unless the network's radius and stride are what it says, along each axis. It leaves random weights.

    Gradients of single voxels tell the radius, exactly; it takes seconds.
    """
    model.eval()  # dropout would look like an output that does not move with its input
    _randomise(model)
    for axis in range(3):
        _refuse_far_sight(model, axis)
        _refuse_other_stride(model, axis)
    idle = [key for key, p in model.network.named_parameters() if p.grad is None]
    if idle:
        raise UserError(f"model.name={model.config.name}: {idle[0]} takes no part in forward; leave it out")


@torch.no_grad()
def _randomise(model: Denoiser) -> None:
    """So that no weight that starts at zero hides what is behind it."""
    for p in model.parameters():
        noise = torch.randn_like(p)
        p.copy_(noise * (1.5 / p[0].numel()) ** 0.5 if p.ndim > 1 else p + 0.1 * noise)


def _refuse_far_sight(model: Denoiser, axis: int) -> None:
    radius, stride = model.radius[axis], model.stride[axis]
    side = -(-radius // stride) + 2  # strides that are clearly more than it sees
    hu = _noise(model, axis, crops=stride, length=(2 * side + 1) * stride).requires_grad_()
    answer = _answer(model, hu).movedim(2 + axis, -1)
    places = [side * stride + i for i in range(stride)]  # one in each crop, since all may see differently far
    torch.stack([answer[i, ..., place].sum() for i, place in enumerate(places)]).sum().backward()
    assert hu.grad is not None
    seen = hu.grad.movedim(2 + axis, -1).flatten(1, 3).any(1)
    reach = (int((crop.nonzero() - place).abs().max()) for crop, place in zip(seen, places, strict=True))
    if max(reach) > radius:
        raise UserError(
            f"model.name={model.config.name}: it sees further along {AXES[axis]} than its radius {model.network.radius} says: "
            "state all that it sees, and do without statistics over space, such as instance or group norm"
        )


@torch.no_grad()
def _refuse_other_stride(model: Denoiser, axis: int) -> None:
    stride = model.stride[axis]
    inner = -(-model.radius[axis] // stride) * stride  # from there on, a voxel sees nothing of the border
    hu = _noise(model, axis, crops=1, length=inner + 5 * stride)
    later = hu.narrow(2 + axis, stride, inner + 4 * stride)
    whole = (_answer(model, hu) - hu).narrow(2 + axis, inner + stride, 4 * stride)
    moved = (_answer(model, later) - later).narrow(2 + axis, inner, 4 * stride)
    if (whole - moved).abs().max() > _ROUNDING * whole.abs().max():
        raise UserError(
            f"model.name={model.config.name}: input that is moved by {stride} along {AXES[axis]} gives something else than "
            f"the output moved by as much; its stride {model.network.stride} has to be the total of all its strides"
        )


def _answer(model: Denoiser, hu: torch.Tensor) -> torch.Tensor:
    try:
        answer = model(hu)
    except RuntimeError as e:  # how torch says that shapes do not fit
        raise UserError(
            f"model.name={model.config.name}: forward fails on {_input_of(hu)}, whose sides are multiples of its stride "
            f"{model.network.stride}: {str(e).splitlines()[0]}"
        ) from e
    if answer.shape != hu.shape:
        raise UserError(
            f"model.name={model.config.name}: forward gives {tuple(answer.shape)} for {_input_of(hu)}; it has to give "
            f"{tuple(hu.shape)}"
        )
    return answer


def _input_of(hu: torch.Tensor) -> tuple[int, ...]:
    """The shape of what the network is given for these HU."""
    return (len(hu), 2, *hu.shape[2:])


def _noise(model: Denoiser, axis: int, crops: int, length: int) -> torch.Tensor:
    """HU (b, 1, z, y, x), long along one axis and thin along the others."""
    shape = [-(-_THIN // s) * s for s in model.stride]
    shape[axis] = length
    return 100 * torch.randn(crops, 1, *shape, device=next(model.parameters()).device)
