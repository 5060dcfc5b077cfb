"""Blocks to batches: threads decode each block once, as a whole, ahead of the step that needs it.

There are no worker processes. Decoding and copying release the GIL, so threads are enough; nothing is forked or pickled,
and a signal has a single process to reach.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ldct_dist.ct.volume import AIR_HU
from ldct_dist.data import augment, lesions
from ldct_dist.data.columns import Columns
from ldct_dist.data.memory import Recycler
from ldct_dist.data.plan import Crop, Plan, lanes_of
from ldct_dist.errors import UserError
from ldct_dist.files import MIB

READY = 2  # batches that are made ahead of the current step
AHEAD = 16  # steps ahead of these for which blocks are decoded, if memory allows


@dataclass(frozen=True)
class Batch:
    """This rank's share of a global batch.

    low, full: float32 HU (b, 1, z, y, x) on the device. box: int64 (b, 3, 2), the volume's extent [start, stop) in the
    crop's voxel coordinates; what is outside is padding. weights: float32 (b, 1, z, y, x), each voxel's weight in the
    loss; None: all are 1.
    """

    low: torch.Tensor
    full: torch.Tensor
    box: torch.Tensor
    crops: tuple[Crop, ...]
    weights: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.low)

    def split(self, size: int) -> Iterator[Batch]:
        """Micro-batches of at most `size` crops, in order."""
        for i in range(0, len(self), size):
            j = slice(i, i + size)
            weights = None if self.weights is None else self.weights[j]
            yield Batch(self.low[j], self.full[j], self.box[j], self.crops[j], weights)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors of the batch that are on the device."""
        return tuple(t for t in (self.low, self.full, self.box, self.weights) if t is not None)


