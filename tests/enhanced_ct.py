"""Enhanced CT files made of single-frame ones, as scanners that write them would have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.uid import EnhancedCTImageStorage, ExplicitVRBigEndian, generate_uid

from ldct_dist.ct.dicom import Series
from synthetic_dicom import Options, only, phantom, write_series

TO_ALL = (
    *("SpecificCharacterSet", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
    *("SeriesDate", "ContentDate", "ContentTime", "AccessionNumber", "ReferringPhysicianName", "Modality"),
    *("Manufacturer", "ManufacturerModelName", "SeriesDescription", "SeriesNumber", "PatientPosition"),
    *("PositionReferenceIndicator", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue"),
)
"""Elements of the single frames that the multi-frame file has for all of its frames"""


def write_enhanced(
    paths: Sequence[Path],
    out: Path,
    *,
    offsets: str = "basic",
    tags: dict[str, Any] | None = None,
    frame_tags: dict[str, Any] | None = None,
    change: Callable[[Dataset], None] = lambda whole: None,
    number: int = 1,
    source_mm: float = 570.0,
) -> Path:
    """Write the single-frame files `paths`, a frame each in that order, as the enhanced CT file `out`, in their syntax.

    offsets: the table of compressed frames: basic, extended or none. tags: set on the file after all else, and then `change` is made. frame_tags: set
    in the group CTImageFrameTypeSequence of every frame, but for KVP, which is added to each frame's X-ray details.
    number: another one gives another SOP instance of the same series. source_mm: from source to isocentre.
    """
    slices = [dcmread(path) for path in paths]
    first, n = slices[0], len(slices)
    whole = Dataset()
    whole.update({e.tag: e for e in first if e.keyword in TO_ALL})
    whole.SOPClassUID = EnhancedCTImageStorage
    whole.SOPInstanceUID = generate_uid(entropy_srcs=[first.SeriesInstanceUID, str(number)])
    whole.InstanceNumber, whole.NumberOfFrames = number, n
    whole.ImageType, whole.PixelPresentation = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], "MONOCHROME"
    whole.VolumetricProperties, whole.VolumeBasedCalculationTechnique = "VOLUME", "NONE"
    whole.ContentQualification, whole.PresentationLUTShape = "RESEARCH", "IDENTITY"
    whole.AcquisitionDateTime, whole.AcquisitionDuration = "20200102101600", 5.0
    whole.BurnedInAnnotation, whole.LossyImageCompression = "NO", "00"
    organization = generate_uid(entropy_srcs=["dimensions"])
    whole.DimensionOrganizationSequence = [_dataset(DimensionOrganizationUID=organization)]
    whole.DimensionIndexSequence = [
        _dataset(
            DimensionOrganizationUID=organization,
            DimensionIndexPointer=0x00209057,
            FunctionalGroupPointer=0x00209111,
        )
    ]
    whole.SharedFunctionalGroupsSequence = [_shared(first, source_mm)]
    frame_tags = frame_tags or {}
    whole.PerFrameFunctionalGroupsSequence = [_own(ds, i, n, frame_tags) for i, ds in enumerate(slices)]
    syntax = first.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        frames = [next(generate_frames(ds.PixelData, number_of_frames=1)) for ds in slices]
        if offsets == "extended":
            pixels, whole.ExtendedOffsetTable, whole.ExtendedOffsetTableLengths = encapsulate_extended(frames)
        else:
            pixels = encapsulate(frames, has_bot=offsets == "basic")
        whole.add_new("PixelData", "OB", pixels)
        whole["PixelData"].is_undefined_length = True
    else:
        whole.add_new("PixelData", "OW", b"".join(ds.PixelData for ds in slices))
    for keyword, value in (tags or {}).items():
        if value is None:
            delattr(whole, keyword)
        else:
            setattr(whole, keyword, value)
    change(whole)
    whole.file_meta = first.file_meta
    whole.file_meta.MediaStorageSOPClassUID = whole.SOPClassUID
    whole.file_meta.MediaStorageSOPInstanceUID = whole.SOPInstanceUID
    out.parent.mkdir(parents=True, exist_ok=True)
    little = syntax != ExplicitVRBigEndian
    whole.save_as(out, implicit_vr=syntax.is_implicit_VR, little_endian=little, enforce_file_format=True)
    for path in paths:
        path.unlink()
    return out


def both(tmp_path: Path, options: Options, **how) -> tuple[Series, Series]:
    """The same series as files of one slice, and as one of all."""
    write_series(tmp_path / "single", phantom(), options)
    paths = write_series(tmp_path / "whole", phantom(), options)
    write_enhanced(paths, tmp_path / "whole" / "IM0", **how)
    return only(tmp_path / "single"), only(tmp_path / "whole")


def _dataset(**elements: Any) -> Dataset:
    ds = Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def _shared(ds: Dataset, source_mm: float) -> Dataset:
    groups = {
        "PixelMeasuresSequence": _dataset(PixelSpacing=ds.PixelSpacing, SliceThickness=ds.SliceThickness),
        "PlaneOrientationSequence": _dataset(ImageOrientationPatient=ds.ImageOrientationPatient),
        "CTReconstructionSequence": _dataset(
            ReconstructionAlgorithm="ITERATIVE", ConvolutionKernel=ds.ConvolutionKernel
        ),
        "CTAcquisitionDetailsSequence": _dataset(
            RotationDirection="CW", RevolutionTime=0.5, GantryDetectorTilt=float(ds.GantryDetectorTilt)
        ),
        "CTGeometrySequence": _dataset(
            DistanceSourceToDetector=1040.0, DistanceSourceToDataCollectionCenter=source_mm
        ),
        "FrameAnatomySequence": _dataset(FrameLaterality="U"),
        "FrameVOILUTSequence": _dataset(WindowCenter=40.0, WindowWidth=400.0),
    }
    return _dataset(**{keyword: [item] for keyword, item in groups.items()})


def _own(ds: Dataset, i: int, n: int, frame_tags: dict[str, Any]) -> Dataset:
    details = [_dataset(KVP=ds.KVP, FilterType="WEDGE")]
    if "KVP" in frame_tags:
        details.append(_dataset(KVP=frame_tags["KVP"], FilterType="WEDGE"))
    frame_type = {
        "FrameType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        "PixelPresentation": "MONOCHROME",
        "VolumetricProperties": "VOLUME",
        "VolumeBasedCalculationTechnique": "NONE",
    }
    frame_type |= {k: v for k, v in frame_tags.items() if k != "KVP"}
    groups = {
        "FrameContentSequence": [
            _dataset(
                FrameAcquisitionNumber=1,
                FrameReferenceDateTime="20200102101600",
                FrameAcquisitionDateTime="20200102101600",
                FrameAcquisitionDuration=5.0,
                DimensionIndexValues=[i + 1],
                StackID="1",
                InStackPositionNumber=i + 1,
            )
        ],
        "PlanePositionSequence": [_dataset(ImagePositionPatient=ds.ImagePositionPatient)],
        "PixelValueTransformationSequence": [
            _dataset(
                RescaleSlope=ds.RescaleSlope, RescaleIntercept=ds.RescaleIntercept, RescaleType=ds.RescaleType
            )
        ],
        "CTImageFrameTypeSequence": [_dataset(**frame_type)],
        "CTExposureSequence": [
            _dataset(ExposureInmAs=float(ds.Exposure), XRayTubeCurrentInmA=200.0 + i, CTDIvol=8.0)
        ],
        "CTXRayDetailsSequence": details,
    }
    return _dataset(**groups)
