"""The one kind of error a user can cause."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave: said in one line as what, where, and what to do.

    The command line prints it without a traceback and exits with code 2. Anything else that is
    raised is a bug in this package and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
