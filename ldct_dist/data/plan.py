"""Which crops make up the batch of step s: arithmetic on (seed, s), no iterator to save or restore.

Lane l of the global batch reads its own stream of blocks and cuts `crops_per_block` crops from each
before it moves on. Lanes are staggered, so that a batch mixes crops at every stage of their blocks, and
loading is spread evenly over the steps. Rank r of R takes lanes r, r + R, ...: the global batch is the
same for every number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Annotated

import numpy as np
from pydantic import Field

from ldct_dist.config import Config
from ldct_dist.data.augment import AugmentConfig
from ldct_dist.errors import UserError
from ldct_dist.store.reader import Store

Positive = Annotated[int, Field(gt=0)]
Triple = tuple[int, int, int]

# The plastic number's powers: t * PLASTIC mod 1 fills the unit cube more evenly than random draws do
# (Roberts 2018, "The unreasonable effectiveness of quasirandom sequences").
PLASTIC = 1.2207440846057596 ** -np.arange(1, 4)


class DataConfig(Config):
    """What a batch holds and how it is read."""

    split: str = "train"
    dose: float = Field(0.25, gt=0, le=1)
    """dose fraction of the network's input; the target is full dose"""
    crop: tuple[Positive, Positive, Positive] = (32, 96, 96)
    """voxels (z, y, x)"""
    batch: Positive = 8
    """crops a step over all ranks"""
    crops_per_block: Positive = 8
    min_body: float = Field(0.1, ge=0, le=1)
    """blocks with a smaller share of body than this are not sampled, as long as the case has others"""
    augment: AugmentConfig = AugmentConfig()
    threads: Positive = 2
    """threads that decode blocks, on each rank"""
    memory_mib: Positive = 1024
    """bound on what a rank's loader holds in memory"""


@dataclass(frozen=True)
class Crop:
    """One sample: cut at `start` from the block `region` of a case; coordinates in voxels (z, y, x).

    `start` is negative where the volume is shorter than the crop: the rest is padding.
    `block` names the block within its lane's stream: (lane, number).
    """

    index: int
    case: str
    shape: Triple
    block: tuple[int, int]
    region: tuple[slice, slice, slice]
    start: Triple


