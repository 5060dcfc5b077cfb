"""Writing files so that they are either complete or as they were before, even after a power cut."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ldct_dist.errors import UserError

MIB, GIB = 2**20, 2**30
TEMPORARY = ".writing-"
"""prefix of the names of files and folders that are not complete yet"""


def unfinished(path: Path) -> Path:
    """A name beside `path`, of this caller alone, for what is to become `path` once it is complete."""
    return path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")


def left_unfinished(path: Path) -> Iterator[Path]:
    """What is there under names that `unfinished(path)` gave: left by killed processes, or still being written."""
    return path.parent.glob(f"{TEMPORARY}{glob.escape(path.name)}-{'?' * 8}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which replaces `path` at the end of the block; after an error `path` is as before."""
    temporary = unfinished(path)
    try:
        yield temporary
        sync(temporary)  # or a power cut might leave the rename on disk, but not the bytes
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace(path: Path, content: bytes | str) -> None:
    """Replace the contents of `path` by `content`, text as UTF-8. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def refuse_unwritable(folder: Path) -> None:
    """Raises UserError where `folder`, or the nearest parent that exists, cannot be written to.

    Call it before work whose results would be lost. It leaves nothing behind.
    """
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror}); choose another folder") from e


def refuse_taken(folder: Path) -> None:
    """Raises UserError where `folder` exists and is not empty, or is a file, or cannot be looked into."""
    try:
        free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror}); choose another folder") from e
    if not free:
        raise UserError(f"{folder}: exists already; choose another folder or remove it")


def real(path: Path) -> Path:
    """`path` absolute and without links, as far as it is there. A link to itself stays, where Path.resolve would raise
    RuntimeError, and fails as other paths that cannot be written do."""
    return Path(os.path.realpath(path))


def refuse_inside(folder: Path, source: Path) -> None:
    """Raises UserError where `folder` is in `source`: what is written there would be read with it the next time."""
    if real(folder).is_relative_to(real(source)):
        raise UserError(
            f"{folder}: is in {source}, so what is written there would be read with it the next time; choose a folder "
            "outside it"
        )


def sync(path: Path) -> None:
    """fsync a file, or a folder for the names in it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if not (e.errno == errno.EINVAL and path.is_dir()):  # some network file systems cannot fsync folders
            raise
    finally:
        os.close(fd)


def sync_tree(root: Path) -> None:
    """`sync` for all files and folders of `root`. Call it before `root` is renamed to its final name."""
    # Many at once: the file system then writes its journal once, and not once for each.
    with ThreadPoolExecutor(64) as threads:
        list(threads.map(sync, [root, *root.rglob("*")]))


def file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def size(nbytes: float) -> str:
    """A number of bytes as text, in the unit that suits: 1.5 MiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if nbytes < 999.5:  # three digits, and no exponent
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.1f} TiB"
