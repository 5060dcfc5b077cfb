"""torch.cuda, as far as the package asks it."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from simulated_gpu import streams
from simulated_gpu.tensors import FACTORIES, Values, Waits, run

_libraries: list[torch.library.Library] = []  # they take back what they registered when they go


def install(values: bool) -> None:
    Values.unknown = not values
    torch.cuda._lazy_init = lambda: None
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _libraries.extend((everything, aten))
    everything.fallback(lambda func, *args, **kwargs: run(func, args, kwargs), "CUDA")
    for name in FACTORIES:
        packet, _, overload = name.partition(".")
        func = getattr(getattr(torch.ops.aten, packet), overload or "default")
        aten.impl(name, lambda *args, func=func, **kwargs: run(func, args, kwargs), "CUDA")
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters become the GPU's own tensors
    torch.inference_mode = torch.no_grad  # views of such tensors are more than a wrapped one can do
    _pinned_memory()

    cuda = torch.cuda
    cuda.is_available = cuda.is_bf16_supported = lambda *_, **__: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_name = lambda *_: "simulated"
    cuda.get_device_properties = lambda *_: SimpleNamespace(uuid="simulated", name="simulated")
    cuda.set_device = cuda.empty_cache = lambda *_: None
    cuda.memory_allocated = cuda.memory_reserved = lambda *_: streams.Allocated.now
    cuda.mem_get_info = lambda *_: (80 << 30, 80 << 30)
    cuda.max_memory_allocated = lambda *_: streams.Allocated.peak
    cuda.reset_peak_memory_stats = lambda *_: setattr(streams.Allocated, "peak", streams.Allocated.now)
    cuda.Stream, cuda.Event = streams.Stream, streams.Event
    cuda.stream, cuda.current_stream = streams.stream, streams.current_stream
    cuda.set_sync_debug_mode = lambda mode: setattr(Waits, "told", mode == "warn")
    cuda.synchronize = lambda *_: streams.DEFAULT.synchronize()


def _pinned_memory() -> None:
    """Pinned tensors are marked; without a GPU none can be had."""
    empty = torch.empty

    def marked(tensor: torch.Tensor) -> torch.Tensor:
        tensor.pinned = True
        return tensor

    def with_pinning(*args: object, pin_memory: bool = False, **kwargs: object) -> torch.Tensor:
        made = empty(*args, **kwargs)
        return marked(made) if pin_memory else made

    torch.empty = with_pinning

    def in_its_strides(tensor: torch.Tensor, *_: object) -> torch.Tensor:
        return marked(torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype).copy_(tensor))

    torch.Tensor.pin_memory = in_its_strides
