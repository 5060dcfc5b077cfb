"""Enhanced (multi-frame) CT: the same volume, and the same derived series, as from one file a slice."""

from __future__ import annotations

import os
from pathlib import Path

import highdicom
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

import ldct_dist
from enhanced_ct import write_enhanced
from ldct_dist.ct.derived import write_derived, write_simulated
from ldct_dist.ct.dicom import Series, find_series, read_series
from ldct_dist.errors import UserError
from synthetic_dicom import Options, phantom, write_series

DEMO = Path(ldct_dist.__file__).parent / "demo_data" / "CRLM-CT-1004"
CORNER = np.zeros((5, 40, 48), bool)
CORNER[:, :9, :9] = True


def only(folder: Path) -> Series:
    (series,), refused = find_series(folder)
    assert refused == []
    return series


def refusal(folder: Path) -> str:
    found, (refused,) = find_series(folder)
    assert found == []
    assert "\n" not in str(refused)
    return str(refused)


def both(tmp_path: Path, options: Options, **how) -> tuple[Series, Series]:
    """The same series as files of one slice, and as one of all."""
    write_series(tmp_path / "single", phantom(), options)
    paths = write_series(tmp_path / "whole", phantom(), options)
    write_enhanced(paths, tmp_path / "whole" / "IM0", **how)
    return only(tmp_path / "single"), only(tmp_path / "whole")


def assert_same_volume(single: Series, whole: Series) -> None:
    a, b = read_series(single), read_series(whole)
    np.testing.assert_array_equal(a.hu, b.hu)
    assert (a.spacing, a.origin, a.direction) == (b.spacing, b.origin, b.direction)


