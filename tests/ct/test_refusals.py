"""Each thing that cannot be made HU on a regular grid without guessing is refused, in one line that says so."""

from __future__ import annotations

import errno
import gzip
import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from ldct_dist.ct.derived import write_derived
from ldct_dist.ct.dicom import find_series, one_series, read_series, sound_series
from ldct_dist.ct.values import pydicom_faults_as_user_errors
from ldct_dist.errors import UserError
from synthetic_dicom import Options, phantom, refusal, write_series

TAGS = {
    "MR": ({"Modality": "MR", "SOPClassUID": MRImageStorage}, "not CT (Modality MR)"),
    "no modality": ({"Modality": None}, "not CT (Modality missing)"),
    "screen capture": ({"SOPClassUID": SecondaryCaptureImageStorage}, "no CT image"),
    "multi-frame": ({"NumberOfFrames": 2}, "several frames in what says it is a single one"),
    "tilt": ({"GantryDetectorTilt": 12.5}, "gantry tilt of 12.5 degrees"),
    "no slope": ({"RescaleSlope": None}, "RescaleSlope"),
    "no intercept": ({"RescaleIntercept": None}, "RescaleIntercept"),
    "zero slope": ({"RescaleSlope": 0}, "RescaleSlope"),
    "absurd slope": ({"RescaleSlope": "1e300"}, "RescaleSlope"),
    "not HU": ({"RescaleType": "MGML"}, "RescaleType MGML"),
    "no position": ({"ImagePositionPatient": None}, "no usable ImagePositionPatient"),
    "no orientation": ({"ImageOrientationPatient": None}, "no usable ImageOrientationPatient"),
    "no pixel spacing": ({"PixelSpacing": None}, "no usable PixelSpacing"),
    "zero pixel spacing": ({"PixelSpacing": [0.7, 0]}, "PixelSpacing (0.7, 0.0) mm"),
    "no plane": ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "perpendicular"),
    "null axes": ({"ImageOrientationPatient": [0] * 6}, "perpendicular"),
    "no rows": ({"Rows": None}, "no usable Rows and Columns"),
    "absurd rows": ({"Rows": 0}, "no usable Rows and Columns"),
    "mixed matrix": ({"Rows": lambda i: 40 + (i == 3)}, "mixed matrix sizes"),
    "mixed spacing": ({"PixelSpacing": lambda i: [0.7, 0.7 + 0.1 * (i == 3)]}, "mixed pixel spacings"),
    "mixed orientation": (
        {"ImageOrientationPatient": lambda i: [1, 0, 0, 0, 1, 0] if i else [0, 1, 0, 0, 0, -1]},
        "mixed orientations",
    ),
    "mixed patients": ({"PatientID": lambda i: f"P{i // 3}"}, "mixed patients"),
    "mixed frames": ({"FrameOfReferenceUID": lambda i: f"1.2.{i // 3}"}, "mixed frames of reference"),
    "mixed kernels": (
        {"ConvolutionKernel": lambda i: "BL"[i % 2]},
        "mixed kernels: slice-000.dcm and slice-001",
    ),
    "mixed voltages": ({"KVP": lambda i: 80 + 60 * (i % 2)}, "mixed tube voltages"),
    "duplicate": ({"ImagePositionPatient": lambda i: [0, 0, 2 * min(i, 3)]}, "1 duplicate slice(s)"),
    "phases": ({"ImagePositionPatient": lambda i: [0, 0, i % 2]}, "duplicate slice(s)"),
    "missing": ({"ImagePositionPatient": lambda i: [0, 0, 2.5 * (i + 2 * (i > 1))]}, "2 missing slice(s)"),
    "uneven": ({"ImagePositionPatient": lambda i: [0, 0, i * i + i]}, "unevenly spaced"),
    "sheared": ({"ImagePositionPatient": lambda i: [0, 0.4 * i, 2.5 * i]}, "shift sideways by 1.60 mm"),
    "huge axes": ({"ImageOrientationPatient": ["1e200", 0, 0, 0, "1e200", 0]}, "perpendicular"),
    "far away": ({"ImagePositionPatient": lambda i: [0, 0, f"1e{300 - i}"]}, "slice-000.dcm is over 100 m"),
    "far apart": ({"ImagePositionPatient": lambda i: [0, 0, 1e4 * i]}, "slices 10000 mm apart"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("tags", "words"), TAGS.values(), ids=TAGS.keys())
def test_headers_that_make_no_volume(tmp_path, tags, words):
    write_series(tmp_path, phantom(), Options(tags=tags))
    line = refusal(tmp_path)
    assert words in line
    assert str(tmp_path) in line
    assert "AXIAL 2.5" in line
    assert ";" in line, "the line says what to do"


