"""What a multi-frame file says of its frames, as series derived from it, facts and refusals have it."""

from __future__ import annotations

from collections.abc import Callable

import highdicom
import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
)

from enhanced_ct import both, write_enhanced
from ldct_dist.ct.derived import write_derived, write_simulated
from ldct_dist.ct.dicom import read_series
from ldct_dist.ct.pixels import read_dataset
from synthetic_dicom import Options, only, phantom, refusal, write_series


def _plain(ds: Dataset) -> dict[str, object]:
    """Elements by keyword, but for those that name an instance or a series, or that only single frames have."""
    names = ("SOPInstanceUID", "SeriesInstanceUID", "SourceImageSequence")
    names += ("SmallestImagePixelValue", "LargestImagePixelValue")
    return {e.keyword: e.value for e in ds if e.keyword not in names}


def test_what_is_derived_is_one_file_a_slice(tmp_path):
    corner = np.zeros((5, 40, 48), bool)
    corner[:, :9, :9] = True
    options = Options(padding=(corner, -2000, True))
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


def test_of_two_sources_is_said_what_both_agree_on(tmp_path):
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
    "distorted": ({"VolumetricProperties": "DISTORTED"}, "a rendering or a curved reformat"),
    "localizer": ({"FrameType": ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]}, "a localizer"),
    "projection": ({"FrameType": ["DERIVED", "PRIMARY", "VOLUME", "MAXIMUM"]}, "intensity projection"),
    "projection, as converters say": (
        {"FrameType": ["DERIVED", "PRIMARY", "MIP", "NONE"]},
        "intensity projection",
    ),
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


OF_FILE = {
    **dict.fromkeys(("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"), "1.2.3"),
    **dict.fromkeys(("PatientID", "PatientName", "FrameOfReferenceUID"), "9"),
    **{
        "PatientBirthDate": "19000101",
        "PatientSex": "F",
        "Modality": "MR",
        "PhotometricInterpretation": "RGB",
    },
    **dict.fromkeys(("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"), 7),
    **dict.fromkeys(("SamplesPerPixel", "PixelPaddingValue", "PixelPaddingRangeLimit"), 7),
}
"""What a group says otherwise than its file"""


def test_no_group_says_otherwise_what_the_file_says(tmp_path):
    def otherwise(whole: Dataset) -> None:
        whole.PixelPaddingValue, whole.PixelPaddingRangeLimit = -2000, -1999
        groups_of("UnassignedPerFrameConvertedAttributesSequence", **OF_FILE)(whole)

    path = write_enhanced(write_series(tmp_path, phantom()), tmp_path / "IM0", change=otherwise)
    whole, single = dcmread(path), read_dataset(only(tmp_path).slices[0])
    assert {k: single[k].value for k in OF_FILE} == {k: whole[k].value for k in OF_FILE}


OF_MULTI_FRAME = {
    **{"DimensionOrganizationType": "3D", "ConcatenationUID": "1.2.3", "InConcatenationNumber": 1},
    **{"InConcatenationTotalNumber": 1, "ConcatenationFrameOffsetNumber": 0, "FrameComments": "said"},
    **{"SOPInstanceUIDOfConcatenationSource": "1.2.3", "FrameLabel": "1", "InStackPositionNumber": 1},
    **{key: [Dataset()] for key in ("ReferencedImageEvidenceSequence", "SourceImageEvidenceSequence")},
    **{key: [Dataset()] for key in ("ReferencedSeriesSequence", "DimensionIndexSequence")},
    **{"StackID": "1", "TemporalPositionIndex": 1, "FrameLaterality": "U", "FrameAcquisitionDuration": 1.0},
    **{"CardiacCyclePosition": "END_SYSTOLE", "RespiratoryCyclePosition": "EXPIRATION"},
    **{
        "PixelPresentation": "MONOCHROME",
        "VolumetricProperties": "VOLUME",
        "PresentationLUTShape": "IDENTITY",
    },
    **{
        "VolumeBasedCalculationTechnique": "NONE",
        "ExtendedOffsetTable": b"",
        "ExtendedOffsetTableLengths": b"",
    },
}
"""Besides what `write_enhanced` writes"""


