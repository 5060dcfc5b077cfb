"""Finding the wanted elements of a DICOM file's header without parsing the others.

pydicom makes an object of each of the hundred or more elements of a CT slice. Ingest wants thirty of them, of perhaps a
million files, and stepping over the rest takes a twentieth of the time. Only entirely regular files are read like that:
with preamble and meta header, little endian, not deflated, with pixel data that begins within the first 32 KiB. All
others are left to pydicom, which knows how real files are broken, and so are those that turn out to be multi-frame.

Encoding: DICOM PS3.5, chapter 7 (elements), 7.5 (sequences); PS3.10, 7.1 (meta header).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, cast

from pydicom import Dataset, uid
from pydicom.charset import convert_encodings, default_encoding
from pydicom.dataelem import DataElement, RawDataElement, empty_value_for_VR
from pydicom.tag import BaseTag
from pydicom.valuerep import EXPLICIT_VR_LENGTH_16, EXPLICIT_VR_LENGTH_32

HEAD = 1 << 15  # bytes from a file's beginning

_PREAMBLE = 132
_EXPLICIT, _IMPLICIT, _LENGTH = struct.Struct("<HH2sH"), struct.Struct("<HHL"), struct.Struct("<L")
_SHORT, _LONG = frozenset(EXPLICIT_VR_LENGTH_16), frozenset(EXPLICIT_VR_LENGTH_32)
_UNDEFINED = 0xFFFFFFFF
NATIVE = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian)
_WALKED = {*NATIVE, *(syntax for syntax in uid.AllTransferSyntaxes if syntax.is_encapsulated)}
_META, _DELIMITERS = 0x0002, 0xFFFE  # groups
_STORAGE_CLASS, _SYNTAX = 0x00020002, 0x00020010
_CHARACTER_SET, _SIGN, _PIXELS = 0x00080005, 0x00280103, 0x7FE00010
_ITEM, _END_OF_ITEM, _END_OF_SEQUENCE = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD

_LAYOUTS = 8  # that are remembered

_Element = tuple[int, str | None, int, int]
"""tag, VR (None where it is implicit), where its value begins, and the value's length in bytes"""


class Raw(NamedTuple):
    """An element's bytes. vr: None where it is implicit."""

    vr: str | None
    value: bytes | None
    little_endian: bool = True

    def converted(self, tag: int, encodings: tuple[str, ...] = (), sign: Raw | None = None) -> DataElement:
        """pydicom's element for these bytes. sign: PixelRepresentation, on which the VR of padding depends.

        Raises and warns as pydicom does.
        """
        ds = Dataset({BaseTag(tag): self._of_pydicom(tag)})
        if sign:
            ds[_SIGN] = sign._of_pydicom(_SIGN)
        ds.set_original_encoding(self.vr is None, self.little_endian, list(encodings) or default_encoding)
        return ds[tag]

    def _of_pydicom(self, tag: int) -> RawDataElement:
        length = len(self.value or b"")
        return RawDataElement(
            BaseTag(tag), self.vr, length, self.value, 0, self.vr is None, self.little_endian
        )


@dataclass(frozen=True)
class Head:
    """The beginning of a file, up to its pixels. encodings: of its text, by Python's names. pixels: offset in the file and
    length in bytes of native ones; None for others."""

    elements: dict[int, Raw]
    encodings: tuple[str, ...]
    syntax: str
    storage_class: str | None
    pixels: tuple[int, int] | None


class _Irregular(Exception):
    """The file is not regular, so it is left to pydicom."""


def read_head(head: bytes, wanted: Set[int]) -> Head | None:
    """The elements `wanted`, by tag, of the file that begins with `head`; None if it is irregular."""
    try:
        return _head(head, wanted)
    except (_Irregular, struct.error):
        return None


def _head(head: bytes, wanted: Set[int]) -> Head:
    meta, at = _meta(head)
    syntax = meta.get(_SYNTAX, b"").rstrip(b"\0 ").decode("ascii", "replace")
    if syntax not in _WALKED:
        raise _Irregular
    implicit = syntax == uid.ImplicitVRLittleEndian
    if implicit == bool(re.match(rb"[A-Z]{2}", head[at + 4 : at + 6])):
        raise _Irregular  # the meta header is wrong about it
    *others, (_, _, start, length) = _wanted_elements(head, at, not implicit, wanted)
    found = {tag: _raw(head, vr, at + start, length) for tag, vr, start, length in others}
    native = syntax in NATIVE and length != _UNDEFINED
    storage_class = meta.get(_STORAGE_CLASS, b"").rstrip(b"\0 ").decode("ascii", "replace")
    return Head(
        found,
        _encodings(found.get(_CHARACTER_SET)),
        syntax,
        storage_class,
        (at + start, length) if native else None,
    )


