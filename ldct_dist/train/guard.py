"""Judging steps: one whose loss or gradient is not finite, or whose loss spikes, does not change the weights.

Every rank comes to the same verdict, since it follows from numbers that are the same on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from pydantic import Field

from ldct_dist.config import Config, Positive
from ldct_dist.data.plan import Crop
from ldct_dist.world import World

WINDOW = 64
"""losses that the running median is taken over; there is no spike before half of them are known"""


class GuardConfig(Config):
    """What to do about steps that would spoil the weights."""

    spike: float | None = Field(20.0, gt=1)
    """a step whose loss is above this many times the running median is skipped; null: only losses that are not finite"""
    patience: Positive = 10
    """steps skipped in a row before the run goes back to its last checkpoint and continues with other data"""
    rollbacks: int = Field(3, ge=0)
    """times a run goes back before it gives up"""


@dataclass
class Guard:
    """What the verdict on a step depends on. It is saved in checkpoints, so that a resumed run judges alike."""

    skipped: int = 0
    """steps skipped over the whole run"""
    rollbacks: int = 0
    stretch: list[str] = field(default_factory=list)
    """why each of the latest steps was skipped; empty after a step that was applied"""
    recent: list[float] = field(default_factory=list)
    """losses of the latest steps that were applied, at most WINDOW"""

    def fault(self, loss: float, finite: bool, spike: float | None) -> str | None:
        """What is wrong with a step, None if nothing is. loss: the global batch's mean; finite: as in Agreed."""
        if not math.isfinite(loss):
            return "the loss is not finite"
        if not finite:
            return "the gradient is not finite"
        if spike is not None and len(self.recent) >= WINDOW // 2 and loss > spike * median(self.recent):
            return f"the loss leapt from {median(self.recent):.4g} to {loss:.4g}"
        return None

    def applied(self, loss: float) -> None:
        self.stretch = []
        self.recent = [*self.recent, loss][-WINDOW:]

    def skip(self, why: str) -> None:
        self.skipped += 1
        self.stretch.append(why)


def blame(losses: Sequence[float], crops: Sequence[Crop], world: World) -> str:
    """The samples of the global batch whose loss is not finite, or, if all are, the one with the largest loss.

    losses: one for each of this rank's `crops`. All ranks call it together and get the same answer.
    """
    mine = [(loss, crop.key[0], crop) for loss, crop in zip(losses, crops, strict=True)]
    worst = [max(mine, key=lambda m: m[0])]
    mine = [m for m in mine if not math.isfinite(m[0])] or worst
    every = [
        m for share in world.gather([(loss, lane, _place(crop)) for loss, lane, crop in mine]) for m in share
    ]
    broken = sorted((lane, place) for loss, lane, place in every if not math.isfinite(loss))
    chosen = broken or [max(every)[1:]]
    return ", ".join(place for _, place in chosen)


def _place(crop: Crop) -> str:
    """Where a sample comes from: case, lane, and the first voxels (z, y, x) of block and crop."""
    block = [s.start for s in crop.block.region]
    return f"{crop.block.case} (lane {crop.key[0]}, block at {block}, crop at {list(crop.start)})"
