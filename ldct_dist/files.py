"""Files that are there whole or as they were before, and stay so after a power cut."""

from __future__ import annotations

import errno
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
"""what the name of a file or folder begins with until it is whole"""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` at the end of the block; after an error `path` is as it was before."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")
    try:
        yield temporary
        sync(temporary)  # before the rename, which might survive a power cut that the bytes do not
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace(path: Path, content: bytes | str) -> None:
    """Write `content`, text as UTF-8, in place of what `path` holds. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def refuse_unwritable(folder: Path) -> None:
    """Raises UserError where `folder`, or what there is of the way to it, cannot be written to: before work that would
    be lost. Nothing is left behind."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror}); choose another folder") from e


def refuse_taken(folder: Path) -> None:
    """Raises UserError where `folder` is there and holds something, or is a file, and where one may not look."""
    try:
        free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror}); choose another folder") from e
    if not free:
        raise UserError(f"{folder}: exists already; choose another folder or remove it")


def refuse_inside(folder: Path, source: Path) -> None:
    """Raises UserError where `folder` is in `source`, whose next reader would take what is written for more sources."""
    if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(source)):
        raise UserError(
            f"{folder}: in {source}, where what is written would be read as a source the next time; choose a folder "
            "outside it"
        )


def sync(path: Path) -> None:
    """Have a file's bytes, or the names in a folder, on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if not (e.errno == errno.EINVAL and path.is_dir()):  # on some network file systems names cannot be
            raise
    finally:
        os.close(fd)


def sync_tree(root: Path) -> None:
    """The same for all of `root`, files and folders: call it before `root` gets its name."""
    # Many at once: the file system then writes its journal once, and not for each.
    with ThreadPoolExecutor(64) as threads:
        list(threads.map(sync, [root, *root.rglob("*")]))


def file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def size(nbytes: float) -> str:
    """So many bytes in the unit that suits."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if nbytes < 999.5:  # three digits, and no exponent
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.1f} TiB"
