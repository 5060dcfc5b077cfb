"""The command line in a process of its own, and stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def command(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ldct_dist", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )


def commands_on_path(folder: Path, **scripts: str) -> str:
    """A PATH on which each named command is this shell script."""
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:/usr/bin:/bin"