KINDS = {
    "explicit": Options(),
    "implicit": Options(syntax=ImplicitVRLittleEndian),
    "big-endian": Options(syntax=ExplicitVRBigEndian),
    "rle": Options(syntax=RLELossless),
    "j2k": Options(syntax=JPEG2000Lossless),
    "jpeg-ls": Options(syntax=JPEGLSLossless),
    "jpeg-lossless": Options(syntax=JPEGLosslessSV1, signed=False),
    "unsigned of 12 bits": Options(signed=False, bits_stored=12),
    "per slice": Options(
        slopes=(1.0, 0.5, 2.0, 0.25, 4.0), intercepts=(-1024.0, 0.0, -1000.0, -8.0, -1024.0)
    ),
    "padding": Options(padding=(CORNER, -2000, True)),
    "coronal": Options(
        orientation=(1, 0, 0, 0, 0, -1), tags={"ImagePositionPatient": lambda i: [0, 3 * i, 0]}
    ),
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_the_volume_is_that_of_single_frames(tmp_path, options):
    single, whole = both(tmp_path, options)
    assert len(set(whole.paths)) == 1
    assert_same_volume(single, whole)
    for fact in ("patient_id", "study_uid", "series_uid", "description", "positions", "shape"):
        assert getattr(single, fact) == getattr(whole, fact), fact
    assert vars(whole.acquisition) == vars(single.acquisition) | {"source_mm": 570.0}


@pytest.mark.parametrize("offsets", ["basic", "extended", "none"])
def test_compressed_frames_are_found_by_any_table_and_by_none(tmp_path, offsets):
    single, whole = both(tmp_path, Options(syntax=JPEG2000Lossless), offsets=offsets)
    assert_same_volume(single, whole)


@settings(deadline=None, max_examples=10, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(order=st.permutations(range(5)))
def test_frames_are_sorted_by_position(tmp_path_factory, order):
    tmp_path = tmp_path_factory.mktemp("order")
    paths = write_series(tmp_path, phantom())
    write_enhanced([paths[i] for i in order], tmp_path / "IM0")
    series = only(tmp_path)
    assert [order[s.frame] for s in series.slices] == list(range(5))
    np.testing.assert_array_equal(read_series(series).hu, phantom())


def test_a_series_of_several_multi_frame_files(tmp_path):
    """A concatenation: what would be too large a file, in parts."""
    paths = write_series(tmp_path, phantom())
    write_enhanced(paths[:2], tmp_path / "IM0")
    write_enhanced(paths[2:], tmp_path / "IM1", number=2, tags={"ConcatenationFrameOffsetNumber": 2})
    series = only(tmp_path)
    np.testing.assert_array_equal(read_series(series).hu, phantom())
    written = write_derived(series, phantom(), tmp_path / "out", "as it was")
    assert [dcmread(path).InstanceNumber for path in written] == [1, 2, 3, 4, 5]


def test_real_ct_converted_by_highdicom(tmp_path):
    """Legacy Converted Enhanced CT, written by another hand than ours."""
    slices = [dcmread(path) for path in sorted(DEMO.glob("*.dcm"))]
    converted = highdicom.legacy.LegacyConvertedEnhancedCTImage(
        slices[::-1], slices[0].SeriesInstanceUID, 1, "1.2.3", 1
    )
    converted.save_as(tmp_path / "converted.dcm")
    single, whole = only(DEMO), only(tmp_path)
    assert_same_volume(single, whole)
    assert single.acquisition == whole.acquisition
    assert (single.patient_id, single.description) == (whole.patient_id, whole.description)


def _plain(ds: Dataset) -> dict[str, object]:
    """Elements by keyword, but for those that name an instance or a series, or that only single frames have."""
    names = ("SOPInstanceUID", "SeriesInstanceUID", "SourceImageSequence")
    names += ("SmallestImagePixelValue", "LargestImagePixelValue")
    return {e.keyword: e.value for e in ds if e.keyword not in names}


def test_what_is_derived_is_one_file_a_slice(tmp_path):
    options = Options(padding=(CORNER, -2000, True))
    single, whole = both(tmp_path, options)
    hu = read_series(whole).hu + np.int16(7)
    written = [
        write_simulated(series, hu, tmp_path / out, 0.25) for series, out in ((single, "a"), (whole, "b"))
    ]
    uid = dcmread(whole.paths[0]).SOPInstanceUID
    for i, (a, b) in enumerate(zip(*map(lambda paths: map(dcmread, paths), written), strict=True)):
        assert b.file_meta.MediaStorageSOPClassUID == b.SOPClassUID == CTImageStorage
        (source,) = b.SourceImageSequence
        assert source.ReferencedSOPClassUID == EnhancedCTImageStorage
        assert (source.ReferencedSOPInstanceUID, source.ReferencedFrameNumber) == (uid, i + 1)
        assert b.ImageType[:3] == ["DERIVED", "SECONDARY", "AXIAL"]
        expected, found = _plain(a), _plain(b)
        assert {k: found.get(k) for k in expected} == expected
        # each frame's own dose, scaled once
        assert (found["CTDIvol"], found["XRayTubeCurrent"]) == (2.0, round((200 + i) / 4))
        assert not [k for k in found if ("Frame" in k and k != "FrameOfReferenceUID") or "Dimension" in k]


def test_ends_of_a_dual_source_scan_are_said_where_both_agree(tmp_path):
    paths = write_series(tmp_path, phantom())
    write_enhanced(paths, tmp_path / "IM0", frame_tags={"KVP": 140})
    series = only(tmp_path)
    assert series.acquisition.kvp is None
    written = write_derived(series, phantom(), tmp_path / "out", "as it was")
    ds = dcmread(written[0])
    assert "KVP" not in ds
    assert ds.FilterType == "WEDGE"


FRAMES = {
    "localizer": ({"FrameType": ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]}, "a localizer"),
    "projection": ({"FrameType": ["DERIVED", "PRIMARY", "VOLUME", "MAXIMUM"]}, "intensity projection"),
    "slab": ({"VolumeBasedCalculationTechnique": "MIN_IP"}, "intensity projection"),
    "rendering": ({"VolumeBasedCalculationTechnique": "VOLUME_RENDER"}, "a rendering"),
    "perfusion": ({"FrameType": ["DERIVED", "PRIMARY", "PERFUSION", "RCBF"]}, "calculated from images"),
    "iodine": (
        {"FrameType": ["DERIVED", "PRIMARY", "VOLUME", "NONE", "MAT_SPECIFIC"]},
        "a map of a material, not of HU",
    ),
}


@pytest.mark.parametrize(("frame_tags", "words"), FRAMES.values(), ids=FRAMES.keys())
def test_frames_that_are_no_slices(tmp_path, frame_tags, words):
    write_enhanced(write_series(tmp_path, phantom()), tmp_path / "IM0", frame_tags=frame_tags)
    assert words in refusal(tmp_path)


def test_a_multiplanar_reformat_is_a_volume(tmp_path):
    paths = write_series(tmp_path, phantom())
    write_enhanced(paths, tmp_path / "IM0", frame_tags={"VolumeBasedCalculationTechnique": "MPR"})
    np.testing.assert_array_equal(read_series(only(tmp_path)).hu, phantom())


FILES = {
    "another number of frames": ({"NumberOfFrames": 6}, "NumberOfFrames 6, but functional groups of 5"),
    "no number of frames": ({"NumberOfFrames": None}, "NumberOfFrames None"),
    "no functional groups": ({"PerFrameFunctionalGroupsSequence": None}, "functional groups of 0 frames"),
    "colours": ({"PixelPresentation": "COLOR"}, "colours, not HU"),
    "truncated": ({"PixelData": bytes(2 * 5 * 40 * 48 - 2)}, "truncated pixel data"),
    "too long": ({"PixelData": bytes(2 * 5 * 40 * 48 + 2)}, "more pixel data than"),
    "no pixels": ({"PixelData": None}, "no pixel data"),
    "no rows": ({"Rows": None}, "no usable Rows"),
}


@pytest.mark.parametrize(("tags", "words"), FILES.values(), ids=FILES.keys())
def test_files_that_hold_no_volume(tmp_path, tags, words):
    write_enhanced(write_series(tmp_path, phantom()), tmp_path / "IM0", tags=tags)
    line = refusal(tmp_path)
    assert words in line
    assert "IM0" in line
    assert ";" in line, "the line says what to do"


def test_two_phases_are_named_by_their_frames(tmp_path):
    paths = write_series(tmp_path, phantom(), Options(tags={"ImagePositionPatient": lambda i: [0, 0, i % 2]}))
    write_enhanced(paths, tmp_path / "IM0")
    assert "first IM0 frame 1 (0.00 mm) and IM0 frame 3 (0.00 mm)" in refusal(tmp_path)


def test_a_deflated_file(tmp_path):
    paths = write_series(tmp_path, phantom(), Options(syntax=DeflatedExplicitVRLittleEndian))
    write_enhanced(paths, tmp_path / "IM0")
    assert "a deflated multi-frame file" in refusal(tmp_path)


def test_a_file_that_was_cut_short_since(tmp_path):
    _, whole = both(tmp_path, Options())
    path = whole.paths[0]
    state = path.stat()
    os.truncate(path, state.st_size - 100)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(UserError, match="changed since"):
        read_series(whole)


@settings(deadline=None, max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.data(),
    syntax=st.sampled_from([ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless]),
)
def test_damage_ends_in_one_line_or_leaves_the_volume(tmp_path_factory, data, syntax):
    folder = tmp_path_factory.mktemp("damage")
    paths = write_series(folder, phantom((3, 32, 32)), Options(syntax=syntax))
    path = write_enhanced(paths, folder / "IM0.dcm", offsets=data.draw(st.sampled_from(["basic", "none"])))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(
        content[: data.draw(st.sampled_from([len(content), len(content) // 2, len(content) - 9]))]
    )
    found, refused = find_series(folder)
    for series in found:
        try:
            volume = read_series(series)
            write_derived(series, volume.hu, folder / "out", "as it was")
        except UserError as e:
            refused.append(e)
    assert [e for e in refused if "\n" in str(e) or ";" not in str(e)] == []
