"""The blocks in which cases are read, and where in a block a crop may lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ldct_dist.store.reader import Case, Store
from ldct_dist.store.shards import Region, Triple


@dataclass(frozen=True)
class Block:
    """A box of whole chunks, cut off at the volume's border; coordinates in voxels (z, y, x).

    shape, chunk: of the case. body: share of body in each of the case's chunks, an array over the chunk grid.
    """

    case: str
    shape: Triple
    chunk: Triple
    region: Region
    body: np.ndarray = field(repr=False, compare=False)

    @property
    def size(self) -> Triple:
        z, y, x = (s.stop - s.start for s in self.region)
        return z, y, x

    @cached_property
    def columns(self) -> tuple[Region, ...]:
        """The regions of the block's columns: chunks that lie one above the other."""
        z, *plane = self.region
        edges = (
            [slice(start, min(start + n, r.stop)) for start in range(r.start, r.stop, n)]
            for r, n in zip(plane, self.chunk[1:], strict=True)
        )
        return tuple((z, y, x) for y, x in product(*edges))

    def body_share(self, starts: np.ndarray, crop: Triple) -> np.ndarray:
        """Share of body in crops at `starts` (n, 3), as if each chunk's body were spread evenly over the chunk: (n,)."""
        overlaps = []
        for s, c, chunk, size in zip(starts.T[:, :, None], crop, self.chunk, self.shape, strict=True):
            edges = np.append(np.arange(0, size, chunk), size)
            inside = np.clip(edges, s, s + c)
            overlap = np.diff(inside, axis=1)
            overlaps.append(overlap / overlap.sum(axis=1, keepdims=True))
        z, y, x = overlaps
        return (
            (z @ self.body.reshape(len(self.body), -1)).reshape(len(z), *self.body.shape[1:])  # (n, y, x)
            * y[:, :, None]
            * x[:, None, :]
        ).sum(axis=(1, 2))


class Blocks:
    """The blocks of each case that show enough body.

    Blocks begin at every chunk and span one chunk more than the crop needs, so that a crop may lie across
    any chunk's border.

    mean_voxels: voxels of a case's largest block, averaged over the cases. mean_used: voxels of a crop that lie within
    the volume, averaged over the cases. largest: voxels of the largest block of any case.
    """

    def __init__(self, store: Store, cases: np.ndarray, crop: Triple, min_body: float) -> None:
        self._store, self._crop, self._min_body = store, crop, min_body
        shape, chunk = (store.triples(name)[cases] for name in ("shape", "chunk"))
        grid = -(-shape // chunk)
        span = np.minimum(grid, -(-np.array(crop) // chunk) + 1)
        voxels = np.minimum(span * chunk, shape).prod(axis=1)
        self.mean_voxels, self.largest = float(voxels.mean()), int(voxels.max())
        self.mean_used = float(np.minimum(crop, shape).prod(axis=1).mean())

    def of(self, case: int) -> CaseBlocks:
        """The blocks of one case. They are worked out at each call: those of ten thousand cases take hundreds of MiB."""
        c = self._store.cases[case]
        grid = [-(-size // n) for size, n in zip(c.shape, c.chunk, strict=True)]
        z, y, x = (min(g, -(-crop // n) + 1) for g, crop, n in zip(grid, self._crop, c.chunk, strict=True))
        body = np.frombuffer(self._store.body(case), np.uint8).reshape(grid) / 255.0
        shares = sliding_window_view(body, (z, y, x)).mean(axis=(-3, -2, -1))
        wanted = np.argwhere(shares >= self._min_body)
        if not len(wanted):
            wanted = np.argwhere(shares == shares.max())[:1]
        return CaseBlocks(c, body, (z, y, x), wanted)


@dataclass(frozen=True)
class CaseBlocks:
    """The blocks of a case, each made when it is asked for.

    span: chunks of a block along (z, y, x). corners: index of each block's first chunk, (n, 3).
    """

    case: Case
    body: np.ndarray
    span: Triple
    corners: np.ndarray

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, i: int) -> Block:
        c = self.case
        z, y, x = (
            slice(first * n, min((first + s) * n, size))
            for first, s, n, size in zip(self.corners[i].tolist(), self.span, c.chunk, c.shape, strict=True)
        )
        return Block(c.name, c.shape, c.chunk, (z, y, x), self.body)


def place(u: np.ndarray, crop: Triple, block: Block) -> np.ndarray:
    """First voxels of crops in the volume, (..., 3), for random numbers u in [0, 1) of the same shape.

    At the volume's border, crops are placed up to half a crop beyond it and then pulled back. Otherwise voxels near the
    border, which are in few crops and in one block only, would hardly be seen.
    """
    starts = np.empty(u.shape, np.int64)
    for axis, (c, size, r) in enumerate(zip(crop, block.shape, block.region, strict=True)):
        if size <= c:
            starts[..., axis] = size - c + np.floor(u[..., axis] * (c - size + 1))
            continue
        low = r.start - (c // 2 if r.start == 0 else 0)
        high = r.stop - c + (c // 2 if r.stop == size else 0)
        corner = low + np.floor(u[..., axis] * (high - low + 1))
        starts[..., axis] = np.clip(corner, r.start, r.stop - c)
    return starts
