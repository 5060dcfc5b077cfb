"""Which crops make up the batch of step s: arithmetic on (seed, s), no iterator to save or restore.

Lane l of the global batch reads its own stream of blocks and cuts k crops from each before it moves on.
Lanes are staggered, so that they do not all change blocks at the same step: a batch mixes first and later crops of
blocks, and reading is spread evenly over the steps. Rank r of R takes lanes r, r + R, ...: the global batch is the same
for every number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from pydantic import Field

from ldct_dist.config import Config, Positive
from ldct_dist.data.augment import AugmentConfig
from ldct_dist.data.blocks import Block, Blocks, place
from ldct_dist.errors import UserError
from ldct_dist.store.layout import FULL_DOSE, dose_name
from ldct_dist.store.reader import Store
from ldct_dist.store.shards import Triple

# The plastic number's powers: t * PLASTIC mod 1 fills the unit cube more evenly than random draws do
# (Roberts 2018, "The unreasonable effectiveness of quasirandom sequences").
PLASTIC = 1.2207440846057596 ** -np.arange(1, 4)
CANDIDATES = 4  # places tried for each crop, to find one that shows enough body

# What a random number is for; each use has a generator of its own.
BASE, CASES, BLOCKS, PLACES = range(1, 5)


class DataConfig(Config):
    """What a batch holds and how it is read."""

    split: str = "train"
    dose: float = Field(0.25, gt=0, lt=1)
    """dose fraction of the network's input; the target is full dose"""
    crop: tuple[Positive, Positive, Positive] = (32, 96, 96)
    """voxels (z, y, x); no deeper than most volumes: what these lack is air, which no network meets in use"""
    batch: Positive = 8
    """crops a step over all ranks"""
    reuse: float = Field(2.0, gt=0, le=4)
    """how often a voxel that was read is used, on average: the more often, the less is read, but the longer a lane
    stays in one block"""
    min_body: float = Field(0.1, ge=0, le=1)
    """crops with a smaller share of body than this are avoided, as long as there are others"""
    augment: AugmentConfig = AugmentConfig()
    threads: Positive = 2
    """threads that read and cut, on each rank"""
    memory_mib: Positive = 1024
    """bound on what a rank's loader holds in memory"""
    stage: str | None = None
    """a folder on a disk of each node, such as /local/nvme or $SLURM_TMPDIR (expanded on the node), to which what the
    node reads is copied while it trains"""


@dataclass(frozen=True)
class Crop:
    """One sample.

    index: counts all samples of a run. key: the block's place in the lanes' streams, (lane, number). start: the crop's
    first voxel (z, y, x) in the volume; negative where the volume is shorter than the crop, and the rest is padding.
    """

    index: int
    key: tuple[int, int]
    block: Block
    start: Triple

    def is_padded(self, size: Triple) -> bool:
        """Whether a crop of that size reaches beyond its volume."""
        return any(s < 0 or s + c > n for s, c, n in zip(self.start, size, self.block.shape, strict=True))


