"""One DICOM file's header as typed facts, whatever state the file is in.

pydicom converts element values when they are first touched, and a damaged header then raises (or warns
about) nearly anything. So every element this package relies on is touched here, once, and turned into a
plain number or string, or into None where it is absent or unusable. Nothing lazy leaves this module.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.uid import MediaStorageDirectoryStorage

from ldct_dist.errors import UserError


@dataclass(frozen=True)
class Header:
    """What one slice says of itself. None: absent, unreadable or not finite. Lengths in mm."""

    path: Path
    series_uid: str
    sop_class: str | None
    study_uid: str | None
    patient_id: str | None
    frame_of_reference: str | None
    modality: str | None
    image_type: str | None
    description: str | None
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


_KEYWORDS = [
    *("SpecificCharacterSet", "SOPClassUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID"),
    *("FrameOfReferenceUID", "Modality", "ImageType", "SeriesDescription", "Manufacturer"),
    *("ManufacturerModelName", "ConvolutionKernel", "KVP", "Exposure", "XRayTubeCurrent", "ExposureTime"),
    "DistanceSourceToPatient",
    *("SliceThickness", "GantryDetectorTilt", "NumberOfFrames", "Rows", "Columns", "PixelSpacing"),
    *("ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept", "RescaleType"),
]

_SUFFIXES = (".dcm", ".dicom", ".ima")


def read_header(path: Path) -> Header | None:
    """The header of the DICOM file at `path`; None for anything else, a DICOMDIR included.

    Raises UserError when the file calls itself DICOM, by its name or its first bytes, and cannot be read
    or belongs to no series: passing over it could quietly shorten a series by its last slice.
    """
    with pydicom_faults_as_user_errors(path):
        if not _looks_like_dicom(path):
            if path.suffix.lower() in _SUFFIXES:
                raise UserError(f"{path}: named as DICOM but is not; copy it again or remove it")
            return None
        ds = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=list(_KEYWORDS))
        if ds.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
            return None
    return _header(path, ds)


def read_headers(paths: Iterable[Path]) -> list[Header | UserError | None]:
    """`read_header` of each path; the UserError it raised where it did."""
    outcomes: list[Header | UserError | None] = []
    for path in paths:
        try:
            outcomes.append(read_header(path))
        except UserError as e:
            outcomes.append(e)
    return outcomes


@contextmanager
def pydicom_faults_as_user_errors(path: Path) -> Iterator[None]:
    """Keep pydicom's warnings about the file at `path` quiet and raise its exceptions as one UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (UserError, MemoryError):
        raise
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e}); make it readable or remove it") from e
    except Exception as e:  # damaged bytes raise whatever the parser or codec trips over
        # pydicom sometimes appends a traceback to its message.
        reason = (str(e) or type(e).__name__).partition("Traceback")[0].strip()
        raise UserError(f"{path}: not readable as DICOM ({reason}); export it again or remove it") from e


def text(ds: Dataset, keyword: str) -> str | None:
    """The element's value as printable text, multiple values joined by backslashes as DICOM writes them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = ds.get(keyword)
            if isinstance(value, MultiValue):
                value = "\\".join(map(str, value))
    except Exception:  # noqa: BLE001 - a value that pydicom cannot convert is as good as absent
        return None
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if value is None or isinstance(value, Sequence):
        return None
    return "".join(filter(str.isprintable, str(value))).strip() or None


def numbers(ds: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    """The element's `count` finite numbers; None if it holds anything else."""
    parts = (text(ds, keyword) or "").split("\\")
    try:
        values = tuple(float(part) for part in parts)
    except ValueError:
        return None
    return values if len(values) == count and all(map(math.isfinite, values)) else None


def number(ds: Dataset, keyword: str) -> float | None:
    """The element's one finite number; None if it holds anything else."""
    values = numbers(ds, keyword, 1)
    return values[0] if values else None


def _looks_like_dicom(path: Path) -> bool:
    with path.open("rb") as f:
        head = f.read(132)
    # Old exports lack the 128-byte preamble and begin with group 2 or 8, little endian.
    return head[128:] == b"DICM" or (head[:2] in (b"\x02\x00", b"\x08\x00") and head[3:4] == b"\x00")


def _header(path: Path, ds: Dataset) -> Header:
    series_uid = text(ds, "SeriesInstanceUID")
    if series_uid is None:
        raise UserError(
            f"{path}: no SeriesInstanceUID, so its series is unknown; export it again or remove it"
        )
    return Header(
        path=path,
        series_uid=series_uid,
        sop_class=text(ds, "SOPClassUID"),
        study_uid=text(ds, "StudyInstanceUID"),
        patient_id=text(ds, "PatientID"),
        frame_of_reference=text(ds, "FrameOfReferenceUID"),
        modality=text(ds, "Modality"),
        image_type=text(ds, "ImageType"),
        description=text(ds, "SeriesDescription"),
        manufacturer=text(ds, "Manufacturer"),
        model=text(ds, "ManufacturerModelName"),
        kernel=text(ds, "ConvolutionKernel"),
        kvp=number(ds, "KVP"),
        exposure_mas=_exposure_mas(ds),
        source_mm=_source_mm(ds),
        thickness=number(ds, "SliceThickness"),
        tilt=number(ds, "GantryDetectorTilt"),
        frames=number(ds, "NumberOfFrames"),
        matrix=_matrix(ds),
        pixel_spacing=numbers(ds, "PixelSpacing", 2),
        orientation=numbers(ds, "ImageOrientationPatient", 6),
        position=numbers(ds, "ImagePositionPatient", 3),
        slope=number(ds, "RescaleSlope"),
        intercept=number(ds, "RescaleIntercept"),
        rescale_type=text(ds, "RescaleType"),
    )


def _source_mm(ds: Dataset) -> float | None:
    """Source to isocentre; None where the tag holds what no scanner has, such as 0."""
    distance = number(ds, "DistanceSourceToPatient")
    return distance if distance is not None and 300 <= distance <= 1200 else None


def _matrix(ds: Dataset) -> tuple[int, int] | None:
    rows, columns = number(ds, "Rows") or 0, number(ds, "Columns") or 0
    sizes = range(1, 1 << 16)
    return (int(rows), int(columns)) if rows in sizes and columns in sizes else None


def _exposure_mas(ds: Dataset) -> float | None:
    """Exposure in mAs, or tube current (mA) times exposure time (ms) where only those are told."""
    exposure = number(ds, "Exposure")
    current, time = number(ds, "XRayTubeCurrent"), number(ds, "ExposureTime")
    if exposure is None and current is not None and time is not None:
        exposure = current * time / 1000
    return exposure
