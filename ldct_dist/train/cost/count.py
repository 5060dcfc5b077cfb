"""What a step costs, counted on tensors that take no memory: FLOPs, bytes moved, and memory in use over time.

The network runs forward and backward as in training, but on fake tensors, which have a shape and a type and no values.
So the figures hold for any network, checkpointing mode and precision, and a billion parameters take seconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import conv_flop_count, flop_registry

from ldct_dist.models.execution import autocast, lay_out
from ldct_dist.models.losses import build_loss, mask_from_box
from ldct_dist.models.registry import ModelConfig, build
from ldct_dist.train.config import RunConfig

aten = torch.ops.aten


@dataclass(frozen=True)
class Op:
    """One kernel: its FLOPs, and the bytes that it reads and writes at the least."""

    flops: int
    bytes: int
    name: str


@dataclass(frozen=True)
class StepCost:
    """The cost of forward and backward of one micro-batch of `crops` crops.

    Memory is in bytes and leaves out the weights, but not their copies in bf16. ops: all kernels, with those of
    recomputation.
    """

    crops: int
    sizes: tuple[int, ...]
    """elements of each of the network's weights"""
    flops: int
    """without recomputation: what MFU counts"""
    saved: int
    """memory in use between forward and backward"""
    live: tuple[int, ...]
    """memory in use after each kernel, without the weights' gradients"""
    gradients: tuple[int, ...]
    """memory of the weights' gradients after each kernel, if there were none before the step"""
    ops: tuple[Op, ...]

    @property
    def parameters(self) -> int:
        return sum(self.sizes)

    @property
    def peak(self) -> int:
        return max(self.live)


def count(config: RunConfig, crops: int) -> StepCost:
    """The cost of a micro-batch of so many crops."""
    cost = _run(config, config.model, crops)
    if config.model.activation_checkpointing == "none":
        return cost
    kept = config.model.model_copy(update={"activation_checkpointing": "none"})
    return replace(cost, flops=_run(config, kept, crops).flops)


def _run(config: RunConfig, model_config: ModelConfig, crops: int) -> StepCost:
    crop = config.data.crop
    with FakeTensorMode():
        model = build(model_config)
        lay_out(model, config.channels_last)
        hu = torch.empty(crops, 1, *crop)
        full = torch.empty_like(hu)
        box = torch.empty(crops, 3, 2, dtype=torch.int64)
        sizes = tuple(p.numel() for p in model.parameters())
        for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
            # Autocast does so on CUDA, but not on the CPU, whose kernels are counted here.
            norm.register_forward_pre_hook(lambda _, given: (given[0].float(),))
        counter = _Counter()
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(counter.gradient)
        with counter:
            with autocast(hu.device, config.precision == "bf16"):
                answer = model(hu)
            weights = mask_from_box(box, hu.shape[2:], config.loss.margin_for(model.radius, crop))
            if config.data.augment.lesions.count:
                weights = weights * torch.ones_like(full)
            loss = build_loss(config.loss)(answer, full, weights).sum()
            del answer, weights  # as in a step: their names go, what the backward pass needs stays
            saved = counter.live
            loss.backward()
    ops = tuple(counter.ops)
    flops = sum(op.flops for op in ops)
    return StepCost(crops, sizes, flops, saved, tuple(counter.trace), tuple(counter.gradients), ops)


class _Counter(TorchDispatchMode):
    """Follows every kernel, and every storage from the kernel that makes it until nothing refers to it.

    live: bytes in use now, without the weights' gradients. trace, gradients: `StepCost.live` and `.gradients` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.live = self._held = 0
        self.trace: list[int] = []
        self.gradients: list[int] = []
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        answer = _as_on_gpus(func, args, func(*args, **kwargs))
        made = [self._is_new(t) for t in _tensors(answer)]
        if any(made) or func._schema.name.endswith("_"):  # a view costs nothing
            moved = sum(t.numel() * t.element_size() for t in _tensors((args, kwargs, answer)))
            self.ops.append(Op(_flops(func, args, kwargs, answer), moved, str(func)))
            self.trace.append(self.live)
            self.gradients.append(self._held)
        return answer

    def gradient(self, weight: torch.Tensor) -> None:
        """Called once the gradient of `weight` is there."""
        assert weight.grad is not None
        size = self._sizes.pop(weight.grad.untyped_storage()._cdata)
        self.live -= size
        self._held += size

    def _is_new(self, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return False
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        weakref.finalize(storage, self._gone, key)
        return True

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def _as_on_gpus(func: Any, args: Sequence[Any], answer: Any) -> Any:
    """The answer of a convolution in the memory format of its input or weight, as cuDNN has it.

    So have CPUs, but not in bf16 if they cannot multiply it: a plan would count copies there that no GPU makes.
    """
    if func is aten.convolution.default:
        given = args[:2]
    elif func is aten.convolution_backward.default:
        given = args[1:3]
    else:
        return answer
    if not any(map(_is_channels_last, given)):
        return answer

    def laid_out(tensor: Any) -> Any:
        return tensor.contiguous(memory_format=torch.channels_last_3d) if tensor.dim() == 5 else tensor

    return tree_map_only(torch.Tensor, laid_out, answer)


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last_3d)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _flops(func: Any, args: Sequence[Any], kwargs: dict[str, Any], answer: Any) -> int:
    if func is aten.convolution_backward.default:
        # torch's own formula takes depthwise convolutions for dense ones. Each gradient costs what forward did.
        gradient, x, weight, *_, transposed, _, _, wanted = args
        forward = conv_flop_count(x.shape, weight.shape, gradient.shape, transposed)
        return forward * sum(wanted[:2])
    formula = flop_registry.get(func._overloadpacket)
    return formula(*args, **kwargs, out_val=answer) if formula else 0
