"""How much memory the files of a series may ask for, so that a damaged or made-up one cannot take all that a machine has."""

from __future__ import annotations

import zlib
from io import BufferedReader

from ldct_dist.errors import UserError
from ldct_dist.files import MIB, size

_ANYWAY = 64 * MIB  # twice the pixels of a slice of 4096 x 4096
_RATIO = 64  # the most that RLE reaches; lossless, CT is compressed 2 to 4 times, and only empty slices more


def refuse_bloated(where: object, stored: int, unpacked: int) -> None:
    """Raises UserError where `stored` bytes are to become `unpacked`, far more than they can hold."""
    if unpacked > max(_ANYWAY, _RATIO * stored):
        raise UserError(
            f"{where}: its {size(stored)} would take {size(unpacked)} or more of memory, which no CT slice does; export the "
            "file again or remove it"
        )


def refuse_other_length(where: object, length: int, said: int, row: int) -> None:
    """Raises UserError where there are fewer than `said` bytes of pixels, or a row of them too many: a few bytes of padding
    are common, a row more means another matrix."""
    if length < said:
        raise UserError(f"{where}: truncated pixel data; export the file again")
    if length >= said + row:
        raise UserError(f"{where}: more pixel data than Rows and Columns say; export the file again")


class Bounded(BufferedReader):
    """A DICOM file for pydicom to read. Raises UserError where its deflated dataset would become too large."""

    def read(self, length: int | None = -1, /) -> bytes:
        content = super().read(length)
        if length == -1:  # pydicom reads only what it is going to inflate without saying how much
            self._refuse_bomb(content)
        return content

    def _refuse_bomb(self, deflated: bytes) -> None:
        piece = 1 << 14  # bytes, which become 16 MiB at most
        stream, inflated = zlib.decompressobj(-zlib.MAX_WBITS), 0
        for start in range(0, len(deflated), piece):
            inflated += len(stream.decompress(deflated[start : start + piece]))
            refuse_bloated(self.name, len(deflated), inflated)
