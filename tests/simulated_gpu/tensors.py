"""Tensors on the simulated GPU, and what their operations do."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from simulated_gpu.streams import LOCK, Memory, current_stream

GPU = torch.device("cuda", 0)
# These run without the tensor's own dispatch, on whatever device they are told.
FACTORIES = ("arange", "arange.start", "arange.start_step", "full", "randn", "scalar_tensor", "copy_")
_CROSSING = ("aten::_to_copy", "aten::copy_", "aten::_copy_from")


_WAITING = ("aten::_local_scalar_dense", "aten::nonzero")


class Values:
    unknown = False
    """whether nothing is computed but shapes, types and memory"""


class Waits:
    told = False
    """whether a warning comes with each operation that waits for the GPU"""


class OnGpu(torch.Tensor):
    """A tensor of the GPU; `held` is where its values are."""

    @staticmethod
    def __new__(cls, held: torch.Tensor, memory: Memory) -> OnGpu:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=GPU,
        )

    def __init__(self, held: torch.Tensor, memory: Memory) -> None:
        self.held, self.memory = held, memory

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: OnGpu) -> None:
        torch.Tensor.data.__set__(self, value)
        self.held, self.memory = value.held, value.memory

    def record_stream(self, stream: Any) -> None:
        self.memory.known.add(stream)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation of the current stream."""
    with LOCK:
        name = func._schema.name
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours = [tensor for tensor in given if isinstance(tensor, OnGpu)]
        if name not in _CROSSING and ours:
            strangers = [t for t in given if not isinstance(t, OnGpu) and t.dim()]
            if strangers:
                raise RuntimeError(
                    f"{name}: tensors on the GPU meet one of shape {strangers[0].shape} on the CPU"
                )
        for tensor in ours:
            tensor.memory.used(name)
        if Waits.told and _waits(name, args, kwargs, ours):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        if name == "aten::copy_" and _asynchronous(args, kwargs):
            to, source = args[:2]
            if isinstance(source, OnGpu) and not isinstance(to, OnGpu):
                current_stream().arriving.append(partial(to.copy_, source.held.clone()))
                return to
            # What lies in pieces is put together first, in memory that is not pinned.
            in_place = getattr(source, "pinned", False) and source.is_contiguous()
            if not in_place and not isinstance(source, OnGpu):
                raise RuntimeError(
                    f"an asynchronous copy of memory that is not pinned: {tuple(source.shape)}"
                )
        return _computed(func, args, kwargs, ours)


def _waits(name: str, args: tuple, kwargs: dict[str, Any], ours: list[OnGpu]) -> bool:
    """Whether the CPU goes on only once the operation is done."""
    if name not in _CROSSING:
        return name in _WAITING and bool(ours)
    target = args[0].device if name == "aten::copy_" else kwargs.get("device")
    source = args[1] if name == "aten::copy_" else args[0]
    if target is None or torch.device(target).type == source.device.type:
        return False
    return not (kwargs.get("non_blocking") if name == "aten::_to_copy" else _asynchronous(args, kwargs))


def _asynchronous(args: tuple, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking", len(args) > 2 and args[2]))


def _computed(func: Any, args: tuple, kwargs: dict[str, Any], ours: list[OnGpu]) -> Any:
    name, to = func._schema.name, kwargs.get("device")
    leaves = name == "aten::copy_" and not isinstance(args[0], OnGpu)
    leaves |= to is not None and torch.device(to).type != "cuda"
    if Values.unknown and (leaves or name == "aten::_local_scalar_dense"):
        return _made_up(name, args, kwargs)
    args, kwargs = tree_map(_held, (args, kwargs))
    kwargs.pop("pin_memory", None)
    if to is not None:
        kwargs["device"] = "meta" if Values.unknown else "cpu"
    result = func(*args, **kwargs)
    if leaves:
        return result
    before = {id(tensor.held): tensor for tensor in ours}
    memories = {_place(tensor.held): tensor.memory for tensor in ours}

    def placed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        known = memories.get(_place(value))
        memory = Memory(value.untyped_storage().nbytes()) if known is None else known
        if known is None or id(value) in before:
            memory.wrote()  # anew, or in place; a view writes nothing
        return before[id(value)] if id(value) in before else OnGpu(value, memory)

    return tree_map(placed, result)


def _made_up(name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the CPU is told of values that nobody knows."""
    if name == "aten::_local_scalar_dense":
        return 1.0
    return args[0] if name == "aten::copy_" else torch.ones(args[0].shape, dtype=kwargs.get("dtype"))


def _held(value: Any) -> Any:
    if isinstance(value, OnGpu):
        return value.held
    return value.to("meta") if Values.unknown and isinstance(value, torch.Tensor) else value


def _place(held: torch.Tensor) -> int:
    """The same for all views of one memory."""
    return held.untyped_storage()._cdata
