"""Enhanced (multi-frame) CT: the same volume, and the same derived series, as from one file a slice."""

from __future__ import annotations

import os
from pathlib import Path

import highdicom
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

import ldct_dist
from enhanced_ct import both, write_enhanced
from ldct_dist.ct import pixels
from ldct_dist.ct.derived import write_derived
from ldct_dist.ct.dicom import Series, find_series, read_series
from ldct_dist.ct.multiframe import read_multi_frame
from ldct_dist.errors import UserError
from synthetic_dicom import Options, only, phantom, refusal, write_series

DEMO = Path(ldct_dist.__file__).parent / "demo_data" / "CRLM-CT-1004"
CORNER = np.zeros((5, 40, 48), bool)
CORNER[:, :9, :9] = True


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


def _part(paths: list[Path], out: Path, uid: str, number: int, first: int, parts: int | None) -> None:
    tags = {"ConcatenationUID": uid, "InConcatenationNumber": number, "ConcatenationFrameOffsetNumber": first}
    if parts is not None:
        tags["InConcatenationTotalNumber"] = parts
    write_enhanced(paths, out, number=number, tags=tags)


def test_a_missing_part_of_a_concatenation_is_noticed(tmp_path):
    """Its slices are at an end of the volume, where no gap would show it."""
    for missing in (1, 3):
        folder = tmp_path / str(missing)
        paths = write_series(folder, phantom((6, 40, 48)))
        for number in (1, 2, 3):
            _part(
                paths[2 * number - 2 : 2 * number], folder / f"IM{number}", "1.2.9", number, 2 * number - 2, 3
            )
        np.testing.assert_array_equal(read_series(only(folder)).hu, phantom((6, 40, 48)))
        (folder / f"IM{missing}").unlink()
        assert "of 3 files there are 2, with 4 frames" in refusal(folder)
    paths = write_series(tmp_path / "unsaid", phantom())
    _part(paths[2:], tmp_path / "unsaid" / "IM2", "1.2.9", 2, 2, None)
    for path in paths[:2]:
        path.unlink()
    assert "parts of its concatenation are missing" in refusal(tmp_path / "unsaid")


def test_parts_that_do_not_say_where_they_belong(tmp_path):
    paths = write_series(tmp_path, phantom((6, 40, 48)))
    _part(paths[:3], tmp_path / "IM1", "1.2.9", 1, 0, 2)
    _part(paths[3:], tmp_path / "IM2", "1.2.9", 2, 0, 2)
    assert "files of its concatenation have the same frames" in refusal(tmp_path)


def test_a_stray_slice_beside_a_multi_frame_file(tmp_path):
    paths = write_series(tmp_path, phantom())
    write_enhanced(paths[:3], tmp_path / "IM0")
    assert "mixed kinds of file, single-frame and multi-frame: IM0 frame 1 and slice-003" in refusal(tmp_path)


def test_an_error_of_pixels_names_the_frame(tmp_path):
    hu = phantom()
    hu[3] += 9000
    write_enhanced(
        write_series(tmp_path, hu, Options(bits_stored=16)),
        tmp_path / "IM0",
        tags={"BitsStored": 13, "HighBit": 12},
    )
    with pytest.raises(UserError, match=r"IM0 frame 4: stored values .* beyond BitsStored"):
        read_series(only(tmp_path))


def test_real_ct_converted_by_highdicom(tmp_path):
    """Legacy Converted Enhanced CT, written by another hand than ours."""
    slices = [dcmread(path) for path in sorted(DEMO.glob("*.dcm"))]
    converted = highdicom.legacy.LegacyConvertedEnhancedCTImage(
        slices[::-1], slices[0].SeriesInstanceUID, 1, "1.2.3", 1
    )
    converted.save_as(tmp_path / "converted.dcm")
    single, whole = only(DEMO), only(tmp_path)
    assert_same_volume(single, whole)
    written = [
        write_derived(series, read_series(series).hu, tmp_path / out, "-")
        for series, out in ((single, "a"), (whole, "b"))
    ]
    types = [{str(dcmread(path).ImageType) for path in paths} for paths in written]
    assert types[0] == types[1]
    sizes = [sum(path.stat().st_size for path in paths) for paths in written]
    assert sizes[1] < 1.02 * sizes[0], "no lists of all frames in the file of each"
    assert single.acquisition == whole.acquisition
    assert (single.patient_id, single.description) == (whole.patient_id, whole.description)


FILES = {
    "another number of frames": ({"NumberOfFrames": 6}, "NumberOfFrames 6, but functional groups of 5"),
    "no number of frames": ({"NumberOfFrames": None}, "NumberOfFrames None"),
    "no functional groups": ({"PerFrameFunctionalGroupsSequence": None}, "functional groups of 0 frames"),
    "no frames": ({"NumberOfFrames": 0, "PerFrameFunctionalGroupsSequence": None}, "NumberOfFrames 0"),
    "two sets of what is shared": (
        {"SharedFunctionalGroupsSequence": [Dataset(), Dataset()]},
        "several sets of what all frames share",
    ),
    "of bytes": ({"BitsAllocated": 8}, "more pixel data than"),
    "colours": ({"PixelPresentation": "COLOR"}, "colours, not HU"),
    "truncated": ({"PixelData": bytes(2 * 5 * 40 * 48 - 2)}, "truncated pixel data"),
    "too long": ({"PixelData": bytes(2 * 5 * 40 * 48 + 2 * 48)}, "more pixel data than"),
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


def test_a_file_without_meta_header(tmp_path):
    path = write_enhanced(write_series(tmp_path, phantom()), tmp_path / "IM0")
    ds = dcmread(path)
    with path.open("wb") as f:
        dcmwrite(f, Dataset(ds), implicit_vr=False, little_endian=True)
    np.testing.assert_array_equal(read_series(only(tmp_path)).hu, phantom())
    assert len(write_derived(only(tmp_path), phantom(), tmp_path / "out", "as it was")) == 5


def test_files_whose_frames_alternate_are_each_read_once(tmp_path, monkeypatch):
    paths = write_series(tmp_path, phantom((12, 32, 40)), Options(syntax=RLELossless))
    for i in range(6):
        write_enhanced(paths[i::6], tmp_path / f"IM{i}", number=i + 1)
    series = only(tmp_path)
    read = []
    monkeypatch.setattr(pixels, "read_multi_frame", lambda path: read.append(path) or read_multi_frame(path))
    np.testing.assert_array_equal(read_series(series).hu, phantom((12, 32, 40)))
    assert sorted(read) == sorted(set(series.paths))


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
