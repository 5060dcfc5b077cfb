"""Enhanced (multi-frame) CT: the same volume, and the same derived series, as from one file a slice."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import highdicom
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.encaps import encapsulate, generate_frames
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
from ldct_dist.ct.multiframe import read_multi_frame
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


STACKS = {
    "stacks": ("FrameContentSequence", "StackID", "12"),
    "times": ("FrameContentSequence", "TemporalPositionIndex", (1, 2)),
    "cardiac phases": ("CardiacSynchronizationSequence", "NominalPercentageOfCardiacPhase", (30.0, 70.0)),
}


@pytest.mark.parametrize(("group", "keyword", "values"), STACKS.values(), ids=STACKS.keys())
@pytest.mark.parametrize("in_turn", [True, False], ids=["in turn", "one after the other"])
def test_stacks_and_phases_are_not_mixed(tmp_path, group, keyword, values, in_turn):
    def two(whole: Dataset) -> None:
        for i, groups in enumerate(whole.PerFrameFunctionalGroupsSequence):
            if group not in groups:
                setattr(groups, group, [Dataset()])
            setattr(groups[group][0], keyword, values[i % 2 if in_turn else i // 3])

    write_enhanced(write_series(tmp_path, phantom()), tmp_path / "IM0", change=two)
    assert "mixed stacks or phases: IM0 frame 1 and IM0 frame" in refusal(tmp_path)


def test_real_ct_converted_by_highdicom(tmp_path):
    """Legacy Converted Enhanced CT, written by another hand than ours."""
    slices = [dcmread(path) for path in sorted(DEMO.glob("*.dcm"))]
    converted = highdicom.legacy.LegacyConvertedEnhancedCTImage(
        slices[::-1], slices[0].SeriesInstanceUID, 1, "1.2.3", 1
    )
    converted.save_as(tmp_path / "converted.dcm")
    single, whole = only(DEMO), only(tmp_path)
    assert_same_volume(single, whole)
    (tmp_path / "converted.dcm").rename(tmp_path / "one.dcm")
    sizes = [
        sum(
            path.stat().st_size for path in write_derived(series, read_series(series).hu, tmp_path / out, "-")
        )
        for series, out in ((single, "a"), (only(tmp_path), "b"))
    ]
    assert sizes[1] < 1.05 * sizes[0], "no lists of all frames in the file of each"
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
    ds = dcmread(write_derived(series, phantom(), tmp_path / "out", "as it was")[0])
    assert ds["KVP"].is_empty  # not absent: an archive may insist on it
    assert ds.FilterType == "WEDGE"


def test_the_exposure_of_two_sources_is_not_that_of_one(tmp_path):
    def twice(whole: Dataset) -> None:
        for groups in whole.PerFrameFunctionalGroupsSequence:
            groups.CTExposureSequence = [*groups.CTExposureSequence] * 2

    write_enhanced(write_series(tmp_path, phantom()), tmp_path / "IM0", change=twice)
    assert only(tmp_path).acquisition.exposure_mas is None


def test_exposures_are_as_exact_as_the_scanner_says(tmp_path):
    def small(whole: Dataset) -> None:
        for groups in whole.PerFrameFunctionalGroupsSequence:
            groups.CTExposureSequence[0].ExposureInmAs = 0.4

    write_enhanced(write_series(tmp_path, phantom()), tmp_path / "IM0", change=small)
    series = only(tmp_path)
    assert series.acquisition.exposure_mas == 0.4
    ds = dcmread(write_simulated(series, phantom(), tmp_path / "out", 0.25)[0])
    assert "Exposure" not in ds  # as a whole number, it would be 0
    assert ds.ExposureInmAs == 0.1


FRAMES = {
    "scout": ({"AcquisitionType": "CONSTANT_ANGLE"}, "IM0 frame 1 is a localizer"),
    "distorted": ({"VolumetricProperties": "DISTORTED"}, "a rendering or a curved reformat"),
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


def without(*indices: int) -> Callable[[Dataset], None]:
    """Frames fewer in the header than there are pixels of."""

    def change(whole: Dataset) -> None:
        groups = whole.PerFrameFunctionalGroupsSequence
        whole.PerFrameFunctionalGroupsSequence = [g for i, g in enumerate(groups) if i not in indices]
        whole.NumberOfFrames = len(whole.PerFrameFunctionalGroupsSequence)

    return change


def offsets_of(**changes: int) -> Callable[[Dataset], None]:
    """Another extended offset table: the i-th offset is what `offset{i}` says."""

    def change(whole: Dataset) -> None:
        table = list(struct.unpack("<5Q", whole.ExtendedOffsetTable))
        for name, value in changes.items():
            table[int(name[-1])] = value
        whole.ExtendedOffsetTable = struct.pack("<5Q", *table)

    return change


@pytest.mark.parametrize(
    "syntax", [JPEG2000Lossless, RLELossless, JPEGLSLossless], ids=["j2k", "rle", "jpeg-ls"]
)
@pytest.mark.parametrize("offsets", ["basic", "extended", "none"])
@pytest.mark.parametrize("change", [without(0), without(4)], ids=["the first", "the last"])
def test_pixels_of_more_frames_than_there_are(tmp_path, syntax, offsets, change):
    """Taken in their order, they would be at another frame's place."""
    paths = write_series(tmp_path, phantom(), Options(syntax=syntax))
    write_enhanced(paths, tmp_path / "IM0", offsets=offsets, change=change)
    assert "do not make 4 frames" in refusal(tmp_path)


