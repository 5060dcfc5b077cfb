"""CT series made up from arrays, with every variation that scanners and exports come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLossless,
    JPEGLosslessSV1,
    generate_uid,
)

from ldct_dist.ct.dicom import Series, find_series


@dataclass(frozen=True)
class Options:
    """How `write_series` stores a volume; lengths in mm.

    slopes and intercepts: one for all slices or one a slice. padding: (mask (z, y, x), stored value,
    whether PixelPaddingValue says so). tags: set on every slice after all else; a value of None removes
    the element, a callable is given the slice index. seed: another one gives other UIDs.
    """

    signed: bool = True
    bits_stored: int = 16
    slopes: float | tuple[float, ...] = 1.0
    intercepts: float | tuple[float, ...] = -1024.0
    syntax: str = ExplicitVRLittleEndian
    padding: tuple[np.ndarray, int, bool] | None = None
    spacing: tuple[float, float, float] = (2.5, 0.7, 0.7)
    origin: tuple[float, float, float] = (-100.0, -120.0, 40.0)
    orientation: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    patient: str = "Doe^Jane"
    kernel: str = "STANDARD"
    description: str = "AXIAL 2.5"
    seed: str = "series"
    tags: dict[str, Any] = field(default_factory=dict)


def write_series(
    folder: Path, hu: np.ndarray, options: Options | None = None, names: Sequence[str] | None = None
) -> list[Path]:
    """Write `hu` (z, y, x), slice 0 at options.origin and each next one along +z, and return the files.

    The stored values are round((hu - intercept) / slope): choose HU that this represents, and it is exact.
    names: a file name a slice, below `folder`.
    """
    options = options or Options()
    paths = []
    for i in range(len(hu)):
        path = folder / (names[i] if names else f"slice-{i:03d}.dcm")
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(_slice(hu[i], i, options), path, options.syntax)
        paths.append(path)
    return paths


def _of(value: float | tuple[float, ...], i: int) -> float:
    return value[i] if isinstance(value, tuple) else value


def _slice(hu: np.ndarray, i: int, o: Options) -> Dataset:
    ds = Dataset()
    ds.SOPClassUID = CTImageStorage
    ds.SOPInstanceUID = generate_uid(entropy_srcs=[o.seed, o.patient, str(i)])
    ds.StudyInstanceUID = generate_uid(entropy_srcs=["study", o.patient])
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=[o.seed, o.patient])
    ds.FrameOfReferenceUID = generate_uid(entropy_srcs=["frame", o.patient])
    ds.PatientName = ds.PatientID = o.patient
    ds.PatientBirthDate, ds.PatientSex, ds.StudyDate, ds.StudyTime = "19600101", "O", "20200102", "101500"
    ds.SeriesDate, ds.ContentDate, ds.ContentTime = "20200102", "20200102", "101700"
    ds.AccessionNumber, ds.ReferringPhysicianName, ds.StudyID = "A1", "Smith^John", "1"
    ds.Modality, ds.Manufacturer, ds.ManufacturerModelName = "CT", "ACME", "Ring 16"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SeriesDescription, ds.SeriesNumber, ds.InstanceNumber = o.description, 3, i + 1
    ds.AcquisitionNumber, ds.PositionReferenceIndicator, ds.PatientPosition = 1, "SN", "HFS"
    ds.KVP, ds.Exposure, ds.ConvolutionKernel, ds.SliceThickness = 120, 80 + i, o.kernel, o.spacing[0]
    ds.GantryDetectorTilt, ds.RescaleType = 0, "HU"
    ds.ImageOrientationPatient = list(o.orientation)
    ds.ImagePositionPatient = [*o.origin[:2], o.origin[2] + i * o.spacing[0]]
    ds.PixelSpacing = list(o.spacing[1:])
    ds.RescaleSlope, ds.RescaleIntercept = _of(o.slopes, i), _of(o.intercepts, i)
    ds.Rows, ds.Columns = hu.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, o.bits_stored, o.bits_stored - 1
    ds.PixelRepresentation = int(o.signed)
    stored = np.rint((hu.astype(float) - _of(o.intercepts, i)) / _of(o.slopes, i)).astype(np.int64)
    if o.padding:
        mask, value, tagged = o.padding
        stored[mask[i]] = value
        if tagged:
            ds.add_new("PixelPaddingValue", "SS" if o.signed else "US", value)
    ds.add_new("SmallestImagePixelValue", "SS" if o.signed else "US", int(stored.min()))
    ds.add_new("LargestImagePixelValue", "SS" if o.signed else "US", int(stored.max()))
    order = ">" if o.syntax == ExplicitVRBigEndian else "<"
    pixels = stored.astype(order + ("i2" if o.signed else "u2"))
    assert (pixels == stored).all(), "these HU do not fit the stored type"
    ds.add_new("PixelData", "OW", pixels.tobytes())
    for keyword, value in o.tags.items():
        value = value(i) if callable(value) else value
        if value is not None:
            setattr(ds, keyword, value)
        elif keyword in ds:
            delattr(ds, keyword)
    return ds


def _save(ds: Dataset, path: Path, syntax: str) -> None:
    ds.file_meta = FileMetaDataset()
    native = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)
    ds.file_meta.TransferSyntaxUID = (
        syntax if syntax in native or _deflated(syntax) else ExplicitVRLittleEndian
    )
    if syntax in (JPEGLossless, JPEGLosslessSV1):
        ds.save_as(path, enforce_file_format=True)
        _compress_by_gdcm(path, syntax)
    elif syntax == ds.file_meta.TransferSyntaxUID:
        ds.save_as(path, enforce_file_format=True)
    else:
        ds.compress(syntax, generate_instance_uid=False)
        ds.save_as(path, enforce_file_format=True)


def _deflated(syntax: str) -> bool:
    return syntax == "1.2.840.10008.1.2.1.99"


def _compress_by_gdcm(path: Path, syntax: str) -> None:
    """pydicom has no JPEG lossless encoder."""
    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    kinds = {
        JPEGLossless: gdcm.TransferSyntax.JPEGLosslessProcess14,
        JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    }
    change.SetTransferSyntax(gdcm.TransferSyntax(kinds[syntax]))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    assert writer.Write()
    assert dcmread(path).file_meta.TransferSyntaxUID == syntax


def phantom(shape: tuple[int, int, int] = (5, 40, 48), seed: int = 0) -> np.ndarray:
    """int16 HU (z, y, x): noise about water in air, no two slices alike, -1024 to about 300 HU.

    At least 32 pixels a side: OpenJPEG encodes nothing smaller.
    """
    hu = np.random.default_rng(seed).normal(20, 60, shape)
    hu[:, :3], hu[:, -3:] = -1000, -1024
    return np.rint(hu).astype(np.int16)


def write_phantoms(folder: Path, names: str) -> Path:
    """A folder a series, each another one, named by the letters of `names`."""
    for name in names:
        write_series(folder / name, phantom(), Options(seed=name))
    return folder


def only(folder: Path) -> Series:
    """The one series below `folder`, where nothing is refused."""
    (series,), refused = find_series(folder)
    assert refused == []
    return series


def refusal(folder: Path) -> str:
    """The one line said about the series or file in `folder`."""
    found, (refused,) = find_series(folder)
    assert found == []
    assert "\n" not in str(refused)
    return str(refused)