class Plan:
    """The sample order of a run: a pure function of (store, config, seed, step)."""

    def __init__(self, store: Store, config: DataConfig, seed: int) -> None:
        self.store, self.config, self.seed = store, config, seed
        self.cases = store.split(config.split)
        # As many whole rows of distinct cases as an epoch has; the few left over change from epoch to epoch.
        self._row = min(config.batch, len(self.cases))
        self._epoch = len(self.cases) // self._row * self._row
        self._permutation = lru_cache(4)(self._permute_cases)
        self._blocks = lru_cache(4096)(self._blocks_of)

    def crops(self, step: int) -> tuple[Crop, ...]:
        """The global batch of a step (counted from 0), lane by lane."""
        return tuple(self.crop(step, lane) for lane in range(self.config.batch))

    def crop(self, step: int, lane: int) -> Crop:
        number, turn = divmod(step + lane, self.config.crops_per_block)
        case, visit = self._case(lane, number)
        name, shape, regions = self._blocks(case)
        cycle, place = divmod(visit, len(regions))
        region = regions[self._random(2, case, cycle).permutation(len(regions))[place]]
        phase = self._random(3, lane, number).random(3)
        start = _place((phase + turn * PLASTIC) % 1.0, self.config.crop, shape, region)
        return Crop(step * self.config.batch + lane, name, shape, (lane, number), region, start)

    def largest_block(self) -> int:
        """Voxels of the largest block of any case: what a loader must be ready to hold."""
        columns = (self.store.table[name].combine_chunks().flatten().to_numpy() for name in ("shape", "chunk"))
        shape, chunk = (c.reshape(-1, 3)[self.cases].astype(np.int64) for c in columns)
        span = np.minimum(-(-shape // chunk), -(-np.array(self.config.crop) // chunk) + 1)
        return int(np.minimum(span * chunk, shape).prod(axis=1).max())

    def _case(self, lane: int, number: int) -> tuple[int, int]:
        """Index of the case that `lane` reads as its block `number`, and how often it was read before."""
        row, seat = divmod(number * self.config.batch + lane, self._row)
        epoch, row = divmod(row, self._epoch // self._row)
        return int(self._seats(epoch, row)[seat]), epoch

    def _seats(self, epoch: int, row: int) -> np.ndarray:
        """The distinct cases of one row.

        Where an epoch begins, a case that the row before holds too keeps its seat: lanes change blocks
        one after the other, and no two of them should be reading the same case meanwhile. (With fewer
        than two rows of cases an epoch's end may still repeat one.)
        """
        seats = self._permutation(epoch)[row * self._row :][: self._row].copy()
        if row == 0 and epoch > 0:
            before = self._permutation(epoch - 1)[self._epoch - self._row : self._epoch]
            for seat, case in enumerate(before):
                found = np.flatnonzero(seats == case)
                if len(found):
                    seats[[seat, found[0]]] = seats[[found[0], seat]]
        return seats

    def _permute_cases(self, epoch: int) -> np.ndarray:
        return self._random(1, epoch).permutation(self.cases)

    def _blocks_of(self, case: int) -> tuple[str, Triple, list[tuple[slice, slice, slice]]]:
        """Name, shape, and the blocks of a case that show enough body.

        Blocks start at every chunk and span one chunk more than the crop needs, so that they overlap and
        voxels beside a chunk's border are seen as often as others.
        """
        c = self.store.cases[case]
        grid = [-(-size // chunk) for size, chunk in zip(c.shape, c.chunk, strict=True)]
        span = [min(g, -(-crop // n) + 1) for g, crop, n in zip(grid, self.config.crop, c.chunk, strict=True)]
        body = np.frombuffer(self.store.body(case), np.uint8).reshape(grid) / 255.0
        shares, regions = [], []
        for corner in product(*(range(g - s + 1) for g, s in zip(grid, span, strict=True))):
            chunks = tuple(slice(i, i + s) for i, s in zip(corner, span, strict=True))
            shares.append(float(body[chunks].mean()))
            regions.append(
                tuple(
                    slice(s.start * n, min(s.stop * n, size))
                    for s, n, size in zip(chunks, c.chunk, c.shape, strict=True)
                )
            )
        wanted = [r for r, share in zip(regions, shares, strict=True) if share >= self.config.min_body]
        return c.name, c.shape, wanted or [regions[int(np.argmax(shares))]]  # type: ignore[return-value]

    def _random(self, *key: int) -> np.random.Generator:
        """A generator of its own for each use: numbers depend on the key, not on what was drawn before."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, *key])))


def lanes_of(rank: int, world: int, batch: int) -> range:
    """The lanes of the global batch that a rank takes. Raises UserError if they cannot be shared evenly."""
    if batch % world:
        fit = [n for n in range(1, batch + 1) if batch % n == 0]
        raise UserError(
            f"data.batch={batch} cannot be shared evenly by {world} ranks; "
            f"it can by {', '.join(map(str, fit))}, or choose another batch"
        )
    return range(rank, batch, world)


def _place(u: np.ndarray, crop: Triple, shape: Triple, region: tuple[slice, slice, slice]) -> Triple:
    """The crop's corner, from u in [0, 1)^3.

    At the volume's own border the corner is drawn from beyond it and pulled back, since no overlapping
    block makes up for border voxels lying in few crops.
    """
    start = []
    for v, c, size, r in zip(u, crop, shape, region, strict=True):
        if size <= c:
            low, high = size - c, 0
            start.append(low + int(v * (high - low + 1)))
            continue
        low = r.start - (c // 3 if r.start == 0 else 0)
        high = r.stop - c + (c // 3 if r.stop == size else 0)
        start.append(min(max(low + int(v * (high - low + 1)), r.start), r.stop - c))
    return start[0], start[1], start[2]
