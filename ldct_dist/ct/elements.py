"""The wanted elements of a DICOM file's header, found without a look at the others.

pydicom makes an object of each of the hundred or more elements of a CT slice; ingest wants thirty of them, of a
million files. Walking over the rest takes a twentieth of the time. Only what is wholly regular is walked: a file with
preamble and meta header, little endian, not deflated, whose pixel data comes within the first 32 KiB. Whatever
else is left to pydicom, which knows how real files are broken, so there is one reading of each file, not two.

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
_SHORT = frozenset(vr.encode() for vr in EXPLICIT_VR_LENGTH_16)
_LONG = frozenset(vr.encode() for vr in EXPLICIT_VR_LENGTH_32)
_UNDEFINED = 0xFFFFFFFF
_NATIVE = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian)
_WALKED = {*_NATIVE, *(syntax for syntax in uid.AllTransferSyntaxes if syntax.is_encapsulated)}
_META, _DELIMITERS = 0x0002, 0xFFFE  # groups
_STORAGE_CLASS, _SYNTAX = 0x00020002, 0x00020010
_CHARACTER_SET, _SIGN, _PIXELS = 0x00080005, 0x00280103, 0x7FE00010
_ITEM, _END_OF_ITEM, _END_OF_SEQUENCE = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD

_Element = tuple[int, bytes | None, int, int]
"""tag, VR (None where it is implicit), where in the file its value begins, and the value's length in bytes"""


class Raw(NamedTuple):
    """An element as its bytes. vr: None where it is implicit."""

    vr: str | None
    value: bytes | None
    little_endian: bool = True

    def converted(self, tag: int, encodings: tuple[str, ...] = (), sign: Raw | None = None) -> DataElement:
        """What pydicom makes of it; `sign`: PixelRepresentation, on which the VR of padding depends.

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
    """What stands before a file's pixels. encodings: Python's names of those of its text. pixels: where in the file
    native ones begin, and their length in bytes."""

    elements: dict[int, Raw]
    encodings: tuple[str, ...]
    syntax: str
    storage_class: str | None
    pixels: tuple[int, int] | None


class _Irregular(Exception):
    """Something that pydicom had better look at."""


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
    found: dict[int, Raw] = {}
    for tag, vr, start, length in _elements(head, at, not implicit):
        if tag >= _PIXELS:
            break
        if tag in wanted or tag == _CHARACTER_SET:
            found[tag] = _raw(head, vr, start, length)
    if tag != _PIXELS:
        raise _Irregular
    native = syntax in _NATIVE and length != _UNDEFINED
    storage_class = meta.get(_STORAGE_CLASS, b"").rstrip(b"\0 ").decode("ascii", "replace")
    return Head(
        found,
        _encodings(found.get(_CHARACTER_SET)),
        syntax,
        storage_class,
        (start, length) if native else None,
    )


def _meta(head: bytes) -> tuple[dict[int, bytes], int]:
    """The values of the meta header by tag, and where the data set begins."""
    if head[_PREAMBLE - 4 : _PREAMBLE] != b"DICM":
        raise _Irregular
    values: dict[int, bytes] = {}
    at = _PREAMBLE
    for tag, _, start, length in _elements(head, at, explicit=True, group=_META):
        at = start + length
        values[tag] = head[start:at]
    return values, at


def _elements(head: bytes, at: int, explicit: bool, group: int | None = None) -> Iterator[_Element]:
    """The elements from `at` on; only those of `group`, if it is given, up to the first of another."""
    while True:
        of, number, vr, length = _EXPLICIT.unpack_from(head, at)
        if group not in (None, of):
            return
        start = at + 8
        if not explicit or of == _DELIMITERS:
            vr, (length,) = None, _LENGTH.unpack_from(head, at + 4)
        elif vr in _LONG:
            (length,) = _LENGTH.unpack_from(head, start)
            start += 4
        elif vr not in _SHORT:
            raise _Irregular
        tag = of << 16 | number
        yield tag, vr, start, length
        at = start + length if length != _UNDEFINED else _end_of_sequence(head, start, explicit)


def _end_of_sequence(head: bytes, at: int, explicit: bool) -> int:
    while True:
        group, number, length = _IMPLICIT.unpack_from(head, at)
        tag = group << 16 | number
        at += 8
        if tag == _END_OF_SEQUENCE:
            return at
        if tag != _ITEM:
            raise _Irregular
        if length == _UNDEFINED:
            at = next(start for tag, _, start, _ in _elements(head, at, explicit) if tag == _END_OF_ITEM)
        else:
            at += length


def _raw(head: bytes, vr: bytes | None, start: int, length: int) -> Raw:
    if length == _UNDEFINED or start + length > len(head):
        raise _Irregular
    name = vr.decode() if vr else None
    return Raw(
        name,
        head[start : start + length] if length else cast(bytes | None, empty_value_for_VR(name, raw=True)),
    )


@lru_cache(16)
def _encodings(character_set: Raw | None) -> tuple[str, ...]:
    if character_set is None:
        return ()
    return tuple(convert_encodings(character_set.converted(_CHARACTER_SET).value))
