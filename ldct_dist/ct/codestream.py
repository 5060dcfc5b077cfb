"""What a compressed slice says of itself, looked at before a decoder takes memory for it."""

from __future__ import annotations

import struct
from pathlib import Path

import _CharLS  # of pyjpegls: its decoder reads headers with it
from pydicom.uid import UID, JPEG2000TransferSyntaxes, JPEGLSTransferSyntaxes, RLELossless

from ldct_dist.errors import UserError

_START = b"\xff\x4f\xff\x51"  # of a JPEG 2000 codestream: its markers SOC and SIZ (ISO/IEC 15444-1 A.5.1)
_SIZ = struct.Struct(">8x2I24xH")  # the right and lower ends of the reference grid, the number of components


def refuse_unlike(path: Path, frame: bytes, syntax: UID, matrix: tuple[int, int]) -> None:
    """Raises UserError where `frame`, compressed pixels of the file at `path`, is cut off or claims another size than
    `matrix`, (rows, columns). What a codec's parser raises on damaged bytes is passed on.

    Decoders take memory for what a codestream claims, which in a damaged one may be all that the machine has. RLE claims
    nothing, and GDCM itself compares what a JPEG claims.
    """
    # Codecs fill in what is missing, silently, but every stream of the JPEG family ends with the marker EOI or EOC.
    if syntax != RLELossless and not frame.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise UserError(f"{path}: truncated pixel data; export the file again")
    claimed, said = _claimed(frame, syntax), (*matrix, 1)
    if claimed is not None and claimed != said:
        raise UserError(
            f"{path}: its compressed pixels claim {' x '.join(map(str, claimed))} values, its header {' x '.join(map(str, said))} "
            "(Rows, Columns, SamplesPerPixel); export the file again"
        )


def _claimed(frame: bytes, syntax: UID) -> tuple[int, int, int] | None:
    """(rows, columns, values a pixel) that `frame` claims; None for a syntax whose decoder needs no such check.

    Raises ValueError or struct.error where there is no JPEG 2000 codestream.
    """
    if syntax in JPEG2000TransferSyntaxes:
        start = frame.find(_START)  # 0, but for writers who put a JP2 header before it
        if start < 0:
            raise ValueError("no JPEG 2000 codestream")
        columns, rows, components = _SIZ.unpack_from(frame, start)
        return rows, columns, components
    if syntax in JPEGLSTransferSyntaxes:
        header = _CharLS.read_header(frame)
        return header["height"], header["width"], header["components"]
    return None
