from __future__ import annotations

import errno
import mmap
import os
import resource
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldct_dist.store import direct
from ldct_dist.store.direct import DirectWriter

PAGE = mmap.PAGESIZE


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr(direct, "_BUFFER", 2 * PAGE)


def write(path, pieces):
    with DirectWriter(path) as file:
        for piece in pieces:
            file.write(piece)
        assert file.tell() == sum(map(len, pieces))


@settings(deadline=None, max_examples=50, derandomize=True)
@given(sizes=st.lists(st.one_of(st.integers(0, 5 * PAGE), st.sampled_from([PAGE, 2 * PAGE])), max_size=6))
def test_it_holds_what_was_written_to_the_byte(sizes):
    pieces = [os.urandom(size) for size in sizes]
    with tempfile.TemporaryDirectory() as folder:
        write(f"{folder}/file", pieces)
        with open(f"{folder}/file", "rb") as f:
            assert f.read() == b"".join(pieces)


def test_where_direct_writes_are_refused_it_goes_through_the_page_cache(tmp_path, monkeypatch):
    """By a file system with larger pages; one that knows no direct writes at all refuses the flag."""
    real, refused = os.write, []

    def picky(fd, content):
        if direct.fcntl.fcntl(fd, direct.fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(fd)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, content)

    monkeypatch.setattr(os, "write", picky)
    content = os.urandom(5 * PAGE + 3)
    write(tmp_path / "file", [content])
    assert (tmp_path / "file").read_bytes() == content
    assert len(refused) <= 1


def test_any_other_refusal_is_raised(tmp_path, monkeypatch):
    def broken(fd, content):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "write", broken)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write(tmp_path / "file", [bytes(9)])


def test_a_disk_that_fills_up_is_an_error_and_no_endless_loop(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * PAGE, hard))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            write(tmp_path / "file", [bytes(PAGE)] * 9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "file").write_bytes(b"here")
    with pytest.raises(FileExistsError):
        DirectWriter(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"here"
