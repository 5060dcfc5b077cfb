"""Blocks to batches: whole blocks are decoded once by threads, ahead of the step that needs them.

No worker processes: the decoder and the copies release the GIL, so threads are enough, nothing is
forked, nothing is pickled, and a signal has one process to reach.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from ldct_dist.ct.volume import AIR_HU
from ldct_dist.data import augment
from ldct_dist.data.plan import Crop, Plan, lanes_of
from ldct_dist.errors import UserError
from ldct_dist.store.layout import FULL_DOSE, dose_name

READY = 2  # batches assembled ahead of the step that runs


@dataclass(frozen=True)
class Batch:
    """This rank's share of a global batch.

    low, full: float32 HU (b, 1, z, y, x) on the device. box: int64 (b, 3, 2), the volume's extent
    [start, stop) in the crop's voxel coordinates; what lies outside is padding.
    """

    low: torch.Tensor
    full: torch.Tensor
    box: torch.Tensor
    crops: tuple[Crop, ...]

    def __len__(self) -> int:
        return len(self.low)

    def split(self, size: int) -> Iterator[Batch]:
        """Micro-batches of at most `size` crops, in order."""
        for i in range(0, len(self), size):
            j = slice(i, i + size)
            yield Batch(self.low[j], self.full[j], self.box[j], self.crops[j])


class Loader:
    """The batches of one rank, for any step in any order; steps in a row are read ahead.

    The tensors of a batch may be overwritten after READY + 1 further calls of `batch`.
    `waited_s` is how long the latest call waited for data. Close it, or use it as a context manager.
    """

    def __init__(self, plan: Plan, rank: int = 0, world: int = 1, device: torch.device | str = "cpu") -> None:
        config = plan.config
        self.plan, self.device = plan, torch.device(device)
        self.lanes = lanes_of(rank, world, config.batch)
        self.waited_s = 0.0
        self._doses = (dose_name(config.dose), FULL_DOSE)
        self._check_doses()
        self._decoders = ThreadPoolExecutor(config.threads, thread_name_prefix="decode")
        self._assembler = ThreadPoolExecutor(1, thread_name_prefix="assemble")
        self._blocks: dict[tuple[int, int], Future[tuple[np.ndarray, np.ndarray]]] = {}
        self._ready: dict[int, Future[_Cut]] = {}
        cuda = self.device.type == "cuda"
        # int16 halves what crosses the bus to a GPU; on the CPU the cut itself makes the float
        shape = (2, len(self.lanes), 1, *config.crop)
        dtype = torch.int16 if cuda else torch.float32
        self._buffers = [torch.empty(shape, dtype=dtype, pin_memory=cuda) for _ in range(READY + 2)]
        self._stream = torch.cuda.Stream(self.device) if cuda else None
        self._ahead = self._steps_ahead()

    def batch(self, step: int) -> Batch:
        """This rank's share of the batch of `step`.

        Raises UserError naming the case if its data is damaged.
        """
        start = time.perf_counter()
        cut = self._cut_future(step).result()
        self.waited_s = time.perf_counter() - start
        self._forget(step)
        for ahead in range(step + 1, step + 1 + READY):
            self._cut_future(ahead)
        low, full = self._to_device(cut.buffer)
        drawn = augment.draw(self.plan.config.augment, self.plan.seed, [c.index for c in cut.crops])
        low, full, box = augment.apply(low, full, cut.box.to(self.device, non_blocking=True), drawn)
        return Batch(low, full, box, cut.crops)

    def close(self) -> None:
        """Stop reading ahead and join the threads."""
        self._assembler.shutdown(wait=True, cancel_futures=True)
        self._decoders.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cut_future(self, step: int) -> Future[_Cut]:
        if step not in self._ready:
            crops = tuple(self.plan.crop(step, lane) for lane in self.lanes)
            blocks = [self._block(crop) for crop in crops]
            for ahead in range(step + 1, step + 1 + self._ahead):
                for lane in self.lanes:
                    if (ahead + lane) % self.plan.config.crops_per_block == 0:  # the lane moves on
                        self._block(self.plan.crop(ahead, lane))
            self._ready[step] = self._assembler.submit(self._cut, step, crops, blocks)
        return self._ready[step]

    def _block(self, crop: Crop) -> Future[tuple[np.ndarray, np.ndarray]]:
        if crop.block not in self._blocks:
            self._blocks[crop.block] = self._decoders.submit(self._decode, crop)
        return self._blocks[crop.block]

    def _decode(self, crop: Crop) -> tuple[np.ndarray, np.ndarray]:
        low, full = (self.plan.store.read(crop.case, dose, crop.region) for dose in self._doses)
        return low, full

    def _cut(self, step: int, crops: tuple[Crop, ...], blocks: list[Future]) -> _Cut:
        buffer = self._buffers[step % len(self._buffers)]
        size = self.plan.config.crop
        for i, (crop, block) in enumerate(zip(crops, blocks, strict=True)):
            for dose, array in enumerate(block.result()):
                _cut_crop(array, crop, size, buffer[dose, i, 0])
        box = torch.tensor([[(-s, n - s) for s, n in zip(c.start, c.shape, strict=True)] for c in crops])
        return _Cut(buffer, box, crops)

    def _forget(self, step: int) -> None:
        """Drop batches and blocks that no step from `step` on, as far as read ahead, asks for."""
        self._ready = {s: f for s, f in self._ready.items() if step < s <= step + READY}
        reach = step + READY + self._ahead
        k = self.plan.config.crops_per_block
        wanted = {
            (lane, n) for lane in self.lanes for n in range((step + lane) // k, (reach + lane) // k + 1)
        }
        self._blocks = {block: f for block, f in self._blocks.items() if block in wanted}

    def _to_device(self, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._stream is None:
            return buffer[0], buffer[1]
        with torch.cuda.stream(self._stream):
            pair = buffer.to(self.device, non_blocking=True).float()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        pair.record_stream(torch.cuda.current_stream(self.device))
        return pair[0], pair[1]

    def _steps_ahead(self) -> int:
        """How many steps of blocks to read ahead of the assembled batches, within the memory budget."""
        config = self.plan.config
        block = 2 * 2 * self.plan.largest_block()  # two doses of int16
        buffers = sum(b.numel() * b.element_size() for b in self._buffers)
        # within crops_per_block steps a lane holds its block and the one it moves on to
        each = ((config.memory_mib << 20) - buffers) // (block * len(self.lanes)) - 1
        if each < 1:
            need = (2 * len(self.lanes) * block + buffers >> 20) + 1
            raise UserError(
                f"data.memory_mib={config.memory_mib} holds too few blocks of {block / 2**20:.1f} MiB for "
                f"{len(self.lanes)} lanes: set it to at least {need}, or use more ranks"
            )
        return max(0, min(each, 2) * config.crops_per_block - READY)

    def _check_doses(self) -> None:
        for i in self.plan.cases[:1]:
            case = self.plan.store.cases[int(i)]
            missing = [d for d in self._doses if d not in case.doses]
            if missing:
                raise UserError(
                    f"{self.plan.store.path}: case {case.name} has doses {', '.join(case.doses)}, "
                    f"not {', '.join(missing)}; set data.dose to one of them"
                )


@dataclass(frozen=True)
class _Cut:
    buffer: torch.Tensor
    box: torch.Tensor
    crops: tuple[Crop, ...]


def _cut_crop(block: np.ndarray, crop: Crop, size: tuple[int, int, int], into: torch.Tensor) -> None:
    """Copy one crop out of its block, converting on the way, and pad where the volume is too short."""
    source, target = [], []
    for r, s, c, n in zip(crop.region, crop.start, size, crop.shape, strict=True):
        start, stop = max(s, 0), min(s + c, n)
        source.append(slice(start - r.start, stop - r.start))
        target.append(slice(start - s, stop - s))
    if any(t.stop - t.start < c for t, c in zip(target, size, strict=True)):
        into.fill_(AIR_HU)
    into[tuple(target)].copy_(torch.from_numpy(block)[tuple(source)])
