"""(b) Training steps of each size, and (c) of the same network in a plain MONAI-style loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from gpus.timing import forget_peak, peak, seconds
from ldct_dist.models.execution import lay_out
from ldct_dist.models.losses import build_loss
from ldct_dist.models.registry import build
from ldct_dist.train.config import RunConfig
from ldct_dist.train.cost.memory import STRATEGIES, Activations, memory
from ldct_dist.train.cost.speed import ADAM_BYTES, AVERAGE_BYTES
from ldct_dist.train.strategy.ddp import DDPStrategy
from ldct_dist.world import World

VARIANTS: dict[str, dict[str, Any]] = {  # what each changes in the config
    "eager": {},
    "compiled": {"compile": True},
    "channels first": {"channels_last": False},
    "full checkpointing": {"model": {"activation_checkpointing": "full"}},
    "selective checkpointing": {"model": {"activation_checkpointing": "selective"}},
    "cudnn benchmark": {},
}
PREDICTED = ("eager", "channels first", "full checkpointing", "selective checkpointing")
"""variants whose memory the planner predicts; it knows neither the kernels that the compiler makes nor the memory that
cuDNN's benchmark takes for what it tries"""


def config_of(size: str, crop: tuple[int, int, int], crops: int, **changes: Any) -> RunConfig:
    """size: of unet3d, or, after another network's name, of that network: nafnet3d-m."""
    name, _, size = size.rpartition("-")
    tree: dict[str, Any] = {
        "name": "bench",
        "store": "nowhere",
        "steps": 1,
        "precision": "bf16",
        "data": {"crop": crop, "batch": crops},
        "model": {"name": name or "unet3d", "size": size},
        "loss": {"margin": (0, 0, 0)},
    }
    for key, value in changes.items():
        tree[key] = tree[key] | value if isinstance(value, dict) else value
    return RunConfig(**tree)


def our_step(config: RunConfig, device: torch.device) -> Callable[[], Any]:
    """One step as the Trainer takes it, on a batch that is there already."""
    with device:  # a billion random numbers take a CPU long
        model = build(config.model)
    strategy = DDPStrategy(model, config, World(device=device))
    loss = build_loss(config.loss)
    low, full = (torch.randn(config.data.batch, 1, *config.data.crop, device=device) * 50 for _ in range(2))
    mask = torch.ones_like(low, dtype=torch.bool)

    def step() -> None:
        strategy.backward(loss(strategy(low), full, mask).mean())
        strategy.clip()
        strategy.step(1e-4)
        strategy.forget_gradients()

    return step


def training(
    size: str,
    variant: str,
    crop: tuple[int, int, int],
    crops: int,
    device: torch.device,
    peaks: dict[str, float],
) -> dict[str, Any]:
    """mfu: against the measured matmul ceiling; roofline: the time that the measured convolution and copy ceilings allow,
    kernel by kernel, over the time taken; memory_error: the planner's, where the device tells its peak."""
    config = config_of(size, crop, crops, **VARIANTS[variant])
    before = forget_peak(device)
    step = our_step(config, device)
    with _benchmarking(variant == "cudnn benchmark"):
        took = seconds(step, device)
    activations, crops = Activations.of(config), config.data.batch
    cost = activations.few
    flops = cost.flops * crops / 2
    kernels = sum(
        max(op.flops / peaks["conv_flops"], op.bytes / peaks["copy_bytes_per_s"]) for op in cost.ops
    )
    update = (ADAM_BYTES + AVERAGE_BYTES) * cost.parameters / peaks["copy_bytes_per_s"]
    row: dict[str, Any] = {
        "size": size,
        "variant": variant,
        "step_s": took,
        "tflops": flops / took / 1e12,
        "mfu": flops / took / peaks["matmul_flops"],
        "roofline": (kernels * crops / 2 + update) / took,
        "voxels_per_s": crops * math.prod(config.data.crop) / took,
    }
    if variant in PREDICTED and (measured := peak(device)) is not None:
        predicted = memory(STRATEGIES[0], config, activations, crops, crops, 1).without_batches_ahead
        row |= {
            "peak_bytes": measured - before,
            "predicted_bytes": predicted,
            "memory_error": predicted / (measured - before) - 1,
        }
    return row


@contextmanager
def _benchmarking(wanted: bool) -> Iterator[None]:
    """Have cuDNN try its kernels instead of guessing the best. Where its cache already holds a choice it tries none, so
    TF32, which is part of the cache's key and does nothing to bf16, is set to the other value."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    if wanted:
        cudnn.benchmark, cudnn.allow_tf32 = True, not cudnn.allow_tf32
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32 = before


def monai_loop(size: str, crop: tuple[int, int, int], crops: int, device: torch.device) -> dict[str, float]:
    """Seconds of a plain loop's step: in its defaults (fp32, or TF32 where torch takes it), and in bf16 autocast.

    It trains the same network on crops as large, which come from a DataLoader over arrays in memory.
    """
    return {
        name: seconds(_plain_step(size, crop, crops, device, dtype), device)
        for name, dtype in (("defaults", None), ("bf16", torch.bfloat16))
    }


def _plain_step(
    size: str, crop: tuple[int, int, int], crops: int, device: torch.device, dtype: torch.dtype | None
) -> Callable[[], Any]:
    """Epochs over cropped volumes, as MONAI's tutorials write them; in torch's default layout."""
    model = build(config_of(size, crop, crops).model).to(device)
    lay_out(model, channels_last=False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    loss_function = torch.nn.L1Loss()
    volumes = [torch.randn(2, *(n + 8 for n in crop)) * 50 for _ in range(2)]
    batches = _loader(volumes, crop, crops)

    def step() -> float:
        low, full = next(batches).to(device).split(1, dim=1)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            loss = loss_function(model(low), full)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _loader(volumes: list[torch.Tensor], crop: tuple[int, int, int], crops: int) -> Iterator[torch.Tensor]:
    """MONAI's cached data set with random crops where MONAI is there, else the same in torch alone."""

    def cut(volume: torch.Tensor) -> torch.Tensor:
        start = [int(torch.randint(n - c + 1, ())) for n, c in zip(volume.shape[1:], crop, strict=True)]
        return volume[:, *(slice(s, s + c) for s, c in zip(start, crop, strict=True))]

    try:
        from monai.data import CacheDataset, DataLoader
        from monai.transforms import RandSpatialCrop

        data: Any = CacheDataset(volumes * crops, RandSpatialCrop(crop, random_size=False), progress=False)
    except ModuleNotFoundError:
        from torch.utils.data import DataLoader

        class Crops(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return len(volumes) * crops

            def __getitem__(self, i: int) -> torch.Tensor:
                return cut(volumes[i % len(volumes)])

        data = Crops()
    loader = DataLoader(data, batch_size=crops, shuffle=True, num_workers=0)
    while True:
        for batch in loader:
            yield batch.as_subclass(torch.Tensor)  # MONAI's own class would cost the network's every call
