"""The one kind of error a user can cause, how its line names a few of many, and memory that runs out as one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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


@contextmanager
def memory_for(what: str, remedy: str = "give it more memory (under Slurm: --mem)") -> Iterator[None]:
    """Raises UserError that names `what` where memory runs out in the block, a GPU's too."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if (said := _lack(e)) is None:
            raise
        raise UserError(f"{what}: {said}; {remedy}") from e


def lacks_memory(e: Exception) -> bool:
    """Whether the error says that memory ran out, and nothing of what was asked for."""
    return isinstance(e, (MemoryError, RuntimeError)) and _lack(e) is not None


def _lack(e: MemoryError | RuntimeError) -> str | None:
    """What is said of memory that ran out; None if something else is wrong. Torch raises RuntimeErrors, and knows no
    MemoryError."""
    said = str(e)
    if isinstance(e, MemoryError):
        return f"memory ran out ({said})" if said else "memory ran out"
    if "DefaultCPUAllocator: " in said:
        return f"memory ran out ({said.partition('DefaultCPUAllocator: ')[2].partition('. ')[0]})"
    if said == "can't start new thread":  # there is no room for its stack
        return "no other thread could be started (too little memory, or ulimit -u is reached)"
    return ". ".join(said.split(". ")[:3]) if "out of memory" in said else None