@pytest.mark.parametrize(
    "image_type",
    [
        ["DERIVED", "SECONDARY", "PROCESSED"],
        ["DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE"],
        ["DERIVED", "PRIMARY", "AXIAL", "VMI"],
        ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"],
    ],
)
def test_derived_images_in_hu_are_taken(tmp_path, image_type):
    write_series(tmp_path, phantom(), Options(tags={"ImageType": image_type}))
    assert one_series(tmp_path).shape == phantom().shape
    with pytest.raises(UserError, match="no such folder"):
        find_series(tmp_path / "pipe.dcm")


@pytest.mark.filterwarnings("ignore:The value length")
def test_what_is_no_axial_scan_is_passed_over_or_told_of(tmp_path):
    """As a clinical export holds them beside the series."""
    write_series(tmp_path / "axial", phantom(), Options(seed="axial"))
    coronal = Options(
        seed="coronal",
        orientation=(1, 0, 0, 0, 0, -1),
        tags={"ImagePositionPatient": lambda i: [0, 2.5 * i, 0]},
    )
    write_series(tmp_path / "coronal", phantom(), coronal)
    for name, tags in (
        ("mip", {"ImageType": ["DERIVED", "SECONDARY", "OTHER", "CT_SOM5 MIP"]}),
        ("iodine", {"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "MATERIAL_FRACTION"], "RescaleType": None}),
        ("zeff", {"RescaleType": "Z_EFF"}),
        ("monitoring", {"ImagePositionPatient": [-100.0, -120.0, 45.0]}),
        ("again", {"DerivationDescription": "Denoised by ldct_dist 0.1.0, unet3d-s"}),
    ):
        write_series(tmp_path / name, phantom(), Options(seed=name, tags=tags))
    notices: list[str] = []
    found = sound_series(tmp_path, notices.append)
    assert [s.paths[0].parent.name for s in found] == ["again", "axial", "coronal"]
    told = {line.split(": ")[0]: line for line in notices if not line.startswith("passed over")}
    assert f"{tmp_path}/again" in told["made by ldct_dist from a scan, not a scan itself"]
    assert f"{tmp_path}/coronal" in told["not axial, which scans and a network's training data are"]
    passed = [line for line in notices if line.startswith("passed over")]
    assert [
        any(f"/{name}:" in line for line in passed) for name in ("mip", "iodine", "zeff", "monitoring")
    ] == [True] * 4
    assert len(notices) == 6


def test_missing_slice_names_its_neighbours(tmp_path):
    write_series(tmp_path, phantom())[2].unlink()
    assert "1 missing slice(s), first between slice-001.dcm (42.50 mm) and slice-003.dcm" in refusal(tmp_path)


def test_the_same_slice_in_two_folders(tmp_path):
    write_series(tmp_path / "a", phantom())
    write_series(tmp_path / "b", phantom(), Options(tags={"InstitutionName": "another file"}))
    line = refusal(tmp_path)
    assert "5 duplicate slice(s), first a/slice-000.dcm (40.00 mm) and b/slice-000.dcm (40.00 mm)" in line
    write_series(tmp_path / "b", phantom(), Options(tags={"PatientID": "other"}))
    assert "mixed patients: a/slice-000.dcm and b/slice-000.dcm differ" in refusal(tmp_path)


def test_single_slice(tmp_path):
    write_series(tmp_path, phantom()[:1])
    assert "a single slice, or the same place again and again" in refusal(tmp_path)


def test_one_bad_series_does_not_hide_a_good_one(tmp_path):
    write_series(tmp_path / "good", phantom(), Options(seed="good"))
    write_series(tmp_path / "bad", phantom(), Options(seed="bad", tags={"Modality": "PT"}))
    found, refused = find_series(tmp_path)
    assert [s.paths[0].parent.name for s in found] == ["good"]
    assert len(refused) == 1


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\0" * 128 + b"DICM"], ids=["empty", "text", "magic only"]
)
def test_a_dcm_file_that_is_no_dicom_is_not_passed_over(tmp_path, content):
    """Passing over it could quietly take the last slice off a series."""
    (tmp_path / "last.dcm").write_bytes(content)
    assert "last.dcm" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["slice-004.dcm.gz", "SLICE-004.IMA.BZ2"])
