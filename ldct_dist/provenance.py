"""Which version of the code, and of packages, is running: it is recorded with everything that is computed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

COMMIT = "COMMIT"
"""a file in a copy of the package: the commit of the original"""


def commit() -> str | None:
    """The commit of this code as `git describe` gives it; None if it is neither a checkout nor a copy of one."""
    package = Path(__file__).parent
    if (package / COMMIT).exists():
        return (package / COMMIT).read_text()
    if not (package.parent / ".git").exists():
        # Or git would describe the repository in which this is installed.
        return None
    describe = ["git", "-C", str(package.parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each package; None if it is not installed."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