def test_nothing_that_is_true_of_many_frames_is_left_in_one(tmp_path):
    path = write_enhanced(write_series(tmp_path, phantom()), tmp_path / "IM0", tags=OF_MULTI_FRAME)
    whole, single = dcmread(path), read_dataset(only(tmp_path).slices[0])
    gone = {e.keyword for e in whole} - {e.keyword for e in single}
    assert gone == {
        *OF_MULTI_FRAME,
        *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "NumberOfFrames"),
        "DimensionOrganizationSequence",
    }
    never = ("FrameType", "FrameReferenceDateTime", "DimensionIndexValues", "FrameAcquisitionNumber")
    assert not [keyword for keyword in never if keyword in single]


def test_an_exposure_that_is_empty_in_its_group_is_that_of_another(tmp_path):
    def empty(whole: Dataset) -> None:
        groups_of("CTExposureSequence", ExposureInmAs=None)(whole)
        groups_of("UnassignedPerFrameConvertedAttributesSequence", Exposure=80)(whole)

    write_enhanced(write_series(tmp_path, phantom()), tmp_path / "IM0", change=empty)
    assert dcmread(write_derived(only(tmp_path), phantom(), tmp_path / "out", "-")[0]).Exposure == 80


def test_a_file_without_frame_types_says_what_its_frames_are(tmp_path):
    def silent(whole: Dataset) -> None:
        whole.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "MAXIMUM"]
        for groups in whole.PerFrameFunctionalGroupsSequence:
            del groups.CTImageFrameTypeSequence

    write_enhanced(write_series(tmp_path, phantom()), tmp_path / "IM0", change=silent)
    assert "intensity projection" in refusal(tmp_path)


def groups_of(sequence: str, frames: slice = slice(None), **elements: object) -> Callable[[Dataset], None]:
    """Elements added to a functional group of these frames, or the group with them."""

    def change(whole: Dataset) -> None:
        for groups in whole.PerFrameFunctionalGroupsSequence[frames]:
            if sequence not in groups:
                setattr(groups, sequence, [Dataset()])
            for keyword, value in elements.items():
                setattr(groups[sequence][0], keyword, value)

    return change


def test_a_scout_is_known_by_how_it_was_acquired(tmp_path):
    change = groups_of("CTAcquisitionTypeSequence", AcquisitionType="CONSTANT_ANGLE")
    write_enhanced(write_series(tmp_path, phantom()), tmp_path / "IM0", change=change)
    assert "IM0 frame 1 is a localizer" in refusal(tmp_path)


def test_a_converted_projection_is_none_the_less_one(tmp_path):
    """What a frame was before its series was converted."""
    before = groups_of(
        "UnassignedPerFrameConvertedAttributesSequence",
        ImageType=["DERIVED", "SECONDARY", "AXIAL", "CT_SOM5 MIP"],
    )
    write_enhanced(write_series(tmp_path / "a", phantom()), tmp_path / "a" / "IM0", change=before)
    assert "intensity projection" in refusal(tmp_path / "a")
    mip = {"ImageType": ["DERIVED", "SECONDARY", "MIP"]}
    slices = [dcmread(path) for path in write_series(tmp_path / "b", phantom(), Options(tags=mip))]
    converted = highdicom.legacy.LegacyConvertedEnhancedCTImage(slices, "1.2.4", 1, "1.2.3", 1)
    (tmp_path / "c").mkdir()
    converted.save_as(tmp_path / "c" / "IM0")
    assert "intensity projection" in refusal(tmp_path / "c")


def test_how_a_frame_was_made_is_told_in_full(tmp_path):
    said = "Denoised by ldct_dist 0.1.0"

    def twice(whole: Dataset) -> None:
        groups_of("DerivationImageSequence", DerivationDescription=said)(whole)
        item = Dataset()
        item.DerivationDescription = "Resampled"
        for groups in whole.PerFrameFunctionalGroupsSequence:
            groups.DerivationImageSequence.append(item)

    write_enhanced(write_series(tmp_path, phantom()), tmp_path / "IM0", change=twice)
    series = only(tmp_path)
    assert series.is_own_output
    ds = dcmread(write_derived(series, phantom(), tmp_path / "out", "as it was")[0])
    assert ds.DerivationDescription == f"{said}; Resampled; as it was"


def test_what_single_frames_never_lack_is_there_and_empty(tmp_path):
    def unknown(whole: Dataset) -> None:
        del (
            whole.PositionReferenceIndicator,
            whole.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness,
        )
        for groups in whole.PerFrameFunctionalGroupsSequence:
            del groups.CTXRayDetailsSequence, groups.FrameContentSequence[0].FrameAcquisitionNumber

    write_enhanced(write_series(tmp_path, phantom()), tmp_path / "IM0", change=unknown)
    ds = dcmread(write_derived(only(tmp_path), phantom(), tmp_path / "out", "as it was")[0])
    for keyword in ("KVP", "AcquisitionNumber", "SliceThickness", "PositionReferenceIndicator"):
        assert ds[keyword].is_empty, keyword


