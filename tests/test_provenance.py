from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ldct_dist
from ldct_dist.cluster.snapshot import snapshot_code
from ldct_dist.errors import UserError
from ldct_dist.provenance import commit, versions


def commit_in(folder: Path) -> str:
    """What the package in `folder` says that its commit is."""
    code = "from ldct_dist.provenance import commit; print(commit())"
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_a_repository_that_the_package_is_installed_in_is_not_its_own(tmp_path):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "someone's own"], check=True)
    leave_out = shutil.ignore_patterns("demo_data", "__pycache__", "COMMIT")
    shutil.copytree(Path(ldct_dist.__file__).parent, tmp_path / "lib" / "ldct_dist", ignore=leave_out)
    assert commit_in(tmp_path / "lib") == "None"


def test_a_job_knows_the_commit_of_the_code_that_it_was_submitted_with(tmp_path):
    assert commit_in(snapshot_code(tmp_path)) == str(commit())


def test_code_that_could_not_be_copied_whole_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="No space left"):
        snapshot_code(tmp_path)
    assert list((tmp_path / "code").iterdir()) == []


def test_two_jobs_that_are_submitted_at_once_share_the_code(tmp_path, monkeypatch):
    """The other one is quicker: its copy has the name when this one is all written."""
    chmod, theirs = os.chmod, []

    def meanwhile(*given):
        monkeypatch.setattr(os, "chmod", chmod)
        theirs.append(snapshot_code(tmp_path))
        chmod(*given)

    monkeypatch.setattr(os, "chmod", meanwhile)
    assert [snapshot_code(tmp_path)] == theirs == list((tmp_path / "code").iterdir())


def test_what_is_not_installed_has_no_version():
    assert versions(["no-such-package"]) == {"no-such-package": None}
