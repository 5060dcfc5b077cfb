"""A DICOM file's header as typed facts, even where the file is damaged.

pydicom converts an element's value when it is first accessed, and for a damaged header that may raise, or warn of, nearly
anything. So every element that this package relies on to tell series and slices is accessed here, once, and turned into
a plain number or string, or into None where it is missing or unusable. Nothing that is converted later leaves this module.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pydicom
from pydicom import Dataset
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.uid import MediaStorageDirectoryStorage

from ldct_dist.ct.bounds import Bounded
from ldct_dist.ct.elements import HEAD, NATIVE, Head, Raw, read_head
from ldct_dist.ct.functional_groups import EXACT
from ldct_dist.ct.multiframe import MULTI_FRAME, Part, read_multi_frame
from ldct_dist.ct.stored import PixelForm, Stored
from ldct_dist.ct.values import as_number, as_numbers, as_text, pydicom_faults_as_user_errors, text
from ldct_dist.errors import UserError


class UnknownSeries(UserError):
    """A file or folder that cannot be read: it may hold a slice that any series beside it now lacks."""


@dataclass(frozen=True)
class Header:
    """What one slice says of itself. None: absent, unreadable or not finite. Lengths in mm.

    stack, part: of a frame of a multi-frame file, which stack of frames it is in, and which part of a larger whole its file.
    """

    stored: Stored
    series_uid: str
    instance_uid: str | None
    sop_class: str | None
    study_uid: str | None
    patient_id: str | None
    frame_of_reference: str | None
    modality: str | None
    image_type: str | None
    description: str | None
    derivation: str | None
    manufacturer: str | None
    model: str | None
    kernel: str | None
    kvp: float | None
    exposure_mas: float | None
    source_mm: float | None
    thickness: float | None
    tilt: float | None
    frames: float | None
    matrix: tuple[int, int] | None
    pixel_spacing: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    position: tuple[float, ...] | None
    slope: float | None
    intercept: float | None
    rescale_type: str | None
    stack: str | None
    part: Part | None

    @property
    def path(self) -> Path:
        return self.stored.path

    @property
    def name(self) -> str:
        """How errors call it, beside the name of its series."""
        return self.stored.called(self.path.name)


_KEYWORDS = [
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID"),
    *("FrameOfReferenceUID", "Modality", "ImageType", "SeriesDescription", "Manufacturer"),
    "DerivationDescription",
    *("ManufacturerModelName", "ConvolutionKernel", "KVP", "Exposure", "XRayTubeCurrent", "ExposureTime"),
    "DistanceSourceToPatient",
    *("SliceThickness", "GantryDetectorTilt", "NumberOfFrames", "Rows", "Columns", "PixelSpacing"),
    *("ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept", "RescaleType"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"),
    *("PhotometricInterpretation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
]
_TAGS = {keyword: int(tag_for_keyword(keyword) or 0) for keyword in _KEYWORDS}
_WANTED = frozenset(_TAGS.values())
_NO_TEXTS: dict[str, str | None] = dict.fromkeys(_KEYWORDS)
_PLAIN = {
    "DS": re.compile(rb"[-+0-9.eE \\]*"),
    "IS": re.compile(rb" *[-+]?[0-9]+ *"),
    "UI": re.compile(rb"[0-9.]*\0?"),
}
"""by VR, values whose text is the same as what pydicom's conversion, which takes long, would give"""
_LONGEST = 1024  # bytes up to which a converted value is cached for the next slice

SUFFIXES = (".dcm", ".dicom", ".ima")
_PACKED = (".gz", ".bz2", ".xz", ".zst")
_APPLE_DOUBLE = b"\0\5\x16\7"
"""the first bytes of the ._NAME that macOS writes beside each NAME on foreign file systems"""


