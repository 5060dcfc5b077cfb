"""Who may write a store at the same time, and which parts of its ingest have begun and are done.

This is kept beside the store, not in it, so that a store is the same however it was made.
"""

from __future__ import annotations

import errno
import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldct_dist.errors import UserError

Part = tuple[int, int]
"""(i, n): every n-th case from the i-th"""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""errors of file systems without locks, as which some of clusters are mounted"""


@contextmanager
def writing(store: Path, part: Part) -> Iterator[None]:
    """Hold the store against other ingests; parts of one array job do not exclude each other.

    Raises UserError if another process holds it. The kernel lets go when a process ends, however it ends.
    """
    store.parent.mkdir(parents=True, exist_ok=True)
    with open(store.with_name(f".{store.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_EX if part[1] == 1 else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(
                f"{store}: another ingest is writing it; wait until that one is done, then start this one again"
            ) from e
        except OSError as e:
            if e.errno not in NO_LOCKS:
                raise
        yield


@contextmanager
def unwritable_as_user_error(store: Path) -> Iterator[None]:
    """Raise an OSError in the block as a UserError about `store`: errors of source files are UserErrors already."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"{store}: cannot be written ({e.strerror or e}); make room or choose another folder, then start again: "
            "complete cases are kept"
        ) from e


def begin(store: Path, part: Part) -> None:
    """Record that `part` has begun and is not done, and forget the parts of an array of another size."""
    folder(store).mkdir(exist_ok=True)
    for mark in _marks(store):
        if _part(mark)[1] != part[1]:
            mark.unlink(missing_ok=True)
    _begun(store, part).touch()
    _done(store, part).unlink(missing_ok=True)


def end(store: Path, part: Part, of: str) -> None:
    """Record that `part` is done; of: a hash of the list of cases that it is a part of."""
    folder(store).mkdir(exist_ok=True)
    _done(store, part).write_text(of)


def missing(store: Path) -> list[Part]:
    """The parts of the latest ingest, in one part or as an array, that are not done; none if it was finalised."""
    marks = _marks(store)
    sizes = {_part(mark)[1] for mark in marks}
    done = {_part(mark) for mark in marks if not mark.suffix}
    return [(i, n) for n in sorted(sizes) for i in range(n) if (i, n) not in done]


def agree(store: Path) -> bool:
    """Whether all parts that are done are of the same list of cases, as far as they say."""
    said = {mark.read_text() for mark in _marks(store) if not mark.suffix}
    return len(said - {""}) <= 1


def any_begun(store: Path) -> bool:
    """Whether a part has begun since the store was finalised last."""
    return bool(_marks(store))


def forget(store: Path) -> None:
    shutil.rmtree(folder(store), ignore_errors=True)


def folder(store: Path) -> Path:
    """Where all that is known of the parts is kept until the store is finalised."""
    return store.with_name(f"{store.name}.parts")


def _done(store: Path, part: Part) -> Path:
    return folder(store) / f"{part[0]}-of-{part[1]}"


def _begun(store: Path, part: Part) -> Path:
    return _done(store, part).with_suffix(".begun")


def _marks(store: Path) -> list[Path]:
    return list(folder(store).glob("*-of-*"))


def _part(mark: Path) -> Part:
    i, n = mark.stem.split("-of-")
    return int(i), int(n)
