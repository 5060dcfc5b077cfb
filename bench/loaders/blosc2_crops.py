"""nnU-Net's scheme: each volume a memory-mapped blosc2 array, each crop read at random by a worker process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import blosc2
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from loaders import volumes

BATCH = 8
L1_BYTES, L3_BYTES = 0.8 * 32768, 0.8 * 1441792  # nnU-Net fills its blocks and chunks to 80 % of these caches


def partitions(shape: tuple[int, ...], crop: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """nnU-Net's rule for (chunks, blocks) of a float32 array: blocks fit into L1, chunks into L3, and neither
    is far larger than a crop."""
    block = [2 ** int(np.ceil(np.log2(c))) for c in crop]
    while 4 * np.prod(block) > L1_BYTES:
        axis = int(np.argmax([b / c if b > 1 else 0 for b, c in zip(block, crop, strict=True)]))
        block[axis] //= 2
    block = [min(b, n) for b, n in zip(block, shape, strict=True)]
    chunk = list(block)
    while 4 * np.prod(chunk) < L3_BYTES and chunk != list(shape):
        ratio = [c / b if c < n else np.inf for c, b, n in zip(chunk, block, shape, strict=True)]
        axis = int(np.argmin(ratio))
        before = chunk[axis]
        chunk[axis] = min(before + block[axis], shape[axis])
        if np.mean([c / p for c, p in zip(chunk, crop, strict=True)]) > 1.5:
            chunk[axis] = before
            break
    return chunk, block


def batches(cache: Path, crop: tuple[int, int, int], threads: int, dtype: str = "float32") -> Iterator:
    """float32 under zstd is what nnU-Net writes; int16 under lz4 is the same scheme with our numbers and codec."""
    cases = [
        {k: _written(v, crop, dtype) if k != "case" else v for k, v in c.items()}
        for c in volumes.arrays(cache)
    ]
    yield from DataLoader(_Crops(cases, crop), batch_size=None, num_workers=threads)


def _written(file: str, crop: tuple[int, int, int], dtype: str) -> str:
    hu = np.load(file, mmap_mode="r")
    path = Path(file).with_suffix(f".{'x'.join(map(str, crop))}.{dtype}.b2nd")
    if not path.exists():
        chunks, blocks = partitions(hu.shape, crop)
        codec = (
            {"codec": blosc2.Codec.ZSTD, "clevel": 8} if dtype == "float32" else {"codec": blosc2.Codec.LZ4}
        )
        blosc2.asarray(
            hu.astype(dtype), chunks=chunks, blocks=blocks, cparams=codec, urlpath=str(path), mode="w"
        )
    return str(path)


class _Crops(IterableDataset):
    def __init__(self, cases: list[dict[str, str]], crop: tuple[int, int, int]) -> None:
        self.cases, self.crop = cases, crop

    def __iter__(self) -> Iterator:
        blosc2.set_nthreads(1)
        g = np.random.default_rng(torch.initial_seed())
        while True:
            pair = torch.empty(2, BATCH, 1, *self.crop)
            chosen = [self.cases[i] for i in g.integers(len(self.cases), size=BATCH)]
            for i, case in enumerate(chosen):
                start = None
                for dose, kind in enumerate(("low", "full")):
                    array = blosc2.open(case[kind], mode="r", dparams={"nthreads": 1}, mmap_mode="r")
                    if start is None:
                        start = [
                            int(g.integers(n - c + 1)) for n, c in zip(array.shape, self.crop, strict=True)
                        ]
                    box = tuple(slice(s, s + c) for s, c in zip(start, self.crop, strict=True))
                    pair[dose, i, 0] = torch.from_numpy(array[box])
            yield pair[0], pair[1], [case["case"] for case in chosen]