class Plan:
    """The sample order of a run: a pure function of (store, config, seed, step).

    crops_per_block: k, the crops that a lane cuts from a block; from config.reuse and the mean size of the blocks.
    """

    def __init__(self, store: Store, config: DataConfig, seed: int) -> None:
        self.store, self.config, self.seed = store, config, seed
        self.cases = store.split(config.split)
        self.doses = (dose_name(config.dose), FULL_DOSE)
        self._check_doses()
        self.blocks = Blocks(store, self.cases, config.crop, config.min_body)
        self.crops_per_block = max(1, int(config.reuse * self.blocks.mean_voxels / self.blocks.mean_used))
        # In the order in which the lanes change blocks: see `case`.
        k = self.crops_per_block
        order = sorted(range(config.batch), key=lambda lane: (-(lane % k), lane))
        self._seats = {lane: seat for seat, lane in enumerate(order)}
        self._base = self._random(BASE).permutation(self.cases)
        self._group = max(1, min(-(-len(self.cases) // 2), len(self.cases) - config.batch + 1))
        self._permutation = lru_cache(8)(self._permute)
        self._visit = lru_cache(4 * config.batch)(self._plan_visit)

    def crops(self, step: int) -> tuple[Crop, ...]:
        """The global batch of a step (counted from 0), lane by lane."""
        return tuple(self.crop(step, lane) for lane in range(self.config.batch))

    def crop(self, step: int, lane: int) -> Crop:
        number, turn = divmod(step + lane, self.crops_per_block)
        block, starts = self._visit(lane, number)
        return Crop(step * self.config.batch + lane, (lane, number), block, starts[turn])

    def block(self, lane: int, number: int) -> Block:
        """The block that a lane reads as its `number`-th."""
        return self._visit(lane, number)[0]

    def case(self, lane: int, number: int) -> tuple[int, int]:
        """Index of the case of a lane's `number`-th block, and how often that case was taken before.

        The lanes take their cases from one endless sequence, in the order in which they change blocks, so a batch is
        always a window on that sequence. It runs through all cases again and again, in another order each time. But
        cases change places only within groups, which are so small that no case is twice in one window. So a batch holds
        as many different cases as it can.
        """
        cycle, seat = number - lane // self.crops_per_block, self._seats[lane]
        visit, position = divmod(cycle * self.config.batch + seat, len(self.cases))
        group, within = divmod(position, self._group)
        return int(self._permutation(visit, group)[within]), visit

    def cases_ahead(self, steps: range, lanes: Sequence[int]) -> Iterator[int]:
        """The cases that the lanes read in `steps`, each once, in the order in which they are first needed."""
        seen: set[int] = set()
        k = self.crops_per_block
        for turn in range(len(steps) // k + 2):
            for lane in lanes:
                number = (steps.start + lane) // k + turn
                case, _ = self.case(lane, number)
                if number * k - lane < steps.stop and case not in seen:
                    seen.add(case)
                    yield case
            if len(seen) == len(self.cases):
                return

    def _permute(self, visit: int, group: int) -> np.ndarray:
        members = self._base[group * self._group :][: self._group]
        return self._random(CASES, visit, group).permutation(members)

    def _plan_visit(self, lane: int, number: int) -> tuple[Block, list[Triple]]:
        """The block, and the first voxel of each crop to cut from it.

        Of a crop's candidate places, the first that shows enough body is taken, or else the one that shows most.
        """
        case, visit = self.case(lane, number)
        blocks = self.blocks.of(case)
        again, turn = divmod(visit, len(blocks))
        block = blocks[self._random(BLOCKS, case, again).permutation(len(blocks))[turn]]
        k = self.crops_per_block
        phase = self._random(PLACES, lane, number).random((CANDIDATES, 1, 3))
        starts = place((phase + np.arange(k)[:, None] * PLASTIC) % 1.0, self.config.crop, block)
        body = block.body_share(starts.reshape(-1, 3), self.config.crop).reshape(CANDIDATES, k)
        choice = np.argmax(np.minimum(body, self.config.min_body), axis=0)
        return block, list(map(tuple, starts[choice, np.arange(k)].tolist()))

    def _random(self, use: int, *key: int) -> np.random.Generator:
        """A generator for this use and key: its numbers do not depend on what was drawn before."""
        counter = [0, *key, *[0] * (3 - len(key))]  # the lowest word counts what is drawn
        return np.random.Generator(np.random.Philox(key=[self.seed, use], counter=counter))

    def _check_doses(self) -> None:
        for dose in self.doses:
            lacking = np.setdiff1d(self.cases, self.store.having(dose), assume_unique=True)
            if len(lacking):
                case = self.store.cases[int(lacking[0])]
                raise UserError(
                    f"{self.store.path}: {len(lacking)} of {len(self.cases)} cases lack dose {dose}, such as "
                    f"{case.name}, which has {', '.join(case.doses)}; set data.dose to one that all have"
                )


def lanes_of(rank: int, world: int, batch: int) -> range:
    """The lanes of the global batch that a rank takes. Raises UserError if they cannot be shared evenly."""
    if batch % world:
        fit = [n for n in range(1, batch + 1) if batch % n == 0]
        raise UserError(
            f"data.batch={batch} cannot be shared evenly by {world} ranks; "
            f"use {', '.join(map(str, fit))} ranks, or another batch"
        )
    return range(rank, batch, world)
