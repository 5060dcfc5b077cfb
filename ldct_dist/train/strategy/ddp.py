"""Data parallelism: every rank holds the whole network and sees its share of the global batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldct_dist.models.registry import Denoiser
from ldct_dist.world import World


class DDPStrategy:
    """Wraps the network for `world.size` ranks; with one rank it adds nothing.

    The network's gradients after `backward` are the mean over ranks, bitwise the same on all of them.
    """

    def __init__(self, model: Denoiser, world: World, bf16: bool, compile: bool) -> None:
        self.model, self.world = model, world
        self._autocast = torch.autocast(world.device.type, torch.bfloat16) if bf16 else nullcontext()
        wrapped: nn.Module = torch.compile(model) if compile else model  # type: ignore[assignment]
        if world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            wrapped = DistributedDataParallel(wrapped, device_ids=devices, gradient_as_bucket_view=True)
        self._wrapped = wrapped

    def warm_up(self, crop: torch.Tensor) -> None:
        """One backward whose gradients are thrown away.

        DDP sorts its buckets anew after the first backward, which changes the order of summation over
        the ranks. Without this, the first step after a resume would add in another order than the
        unbroken run did.
        """
        if self.world.size > 1:
            with self._autocast:
                restored = self._wrapped(crop)
            restored.float().sum().mul(0.0).backward()
            self.model.zero_grad()

    def __call__(self, hu: torch.Tensor) -> torch.Tensor:
        with self._autocast:
            return self._wrapped(hu)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around the forward and backward of one micro-batch: only the last one talks to other ranks."""
        with nullcontext() if last or self.world.size == 1 else self._wrapped.no_sync():  # type: ignore[operator]
            yield

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip(self, norm: float | None) -> torch.Tensor:
        """Scale the gradients down to an L2 norm of at most `norm`; the norm they had, a scalar."""
        limit = float("inf") if norm is None else norm
        return nn.utils.clip_grad_norm_(self.model.parameters(), limit)
