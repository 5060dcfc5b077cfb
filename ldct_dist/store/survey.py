"""What the headers of a source say, read by one task of an array job for all of them.

The others wait, and all go on from one list: with lists of their own, of a source that changes meanwhile, a case could
fall between two tasks. The list is beside the store until that is finalised, readable by its owner alone, since it names
patients. A task that gets no lock, or no sound list, reads the headers for itself.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ldct_dist.provenance import versions
from ldct_dist.store import parts
from ldct_dist.store.pair_list import FORMAT, Found, What, is_of, read_list, write_list
from ldct_dist.store.pairing import Map, PairingConfig, find_pairs


@contextmanager
def shared_pairs(
    store: Path,
    part: parts.Part,
    source: Path,
    config: PairingConfig,
    share_out: Map,
    notice: Callable[[str], None],
) -> Iterator[Found]:
    """What `find_pairs(source, config, share_out)` returns; in an array job, what it returned to the first of its tasks.

    So a task that runs again gets the same as before, and another array reads the headers anew. `notice` is told which
    it is, and of waiting. If the block raises before any part has begun, nothing is left behind.
    Raises UserError as find_pairs does, and if the list cannot be written.
    """

    def find() -> Found:
        notice(f"reading headers: {source}")
        return find_pairs(source, config, share_out)

    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if not array or part[1] == 1:
        yield find()
        return
    what = {
        "format": FORMAT,
        "versions": versions(("ldct_dist", "pydicom")),
        "array": array,
        "parts": part[1],
        "source": [os.fspath(source), os.path.abspath(source)],
        "pairing": config.model_dump(),
    }
    shared = _Shared(store, what, notice)
    found = shared.found(find)
    with shared.nothing_left_behind():
        yield found


class _Shared:
    """The list of `what` beside the store, and the lock of the task that makes it."""

    def __init__(self, store: Path, what: What, notice: Callable[[str], None]) -> None:
        self.store, self.what, self.notice = store, what, notice
        self.folder = parts.folder(store)
        self.list, self.lock = self.folder / "survey.json.gz", self.folder / "survey.lock"
        self.new = [p for p in (self.folder, *self.folder.parents) if not os.path.exists(p)]

    def found(self, find: Callable[[], Found]) -> Found:
        """What is listed, else what `find` returns, which from then on is listed for the other tasks."""
        listed = read_list(self.list, self.what)
        if listed is None:
            with self._turn(), self.nothing_left_behind():
                listed = read_list(self.list, self.what)
                if listed is None:
                    return self._kept(find())
        self.notice(f"headers: as read by another task of this array, from {self.list}")
        return listed

    def _kept(self, found: Found) -> Found:
        with parts.unwritable_as_user_error(self.store):
            # Without locks, another task may have been faster, and all are to go on from one list.
            listed = read_list(self.list, self.what)
            if listed is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_list(self.list, self.what, found)
        return listed or found

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until no other task reads the headers, and have the others wait while the block runs.

        The kernel lets go when a process ends, however it ends.
        """
        with self._opened() as lock:
            with parts.unwritable_as_user_error(self.store):
                waited = self._wait(lock)
            if waited and (is_of(self.list, self.what) or not self.lock.exists()):
                # There is a list now, or the task that was to make it has given up: all who waited go on at once.
                lock.close()
            yield

    def _opened(self) -> IO[str]:
        with parts.unwritable_as_user_error(self.store):
            self.folder.mkdir(parents=True, exist_ok=True)
            return open(self.lock, "w")

    def _wait(self, lock: IO[str]) -> bool:
        """Lock the file, where there are locks; whether another task had to be waited for."""
        waited = False
        try:
            waited = not _is_free(lock)
            if waited:
                self.notice("waiting for another task of this array, which reads the headers")
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as e:
            # Stale: on NFS, a task on another node has given up, and deleted the file.
            if e.errno not in (*parts.NO_LOCKS, errno.ESTALE):
                raise
        return waited

    @contextmanager
    def nothing_left_behind(self) -> Iterator[None]:
        """After an error in the block, unless a part has begun; then all but the list is needed no more."""
        try:
            yield
        except BaseException:
            # First: a task that waited, and finds no list, looks for the lock.
            self.lock.unlink(missing_ok=True)
            if not parts.any_begun(self.store):
                self.list.unlink(missing_ok=True)
                for path in (self.folder, *self.new):
                    with suppress(OSError):  # gone already, or another task has put something there meanwhile
                        path.rmdir()
            raise


def _is_free(lock: IO[str]) -> bool:
    """Whether no other process had locked the file, which is locked now."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