@pytest.mark.parametrize("wrong", [{"offset4": 1 << 40}, {"offset2": 0}, {"offset1": 9}, {"offset0": 4}])
def test_offsets_that_lead_to_no_frame(tmp_path, wrong):
    paths = write_series(tmp_path, phantom(), Options(syntax=JPEG2000Lossless))
    write_enhanced(paths, tmp_path / "IM0", offsets="extended", change=offsets_of(**wrong))
    assert "do not make 5 frames" in refusal(tmp_path)


@pytest.mark.parametrize("table", [True, False], ids=["offsets", "no offsets"])
def test_frames_in_several_fragments(tmp_path, table):
    def in_pieces(whole: Dataset) -> None:
        frames = generate_frames(whole.PixelData, number_of_frames=5)
        whole.PixelData = encapsulate(list(frames), fragments_per_frame=3, has_bot=table)

    paths = write_series(tmp_path, phantom(), Options(syntax=JPEGLSLossless))
    write_enhanced(paths, tmp_path / "IM0", change=in_pieces)
    np.testing.assert_array_equal(read_series(only(tmp_path)).hu, phantom())


def test_an_offset_left_out_makes_no_frame_of_two(tmp_path):
    """A decoder would take the first of the two, and never say so."""

    def left_out(whole: Dataset) -> None:
        without(4)(whole)
        count, size, *table = struct.unpack_from("<LL5L", whole.PixelData)
        rest = whole.PixelData[8 + size :]
        whole.PixelData = struct.pack("<LL4L", count, 16, *table[:4]) + rest

    paths = write_series(tmp_path, phantom(), Options(syntax=JPEG2000Lossless))
    write_enhanced(paths, tmp_path / "IM0", change=left_out)
    assert "5 pieces of compressed pixels and 4 offsets do not make 4 frames" in refusal(tmp_path)


def test_native_pixels_in_fragments(tmp_path):
    paths = write_series(tmp_path, phantom(), Options(syntax=RLELossless))
    path = write_enhanced(paths, tmp_path / "IM0")
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.5\0", b"1.2.840.10008.1.2.1\0"))
    assert "not what its transfer syntax says" in refusal(tmp_path)


def test_a_file_without_meta_header(tmp_path):
    path = write_enhanced(write_series(tmp_path, phantom()), tmp_path / "IM0")
    ds = dcmread(path)
    with path.open("wb") as f:
        dcmwrite(f, Dataset(ds), implicit_vr=False, little_endian=True)
    np.testing.assert_array_equal(read_series(only(tmp_path)).hu, phantom())
    assert len(write_derived(only(tmp_path), phantom(), tmp_path / "out", "as it was")) == 5


def test_names_are_read_in_the_character_set_of_the_file(tmp_path):
    def two_sets(whole: Dataset) -> None:
        whole.SpecificCharacterSet, whole.PatientName = "ISO_IR 192", "Yamada^Tarou=山田^太郎"
        for groups in whole.PerFrameFunctionalGroupsSequence:
            content = groups.FrameContentSequence[0]
            content.SpecificCharacterSet, content.FrameComments = "ISO_IR 100", "größer"

    write_enhanced(write_series(tmp_path, phantom()), tmp_path / "IM0", change=two_sets)
    ds = dcmread(write_derived(only(tmp_path), phantom(), tmp_path / "out", "as it was")[0])
    assert ds.PatientName == "Yamada^Tarou=山田^太郎"
    assert ds.ImageComments == "größer"


def test_no_group_says_which_file_it_is_in(tmp_path):
    def another(whole: Dataset) -> None:
        item = Dataset()
        item.SOPClassUID, item.SOPInstanceUID, item.PatientID = CTImageStorage, "1.2.3", "another"
        for groups in whole.PerFrameFunctionalGroupsSequence:
            groups.UnassignedPerFrameConvertedAttributesSequence = [item]

    path = write_enhanced(write_series(tmp_path, phantom()), tmp_path / "IM0", change=another)
    assert only(tmp_path).patient_id == "Doe^Jane"
    ds = dcmread(write_derived(only(tmp_path), phantom(), tmp_path / "out", "as it was")[0])
    assert ds.SourceImageSequence[0].ReferencedSOPInstanceUID == dcmread(path).SOPInstanceUID


def test_files_whose_frames_alternate_are_each_read_once(tmp_path, monkeypatch):
    paths = write_series(tmp_path, phantom((12, 32, 40)), Options(syntax=RLELossless))
    for i in range(6):
        write_enhanced(paths[i::6], tmp_path / f"IM{i}", number=i + 1)
    series = only(tmp_path)
    read_multi_frame.cache_clear()
    np.testing.assert_array_equal(read_series(series).hu, phantom((12, 32, 40)))
    assert read_multi_frame.cache_info().misses == 6


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