def test_a_compressed_slice_is_not_passed_over(tmp_path, name):
    last = write_series(tmp_path, phantom())[-1]
    (tmp_path / name).write_bytes(gzip.compress(last.read_bytes()))
    last.unlink()
    with pytest.raises(UserError, match=rf"{name}: compressed; unpack it"):
        one_series(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    write_series(tmp_path, phantom())
    os.mkfifo(tmp_path / "pipe.dcm")
    assert one_series(tmp_path).shape == phantom().shape
    with pytest.raises(UserError, match="no such folder"):
        find_series(tmp_path / "pipe.dcm")


@pytest.mark.parametrize("target", ["annex/objects/5", "000005", "5" * 300], ids=["gone", "loop", "no path"])
def test_a_link_to_a_slice_that_is_not_there_is_not_passed_over(tmp_path, target):
    """As data managers leave for files that were not fetched, under whatever name."""
    write_series(tmp_path, phantom())[-1].unlink()
    (tmp_path / "000005").symlink_to(target)
    with pytest.raises(UserError, match="000005: cannot be read"):
        one_series(tmp_path)


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    write_series(tmp_path / "a", phantom())
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def guarded(path):
        if Path(path).name == "locked":  # as root, permissions alone would not stop us
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    found, refused = find_series(tmp_path)
    assert len(found) == 1
    assert "locked: Permission denied" in str(refused[0])


def test_a_slice_without_a_uid_of_its_own(tmp_path):
    """Said before a network has worked on it: what is derived from it could not refer to it."""
    path = write_series(tmp_path, phantom())[2]
    ds = dcmread(path)
    del ds.SOPInstanceUID
    ds.save_as(path)
    assert "no usable SOPInstanceUID in slice-002.dcm; export the original" in refusal(tmp_path)


def test_a_file_in_place_of_a_folder_is_said(tmp_path):
    path, *_ = write_series(tmp_path, phantom())
    with pytest.raises(UserError, match=r"a single slice.* give the whole series"):
        sound_series(path)
    path.write_text("no DICOM")
    with pytest.raises(UserError, match=r"slice-000\.dcm: named as DICOM but is not"):
        sound_series(path)
    for name in ("nowhere", "n" * 300):  # at the second, the system refuses to look
        with pytest.raises(
            UserError, match=f"{name}: no such folder, or it may not be read; give the folder"
        ):
            find_series(tmp_path / name)


def test_one_series_means_one_and_nothing_refused(tmp_path):
    with pytest.raises(UserError, match="no CT series"):
        one_series(tmp_path)
    write_series(tmp_path / "a", phantom())
    assert one_series(tmp_path).shape == (5, 40, 48)
    (tmp_path / "a" / "last.dcm").touch()
    with pytest.raises(UserError, match="last"):
        one_series(tmp_path)
    (tmp_path / "a" / "last.dcm").unlink()
    write_series(tmp_path / "b", phantom(), Options(seed="b"))
    with pytest.raises(UserError, match="2 CT series"):
        one_series(tmp_path)


def pixel_refusal(folder) -> str:
    found, refused = find_series(folder)
    assert refused == []
    with pytest.raises(UserError) as e:
        read_series(found[0])
    assert "\n" not in str(e.value)
    return str(e.value)


def test_what_pydicom_raises_is_one_line_with_its_reason(tmp_path):
    line = r"x\.dcm: not readable as DICOM \(odd bytes\); export it again or remove it$"
    with pytest.raises(UserError, match=line), pydicom_faults_as_user_errors(tmp_path / "x.dcm"):
        raise ValueError("odd bytes\nTraceback (most recent call last): ...")


@pytest.mark.parametrize("syntax", [None, JPEG2000Lossless, JPEGLSLossless, JPEGLossless, RLELossless])
@pytest.mark.parametrize("lost", [5, 400])
def test_files_cut_off(tmp_path, syntax, lost):
    path = write_series(tmp_path, phantom(), Options(**({"syntax": syntax} if syntax else {})))[2]
    path.write_bytes(path.read_bytes()[:-lost])
    assert "slice-002.dcm" in pixel_refusal(tmp_path)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, JPEGLossless])
