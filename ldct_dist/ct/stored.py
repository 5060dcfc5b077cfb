"""Where the pixels of a slice are, as its header says, unchecked until they are read."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class PixelForm(NamedTuple):
    """How pixels are stored, in the header's own words; all slices of a series mostly share one.

    matrix: rows, columns.
    """

    syntax: str
    matrix: tuple[int, int] | None
    bits_allocated: str | None
    bits_stored: str | None
    high_bit: str | None
    representation: str | None
    samples: str | None
    photometric: str | None
    pad_value: str | None
    pad_limit: str | None
    slope: float | None
    intercept: float | None


class Stored(NamedTuple):
    """Where the pixels of a slice are, so that they are read without its header.

    size in bytes and changed in ns: the file's, when the header was read. pixels: where native little-endian ones
    begin in it, and their length in bytes; None where pydicom has to find or decode them.
    """

    path: Path
    size: int
    changed: int
    pixels: tuple[int, int] | None
    form: PixelForm