class Loader:
    """The batches of one rank, for any step in any order; those of the next steps are made ahead.

    waited_s: how long the latest call of `batch` waited for data. Close the loader, or use it as a context manager.
    Raises UserError if the ranks cannot share the lanes evenly, or if data.memory_mib is too small.
    """

    def __init__(self, plan: Plan, rank: int = 0, world: int = 1, device: torch.device | str = "cpu") -> None:
        self.plan, self.device = plan, torch.device(device)
        self.lanes = lanes_of(rank, world, plan.config.batch)
        self.waited_s = 0.0
        self._ahead = self._steps_ahead()
        self._blocks: dict[tuple[int, int], tuple[Future[Columns], ...]] = {}  # by (lane, number): low, full
        self._batches: dict[int, Future[_Made]] = {}
        self._block_memory = Recycler(self._block_bytes() // len(plan.doses))
        self._batch_memory = Recycler(self._batch_bytes())
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # All work is in one queue, first in, first out. A batch's blocks are queued before the batch is, so it never
        # waits for work that comes after it.
        # Threads start on the first GPU, and would take memory there whatever they do.
        here = partial(torch.cuda.set_device, self.device) if self._copies is not None else None
        self._threads = ThreadPoolExecutor(plan.config.threads, "data", initializer=here)

    def batch(self, step: int) -> Batch:
        """This rank's share of the batch of `step`.

        Raises UserError naming the case if its data is damaged.
        """
        self._forget(step)
        self._read(step, step + READY)
        for s in range(step, step + 1 + READY):
            if s not in self._batches:
                self._batches[s] = self._make(s)
        k = self.plan.crops_per_block
        self._read(step, step + READY + self._ahead, most=self.plan.config.threads + len(self.lanes) // k)

        start = time.perf_counter()
        made = self._batches[step].result()
        self.waited_s = time.perf_counter() - start
        if made.copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(made.copied)
            for tensor in made.batch.tensors:
                tensor.record_stream(current)
        return made.batch

    def air(self) -> Batch:
        """A batch of this rank's size that holds nothing but air."""
        size = self.plan.config.crop
        hu = torch.full((len(self.lanes), 1, *size), float(AIR_HU), device=self.device)
        box = torch.tensor([[(0, n) for n in size]] * len(self.lanes), device=self.device)
        return Batch(hu, hu, box, ())

    def close(self) -> None:
        """Stop reading ahead, join the threads and free the memory."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._batches.clear()
        self._blocks.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, first: int, last: int, most: int | None = None) -> None:
        """Queue the blocks of steps `first` to `last` for decoding, the most urgent first and no more than `most`."""
        keys = [key for key in self._keys(first, last) if key not in self._blocks]
        k = self.plan.crops_per_block
        for lane, number in sorted(keys, key=lambda key: key[1] * k - key[0])[:most]:
            self._blocks[lane, number] = tuple(
                self._threads.submit(self._decode, lane, number, dose) for dose in self.plan.doses
            )

    def _keys(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        k = self.plan.crops_per_block
        for lane in self.lanes:
            for number in range((first + lane) // k, (last + lane) // k + 1):
                yield lane, number

    def _decode(self, lane: int, number: int, dose: str) -> Columns:
        block = self.plan.block(lane, number)
        columns = Columns(block, self._block_memory.take((math.prod(block.size),), np.int16))
        return columns.fill(partial(self.plan.store.read, block.case, dose))

    def _make(self, step: int) -> Future[_Made]:
        crops = tuple(self.plan.crop(step, lane) for lane in self.lanes)
        return self._threads.submit(self._cut, step, crops, [self._blocks[c.key] for c in crops])

    def _cut(self, step: int, crops: tuple[Crop, ...], blocks: list[tuple[Future[Columns], ...]]) -> _Made:
        pair = self._staging()
        hu = pair.numpy()
        for i, (crop, doses) in enumerate(zip(crops, blocks, strict=True)):
            if crop.is_padded(self.plan.config.crop):
                hu[:, i].fill(AIR_HU)
            for dose, block in enumerate(doses):
                block.result().cut(crop.start, hu[dose, i, 0])
        start, shape = np.array([c.start for c in crops]), np.array([c.block.shape for c in crops])
        box = torch.from_numpy(np.stack((-start, shape - start), axis=-1))
        if self._copies is None:
            return _Made(self._augmented(step, crops, pair, box))
        with torch.cuda.stream(self._copies):
            pair = pair.to(self.device, non_blocking=True).float()
            made = self._augmented(step, crops, pair, box.pin_memory().to(self.device, non_blocking=True))
            return _Made(made, self._copies.record_event())

    def _augmented(self, step: int, crops: tuple[Crop, ...], pair: torch.Tensor, box: torch.Tensor) -> Batch:
        config = self.plan.config
        drawn = augment.draw(config.augment, self.plan.seed, step * config.batch, config.batch)
        drawn = drawn[list(self.lanes)]
        pair, box = augment.apply(config.augment, pair, box, drawn, lambda _: self._staging())
        weights = self._with_lesions(crops, pair)
        low, full = pair
        return Batch(low, full, box, crops, weights)

    def _with_lesions(self, crops: tuple[Crop, ...], pair: torch.Tensor) -> torch.Tensor | None:
        """Insert lesions into `pair`, if the config asks for them; the voxels' weights in the loss, None without lesions.

        A transposed crop keeps its scan's spacing, since voxels are square in plane.
        """
        config = self.plan.config.augment.lesions
        if not config.count:
            return None
        drawn = lesions.draw(config, self.plan.seed, [crop.index for crop in crops])
        spacings = [self.plan.store.cases[self.plan.case(*crop.key)[0]].spacing for crop in crops]
        return lesions.insert(config, pair, spacings, drawn)

    def _staging(self) -> torch.Tensor:
        """Memory for a batch, low dose and full dose: (2, b, 1, z, y, x)."""
        shape = (len(self.plan.doses), len(self.lanes), 1, *self.plan.config.crop)
        if self._copies is None:
            return torch.from_numpy(self._batch_memory.take(shape, np.float32))
        # int16 halves what crosses the bus. torch reuses pinned memory by itself, once the copies from it are done.
        return torch.empty(shape, dtype=torch.int16, pin_memory=True)

    def _forget(self, step: int) -> None:
        """Drop the batches and blocks that neither `step` nor the steps that are read ahead of need.

        After a jump to another step some may still be in the making; they are waited for, so that their memory is free
        before more is taken.
        """
        wanted = set(self._keys(step, step + READY + self._ahead))
        unwanted = [s for s in self._batches if not step <= s <= step + READY]
        stale: list[Future] = [self._batches.pop(s) for s in unwanted]
        for key in [key for key in self._blocks if key not in wanted]:
            stale.extend(self._blocks.pop(key))
        _cancel(stale)

    def _block_bytes(self) -> int:
        return len(self.plan.doses) * self.plan.blocks.largest * np.dtype(np.int16).itemsize

    def _batch_bytes(self) -> int:
        crop = int(np.prod(self.plan.config.crop))
        return len(self.plan.doses) * len(self.lanes) * crop * np.dtype(np.float32).itemsize

    def _steps_ahead(self) -> int:
        """For how many steps, beyond the batches made ahead, to decode blocks within the memory budget."""
        config, k, lanes = self.plan.config, self.plan.crops_per_block, len(self.lanes)
        # Batches in memory: those made ahead, the one in use, the one before it, and one in the making in each thread.
        weights = self._batch_bytes() // len(self.plan.doses) if config.augment.lesions.count else 0
        batches = (READY + 2 + config.threads) * (self._batch_bytes() + weights)
        blocks = (config.memory_mib * MIB - batches) // self._block_bytes()
        # For n steps ahead, a lane holds its current block and up to ceil(n / k) that it moves on to.
        each = blocks // lanes - 1
        least = -(-READY // k)
        if each < least:
            need = (batches + lanes * (1 + least) * self._block_bytes()) // MIB + 1
            raise UserError(
                f"data.memory_mib={config.memory_mib} holds too few blocks of {self._block_bytes() / MIB:.1f} MiB "
                f"for {lanes} lanes: set it to at least {need}, or use more ranks"
            )
        return min(each, max(least, -(-AHEAD // k))) * k - READY


@dataclass(frozen=True)
class _Made:
    batch: Batch
    copied: torch.cuda.Event | None = None
    """set once the batch lies on the GPU"""


def _cancel(futures: Iterable[Future]) -> None:
    """Cancel the futures that have not started, and wait for those that have."""
    wait([f for f in futures if not f.cancel()])
