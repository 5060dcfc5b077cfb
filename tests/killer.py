"""Training killed by SIGKILL at a chosen instant, in a save and in its renames too."""

from __future__ import annotations

import mmap
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

from forked import ForkedRanks
from ldct_dist.checkpoint import retention
from ldct_dist.checkpoint.save import Saver
from ldct_dist.train.trainer import Trainer
from runs import starts

PHASES = ("start", "train", "stage", "prepare", "write", "commit", "rename", "renamed")
IN_A_SAVE = PHASES[2:]
EXACT = ("rename", "renamed")
"""Too short to be met from outside: the process kills itself just before a rename, or just after one."""
_ORDER = 16  # where on the page the phase stands in which rank 0 is to kill itself


def announce(page: Path, rank: int) -> None:
    """In a training process: keep on `page` which phase this rank is in, and die in the one that is ordered."""
    with open(page, "r+b") as f:
        seen = mmap.mmap(f.fileno(), 0)

    def enter(phase: str) -> None:
        seen[rank] = PHASES.index(phase)
        if rank == 0 and phase in EXACT and seen[_ORDER] == seen[rank]:
            os.kill(os.getpid(), signal.SIGKILL)

    def together(self, phase):
        enter(phase.__name__)
        try:
            return together_as_it_is(self, phase)
        finally:
            enter("train")

    def rename(self, target):
        enter("rename")
        moved = rename_as_it_is(self, target)
        enter("renamed")
        return moved

    def advance(self):
        if seen[rank] == PHASES.index("start"):
            enter("train")
        return advance_as_it_is(self)

    together_as_it_is, Saver._together = Saver._together, together
    rename_as_it_is, Path.rename = Path.rename, rename
    advance_as_it_is, Trainer.advance = Trainer.advance, advance


class KilledRun:
    """A run of two ranks that is started and killed again and again.

    lost: how many starts went on from an older checkpoint than the newest one that was there.
    """

    def __init__(self, config: Path, run: Path) -> None:
        self.config, self.run = config, run
        self.lost = 0
        self._page = config.with_name("phases")
        self._recorded = 0

    def strike(self, target: str, draw: random.Random) -> str | None:
        """Start, kill in phase `target`, and tell in which phase rank 0 truly was; None if training ended first."""
        newest = self.newest_step()
        self._page.write_bytes(bytes(mmap.PAGESIZE))
        with open(self._page, "r+b") as f:
            seen = mmap.mmap(f.fileno(), 0)
        seen[_ORDER] = PHASES.index(target) if target in EXACT else 0
        with ForkedRanks(self.config, plant=partial(announce, self._page)) as ranks:
            while all(p.is_alive() for p in ranks.processes):
                if target not in EXACT and seen[0] == PHASES.index(target):
                    # a short while into a phase of saving, and longer into the steps
                    time.sleep(draw.uniform(0, 0.5 if target == "train" else 0.01))
                    for process in draw.sample(ranks.processes, 2):
                        process.kill()
                time.sleep(0.0002)
            ranks.processes[0].join(60 if target in EXACT else 0)
            ended = [p.exitcode for p in ranks.processes]
        self._compare_start_with(newest)
        return PHASES[seen[0]] if -signal.SIGKILL in ended else None

    def finish(self) -> list[int]:
        """Let it train to the end; the exit codes."""
        newest = self.newest_step()
        with ForkedRanks(self.config) as ranks:
            codes = ranks.wait()
        self._compare_start_with(newest)
        return codes

    def newest_step(self) -> int:
        sound, _ = retention.newest_first(self.run / "checkpoints")
        return sound[0][1].step if sound else 0

    def _compare_start_with(self, newest: int) -> None:
        recorded = starts(self.run)
        if len(recorded) > self._recorded:  # killed early, it leaves no record
            self.lost += recorded[-1]["from_step"] < newest
        self._recorded = len(recorded)


def leftovers(run: Path) -> list[str]:
    """What a killed save left behind."""
    return [p.name for p in (run / "checkpoints").iterdir() if not p.name.startswith(retention.PREFIX)]