def read_header(path: Path) -> list[Header]:
    """The headers of the slices in the DICOM file at `path`: one, or one for each frame of an enhanced CT; none for
    anything else, a DICOMDIR included.

    Raises UserError when the file calls itself DICOM, by its name or its first bytes, and cannot be read, is
    compressed or belongs to no series: passing over it could quietly shorten a series by its last slice.
    """
    with pydicom_faults_as_user_errors(path):
        with path.open("rb", buffering=0) as f:
            start = f.read(HEAD)
            state = os.fstat(f.fileno())
        if not _looks_like_dicom(start):
            if start.startswith(_APPLE_DOUBLE):
                return []
            if path.suffix.lower() in SUFFIXES:
                raise UserError(f"{path}: named as DICOM but is not; copy it again or remove it")
            if path.suffix.lower() in _PACKED and Path(path.stem).suffix.lower() in SUFFIXES:
                raise UserError(f"{path}: compressed; unpack it, or remove it")
            return []
        head = read_head(start, _WANTED) or _head_by_pydicom(path)
        if head.storage_class == MediaStorageDirectoryStorage:
            return []
        texts = _texts(head)
        if texts["SOPClassUID"] in MULTI_FRAME:
            return _headers_of_frames(path, state, head.syntax)
        return [_header(path, state, texts, head.syntax, head.pixels)]


def read_headers(paths: Iterable[Path]) -> list[Header | UserError]:
    """The outcome of `read_header` for each path; an UnknownSeries where it raised UserError."""
    outcomes: list[Header | UserError] = []
    for path in paths:
        try:
            outcomes += read_header(path)
        except UserError as e:
            outcomes.append(UnknownSeries(*e.args))
    return outcomes


def is_dicom(path: Path) -> bool:
    """Whether the file begins as DICOM does. Raises OSError."""
    with path.open("rb") as f:
        return _looks_like_dicom(f.read(HEAD))


def _looks_like_dicom(start: bytes) -> bool:
    # Old exports lack the 128-byte preamble and begin with group 2 or 8, little endian.
    return start[128:132] == b"DICM" or (start[:2] in (b"\x02\x00", b"\x08\x00") and start[3:4] == b"\x00")


def _head_by_pydicom(path: Path) -> Head:
    with Bounded(path.open("rb", buffering=0)) as f:
        ds = pydicom.dcmread(f, stop_before_pixels=True, force=True, specific_tags=list(_KEYWORDS))
    elements = {
        int(e.tag): Raw(e.VR, e.value, e.is_little_endian)
        for e in ds.elements()
        if isinstance(e, RawDataElement)  # all others are sequences
    }
    names = ds.original_character_set
    encodings = (names,) if isinstance(names, str) else tuple(names)
    syntax, storage_class = (
        text(ds.file_meta, f"{k}UID") for k in ("TransferSyntax", "MediaStorageSOPClass")
    )
    return Head(elements, encodings, syntax or "", storage_class, None)


def _texts(head: Head) -> dict[str, str | None]:
    """The text of each of _KEYWORDS."""
    texts: dict[str, str | None] = {}
    for keyword, tag in _TAGS.items():
        raw = head.elements.get(tag)
        if raw is None:
            texts[keyword] = None
        else:
            sign = head.elements.get(_TAGS["PixelRepresentation"]) if "Padding" in keyword else None
            convert = _text if len(raw.value or b"") > _LONGEST else _kept_text
            texts[keyword] = convert(tag, raw, head.encodings, sign)
    return texts


def _text(tag: int, raw: Raw, encodings: tuple[str, ...], sign: Raw | None) -> str | None:
    if raw.value and (pattern := _PLAIN.get(raw.vr or dictionary_VR(tag))) and pattern.fullmatch(raw.value):
        return raw.value.decode().rstrip("\0") or None
    return as_text(lambda: raw.converted(tag, encodings, sign).value)


_kept_text = lru_cache(1 << 13)(_text)
"""Most values are the same in all slices of a series, and pydicom's conversion takes long."""


