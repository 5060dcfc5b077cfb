"""doctor's checks. Each has two halves: `look`, which runs on every rank and returns what that rank sees, and `judge`.

The ranks look at the same time, and may talk to each other. A judge is a pure function of what all ranks saw, and runs on
rank 0.
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
    """seconds between warning and end, by occasion: "before the time limit", "at preemption" """
    loader_threads: int
    """threads of a rank that read data while it trains"""

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
    """look: what one rank sees. judges: by the name of its line in the report, a function of what all ranks saw, in
    rank order."""

    look: Callable[[Probe], Any]
    judges: dict[str, Judge]


def examine(probe: Probe, check: Check) -> list[Finding]:
    """The check's findings on rank 0; none on other ranks. An OSError on any rank is a finding as well.

    A look that talks to the other ranks must not raise OSError before it has done so, or they wait for it.
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
