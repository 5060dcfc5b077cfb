"""Writing a file past the page cache, where the file system supports it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

_DIRECT = getattr(os, "O_DIRECT", 0)
_BUFFER = 256 * mmap.PAGESIZE


class DirectWriter:
    """Writes a new file at `path` from beginning to end; a context manager.

    An ingest does not read again what it writes. By way of the page cache, each byte would be copied once more, into
    memory that the kernel first has to find, and would wait there for the fsync: that takes three times the CPU, and in
    a job with a memory limit, the pages count against it.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        self._buffer = mmap.mmap(-1, _BUFFER)  # aligned to pages, as a direct write has to be
        self._filled = self._written = 0
        self._set_direct(True)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._written + self._filled

    def write(self, content: bytes) -> None:
        """Raises OSError as the file system does, at the latest from `__exit__`."""
        rest = memoryview(content)
        while rest:
            part = rest[: _BUFFER - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            rest = rest[len(part) :]
            if self._filled == _BUFFER:
                self._flush(_BUFFER)

    def __enter__(self) -> DirectWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                size = self.tell()
                self._flush(-(-self._filled // mmap.PAGESIZE) * mmap.PAGESIZE)
                os.ftruncate(self._fd, size)
        finally:
            os.close(self._fd)

    def _flush(self, size: int) -> None:
        """Write the first `size` bytes of the buffer, a whole number of pages."""
        with memoryview(self._buffer) as view:
            start = 0
            while start < size:  # a disk that is nearly full writes a part
                try:
                    start += os.write(self._fd, view[start:size])
                except OSError as e:
                    if e.errno != errno.EINVAL or not self._is_direct:
                        raise
                    self._set_direct(False)  # the file system wants larger blocks than our pages
        self._written += size
        self._filled = 0

    @property
    def _is_direct(self) -> bool:
        return bool(fcntl.fcntl(self._fd, fcntl.F_GETFL) & _DIRECT)

    def _set_direct(self, direct: bool) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | _DIRECT if direct else flags & ~_DIRECT)
        except OSError as e:
            if e.errno != errno.EINVAL:  # a file system that knows only the page cache
                raise