def test_codestreams_cut_off_inside_a_whole_file(tmp_path, syntax):
    from pydicom.encaps import get_frame

    path = write_series(tmp_path, phantom(), Options(syntax=syntax))[2]
    ds = dcmread(path)
    frame = get_frame(ds.PixelData, 0, number_of_frames=1)
    ds.PixelData = encapsulate([frame[: len(frame) * 3 // 4]])
    ds.save_as(path)
    assert "truncated pixel data" in pixel_refusal(tmp_path)


PIXEL_TAGS = {
    "HU too high": ({"RescaleSlope": 1000}, "does not fit 16 bits"),
    "padding is tissue": ({"PixelPaddingValue": 1024}, "tissue has too"),
    "beyond BitsStored": ({"BitsStored": 8, "HighBit": 7}, "beyond BitsStored"),
    "more rows": ({"Rows": 30}, "more pixel data than Rows and Columns say"),
    "8 bits": ({"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}, "CT stores values in the low bits of 16"),
    "colour": ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "not one grey value"),
    "no pixels": ({"PixelData": None}, "no pixel data"),
    "no signedness": ({"PixelRepresentation": None}, "not one grey value"),
}


@pytest.mark.parametrize(("tags", "words"), PIXEL_TAGS.values(), ids=PIXEL_TAGS.keys())
def test_pixels_that_make_no_hu(tmp_path, tags, words):
    write_series(tmp_path, phantom(), Options(tags=tags))
    line = pixel_refusal(tmp_path)
    assert words in line
    assert str(tmp_path) in line


KEYWORDS = [
    *("SOPClassUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "FrameOfReferenceUID", "Modality"),
    *("ImageType", "SeriesDescription", "ConvolutionKernel", "KVP", "Exposure", "SliceThickness", "Rows"),
    *("GantryDetectorTilt", "NumberOfFrames", "Columns", "PixelSpacing", "ImageOrientationPatient"),
    *("ImagePositionPatient", "RescaleSlope", "RescaleIntercept", "RescaleType", "BitsAllocated"),
    *("BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel", "PhotometricInterpretation"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "SpecificCharacterSet", "SeriesNumber", "PixelData"),
]


@settings(deadline=None, max_examples=80, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    keyword=st.sampled_from(KEYWORDS),
    value=st.one_of(
        st.sampled_from(
            ["", "nan", "inf", "-1e999", "1e308", "0", "-5", "abc", "\x1b[31m\n", "1\\2\\3", "9" * 70]
        ),
        st.binary(max_size=24),
        st.text(max_size=12),
        st.floats(width=32).map(repr),
    ),
    vr=st.sampled_from(["LO", "DS", "IS", "UN", "US", "FD", "SQ"]),
    everywhere=st.booleans(),
)
def test_absurd_headers_give_a_volume_or_one_line(tmp_path_factory, keyword, value, vr, everywhere):
    folder = tmp_path_factory.mktemp("absurd")
    hu = phantom((3, 16, 16))
    paths = write_series(folder / "source", hu)
    for path in paths if everywhere else paths[1:2]:
        splice(path, keyword, vr, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, refused = find_series(folder)
        assert found or refused
        for series in found:
            try:
                volume = read_series(series)
                write_derived(series, volume.hu, folder / "out" / series.series_uid[:8], "nothing done")
            except UserError as e:
                refused.append(e)
    assert all(str(e).isprintable() for e in refused)


LONG = ("UN", "SQ", "OW")
"""VRs with a length of four bytes."""


def splice(path: Path, keyword: str, vr: str, value: str | bytes) -> None:
    """Put the element with these very bytes into the explicit VR file at `path`: pydicom would not write it."""
    raw = value if isinstance(value, bytes) else value.encode()
    raw += b" " * (len(raw) % 2)
    data = path.read_bytes()
    first = 144 + int.from_bytes(data[140:144], "little")
    start, end, tag = next(e for e in elements(data, first) if e[2] >= Tag(keyword))
    tail = data[end:] if tag == Tag(keyword) else data[start:]
    length = struct.pack("<HI", 0, len(raw)) if vr in LONG else struct.pack("<H", len(raw))
    header = struct.pack("<HH", Tag(keyword).group, Tag(keyword).element) + vr.encode() + length
    path.write_bytes(data[:start] + header + raw + tail)


def elements(data: bytes, start: int) -> Iterator[tuple[int, int, int]]:
    """Start, end and tag of each element of an explicit VR little endian dataset without sequences."""
    while start < len(data):
        group, element = struct.unpack_from("<HH", data, start)
        long = data[start + 4 : start + 6].decode() in LONG
        (length,) = struct.unpack_from("<I" if long else "<H", data, start + (8 if long else 6))
        end = start + (12 if long else 8) + length
        yield start, end, group << 16 | element
        start = end


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, JPEGLSLossless])
def test_a_file_that_changes_after_the_search_is_not_read_by_its_old_header(tmp_path, syntax):
    paths = write_series(tmp_path, phantom(), Options(syntax=syntax))
    (series,), _ = find_series(tmp_path)
    paths[2].write_bytes(paths[3].read_bytes() + b"\0\0")
    with pytest.raises(
        UserError, match=r"slice-002\.dcm: changed since the folder was searched; search it again"
    ):
        read_series(series)
