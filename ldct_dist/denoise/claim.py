"""Making sure that everything in an output folder is by the same network, however often the work is started again."""

from __future__ import annotations

from pathlib import Path

from ldct_dist.errors import UserError
from ldct_dist.files import replace

MADE_BY = ".denoised-by"
"""the file in an output folder that names the network"""


def claim(out: Path, maker: str) -> None:
    """Mark `out` as the output of `maker`: a network, and whatever else decides what belongs in the folder.

    Raises UserError where it is another maker's, and where `out` cannot be written.
    """
    refuse_others(out, maker)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / MADE_BY).exists():
            replace(out / MADE_BY, maker)
    except OSError as e:
        raise _unwritable(out, e) from e
    refuse_others(out, maker)  # another may have claimed it at the same time


def refuse_others(out: Path, maker: str) -> None:
    """Raises UserError where `out` holds the output of another maker, or of one that it does not name. Writes nothing."""
    mark, made_by = out / MADE_BY, maker
    try:
        if mark.exists():
            made_by = mark.read_text()
        elif out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
            made_by = "an unknown network"
    except OSError as e:
        raise _unwritable(out, e) from e
    if made_by != maker:
        raise UserError(
            f"{out}: what is there was denoised by {made_by}, this would be by {maker}; choose another folder"
        )


def _unwritable(out: Path, why: OSError) -> UserError:
    return UserError(f"{out}: cannot be written ({why.strerror}); choose another folder")
