"""A store read from a disk of this node, to which what the node needs is copied once, while it trains.

STAGE/ldct_dist-UID-FINGERPRINT/store                       the store's path; locked, shared, by who uses the copies
STAGE/ldct_dist-UID-FINGERPRINT/cases/CASE/DOSE             a copy of an array of the store
STAGE/ldct_dist-UID-FINGERPRINT/cases/CASE/.writing-DOSE    one in the making, locked by the process that makes it

Nothing waits for a copy: an array is read from the store until its copy is complete. A copy gets its name by a rename
once the checksums of all its chunks are right, and its chunks are checked again when they are read, as in the store. So
batches are the same, bit for bit, with copies and without. If anything goes wrong with copies, it costs speed, and is
told in one line. Copies stay for the next run on the node. Once the store at that path has another fingerprint they are
out of date, and the next run deletes them, unless a run that started earlier is still using them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from ldct_dist.config import looked_up
from ldct_dist.data.plan import Plan, lanes_of
from ldct_dist.errors import UserError
from ldct_dist.files import TEMPORARY, size
from ldct_dist.store.layout import CASES
from ldct_dist.store.reader import Store
from ldct_dist.store.shards import DamagedError, Region, ShardedArray
from ldct_dist.world import World

ORIGIN = "store"
PIECE = 8 << 20  # bytes read from a shared file system at a time
RETRY_S = 1.0  # between looks at what another process is copying


class StagedStore(Store):
    """A store whose arrays are read from their copies on this node, where there are copies.

    stage: DataConfig.stage; None: there are no copies. say: is told what becomes of them, in lines.
    Raises UserError as Store does.
    """

    def __init__(self, path: Path | str, stage: str | None, say: Callable[[str], None] = print) -> None:
        super().__init__(path)
        self.copies: Path | None = None
        """the folder of the copies, laid out like the store"""
        if stage is not None:
            name = f"ldct_dist-{os.getuid()}-{self.fingerprint[:16]}"
            self.copies = looked_up(stage) / name
        self._say = say
        self._spoiled: set[Path] = set()

    def read(self, case: str, dose: str, region: Region, out: np.ndarray | None = None) -> np.ndarray:
        if out is None:
            out = np.empty([s.stop - s.start for s in region], np.int16)
        if self.copies is not None:
            copy = self.copies / CASES / case / dose
            if copy not in self._spoiled and os.path.exists(copy):  # Path.exists would raise PermissionError
                try:
                    if self._copies_are_ours:
                        self.array(self.copies, case, dose).read(region, out)
                        return out
                except (DamagedError, OSError) as e:
                    self._spoiled.add(copy)
                    shutil.rmtree(copy, ignore_errors=True)  # a later run makes it anew
                    self._say(f"data.stage: {copy} is damaged ({e}); reading {self.path} instead")
        return super().read(case, dose, region, out)

    @cached_property
    def _copies_are_ours(self) -> bool:
        return self.copies is not None and _is_ours(self.copies)

    @contextmanager
    def staging(self, plan: Plan, world: World, steps: range, held_out: Sequence[int]) -> Iterator[None]:
        """Copy in the background while the block runs. All ranks enter together; the first of each node copies.

        First come the cases that the node's ranks read in `steps`, the soonest first; then their share of the cases
        `held_out`, of which rank r of R validates every R-th from the r-th on.
        """
        if self.copies is None:
            yield
            return
        host = socket.gethostname()
        ranks = [rank for rank, name in enumerate(world.gather(host)) if name == host]
        if world.rank != ranks[0]:
            yield
            return
        lanes = sorted(lane for rank in ranks for lane in lanes_of(rank, world.size, plan.config.batch))
        shares = (case for rank in ranks for case in held_out[rank :: world.size])
        cases = chain(plan.cases_ahead(steps, lanes), shares)
        copier = Copier(self, self.copies, self._say)
        with copier.at_work((self.cases[int(case)].name, dose) for case in cases for dose in plan.doses):
            yield


class Copier:
    """Copies arrays of `store` to `copies` in a thread of its own. Several processes may do so at the same time."""

    def __init__(self, store: Store, copies: Path, say: Callable[[str], None]) -> None:
        self.store, self.copies = store, copies
        self._say = say
        self._stop = threading.Event()
        self._made = self._bytes = 0
        self._in_use = ExitStack()

    @contextmanager
    def at_work(self, arrays: Iterable[tuple[str, str]]) -> Iterator[None]:
        """Copy these (case, dose) in their order while the block runs, until all are there or it ends."""
        thread = threading.Thread(target=self.copy, args=(arrays,), name="stage")
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            self._in_use.close()

    def copy(self, arrays: Iterable[tuple[str, str]]) -> None:
        """Copy what is not there yet. The first array that cannot be copied ends it, with a line that says why."""
        where = f"{self.copies} on {socket.gethostname()}"
        try:
            self.copies.mkdir(mode=0o700, exist_ok=True)  # a copy is no more public than its store
            if not _is_ours(self.copies):
                raise UserError("a link, or another user's folder, is in its place")
            origin = self.copies / ORIGIN
            origin.write_bytes(os.fsencode(self.store.path.resolve()))
            self._in_use.enter_context(_lock(origin, fcntl.LOCK_SH))
            self._delete_outdated()
            waiting = [array for array in arrays if not self._copy(*array)]
            while waiting:
                self._pause()
                waiting = [array for array in waiting if not self._copy(*array)]
        except _Stopped:
            return
        except (DamagedError, UserError, OSError) as e:
            reason = e.strerror if isinstance(e, OSError) and e.strerror else e
            self._say(
                f"data.stage: copying to {where} stopped ({reason}); the rest is read from {self.store.path}"
            )
        else:
            self._say(f"data.stage: {where} is complete; copied {self._made} arrays, {size(self._bytes)}")

    def _delete_outdated(self) -> None:
        """Delete copies of earlier states of the store at this path that no run uses any more."""
        path = self.store.path.resolve()
        name, _, _ = self.copies.name.rpartition("-")
        for origin in self.copies.parent.glob(f"{name}-*/{ORIGIN}"):
            with suppress(FileNotFoundError):  # another run on the node has just deleted it
                if origin.parent == self.copies or origin.read_bytes() != os.fsencode(path):
                    continue
            with _lock(origin) as unused:
                if unused:
                    shutil.rmtree(origin.parent, ignore_errors=True)
                    self._say(f"data.stage: deleted {origin.parent}, copies of an earlier state of {path}")

    def _copy(self, case: str, dose: str) -> bool:
        """Copy an array; whether its copy is there now. It is not while another process is making it."""
        if self._stop.is_set():
            raise _Stopped
        target = self.copies / CASES / case / dose
        if target.exists():
            return True
        unfinished = target.with_name(f"{TEMPORARY}{dose}")
        unfinished.mkdir(parents=True, exist_ok=True)
        with _lock(unfinished) as locked:
            if not locked:
                return False
            try:
                if not target.exists():  # it is, if another process has just finished and renamed it
                    self._fill(unfinished, case, dose)
                    unfinished.rename(target)
                    self._made += 1
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)  # which matters most when the disk is full
        return True

    def _fill(self, folder: Path, case: str, dose: str) -> None:
        """Copy an array's files to `folder`. Raises DamagedError if they are not what the catalogue says."""
        source, row = self.store.path / CASES / case / dose, self.store.row(case)
        self._copy_file(source / "zarr.json", folder / "zarr.json")
        copy = ShardedArray(folder, self.store.cases[row].shape, self.store.cases[row].chunk)
        for shard in copy.shards():
            self._copy_file(source / shard, folder / shard)
        copy.check()
        if self.store.replaced(case):
            raise DamagedError(f"case {case} was ingested again")

    def _copy_file(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(source, "rb", buffering=0) as whole, open(target, "wb") as copy:
            while piece := whole.read(PIECE):
                if self._stop.is_set():
                    raise _Stopped
                copy.write(piece)
                self._bytes += len(piece)

    def _pause(self) -> None:
        if self._stop.wait(RETRY_S):
            raise _Stopped


class _Stopped(Exception):
    """The block has ended, so copying ends, too."""


def _is_ours(folder: Path) -> bool:
    """Whether it is a folder that this user made. On a disk that all write to, such as /tmp, another one may lay a folder
    or a link there first: to read the copies, or to have voxels of his own trained on."""
    facts = folder.lstat()
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()


@contextmanager
def _lock(path: Path, mode: int = fcntl.LOCK_EX) -> Iterator[bool]:
    """Try to lock `path` while the block runs: exclusively, to write in it, or with LOCK_SH, to use it; whether it worked.

    The kernel ends a lock with the process that holds it, however that dies. A lock is on a file, and not on its name:
    hence the check that the file still has this name.
    """
    with ExitStack() as opened:
        try:
            fd = os.open(path, os.O_RDONLY)
            opened.callback(os.close, fd)
            fcntl.flock(fd, mode | fcntl.LOCK_NB)  # raises OSError where the file system has no locks
            locked = os.path.samestat(os.fstat(fd), path.stat())
        except (BlockingIOError, FileNotFoundError):
            locked = False
        yield locked
