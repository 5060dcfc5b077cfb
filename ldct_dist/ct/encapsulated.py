"""Where each frame's compressed pixels are in a multi-frame file.

Encapsulation: DICOM PS3.5 A.4. A frame is one fragment or, in JPEG syntaxes, several. Where one ends, a table of offsets
says; without one, the number of fragments or the streams' own ends do. A file in which these do not agree is refused: with
one frame more or less than there is said to be, slices would trade places.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from io import BufferedReader
from itertools import pairwise
from pathlib import Path

from pydicom.uid import UID, RLELossless

from ldct_dist.ct.codestream import begins, ends
from ldct_dist.errors import UserError

Span = tuple[int, int]
"""offset in a file and length, in bytes"""

_TAG = struct.Struct("<HHL")
_ITEM, _END = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
_TAIL = 16  # bytes at an end of a fragment, with a marker and some padding


def spans_of_frames(
    path: Path, f: BufferedReader, size: int, frames: int, syntax: UID, extended: bytes | None
) -> list[tuple[Span, ...]]:
    """The fragments of each of the `frames` of the file at `path`, open as `f` at the value of its Pixel Data.

    size: the file's, in bytes. extended: the extended offset table, if there is one. Raises UserError if fragments and
    frames do not agree, or the file ends before them.
    """
    (start, length), *fragments = list(_items(path, f, size)) or [(0, 0)]
    f.seek(start)
    table = _numbers(extended, "Q") if extended else _numbers(f.read(length), "L")
    by_table = table and fragments
    firsts = _firsts_by_table(table, fragments) if by_table else _firsts_by_count(f, fragments, frames)
    spans = [tuple(fragments[a:b]) for a, b in pairwise([*firsts, len(fragments)])]
    sound = len(spans) == frames and all(
        len(own) == 1 or (syntax != RLELossless and not any(_parted(f, *two) for two in pairwise(own)))
        for own in spans
    )
    if not sound:
        raise UserError(
            f"{path}: {len(fragments)} pieces of compressed pixels and {len(table)} offsets do not make {frames} frames; "
            "export the file again"
        )
    return spans


def _items(path: Path, f: BufferedReader, size: int) -> Iterator[Span]:
    while head := f.read(_TAG.size):
        at = f.tell()
        *tag, length = _TAG.unpack(head.ljust(_TAG.size, b"\0"))
        if tuple(tag) == _END:
            return
        if tuple(tag) != _ITEM or at + length > size:
            raise UserError(f"{path}: truncated or damaged pixel data; export the file again")
        yield at, length
        f.seek(at + length)


def _numbers(table: bytes, form: str) -> tuple[int, ...]:
    """Raises struct.error if the table is no whole number of offsets."""
    return struct.unpack(f"<{len(table) // struct.calcsize('<' + form)}{form}", table)


def _firsts_by_table(table: Sequence[int], fragments: Sequence[Span]) -> list[int]:
    """The indices of the fragments with which frames begin; none, if an offset leads to no fragment or to a former one."""
    places = {start - fragments[0][0]: i for i, (start, _) in enumerate(fragments)}
    firsts = [places.get(offset, -1) for offset in table]
    sound = firsts[0] == 0 and all(a < b for a, b in pairwise(firsts))
    return firsts if sound else []


def _firsts_by_count(f: BufferedReader, fragments: Sequence[Span], frames: int) -> list[int]:
    if len(fragments) == frames:
        return list(range(frames))
    # A fragment after the end of an image begins the next one.
    closing = [i for i, span in enumerate(fragments) if _ends(f, span)]
    return [0, *(i + 1 for i in closing[:-1])] if closing and closing[-1] == len(fragments) - 1 else []


def _parted(f: BufferedReader, former: Span, latter: Span) -> bool:
    """Whether one image ends, or another begins, between two fragments that follow each other."""
    if _ends(f, former):
        return True
    f.seek(latter[0])
    return begins(f.read(min(latter[1], _TAIL)))


def _ends(f: BufferedReader, span: Span) -> bool:
    """Whether an image ends with this fragment."""
    start, length = span
    f.seek(start + max(0, length - _TAIL))
    return ends(f.read(min(length, _TAIL)))