def _meta(head: bytes) -> tuple[dict[int, bytes], int]:
    """(the values of the meta header by tag, the offset at which the data set begins)."""
    if head[_PREAMBLE - 4 : _PREAMBLE] != b"DICM":
        raise _Irregular
    values: dict[int, bytes] = {}
    at = _PREAMBLE
    for tag, _, start, length in _elements(head, at, True, [], group=_META):
        at = start + length
        values[tag] = head[start:at]
    return values, at


class _Layout(NamedTuple):
    """The outcome of a walk through a header, and the bytes that it looked at, which are all that it depends on.

    Most slices of a series share one, or a few that differ in the lengths of their UIDs.
    """

    explicit: bool
    wanted: Set[int]
    form: struct.Struct
    looked_at: tuple[bytes, ...]
    elements: tuple[_Element, ...]

    def is_of(self, head: bytes, at: int) -> bool:
        return len(head) >= at + self.form.size and self.form.unpack_from(head, at) == self.looked_at


_recent: tuple[_Layout, ...] = ()


def _wanted_elements(head: bytes, at: int, explicit: bool, wanted: Set[int]) -> tuple[_Element, ...]:
    """The elements `wanted` of the data set at `at`, with offsets relative to that; the last one is the pixels."""
    global _recent  # replaced as a whole, so threads may share it
    for layout in _recent:
        if layout.explicit == explicit and layout.wanted is wanted and layout.is_of(head, at):
            return layout.elements
    layout = _walk(head, at, explicit, wanted)
    _recent = (layout, *_recent[: _LAYOUTS - 1])
    return layout.elements


def _walk(head: bytes, begin: int, explicit: bool, wanted: Set[int]) -> _Layout:
    seen: list[tuple[int, int]] = []
    elements: list[_Element] = []
    for tag, vr, start, length in _elements(head, begin, explicit, seen):
        if tag in wanted or tag in (_CHARACTER_SET, _PIXELS):
            elements.append((tag, vr, start - begin, length))
        if tag >= _PIXELS:
            break
    if tag != _PIXELS:
        raise _Irregular
    end, parts = begin, []
    for start, stop in seen:
        parts.append(f"{start - end}x{stop - start}s")
        end = stop
    form = struct.Struct("".join(parts))
    return _Layout(explicit, wanted, form, form.unpack_from(head, begin), tuple(elements))


def _elements(
    head: bytes,
    at: int,
    explicit: bool,
    seen: list[tuple[int, int]],
    group: int | None = None,
) -> Iterator[_Element]:
    """The elements from `at` on; if `group` is given, up to the first of another group.

    seen: the ranges of bytes that were looked at are appended to it.
    """
    while True:
        of, number, name, length = _EXPLICIT.unpack_from(head, at)
        if group not in (None, of):
            return
        vr, start = name.decode("latin-1"), at + 8
        if not explicit or of == _DELIMITERS:
            vr, (length,) = None, _LENGTH.unpack_from(head, at + 4)
        elif vr in _LONG:
            (length,) = _LENGTH.unpack_from(head, start)
            start += 4
        elif vr not in _SHORT:
            raise _Irregular
        seen.append((at, start))
        tag = of << 16 | number
        yield tag, vr, start, length
        at = start + length if length != _UNDEFINED else _end_of_sequence(head, start, explicit, seen)


def _end_of_sequence(head: bytes, at: int, explicit: bool, seen: list[tuple[int, int]]) -> int:
    while True:
        group, number, length = _IMPLICIT.unpack_from(head, at)
        tag = group << 16 | number
        seen.append((at, at + 8))
        at += 8
        if tag == _END_OF_SEQUENCE:
            return at
        if tag != _ITEM:
            raise _Irregular
        if length == _UNDEFINED:
            inner = _elements(head, at, explicit, seen)
            at = next(start for tag, _, start, _ in inner if tag == _END_OF_ITEM)
        else:
            at += length


def _raw(head: bytes, vr: str | None, start: int, length: int) -> Raw:
    if length == _UNDEFINED or start + length > len(head):
        raise _Irregular
    return Raw(
        vr, head[start : start + length] if length else cast(bytes | None, empty_value_for_VR(vr, raw=True))
    )


@lru_cache(16)
def _encodings(character_set: Raw | None) -> tuple[str, ...]:
    if character_set is None:
        return ()
    return tuple(convert_encodings(character_set.converted(_CHARACTER_SET).value))
