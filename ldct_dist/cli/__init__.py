"""The command line: one thin function a verb, which parses, calls and prints."""

from __future__ import annotations

import sys
from io import TextIOWrapper

from ldct_dist.cli import data, runs, slurm  # noqa: F401  they register their verbs
from ldct_dist.cli.common import app
from ldct_dist.errors import UserError

INTERRUPTED = 130  # what Typer makes of Ctrl-C, as shells do


def main() -> None:
    """Run the command; a user's mistake is one line on stderr and exit code 2, Ctrl-C one line and 130."""
    if isinstance(sys.stdout, TextIOWrapper):  # as on stderr: names of files need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as e:
        if e.code == INTERRUPTED:
            print(
                "interrupted; the same command again goes on with what is whole, or starts over",
                file=sys.stderr,
            )
        raise