def test_groups_that_single_frames_have_as_elements(tmp_path):
    region = Dataset()
    region.CodeValue, region.CodingSchemeDesignator, region.CodeMeaning = "818981001", "SCT", "Abdomen"

    def said(whole: Dataset) -> None:
        groups_of("FrameAnatomySequence", AnatomicRegionSequence=[region])(whole)
        groups_of("FrameVOILUTSequence", WindowCenter=50.0, WindowWidth=350.0)(whole)
        groups_of("CTTableDynamicsSequence", SpiralPitchFactor=0.9)(whole)
        groups_of("CTPositionSequence", TablePosition=-120.0)(whole)
        groups_of("IrradiationEventIdentificationSequence", IrradiationEventUID="1.2.7")(whole)
        groups_of("FrameContentSequence", FrameComments="one line\r\nanother")(whole)

    write_enhanced(write_series(tmp_path, phantom()), tmp_path / "IM0", change=said)
    ds = dcmread(write_derived(only(tmp_path), phantom(), tmp_path / "out", "as it was")[0])
    assert (ds.WindowCenter, ds.WindowWidth, ds.SpiralPitchFactor, ds.TablePosition) == (50, 350, 0.9, -120)
    assert (ds.AnatomicRegionSequence[0].CodeValue, ds.IrradiationEventUID) == ("818981001", "1.2.7")
    assert ds.ImageComments == "one line\r\nanother"
    assert "FrameLaterality" not in ds


def test_damaged_elements_that_nobody_needs_are_left_out(tmp_path):
    paths = write_series(tmp_path, phantom())
    path = write_enhanced(paths, tmp_path / "IM0")
    content = path.read_bytes()
    number = b"\x20\x00\x56\x91US\x02\x00\x01\x00"  # FrameAcquisitionNumber
    assert content.count(number) == 5
    path.write_bytes(content.replace(number, number[:4] + b"DT" + number[6:8] + b"\xff\xff"))
    ds = dcmread(write_derived(only(tmp_path), phantom(), tmp_path / "out", "as it was")[0])
    assert ds["AcquisitionNumber"].is_empty


def test_padding_that_only_a_group_says(tmp_path):
    corner = np.zeros((5, 40, 48), bool)
    corner[:, :9, :9] = True

    def moved(whole: Dataset) -> None:
        groups_of("UnassignedPerFrameConvertedAttributesSequence", PixelPaddingValue=-2000)(whole)
        del whole.PixelPaddingValue

    paths = write_series(tmp_path, phantom(), Options(intercepts=0.0, padding=(corner, -2000, True)))
    write_enhanced(paths, tmp_path / "IM0", change=moved)
    assert [stored.form.pad_value for stored in only(tmp_path).slices] == ["-2000"] * 5


STACKS = {
    "stacks": ("FrameContentSequence", "StackID", "12"),
    "times": ("FrameContentSequence", "TemporalPositionIndex", (1, 2)),
    "parts of a heartbeat": ("FrameContentSequence", "CardiacCyclePosition", ("END_SYSTOLE", "END_DIASTOLE")),
    "parts of a breath": ("FrameContentSequence", "RespiratoryCyclePosition", ("EXPIRATION", "INSPIRATION")),
    "respiratory phases": (
        "RespiratorySynchronizationSequence",
        "NominalPercentageOfRespiratoryPhase",
        (20.0, 80.0),
    ),
    "cardiac phases": ("CardiacSynchronizationSequence", "NominalPercentageOfCardiacPhase", (30.0, 70.0)),
}


@pytest.mark.parametrize(("group", "keyword", "values"), STACKS.values(), ids=STACKS.keys())
@pytest.mark.parametrize(
    "halves",
    [(slice(0, None, 2), slice(1, None, 2)), (slice(0, 3), slice(3, None))],
    ids=["in turn", "one after the other"],
)
def test_stacks_and_phases_are_not_mixed(tmp_path, group, keyword, values, halves):
    def two(whole: Dataset) -> None:
        for frames, value in zip(halves, values, strict=True):
            groups_of(group, frames, **{keyword: value})(whole)

    write_enhanced(write_series(tmp_path, phantom()), tmp_path / "IM0", change=two)
    assert "mixed stacks or phases: IM0 frame 1 and IM0 frame" in refusal(tmp_path)
