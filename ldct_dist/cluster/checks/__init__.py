"""What doctor looks at. Each check has two halves: what a rank sees, and what all that together means.

The first half runs on every rank at once, and may talk to the others; the second is a pure function of
what the ranks saw, and runs on rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldct_dist.world import World


@dataclass(frozen=True)
class Probe:
    """What a check may use: the ranks, and what the run will ask for."""

    world: World
    hosts: list[str]
    """by rank"""
    folder: Path
    """a fresh folder within that of the runs"""
    write_mib: int
    """a rank writes this much to measure the speed"""
    checkpoint_bytes: int | None
    """size of one checkpoint; None: no config was given"""
    keep: int
    """checkpoints of a run that exist at the same time, at most"""
    grace: dict[str, float]
    """seconds from the warning to the end, by occasion: `before the time limit`, `at preemption`"""
    loader_threads: int
    """of a rank: they read while it trains"""

    def where(self, ranks: Sequence[int]) -> str:
        """The hosts of these ranks, each once."""
        return ", ".join(dict.fromkeys(self.hosts[rank] for rank in ranks))


@dataclass(frozen=True)
class Finding:
    """One line of the report: what is, or what is wrong and what to do."""

    name: str
    ok: bool
    text: str


Verdict = tuple[bool, str]
Judge = Callable[[Probe, list[Any]], Verdict]


@dataclass(frozen=True)
class Check:
    """look: on every rank. judges: from what all ranks saw, in rank order, to a line under each name."""

    look: Callable[[Probe], Any]
    judges: dict[str, Judge]


def examine(probe: Probe, check: Check) -> list[Finding]:
    """The check's findings on rank 0; none elsewhere. What a system refuses one rank is a finding, too.

    A look that talks to the other ranks must not raise OSError before it has done so.
    """
    try:
        seen, fault = check.look(probe), None
    except OSError as e:
        seen, fault = None, e.strerror or str(e)
    answers = probe.world.gather((seen, fault))
    if not probe.world.is_main:
        return []
    faults = {f"{probe.hosts[rank]}: {fault}": None for rank, (_, fault) in enumerate(answers) if fault}
    if faults:
        return [Finding(name, False, "; ".join(faults)) for name in check.judges]
    return [
        Finding(name, *judge(probe, [seen for seen, _ in answers])) for name, judge in check.judges.items()
    ]