def _headers_of_frames(path: Path, state: os.stat_result, syntax: str) -> list[Header]:
    whole = read_multi_frame(path)
    shared = _texts_of(whole.elements.shared)
    headers = []
    for i, (own, stack) in enumerate(zip(whole.elements.own, whole.elements.stacks, strict=True)):
        pixels = whole.spans[i][0] if syntax in NATIVE else None
        texts = _NO_TEXTS | shared | _texts_of(own)
        headers.append(_header(path, state, texts, syntax, pixels, i, stack, whole.part))
    return headers


def _texts_of(ds: Dataset) -> dict[str, str | None]:
    """The texts of those of _KEYWORDS that `ds` has."""
    texts = {keyword: text(ds, keyword) for keyword, tag in _TAGS.items() if tag in ds}
    return texts | {whole: text(ds, exact) for exact, whole in EXACT.items() if exact in ds}


def _header(
    path: Path,
    state: os.stat_result,
    texts: dict[str, str | None],
    syntax: str,
    pixels: tuple[int, int] | None,
    frame: int | None = None,
    stack: str | None = None,
    part: Part | None = None,
) -> Header:
    def number(keyword: str) -> float | None:
        return as_number(texts[keyword])

    series_uid = texts["SeriesInstanceUID"]
    if series_uid is None:
        raise UserError(
            f"{path}: no SeriesInstanceUID, so its series is unknown; export it again or remove it"
        )
    matrix = _matrix(number("Rows") or 0.0, number("Columns") or 0.0)
    form = _form(
        *(syntax, matrix, texts["BitsAllocated"], texts["BitsStored"], texts["HighBit"]),
        *(texts["PixelRepresentation"], texts["SamplesPerPixel"], texts["PhotometricInterpretation"]),
        *(texts["PixelPaddingValue"], texts["PixelPaddingRangeLimit"]),
        *(number("RescaleSlope"), number("RescaleIntercept")),
    )
    return Header(
        stored=Stored(path, state.st_size, state.st_mtime_ns, pixels, form, frame),
        series_uid=series_uid,
        instance_uid=texts["SOPInstanceUID"],
        sop_class=texts["SOPClassUID"],
        study_uid=texts["StudyInstanceUID"],
        patient_id=texts["PatientID"],
        frame_of_reference=texts["FrameOfReferenceUID"],
        modality=texts["Modality"],
        image_type=texts["ImageType"],
        description=texts["SeriesDescription"],
        derivation=texts["DerivationDescription"],
        manufacturer=texts["Manufacturer"],
        model=texts["ManufacturerModelName"],
        kernel=texts["ConvolutionKernel"],
        kvp=number("KVP"),
        exposure_mas=_exposure_mas(number("Exposure"), number("XRayTubeCurrent"), number("ExposureTime")),
        source_mm=_source_mm(number("DistanceSourceToPatient")),
        thickness=number("SliceThickness"),
        tilt=number("GantryDetectorTilt"),
        frames=number("NumberOfFrames"),
        matrix=matrix,
        pixel_spacing=as_numbers(texts["PixelSpacing"], 2),
        orientation=as_numbers(texts["ImageOrientationPatient"], 6),
        position=as_numbers(texts["ImagePositionPatient"], 3),
        slope=form.slope,
        intercept=form.intercept,
        rescale_type=texts["RescaleType"],
        stack=stack,
        part=part,
    )


@lru_cache(64)
def _form(*facts: Any) -> PixelForm:
    """The same object for all slices with these facts, which keeps headers small on their way between processes."""
    return PixelForm(*facts)


def _source_mm(distance: float | None) -> float | None:
    """Source to isocentre; None for distances that no scanner has, such as 0."""
    return distance if distance is not None and 300 <= distance <= 1200 else None


def _matrix(rows: float, columns: float) -> tuple[int, int] | None:
    sound = all(size.is_integer() and 0 < size < 1 << 16 for size in (rows, columns))
    return (int(rows), int(columns)) if sound else None


def _exposure_mas(exposure: float | None, current: float | None, time: float | None) -> float | None:
    """Exposure in mAs; where it is not given, tube current (mA) times exposure time (ms)."""
    if exposure is None and current is not None and time is not None:
        exposure = current * time / 1000
    return exposure
