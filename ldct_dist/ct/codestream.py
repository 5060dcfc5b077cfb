"""What a compressed slice says of itself, looked at before a decoder takes memory for it."""

from __future__ import annotations

import struct

import _CharLS  # of pyjpegls: its decoder reads headers with it
from pydicom.uid import UID, JPEG2000TransferSyntaxes, JPEGLSTransferSyntaxes, RLELossless

from ldct_dist.errors import UserError

_START = b"\xff\x4f\xff\x51"  # of a JPEG 2000 codestream: its markers SOC and SIZ (ISO/IEC 15444-1 A.5.1)
_SIZ = struct.Struct(">8x2I24xH")  # the right and lower ends of the reference grid, the number of components
_SEGMENT = struct.Struct(">BBH")  # of a JPEG: 0xff, its marker, and the length of what follows the marker
_FRAME = struct.Struct(">4xBHHB")  # bits a value, rows, columns, values a pixel
_STARTS_OF_FRAME = (0xC0, 0xC1, 0xC3)  # SOF of baseline, extended and lossless ones
_HUFFMAN_TABLES, _SCAN = 0xC4, 0xDA  # DHT, SOS


def refuse_unlike(where: object, frame: bytes, syntax: UID, matrix: tuple[int, int]) -> None:
    """Raises UserError where `frame`, the compressed pixels of a slice, is cut off or claims another size than
    `matrix`, (rows, columns). What a codec's parser raises on damaged bytes is passed on.

    Decoders take memory for what a codestream claims, which in a damaged one may be all that the machine has, and GDCM ends
    the process if there is no Huffman table, or a value of more than 16 bits. RLE claims nothing.
    """
    # Codecs fill in what is missing, silently.
    if syntax != RLELossless and not ends(frame):
        raise UserError(f"{where}: truncated pixel data; export the file again")
    claimed, said = _claimed(frame, syntax), (*matrix, 1)
    if claimed is not None and claimed != said:
        raise UserError(
            f"{where}: its compressed pixels claim {' x '.join(map(str, claimed))} values, its header {' x '.join(map(str, said))} "
            "(Rows, Columns, SamplesPerPixel); export the file again"
        )


def begins(stream: bytes) -> bool:
    """Whether these are the first bytes of a stream of the JPEG family, which never occur within one: the marker SOI and
    that of a segment, or SOC and SIZ."""
    return stream.startswith((b"\xff\xd8\xff", _START))


def ends(stream: bytes) -> bool:
    """Whether these are the last bytes of a stream, padded or not: those of the JPEG family end with the marker EOI or EOC."""
    return stream.rstrip(b"\0").endswith(b"\xff\xd9")


def _claimed(frame: bytes, syntax: UID) -> tuple[int, int, int] | None:
    """(rows, columns, values a pixel) that `frame` claims; None for RLE.

    Raises ValueError or struct.error where there is no such stream.
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
    return None if syntax == RLELossless else _claimed_by_jpeg(frame)


def _claimed_by_jpeg(frame: bytes) -> tuple[int, int, int]:
    """(rows, columns, values a pixel), from the segments before the scan, which follow each other (ISO/IEC 10918-1 B.1, B.2)."""
    found: dict[int, int] = {}
    at = 2  # behind the marker SOI
    while _SCAN not in found:
        begin, marker, length = _SEGMENT.unpack_from(frame, at)
        if begin != 0xFF:
            raise ValueError("damaged JPEG stream")
        if marker == 0xFF:  # fills up
            at += 1
            continue
        found[marker] = at
        at += 2 + length
    start = next((found[marker] for marker in _STARTS_OF_FRAME if marker in found), None)
    if start is None or _HUFFMAN_TABLES not in found:
        raise ValueError("no JPEG stream as CT has")
    bits, rows, columns, values = _FRAME.unpack_from(frame, start)
    if bits > 16:
        raise ValueError(f"JPEG stream of {bits} bits a value")
    return rows, columns, values
