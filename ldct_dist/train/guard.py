"""Judging steps: one whose loss or gradient is not finite, or whose loss leaps, changes nothing.

Every rank comes to the same verdict, since it follows from numbers that all ranks have agreed on.
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
"""losses that the running median is taken over; a leap is only called one once half of them are there"""

NAMED = 3
"""skipped steps that the line about a rollback names"""


class GuardConfig(Config):
    """What is done about steps that would spoil the weights."""

    spike: float | None = Field(20.0, gt=1)
    """a loss above this many times the running median is not learnt from; null: any finite one is"""
    patience: Positive = 10
    """steps skipped in a row before the run goes back to its last checkpoint, and on with other data"""
    rollbacks: int = Field(3, ge=0)
    """times a run goes back before it gives up"""


@dataclass
class Guard:
    """What the verdict on a step depends on; a checkpoint holds it, so a resumed run judges alike."""

    skipped: int = 0
    """steps that changed nothing, over the whole run"""
    rollbacks: int = 0
    stretch: list[str] = field(default_factory=list)
    """why each of the latest steps was skipped; empty after a step that was applied"""
    recent: list[float] = field(default_factory=list)
    """losses of the latest steps that were applied, at most WINDOW"""

    def fault(self, loss: float, finite: bool, spike: float | None) -> str | None:
        """What is wrong with a step of this mean loss; `finite`: loss and gradients were, on all ranks."""
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

    def summary(self) -> str:
        """Why the latest steps were skipped; the first few of many."""
        rest = len(self.stretch) - NAMED
        return "; ".join(self.stretch[:NAMED]) + (f"; and {rest} more, named above" if rest > 0 else "")


def blame(losses: Sequence[float], crops: Sequence[Crop], world: World) -> str:
    """Which samples of the global batch have a loss that is not finite, or else the one with the greatest.

    losses: of this rank's crops. All ranks ask together, and get the same answer.
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
    """Case, lane, and the corners of block and crop in voxels (z, y, x)."""
    block = [s.start for s in crop.block.region]
    return f"{crop.block.case} (lane {crop.key[0]}, block at {block}, crop at {list(crop.start)})"
