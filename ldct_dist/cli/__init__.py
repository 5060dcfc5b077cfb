"""The command line: one thin function a verb, which parses, calls and prints."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper

from ldct_dist.cli import data, evaluation, runs, slurm  # noqa: F401  they register their verbs
from ldct_dist.cli.common import app
from ldct_dist.errors import UserError, memory_for

TERMINATED = 143
ENDED = {130: "interrupted", TERMINATED: "terminated"}  # as shells have it; Typer makes 130 of Ctrl-C itself
TIDY = ("ingest", "simulate", "denoise", "evaluate")
"""Verbs that clear up what they were writing when a TERM ends them, as at a job's time limit. Those that train have
ways of their own to stop."""


def main() -> None:
    """Run the command; a user's mistake, or memory that runs out, is one line on stderr and exit code 2, Ctrl-C one line
    and 130, TERM and 143."""
    if isinstance(sys.stdout, TextIOWrapper):  # as on stderr: names of files need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _term_heeded(), memory_for(" ".join(sys.argv[1:2])):
            app()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as e:
        if e.code in ENDED:
            print(
                f"{ENDED[e.code]}; run the same command again: what was finished is kept, the rest is done again",
                file=sys.stderr,
            )
        raise


@contextmanager
def _term_heeded() -> Iterator[None]:
    """A TERM during a tidy verb ends it as Ctrl-C does; a second one ends it at once. Where it is ignored, it stays so."""
    before = signal.getsignal(signal.SIGTERM)
    if before != signal.SIG_DFL or sys.argv[1:2] not in ([verb] for verb in TIDY):
        yield
        return

    def end(number: int, _: object) -> None:
        signal.signal(number, before)
        sys.exit(TERMINATED)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
