"""How training can end."""

from __future__ import annotations

from enum import IntEnum


class Ending(IntEnum):
    """The values are the command's exit codes; 2 is a mistake in what was given, 1 a bug with its traceback."""

    DONE = 0
    UNSTABLE = 65
    """steps were still skipped after several rollbacks: the line names their samples, look at them first"""
    FENCED = 70
    """a newer start of the run has taken over: do not start this one again"""
    RESUMABLE = 75
    """stopped on request with a checkpoint: start the same command again to go on"""
    HUNG = 76
    """a rank stopped answering: start the same command again to go on from the last checkpoint"""
    HUNG_EARLY = 77
    """a rank stopped answering before this start had saved anything: another one may end likewise, look at the
    line first"""
