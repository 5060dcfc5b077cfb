from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from ldct_dist import files
from ldct_dist.errors import UserError


def test_the_bytes_are_on_disk_before_the_name_is_and_the_name_before_it_returns(tmp_path, monkeypatch):
    done = []
    for module, call in ((os, "fsync"), (Path, "replace")):
        original = getattr(module, call)
        monkeypatch.setattr(
            module, call, lambda *given, call=call, original=original: done.append(call) or original(*given)
        )
    files.replace(tmp_path / "config.yaml", "steps: 8\n")
    assert done == ["fsync", "replace", "fsync"]
    assert (tmp_path / "config.yaml").read_text() == "steps: 8\n"


def test_a_folder_that_cannot_be_looked_at_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot be written \(File name too long\); choose"):
        files.refuse_taken(tmp_path / ("x" * 300))


def test_a_link_to_itself_is_found_out_where_it_is_written_to(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to("there")
    assert files.real(tmp_path / "loop" / "x") == tmp_path / "loop" / "x"
    assert files.real(tmp_path / "link" / "x") == tmp_path / "there" / "x"


def test_after_an_error_the_old_file_stands_alone(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text("old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.replace(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_system_that_cannot_sync_folders_is_written_to_all_the_same(tmp_path, monkeypatch):
    """Some network file systems say EINVAL to it. A file's bytes must still be on disk."""

    def refuse(kind):
        def fsync(fd):
            if kind(os.fstat(fd).st_mode):
                raise OSError(22, "Invalid argument")

        monkeypatch.setattr(os, "fsync", fsync)

    refuse(stat.S_ISDIR)
    files.replace(tmp_path / "config.yaml", "new")
    assert (tmp_path / "config.yaml").read_text() == "new"
    refuse(stat.S_ISREG)
    with pytest.raises(OSError, match="Invalid argument"):
        files.replace(tmp_path / "config.yaml", "newer")


def test_what_cannot_be_written_is_found_out_without_a_trace(tmp_path):
    files.refuse_unwritable(tmp_path / "new" / "newer")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"{folder}: cannot be written"):
            files.refuse_unwritable(folder)


@pytest.mark.parametrize(
    ("nbytes", "told"),
    [
        (0, "0 bytes"),
        (1023, "0.999 KiB"),
        (1.5 * files.GIB, "1.5 GiB"),
        (1023 * files.GIB, "1.0 TiB"),
        (2**52, "4,096.0 TiB"),
    ],
)
def test_a_size_is_told_in_the_unit_that_suits(nbytes, told):
    assert files.size(nbytes) == told
