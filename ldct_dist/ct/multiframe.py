"""Enhanced (multi-frame) CT taken apart: each of its frames as the single-frame CT image that it stands for, which is all
that the rest of this package needs to know."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pydicom
from pydicom import Dataset
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
)

from ldct_dist.ct.bounds import Bounded, refuse_other_length
from ldct_dist.ct.encapsulated import Span, spans_of_frames
from ldct_dist.ct.functional_groups import Elements, flatten
from ldct_dist.ct.values import number, text
from ldct_dist.errors import UserError

MULTI_FRAME = (EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
"""SOP classes"""

NOT_AS_SAID = "its pixel data is not what its transfer syntax says; export the file again"

_PIXEL_DATA = (0x7FE0, 0x0010)
_UNDEFINED = 0xFFFFFFFF


class Part(NamedTuple):
    """What a file of a concatenation says of its place in that. frames: the numbers of its frames in the whole, counted
    from 0. parts: how many files there are; None if it does not say."""

    uid: str
    frames: range
    parts: int | None


@dataclass(frozen=True)
class MultiFrame:
    """A multi-frame file but for its pixels.

    elements: of single-frame images, what its frames have. spans: of each frame, the pieces of the file that make up its
    pixels. part: of a file that is itself a part of a larger whole.
    """

    path: Path
    elements: Elements
    spans: tuple[tuple[Span, ...], ...]
    part: Part | None

    def frame(self, index: int) -> Dataset:
        """Frame `index`, counted from 0, with its pixels. It keeps the SOP class and UID of the whole, whose part it is.

        Raises what pydicom does on damaged bytes.
        """
        single = deepcopy(self.elements.shared)
        single.update(deepcopy(self.elements.own[index]))
        with self.path.open("rb") as f:
            pieces = []
            for start, length in self.spans[index]:
                f.seek(start)
                pieces.append(f.read(length))
        pixels = b"".join(pieces)
        if single.file_meta.TransferSyntaxUID.is_encapsulated:
            single.add_new("PixelData", "OB", encapsulate([pixels]))
        else:
            single.add_new("PixelData", "OW", pixels)
        return single


def read_multi_frame(path: Path) -> MultiFrame:
    """The file at `path`.

    Raises UserError where frames, functional groups and pixels do not match, or values are colours; on damaged bytes, what
    pydicom does.
    """
    with Bounded(path.open("rb", buffering=0)) as f:
        whole = pydicom.dcmread(f, stop_before_pixels=True, force=True)
        ensure_syntax(whole)
        if whole.file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian:
            raise UserError(f"{path}: a deflated multi-frame file; export it without compression")
        groups = _groups_of_frames(path, whole)
        spans = _spans(path, f, whole, len(groups))
    shared_groups = list(whole.get("SharedFunctionalGroupsSequence") or [Dataset()])
    if len(shared_groups) > 1:
        raise UserError(f"{path}: several sets of what all frames share; export the file again")
    elements = flatten(whole, shared_groups[0], groups)
    elements.shared.file_meta = whole.file_meta
    return MultiFrame(path, elements, tuple(spans), _part(whole, len(groups)))


def ensure_syntax(ds: FileDataset) -> None:
    """Give a file without preamble and meta header the transfer syntax that pydicom has found in it."""
    if "TransferSyntaxUID" not in ds.file_meta:
        implicit, little = ds.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def _groups_of_frames(path: Path, whole: Dataset) -> Sequence[Dataset]:
    if text(whole, "PixelPresentation") not in (None, "MONOCHROME"):
        raise UserError(f"{path}: some of its values are colours, not HU; export the scan's own images")
    groups: Sequence[Dataset] = whole.get("PerFrameFunctionalGroupsSequence") or ()
    if not groups or number(whole, "NumberOfFrames") != len(groups):
        raise UserError(
            f"{path}: NumberOfFrames {text(whole, 'NumberOfFrames')}, but functional groups of {len(groups)} frames; "
            "export the file again"
        )
    return groups


def _spans(path: Path, f: Bounded, whole: FileDataset, frames: int) -> list[tuple[Span, ...]]:
    """Of each frame, the parts of the file that make up its pixels, before which pydicom stopped reading `whole` from `f`."""
    implicit, little = whole.original_encoding
    element = struct.Struct(("<" if little else ">") + ("HHL" if implicit else "HH4xL"))
    head = f.read(element.size)
    if len(head) < element.size or (fields := element.unpack(head))[:2] != _PIXEL_DATA:
        raise UserError(f"{path}: no pixel data, or truncated; export the file again")
    length, syntax = fields[2], whole.file_meta.TransferSyntaxUID
    if (length == _UNDEFINED) != syntax.is_encapsulated:
        raise UserError(f"{path}: {NOT_AS_SAID}")
    start = f.tell()
    if length == _UNDEFINED:
        size = os.fstat(f.fileno()).st_size
        return spans_of_frames(path, f, size, frames, syntax, whole.get("ExtendedOffsetTable"))
    frame, row = _native_size(path, whole)
    refuse_other_length(path, length, frames * frame, row)
    return [((start + i * frame, frame),) for i in range(frames)]


def _native_size(path: Path, whole: Dataset) -> tuple[int, int]:
    """Bytes of a frame, and of a row of it."""
    keywords = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated")
    rows, columns, samples, bits = (int(number(whole, keyword) or 0) for keyword in keywords)
    row = columns * samples * bits // 8
    if not rows * row:
        raise UserError(f"{path}: no usable {', '.join(keywords)}; export the file again")
    return rows * row, row


def _part(whole: Dataset, frames: int) -> Part | None:
    if (uid := text(whole, "ConcatenationUID")) is None:
        return None
    first, parts = (
        number(whole, k) for k in ("ConcatenationFrameOffsetNumber", "InConcatenationTotalNumber")
    )
    begin = int(first or 0)
    return Part(uid, range(begin, begin + frames), None if parts is None else int(parts))
