"""Faults that a test plants into a training process, each at a batch of the data's order, on one rank."""

from __future__ import annotations

import copy
import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from ldct_dist import config
from ldct_dist.checkpoint import retention
from ldct_dist.data.loader import Batch, Loader
from ldct_dist.train import trainer, validation
from ldct_dist.train.strategy import ddp
from ldct_dist.train.strategy.ddp import DDPStrategy

RANK = 1


def random_loss(rank: int) -> None:
    """A loss that draws random numbers, as dropout would."""
    build = trainer.build_loss

    def built(*given):
        loss = build(*given)
        return lambda *tensors: (each := loss(*tensors)) * (0.5 + torch.rand(len(each)))

    trainer.build_loss = built


def lacks_what_its_loss_reads(rank: int) -> None:
    """A file of features that is not on one rank's node."""
    build = trainer.build_loss

    def built(*given):
        if rank == RANK:
            raise FileNotFoundError("features.pt")
        return build(*given)

    trainer.build_loss = built


def given_otherwise(overrides: list[str], rank: int) -> None:
    """One rank is started with these settings besides, or has read the file before it was changed."""
    whole = config.read
    if rank == RANK:
        config.read = lambda schema, path, given=(): whole(schema, path, [*given, *overrides])


def _at_batches(change: Callable[[Batch, int], Batch]) -> None:
    whole = Loader.batch
    Loader.batch = lambda self, step: change(whole(self, step), step)


def spoilt(batches: dict[int, float], rank: int) -> None:
    """On one rank, the low dose of the first crop of these batches is multiplied by that."""

    def change(batch: Batch, step: int) -> Batch:
        if rank == RANK and step in batches:
            low = batch.low.clone()
            low[0] *= batches[step]
            return replace(batch, low=low)
        return batch

    _at_batches(change)


def steep(batch: int, rank: int) -> None:
    """On one rank, the loss of this batch has a value but no gradient: sqrt(0) has none."""
    now = {}

    def change(given: Batch, step: int) -> Batch:
        now["step"] = step
        return given

    _at_batches(change)
    build = trainer.build_loss

    def built(*given):
        loss = build(*given)

        def planted(denoised, *given):
            each = loss(denoised, *given)
            return each + (0 * denoised).sum().sqrt() if rank == RANK and now["step"] == batch else each

        return planted

    trainer.build_loss = built


def stopped(victim: int, batch: int, rank: int) -> None:
    """The victim's process is stopped, as by a debugger or a kernel in trouble."""
    _on_victim(victim, batch, rank, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def stuck(victim: int, batch: int, rank: int) -> None:
    """The victim's main thread sleeps in the loader, as in a read from a file server that is gone."""
    _on_victim(victim, batch, rank, lambda: time.sleep(1000))


def unreached(rank: int) -> None:
    """One rank never meets the others to train with, as where a firewall lies between them."""
    trainer.SLOW = 1.0
    if rank == RANK:
        ddp.DistributedDataParallel = lambda *_, **__: time.sleep(1000)


def killed(batch: int, rank: int) -> None:
    """One rank's process is killed, as for want of memory."""
    _on_victim(RANK, batch, rank, lambda: os.kill(os.getpid(), signal.SIGKILL))


def raising(batch: int, rank: int, error: Exception | None = None) -> None:
    """One rank meets a bug, or this error; to part from ranks that wait for it, it would wait, as NCCL does."""

    def fail() -> None:
        dist.destroy_process_group = lambda: time.sleep(1000)
        raise error or LookupError("planted")

    _on_victim(RANK, batch, rank, fail)


def _on_victim(victim: int, batch: int | None, rank: int, act: Callable[[], None]) -> None:
    def change(given: Batch, step: int) -> Batch:
        if rank == victim and batch in (step, None):
            act()
        return given

    _at_batches(change)


def poisoned_average(rank: int) -> None:
    """On one rank, the averaged weights are not numbers."""

    def poisoned(self: DDPStrategy):
        module = copy.deepcopy(self.ema.module)
        for p in module.parameters():
            p.data.fill_(torch.nan)
        return module

    if rank == RANK:
        DDPStrategy.averaged = property(poisoned)


def asked_to_stop_at_every_step(rank: int) -> None:
    """One rank gets SIGUSR1 as each step begins."""
    _on_victim(RANK, None, rank, lambda: os.kill(os.getpid(), signal.SIGUSR1))


def asked_to_stop(batch: int, rank: int) -> None:
    """One rank gets SIGUSR1 in the step that learns from this batch."""
    _on_victim(RANK, batch, rank, lambda: os.kill(os.getpid(), signal.SIGUSR1))


def asked_to_stop_in_validation(rank: int) -> None:
    """One rank gets SIGUSR1 while it denoises its first case."""
    denoise = validation.denoise_volume

    def interrupted(*given, **options):
        if rank == RANK:
            os.kill(os.getpid(), signal.SIGUSR1)
        return denoise(*given, **options)

    validation.denoise_volume = interrupted


def memory_runs_out_in_validation(rank: int) -> None:
    """One rank asks for more memory than any machine has while it denoises."""
    if rank == RANK:
        validation.denoise_volume = lambda *_, **__: torch.empty(1 << 50, dtype=torch.int8)


def together(*plants_and_rank) -> None:
    *plants, rank = plants_and_rank
    for plant in plants:
        plant(rank)


def gradients_places(rank: int) -> None:
    """Each rank prints, after each micro-batch, in how many pieces of memory its gradients lie, and which."""
    accumulating = DDPStrategy.accumulating

    @contextmanager
    def noting(self: DDPStrategy, last: bool) -> Iterator[None]:
        with accumulating(self, last):
            yield
        places = {p.grad.untyped_storage().data_ptr() for p in self.model.parameters()}
        line = f"gradients of rank {rank} at {sorted(places)}\n"
        os.write(1, line.encode())  # whole, though both ranks write there

    DDPStrategy.accumulating = noting


def nothing_may_be_deleted(rank: int) -> None:
    """The file system takes new checkpoints, and keeps the old ones."""

    def refused(path: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    retention.discard = refused
