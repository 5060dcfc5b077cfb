"""Checks of the folder that holds the runs: that all nodes share it, how fast it is, and that there is room."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from pathlib import Path

from ldct_dist.cluster.checks import Check, Probe, Verdict
from ldct_dist.files import MIB, file_sha256, size

_LIBC = ctypes.CDLL(None, use_errno=True)


def look_shared(probe: Probe) -> tuple[list[int], float, bool, str | None]:
    """(ranks whose files did not appear, seconds until the others' had, whether this rank made the directory that only
    one can make, why it cannot write)."""
    folder, rank, fault = probe.folder, probe.world.rank, None
    try:
        (folder / f"rank-{rank}").write_text(str(rank))
    except OSError as e:
        fault = str(e)
    probe.world.gather(None)
    won = _claim(folder / "claim")
    start = time.monotonic()
    missing = list(range(probe.world.size))
    while missing and time.monotonic() - start < 10:
        missing = [r for r in missing if not _holds(folder / f"rank-{r}", str(r))]
        time.sleep(0.01 if missing else 0)
    return missing, time.monotonic() - start, won, fault


def judge_shared(probe: Probe, seen: list[tuple[list[int], float, bool, str | None]]) -> Verdict:
    runs = probe.folder.parent
    if seen[0][3] is not None:
        return False, f"{seen[0][3]}: choose a folder that can be written (--runs)"
    blind = [rank for rank, (missing, *_) in enumerate(seen) if 0 in missing]
    if blind:
        return False, (
            f"{probe.where(blind)} does not see what {probe.hosts[0]} writes in {runs}: it is not one folder on "
            "all nodes; choose one that is (--runs)"
        )
    unseen = sorted({rank for missing, *_ in seen for rank in missing})
    if unseen:
        why = seen[unseen[0]][3] or "choose another folder (--runs)"
        return False, f"what {probe.where(unseen)} writes in {runs} is not seen by all: {why}"
    winners = sum(won for _, _, won, _ in seen)
    if winners != 1:
        return (
            False,
            f"{runs}: {winners} ranks made one directory; take a file system that forbids it (--runs)",
        )
    return True, f"{runs}: every rank sees every other's file within {max(s for _, s, _, _ in seen):.2f} s"


def look_write(probe: Probe) -> float:
    """Seconds in which this rank writes `write_mib` as checkpoints are written: fsynced and hashed."""
    path, block = probe.folder / f"data-{probe.world.rank}", os.urandom(MIB)
    probe.world.gather(None)
    start = time.perf_counter()
    try:
        with open(path, "wb") as f:
            for _ in range(probe.write_mib):
                f.write(block)
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise OSError(e.errno, f"{e.strerror}: make room, or choose another folder (--runs)") from e
    file_sha256(path)
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def judge_write(probe: Probe, seen: list[float]) -> Verdict:
    rate = len(seen) * probe.write_mib * MIB / max(seen)
    return True, f"{rate / 1e6:.0f} MB/s from {len(seen)} ranks at once, on disk and hashed"


def judge_save(probe: Probe, seen: list[float]) -> Verdict:
    if probe.checkpoint_bytes is None:
        return True, "not known: name the run's CONFIG"
    # A quarter of a checkpoint (the weights) is one file, and a file is written by one rank.
    share = max(probe.checkpoint_bytes / len(seen), probe.checkpoint_bytes / 4)
    seconds = share / (probe.write_mib * MIB / max(seen))
    took = f"about {seconds:.1f} s" if seconds >= 0.1 else "under 0.1 s"
    text = f"{took} for {size(probe.checkpoint_bytes)}"
    short = [f"there are only {s:g} s {occasion}" for occasion, s in probe.grace.items() if 0 < s < seconds]
    if short:
        return False, (
            f"{text}, but {', '.join(short)}: ask the site for more, or choose a faster folder (--runs)"
        )
    none = "none {}: a preempted run goes back to its last checkpoint"
    told = [f"{s:g} s {occasion}" if s else none.format(occasion) for occasion, s in probe.grace.items()]
    return True, "; ".join([text, *told])


def look_room(probe: Probe) -> tuple[int, int]:
    """(bytes free, files free), after reserving for a moment what the run will keep, which fails where a quota forbids it.

    Never more than half of what is free is reserved, and nothing if the run needs more than is free: meanwhile, others
    write there, too.
    """
    free = os.statvfs(probe.folder)
    space, kept = free.f_bavail * free.f_frsize, probe.keep * (probe.checkpoint_bytes or 0)
    if probe.world.is_main and 0 < kept <= space:
        reserve(probe.folder / "room", min(kept, space // 2))
    return space, free.f_favail


def judge_room(probe: Probe, seen: list[tuple[int, int]]) -> Verdict:
    space, files = seen[0]
    text = f"{size(space)} free"
    if probe.checkpoint_bytes is not None:
        text += f"; a run keeps {probe.keep} checkpoints, {size(probe.keep * probe.checkpoint_bytes)}"
        if space < probe.keep * probe.checkpoint_bytes:
            return False, f"{text}: make room, or keep fewer (checkpoint.keep_last, keep_every)"
    if 0 < files < 1000:  # file systems without a limit say 0
        return False, f"only {files} more files fit: delete some, or ask for a larger quota"
    return True, text


def reserve(path: Path, size_bytes: int) -> None:
    """Allocate so many bytes on disk and free them again. Raises OSError where quota or space forbid it.

    Nothing is written: if the file system cannot allocate without writing (EOPNOTSUPP), this checks nothing.
    """
    with open(path, "wb") as f:
        failed = _LIBC.fallocate(f.fileno(), 0, ctypes.c_long(0), ctypes.c_long(size_bytes)) != 0
    number = ctypes.get_errno()
    path.unlink()
    if failed and number != errno.EOPNOTSUPP:
        raise OSError(
            number,
            f"{os.strerror(number)}: {size(size_bytes)} of checkpoints do not fit; make room, or keep fewer (checkpoint.keep_last, keep_every)",
        )


def _claim(path: Path) -> bool:
    """Make a directory as a start of a run does to claim its generation; whether it was this rank that made it."""
    try:
        path.mkdir()
    except OSError:
        return False
    return True


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False


SHARED = Check(look_shared, {"shared folder": judge_shared})
INSIDE = [
    Check(look_write, {"write speed": judge_write, "time to save": judge_save}),
    Check(look_room, {"room": judge_room}),
]
"""only if the folder is shared: otherwise they would fail for that reason alone"""
