"""Whether a network of another package sees as far as it says and no further, and moves its output along with its input.

Tiles rest on both: without them a volume in tiles is not the volume as a whole, and the loss counts voxels that lack a part
of what they would see in use.
"""

from __future__ import annotations

import torch

from ldct_dist.errors import UserError
from ldct_dist.models.blocks import detail_and_mean
from ldct_dist.models.execution import lay_out
from ldct_dist.models.installed import told
from ldct_dist.models.registry import Denoiser, ModelConfig, build, outline

AXES = ("z", "y", "x")
_THIN = 6  # voxels, at least, along the other axes: enough for most kernels to mirror a border
_AHEAD = 7  # strides by which input is moved: prime, so that a stride that was left out does not divide it
_ROUNDING = 1e-3  # of the largest value, for sums in another order
_AIR_HU = -1000.0


def refuse_misstated(config: ModelConfig, channels_last: bool, device: torch.device | str = "cpu") -> None:
    """Raises UserError unless the network's radius and stride are what it says, along each axis, and its weights are all that
    it depends on. It takes seconds on tens of millions of weights.

    Gradients of single voxels tell the radius exactly; outputs tell what gradients do not show.
    """
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with exact, told(f"model.name={config.name}: its gradient cannot be taken", RuntimeError):
        model = build(config).to(device)
        lay_out(model, channels_last)
        _perturb(model)
        _refuse_idle_weights(model)
        refuse_what_needs_values(model)
        for training in (True, False):
            model.train(training)
            for axis in range(3):
                _refuse_far_sight(model, axis)
        for axis in range(3):
            _refuse_what_does_not_move(model, axis)
        _refuse_own_state(model, channels_last)


def refuse_what_needs_values(model: Denoiser) -> None:
    """Raises UserError for a network whose forward fails on tensors without values, by which its cost is counted."""
    name = f"model.name={model.config.name}"
    with told(f"{name}: forward fails on torch's meta device, where tensors have no values", RuntimeError):
        _ = model.widest


@torch.no_grad()
def _perturb(model: Denoiser) -> None:
    """So that no weight that starts at zero hides what is behind it. Weights that have to be positive stay so."""
    for p in model.parameters():
        p.add_(torch.rand(p.shape).to(p.device), alpha=0.1 * (p[0].numel() ** -0.5 if p.ndim > 1 else 1.0))


def _refuse_idle_weights(model: Denoiser) -> None:
    """On input without gradients, as in training."""
    _answer(model, _noise(model, 0, model.stride[0] * _THIN)).square().sum().backward()
    idle = [key for key, p in model.network.named_parameters() if p.grad is None]
    model.zero_grad()
    if idle:
        raise UserError(
            f"model.name={model.config.name}: {idle[0]} learns nothing: leave it out, or have forward use it (checkpoint with "
            "use_reentrant=False)"
        )


def _refuse_far_sight(model: Denoiser, axis: int) -> None:
    radius, stride = model.radius[axis], model.stride[axis]
    side = -(-radius // stride) + 2  # strides that are clearly more than it sees
    hu = _noise(model, axis, (2 * side + 1) * stride).requires_grad_()
    answer = _answer(model, hu)[0].movedim(1 + axis, -1)
    for place in range(side * stride, (side + 1) * stride):  # all may see differently far
        (gradient,) = torch.autograd.grad(answer[..., place].sum(), hu, retain_graph=True)
        if gradient[1].any():
            raise UserError(
                f"model.name={model.config.name}: a crop's output depends on the other crops of its batch; do without "
                "statistics, or attention, over the batch"
            )
        seen = gradient[0].movedim(1 + axis, -1).flatten(0, 2).any(0).nonzero()
        if not len(seen):
            raise UserError(f"model.name={model.config.name}: its output does not depend on its input")
        if int((seen - place).abs().max()) > radius:
            raise UserError(
                f"model.name={model.config.name}: it sees further along {AXES[axis]} than its radius {model.network.radius} "
                "says: state all that it sees, and do without statistics over space, such as instance or group norm"
            )


@torch.no_grad()
def _refuse_what_does_not_move(model: Denoiser, axis: int) -> None:
    """Beyond air, the output is what it is without that air: neither strides nor statistics nor coordinates change it."""
    stride = model.stride[axis]
    inner = -(-model.radius[axis] // stride) * stride  # from there on, a voxel sees nothing of the border
    rest = inner + 4 * stride
    hu = _noise(model, axis, _AHEAD * stride + rest)
    hu.narrow(2 + axis, 0, _AHEAD * stride).fill_(_AIR_HU)
    later = hu.narrow(2 + axis, _AHEAD * stride, rest)
    whole = _answer(model, hu).narrow(2 + axis, _AHEAD * stride + inner, 4 * stride)
    moved = _answer(model, later).narrow(2 + axis, inner, 4 * stride)
    if (whole - moved).abs().max() > _ROUNDING * whole.abs().max():
        raise UserError(
            f"model.name={model.config.name}: with {_AHEAD * stride} voxels of air before it along {AXES[axis]}, the same input "
            f"gives something else. Its stride {model.network.stride} has to be the total of all its strides, its radius all "
            "that it sees, and it may know neither places nor statistics over space"
        )


@torch.no_grad()
def _refuse_own_state(model: Denoiser, channels_last: bool) -> None:
    """Made once more, as for training, and with the same weights, it gives the same."""
    hu = _noise(model, 0, model.stride[0] * _THIN)
    other = outline(model.config).to_empty(device=hu.device).eval()
    lay_out(other, channels_last)
    other.load_state_dict(model.state_dict())
    first, second = _answer(model, hu), _answer(other, hu)
    if (first - second).abs().max() > _ROUNDING * first.abs().max():
        raise UserError(
            f"model.name={model.config.name}: made twice, it gives two outputs with the same weights: whatever it draws or "
            "reads has to be a weight, or the same each time"
        )


def _answer(model: Denoiser, hu: torch.Tensor) -> torch.Tensor:
    """What the network gives for these HU: the residual (b, 1, z, y, x), in its own units."""
    given = detail_and_mean(hu)
    name, shape = f"model.name={model.config.name}", tuple(given.shape)
    fails = (
        f"{name}: forward fails on {shape}, whose sides are multiples of its stride {model.network.stride}"
    )
    with told(fails, RuntimeError, ValueError):
        answer = model.network(given)
    if not (isinstance(answer, torch.Tensor) and answer.shape == hu.shape):
        got = tuple(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
        raise UserError(f"{name}: forward gives {got} for {shape}; it has to give {tuple(hu.shape)}")
    if not answer.isfinite().all():
        raise UserError(
            f"{name}: forward gives values that are not finite for noise of 30 HU; begin with smaller weights"
        )
    return answer


def _noise(model: Denoiser, axis: int, length: int) -> torch.Tensor:
    """HU (2, 1, z, y, x) of a scan's noise, long along one axis and thin along the others."""
    shape = [-(-_THIN // s) * s for s in model.stride]
    shape[axis] = length
    return 30 * torch.randn(2, 1, *shape).to(next(model.parameters()).device)
