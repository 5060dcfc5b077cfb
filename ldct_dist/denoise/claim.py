"""One maker for all that a folder is filled with, however often that is started again."""

from __future__ import annotations

from pathlib import Path

from ldct_dist.errors import UserError
from ldct_dist.files import replace

MADE_BY = ".denoised-by"
"""beside what was denoised: by what all of it was"""


def claim(out: Path, maker: str) -> None:
    """Have `out` be filled by `maker` alone: a network, and what else decides what belongs there.

    Raises UserError where another maker was at work, and where `out` cannot be written.
    """
    refuse_others(out, maker)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / MADE_BY).exists():
            replace(out / MADE_BY, maker)
    except OSError as e:
        raise _unwritable(out, e) from e
    refuse_others(out, maker)  # one may have begun at the same time


def refuse_others(out: Path, maker: str) -> None:
    """Raises UserError where `out` holds what another maker made, or one that it does not name. Writes nothing."""
    mark, made_by = out / MADE_BY, maker
    try:
        if mark.exists():
            made_by = mark.read_text()
        elif out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
            made_by = "a network that it does not name"
    except OSError as e:
        raise _unwritable(out, e) from e
    if made_by != maker:
        raise UserError(
            f"{out}: what is there was denoised by {made_by}, this would be by {maker}; choose another folder"
        )


def _unwritable(out: Path, why: OSError) -> UserError:
    return UserError(f"{out}: {why.strerror}; choose a folder that can be written")
