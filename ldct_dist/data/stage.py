"""A store read from a disk of this node: what is needed is copied there once, beside training.

STAGE/ldct_dist-UID-FINGERPRINT/store                       the store's path; locked, shared, by who uses the copies
STAGE/ldct_dist-UID-FINGERPRINT/cases/CASE/DOSE             a copy of an array of the store
STAGE/ldct_dist-UID-FINGERPRINT/cases/CASE/.writing-DOSE    one in the making, locked by the process that makes it

Nothing waits for a copy: an array is read from the store until its copy is whole. A copy gets its name in one
rename, once the checksum of each of its chunks held; and when it is read each chunk is checked again, as in the
store. So batches are the same, bit for bit, with copies and without. What goes wrong with copies costs speed and
one line. Copies stay for the next run on the node. Once the store at the same path has another fingerprint, nobody
can read them any more, and the next run deletes them, unless a run that began before is still using them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
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

Say = Callable[[str], None]


class StagedStore(Store):
    """A store whose arrays are read from their copies on this node, as far as there are any.

    stage: DataConfig.stage; None makes it a plain Store. say: hears what becomes of the copies, in lines.
    Raises UserError as Store does.
    """

    def __init__(self, path: Path | str, stage: str | None, say: Say = print) -> None:
        super().__init__(path)
        self.copies: Path | None = None
        """laid out like the store"""
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
            if copy not in self._spoiled and os.path.exists(copy):  # False too where one may not look
                try:
                    self.array(self.copies, case, dose).read(region, out)
                    return out
                except (DamagedError, OSError) as e:
                    self._spoiled.add(copy)
                    shutil.rmtree(copy, ignore_errors=True)  # a later run makes it anew
                    self._say(f"data.stage: {copy} is damaged ({e}); reading {self.path} instead")
        return super().read(case, dose, region, out)

    @contextmanager
    def staging(self, plan: Plan, world: World, steps: range, held_out: Sequence[int]) -> Iterator[None]:
        """Copies are made beside what runs inside; all ranks enter together, and the first of each node copies.

        First what the node's ranks read in `steps`, soonest first; then their share of the cases `held_out`, of
        which rank r takes every size-th from the r-th.
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
    """Copies arrays of `store` to `copies`, on a thread of its own; several processes may do so at once."""

    def __init__(self, store: Store, copies: Path, say: Say) -> None:
        self.store, self.copies = store, copies
        self._say = say
        self._stop = threading.Event()
        self._made = self._bytes = 0
        self._in_use = ExitStack()

    @contextmanager
    def at_work(self, arrays: Iterable[tuple[str, str]]) -> Iterator[None]:
        """Copy these (case, dose) in their order, until all are there or the caller leaves."""
        thread = threading.Thread(target=self.copy, args=(arrays,), name="stage")
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            self._in_use.close()

    def copy(self, arrays: Iterable[tuple[str, str]]) -> None:
        """Copy what is not there yet; the first that cannot be copied ends it, and is said."""
        where = f"{self.copies} on {socket.gethostname()}"
        try:
            self.copies.mkdir(mode=0o700, exist_ok=True)  # a copy is no more public than its store
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
                f"data.stage: copying to {where} ended ({reason}); the rest is read from {self.store.path}"
            )
        else:
            self._say(f"data.stage: {where} has all; {self._made} arrays, {size(self._bytes)}, are new there")

    def _delete_outdated(self) -> None:
        """Delete copies of what the store at its path was before, as far as no run uses them."""
        path = self.store.path.resolve()
        name, _, _ = self.copies.name.rpartition("-")
        for origin in self.copies.parent.glob(f"{name}-*/{ORIGIN}"):
            with suppress(FileNotFoundError):  # another run on the node has just deleted it
                if origin.parent == self.copies or origin.read_bytes() != os.fsencode(path):
                    continue
            with _lock(origin) as unused:
                if unused:
                    shutil.rmtree(origin.parent, ignore_errors=True)
                    self._say(f"data.stage: deleted {origin.parent}, copies of what {path} was before")

    def _copy(self, case: str, dose: str) -> bool:
        """Whether the array's copy is there now; not if another process has it in hand."""
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
                if not target.exists():  # or it has just been renamed, and `unfinished` made for nothing
                    self._fill(unfinished, case, dose)
                    unfinished.rename(target)
                    self._made += 1
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)  # above all on a disk that is full
        return True

    def _fill(self, folder: Path, case: str, dose: str) -> None:
        """Raises DamagedError if what arrives is not what the catalogue says."""
        source, row = self.store.path / CASES / case / dose, self.store.row(case)
        self._copy_file(source / "zarr.json", folder / "zarr.json")
        copy = ShardedArray(folder, self.store.cases[row].shape, self.store.cases[row].chunk)
        for shard in copy.shards():
            self._copy_file(source / shard, folder / shard)
        copy.check()
        # Last: an ingest may have put another case into this one's place meanwhile.
        if list(self.store.record(case).voxels) != self.store.table["voxels"][row].as_py():
            raise DamagedError(f"case {case} was ingested anew")

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
    """Copying is to end before all is copied."""


@contextmanager
def _lock(path: Path, mode: int = fcntl.LOCK_EX) -> Iterator[bool]:
    """Whether this process may write in `path`, and no other; LOCK_SH: whether it may use it, as others may.

    The lock is the kernel's: it ends with the process that holds it, however that dies. And it is the file's,
    whatever that is renamed to: hence the look whether it still has its name.
    """
    fd = None
    try:
        fd = os.open(path, os.O_RDONLY)
        fcntl.flock(fd, mode | fcntl.LOCK_NB)
        locked = os.path.samestat(os.fstat(fd), path.stat())
    except (BlockingIOError, FileNotFoundError):
        locked = False
    try:
        yield locked
    finally:
        if fd is not None:
            os.close(fd)
