"""The code as it was when a job was submitted: what a requeue runs, whatever has become of the checkout."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ldct_dist
from ldct_dist.errors import UserError
from ldct_dist.files import TEMPORARY
from ldct_dist.provenance import COMMIT, commit

_LEFT_OUT = ("__pycache__", "demo_data", COMMIT)


def snapshot_place(folder: Path) -> Path:
    """Stands for the snapshot of a job in `folder` in a script that is only shown or checked: none is made yet."""
    return folder / "code" / "SNAPSHOT"


def snapshot_code(folder: Path) -> Path:
    """Copy this package into `folder`, of a job; what to put on the Python path.

    A snapshot is named by the hash of its contents, so that a job that still waits keeps the code it was submitted with.
    Raises UserError where it cannot be written.
    """
    into = folder / "code"
    package = Path(ldct_dist.__file__).parent
    files = list(_files(package))
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(package)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    target = into / digest.hexdigest()[:16]
    if target.exists():
        return target
    try:
        into.mkdir(parents=True, exist_ok=True)
        # A copy that is not complete is deleted, whatever goes wrong.
        with tempfile.TemporaryDirectory(prefix=f"{TEMPORARY}{target.name}-", dir=into) as name:
            partial = Path(name)
            for path in files:
                copy = partial / package.name / path.relative_to(package)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            if (known := commit()) is not None:
                (partial / package.name / COMMIT).write_text(known)
            os.chmod(partial, 0o755)
            partial.rename(target)
    except OSError as e:
        if not target.exists():  # another submit may have been quicker
            raise UserError(f"{into}: {e.strerror}; choose another folder with runs=FOLDER") from e
    return target


def _files(package: Path) -> Iterator[Path]:
    for path in sorted(package.rglob("*")):
        if path.is_file() and not any(part in _LEFT_OUT for part in path.relative_to(package).parts):
            yield path
