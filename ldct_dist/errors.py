"""The one kind of error a user can cause, and how its line names a few of many."""

from __future__ import annotations

from collections.abc import Sequence

NAMED = 4
"""of many, those that a line names"""


class UserError(Exception):
    """A mistake in what the user gave: said in one line as what, where, and what to do.

    The command line prints it without a traceback and exits with code 2. Anything else that is
    raised is a bug in this package and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def few(told: Sequence[str], between: str = "; ") -> str:
    """The first few of many items and how many more there are, in one line: a full disk, say, is met by all ranks."""
    rest = len(told) - NAMED
    return between.join((*told[:NAMED], *([f"and {rest} more"] if rest > 0 else [])))
