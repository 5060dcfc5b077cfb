"""Our own loader, and the limit that it is held against."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from queue import Queue

import numpy as np
import torch
from numcodecs import blosc

from ldct_dist.data.augment import AugmentConfig
from ldct_dist.data.loader import Loader
from ldct_dist.data.plan import DataConfig, Plan
from ldct_dist.store.reader import Store

BATCH = 8
UNMOVED = AugmentConfig(flips=False, transpose=False)
Batches = Iterator[tuple[torch.Tensor, torch.Tensor, list[str]]]


def plan(cache: Path, crop: tuple[int, int, int], reuse: float, threads: int, moved: bool = False) -> Plan:
    augment = AugmentConfig() if moved else UNMOVED
    config = DataConfig(crop=crop, batch=BATCH, reuse=reuse, threads=threads, augment=augment)
    return Plan(Store(cache / "store"), config, seed=0)


def batches(
    cache: Path, crop: tuple[int, int, int], threads: int, reuse: float, moved: bool = False
) -> Batches:
    with Loader(plan(cache, crop, reuse, threads, moved)) as loader:
        for step in count():
            batch = loader.batch(step)
            if step >= loader.plan.crops_per_block:  # each lane is on its way, and has read ahead what it may
                yield batch.low, batch.full, [c.block.case for c in batch.crops]


def limit(cache: Path, crop: tuple[int, int, int], threads: int, reuse: float) -> Batches:
    """Only what no loader can leave out: each chunk decoded by blosc, each crop copied out as float.

    The same chunks and crops in the same order as `batches`, with the bytes in memory and found beforehand. There are no
    checksums, and chunks are not put together to blocks. Threads share the lanes and do not wait for each other.
    """
    source = plan(cache, crop, reuse, threads)
    done: Queue[tuple[torch.Tensor, torch.Tensor, list[str]]] = Queue(maxsize=4)
    for first in range(threads):
        lanes = range(first, BATCH, threads)
        threading.Thread(target=_decode_and_copy, args=(source, lanes, done), daemon=True).start()
    while True:
        yield done.get()


def _decode_and_copy(source: Plan, lanes: range, done: Queue) -> None:
    largest = source.block(0, 0)
    held = {lane: np.ones((2, *largest.size), np.int16) for lane in lanes}  # zeros would share one page
    chunk = np.empty(largest.chunk, np.int16)
    buffers = torch.from_numpy(np.zeros((6, 2, len(lanes), 1, *source.config.crop), np.float32))
    for step in count():
        pair = buffers[step % len(buffers)]
        hu = pair.numpy()
        for i, lane in enumerate(lanes):
            crop = source.crop(step, lane)
            if (step + lane) % source.crops_per_block == 0:
                for dose in source.doses:
                    for stored in _stored_chunks(source, crop.block, dose):
                        blosc.decompress(stored, chunk)
            box = tuple(
                slice(s - r.start, s - r.start + c)
                for s, r, c in zip(crop.start, crop.block.region, source.config.crop, strict=True)
            )
            for dose in range(2):
                hu[dose, i, 0] = held[lane][dose][box]
        done.put((pair[0], pair[1], [source.crop(step, lane).block.case for lane in lanes]))


def _stored_chunks(source: Plan, block, dose: str) -> list[memoryview]:
    """The compressed bytes of a block's chunks, as they lie in the page cache."""
    shard = source.store.path / "cases" / block.case / dose / "c/0/0/0"
    raw = np.memmap(shard, np.uint8, "r")
    grid = [-(-n // c) for n, c in zip(block.shape, block.chunk, strict=True)]
    index = raw[-16 * int(np.prod(grid)) - 4 : -4].view("<u8").reshape(*grid, 2)
    touched = tuple(
        slice(r.start // c, -(-r.stop // c)) for r, c in zip(block.region, block.chunk, strict=True)
    )
    return [raw[int(o) : int(o + n) - 4].data for o, n in index[touched].reshape(-1, 2) if n < 2**40]
