"""Which code this is, for whoever wants to know what made a number."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

COMMIT = "COMMIT"
"""in a copy of the package: the commit of what it was copied from"""


def commit() -> str | None:
    """The commit of this code as `git describe` tells it; None where it is neither a checkout nor a copy of one."""
    package = Path(__file__).parent
    if (package / COMMIT).exists():
        return (package / COMMIT).read_text()
    if not (package.parent / ".git").exists():  # git would take the repository that this is installed in
        return None
    describe = ["git", "-C", str(package.parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Of each package what is installed; None if it is not."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
