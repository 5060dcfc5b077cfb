"""Where and how the pixels of a slice are stored, as its header says; checked when they are read."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class PixelForm(NamedTuple):
    """How pixels are stored, in the header's own words; mostly the same for all slices of a series.

    matrix: (rows, columns).
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
    """Where the pixels of a slice are, so that they can be read without parsing its header again.

    size, changed: the file's, in bytes and ns, when its header was read. pixels: offset and length in bytes of native
    little-endian ones; None if pydicom has to find or decode them. frame: which one, counted from 0, of a multi-frame file.
    """

    path: Path
    size: int
    changed: int
    pixels: tuple[int, int] | None
    form: PixelForm
    frame: int | None = None

    def __str__(self) -> str:
        return self.called(str(self.path))

    def called(self, name: str) -> str:
        """How errors call the slice, its file being called `name`."""
        return name if self.frame is None else f"{name} frame {self.frame + 1}"
