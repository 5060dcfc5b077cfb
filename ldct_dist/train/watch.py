"""The watchdog: notices that a rank has stopped, whichever it is, and leaves, so that the scheduler can start again.

A thread of each rank writes a heartbeat into its place in a file of its node, and reads the files of all nodes. It works
while the main thread waits in a collective, and whichever rank or host is gone; a store kept by rank 0 would not survive
the loss of that one. The files are in the run's folder, which all ranks share anyway for checkpoints. There is one a
node, not one a rank: at each look every rank opens all of them, which would be 262,000 files for 512 ranks.
It costs one small write every tenth of `hang_s`. The others' files are only read while this rank's main thread stands
still, as it soon does when any rank has stopped. The training step itself only counts up.

There are two kinds of fault. A rank may be silent: its process, or its host, is stopped or gone. Or it may be stuck: all
ranks pass the same phases in the same order, so the others wait for the rank that is furthest behind and does not move.
If a rank's process has died, gloo reports that at once as well.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import NoReturn

from ldct_dist.errors import few
from ldct_dist.train.ending import Ending
from ldct_dist.world import World, failed_alone, loss_of_a_rank

LOOKS = 10
"""how often a rank is looked at within `hang_s`"""
BYTES = 256
"""length of a heartbeat; always the same, so that it can be rewritten in place on a full disk"""
FAILED = 0
"""`Beat.alive` of a rank that an error has ended: nobody is to wait for it"""
LEFT = b" " * BYTES
"""what a rank that has ended as it should leaves in place of its heartbeat"""


@dataclass(frozen=True)
class Beat:
    """A rank's heartbeat. alive: how many it has written, or FAILED; phases: how many it has entered; ticks: grows while
    something moves within a phase; patience: how many hang_s the phase may last without a tick."""

    alive: int
    phases: int
    ticks: int
    step: int
    phase: str
    patience: float

    @property
    def where(self) -> str:
        return f"last seen at step {self.step}, {self.phase}"


@dataclass(frozen=True)
class Seen:
    """The latest heartbeat read of a rank, and for how many looks it has been silent, and stuck."""

    beat: Beat
    silent: int = 0
    stuck: int = 0

    def then(self, beat: Beat) -> Seen:
        old = self.beat
        silent = self.silent + 1 if beat.alive == old.alive else 0
        stuck = self.stuck + 1 if (beat.phases, beat.ticks) == (old.phases, old.ticks) else 0
        return Seen(beat, silent, stuck)


class Watch:
    """Ends the process once a rank has done nothing for `hang_s` seconds: with Ending.HUNG if this start has
    `saved` anything by then, else with Ending.HUNG_EARLY.

    Use it as a context manager around all work in which ranks wait for each other. The main thread calls `enter` at
    each new phase; within a long one, any thread calls `tick` to show that something moves. Time is counted in looks,
    and a look counts only if this rank could write its own heartbeat, so a file system that stalls for all, or a
    machine that was suspended, makes nobody suspicious. Within 1.5 times `hang_s`, every rank names the one that
    stopped, with the step and phase it was last seen in, and writes the stacks of its own threads to `folder`.
    """

    def __init__(self, folder: Path, hang_s: float, world: World, saved: Callable[[], bool]) -> None:
        self.folder, self.hang_s, self.world, self._saved = folder, hang_s, world, saved
        self._count = count(1)
        self._ticks = self._phases = self._alive = self._step = 0
        self._phase, self._patience = "start", 1.0
        self._names: list[str] = []
        self._places: list[tuple[Path, int]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._stacks = folder / f"rank-{world.rank:05d}.stacks"

    def enter(self, phase: str, step: int, patience: float = 1.0) -> None:
        """The main thread begins `phase`, as that of every rank does. It may last patience * hang_s without a tick."""
        self._phase, self._step, self._patience = phase, step, patience
        self._phases += 1

    def tick(self, *_: object) -> None:
        """Something has moved within the phase."""
        self._ticks = next(self._count)

    def __enter__(self) -> Watch:
        self._meet(self.world.gather((self.world.name, socket.gethostname())))
        self.world.on_each(self._open)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if loss := loss_of_a_rank(error):
            self._leave(f"another rank is gone ({loss})")
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        with suppress(OSError):  # where the disk takes nothing any more, the last heartbeat stays
            if failed_alone(kind):  # the others are to name this rank
                self._alive = FAILED - 1
                self._write()
            elif kind is None:
                self._part()

    def _open(self) -> None:
        self._file = open(self._stacks, "w")  # noqa: SIM115  until `__exit__`
        self._write()

    def _part(self) -> None:
        """Remove this rank's files and heartbeat: it has ended as it should."""
        self._stacks.unlink()
        self._put(LEFT)
        path = self._places[self.world.rank][0]
        if not _content(path).strip(b" "):  # the last of its node
            path.unlink(missing_ok=True)

    def _meet(self, ranks: list[tuple[str, str]]) -> None:
        """Work out where each rank's heartbeat is: (file, first byte). ranks: their names and hosts."""
        self._names = [name for name, _ in ranks]
        known: dict[str, list[int]] = {}
        for rank, (_, host) in enumerate(ranks):
            there = known.setdefault(host, [])
            there.append(rank)
            self._places.append((self.folder / f"ranks-{there[0]:05d}.beats", BYTES * (len(there) - 1)))

    def _run(self) -> None:
        mine: tuple[int, int] | None = None
        seen: dict[int, Seen] = {}
        while not self._over.wait(self.hang_s / LOOKS):
            # A timer in C, in case a thread never gives the interpreter's lock back, which stops this thread too.
            faulthandler.dump_traceback_later(1.5 * self.hang_s, file=self._file)
            try:
                self._write()
                if mine != (self._phases, self._ticks):
                    mine, seen = (self._phases, self._ticks), {}
                    continue
                seen = self._look(seen)
            except OSError:
                continue  # says nothing about the ranks
            if fault := self._fault(seen):
                self._leave(fault)

    def _look(self, before: dict[int, Seen]) -> dict[int, Seen]:
        """Read the heartbeats of all ranks that are still at work, this one included."""
        seen: dict[int, Seen] = {}
        files = {path: _content(path) for path in {path for path, _ in self._places}}
        for rank, (path, start) in enumerate(self._places):
            written = files[path][start : start + BYTES]
            if not written.strip(b" \0"):
                continue  # it has left, or has yet to write its first
            try:
                beat = Beat(**json.loads(written))
            except ValueError:  # it is being written just now
                seen |= {rank: before[rank]} if rank in before else {}
                continue
            seen[rank] = before[rank].then(beat) if rank in before else Seen(beat)
        return seen

    def _fault(self, seen: dict[int, Seen]) -> str | None:
        """Which rank has stopped, and where; None if none has."""
        failed = [rank for rank, s in seen.items() if s.beat.alive == FAILED]
        if failed:
            return f"an error has ended {self._where(failed, seen)}"
        silent = [rank for rank, s in seen.items() if s.silent >= LOOKS]
        if silent:
            return f"no answer for {self.hang_s:g} s from {self._where(silent, seen)}"
        behind = min(s.beat.phases for s in seen.values())
        last = [rank for rank, s in seen.items() if s.beat.phases == behind]
        patience = seen[last[0]].beat.patience
        if all(seen[rank].stuck >= LOOKS * patience for rank in last):
            return f"no progress for {patience * self.hang_s:g} s on {self._where(last, seen)}"
        return None

    def _where(self, ranks: list[int], seen: dict[int, Seen]) -> str:
        return few([f"{self._names[r]} ({seen[r].beat.where})" for r in ranks], ", ")

    def _leave(self, fault: str) -> NoReturn:
        faulthandler.dump_traceback(self._file)
        ending = Ending.HUNG if self._saved() else Ending.HUNG_EARLY
        line = (
            f"{fault}; {self.world.name} (at step {self._step}, {self._phase}) leaves with exit code {ending:d}: "
            "start the same command again to go on from the last checkpoint. Stacks of its threads: "
            f"{self._stacks}\n"
        )
        os.write(2, line.encode())  # not by print, whose lock the main thread may hold
        time.sleep(2 * self.hang_s / LOOKS)  # the others shall see for themselves, not a peer that left
        os._exit(ending)

    def _write(self) -> None:
        self._alive += 1
        beat = Beat(self._alive, self._phases, self._ticks, self._step, self._phase, self._patience)
        self._put(json.dumps(asdict(beat)).encode().ljust(BYTES))

    def _put(self, text: bytes) -> None:
        path, start = self._places[self.world.rank]
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(fd, text, start)
        finally:
            os.close(fd)  # on a network file system, others see what was written once it is closed


def _content(path: Path) -> bytes:
    """Nothing where there is no such file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
