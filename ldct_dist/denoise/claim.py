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
    mark = out / MADE_BY
    try:
        out.mkdir(parents=True, exist_ok=True)
        unnamed = not mark.exists() and any(not path.name.startswith(".") for path in out.iterdir())
        if not mark.exists() and not unnamed:
            replace(mark, maker)
        made_by = "a network that it does not name" if unnamed else mark.read_text()
    except OSError as e:
        raise UserError(f"{out}: {e.strerror}; choose a folder that can be written") from e
    if made_by != maker:
        raise UserError(
            f"{out}: what is there was denoised by {made_by}, this would be by {maker}; choose another folder"
        )
