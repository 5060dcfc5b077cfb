"""Ranks on one device: one on NCCL, and two on gloo, whose steps must be those of a process alone."""

from __future__ import annotations

import os
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from gpus.steps import config_of
from ldct_dist.models.losses import build_loss
from ldct_dist.models.registry import build
from ldct_dist.train.strategy.ddp import DDPStrategy
from ldct_dist.world import World, backend_of

STEPS = 5
PATIENCE = timedelta(seconds=60)


def differences(device: torch.device) -> dict[str, float]:
    """The largest difference of a weight from that of a process alone, relative to how far training moved them: for one
    rank under DDP, on NCCL where there is a GPU, and for two ranks on gloo."""
    alone, start = _train(World(device=device))
    dist.init_process_group(
        backend_of(device), store=dist.HashStore(), rank=0, world_size=1, timeout=PATIENCE
    )
    under_ddp, _ = _train(World(device=device), ddp=True)
    dist.destroy_process_group()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (str(device), folder), nprocs=2)
        together = torch.load(Path(folder) / "weights.pt", weights_only=True)
    moved = (alone - start).abs().max()
    one = "one_nccl_rank" if device.type == "cuda" else "one_gloo_rank"
    ranks = {one: under_ddp, "two_gloo_ranks": together}
    return {name: ((alone - weights).abs().max() / moved).item() for name, weights in ranks.items()}


def _rank(rank: int, device: str, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29532"}
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=PATIENCE)
    weights, _ = _train(World(rank, 2, rank, 2, torch.device(device)))
    if rank == 0:
        torch.save(weights, Path(folder) / "weights.pt")
    dist.destroy_process_group()


def _train(world: World, ddp: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """All weights, on the CPU, after and before some steps on a global batch of two crops. ddp: wrap a single rank, too."""
    torch.manual_seed(0)
    # In fp64: a GPU's TF32 rounds so much that Adam, which takes signs of small gradients, would differ after five steps.
    config = config_of("s", (4, 16, 16), 2, precision="fp64")
    strategy = DDPStrategy(build(config.model), config, world)
    strategy.warm_up()
    if ddp:
        strategy._wrapped = DistributedDataParallel(strategy._wrapped, gradient_as_bucket_view=True)
    loss = build_loss(config.loss)
    low, full = (
        torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(i)) * 50 for i in (1, 2)
    )
    mine = slice(world.rank, None, world.size)
    low, full = low[mine].to(world.device), full[mine].to(world.device)
    start = _weights(strategy)
    for _ in range(STEPS):
        with strategy.accumulating(last=True):
            each = loss(strategy(low), full, torch.ones_like(low, dtype=torch.bool))
            strategy.backward(each.mean())
        strategy.clip()
        strategy.step(1e-3)
        strategy.forget_gradients()
    return _weights(strategy), start


def _weights(strategy: DDPStrategy) -> torch.Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in strategy.model.parameters()])
