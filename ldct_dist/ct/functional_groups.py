"""Functional groups of multi-frame CT as the elements that a single-frame image has.

A multi-frame file states once what all its frames share, and for each frame what differs, in functional groups (DICOM
PS3.3 C.7.6.16; those of CT: A.38, C.8.15.3; of series converted from single frames: A.70). A single-frame image has the
same elements as its own, most of them under the same names.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydicom import Dataset
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.tag import BaseTag
from pydicom.valuerep import format_number_as_ds

from ldct_dist.ct.values import number, text

_GROUPS = (
    *("PixelMeasuresSequence", "PlanePositionSequence", "PlaneOrientationSequence"),
    *("PixelValueTransformationSequence", "FrameVOILUTSequence", "FrameContentSequence"),
    *("FrameAnatomySequence", "DerivationImageSequence", "IrradiationEventIdentificationSequence"),
    *("CTImageFrameTypeSequence", "CTAcquisitionDetailsSequence", "CTTableDynamicsSequence"),
    *("CTPositionSequence", "CTGeometrySequence", "CTReconstructionSequence", "CTExposureSequence"),
    *("CTXRayDetailsSequence", "CTAcquisitionTypeSequence", "CardiacSynchronizationSequence"),
    *("UnassignedSharedConvertedAttributesSequence", "UnassignedPerFrameConvertedAttributesSequence"),
)
"""The functional groups whose elements are those of a single-frame image"""

EXACT = {
    "ExposureInmAs": "Exposure",
    "XRayTubeCurrentInmA": "XRayTubeCurrent",
    "ExposureTimeInms": "ExposureTime",
}
"""Numbers that single-frame images have as whole ones, under names that such images may have, too"""

_RENAMED = {
    **EXACT,
    "DistanceSourceToDataCollectionCenter": "DistanceSourceToPatient",
    "FrameAcquisitionNumber": "AcquisitionNumber",
    "FrameAcquisitionDateTime": "AcquisitionDateTime",
    "FrameComments": "ImageComments",
}
"""What single-frame images have under another name"""

_OF_FILE = (
    *("SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"),
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "Modality", "FrameOfReferenceUID"),
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("SamplesPerPixel", "PhotometricInterpretation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
)
"""What only the file says, and no group instead of it"""

_OF_MULTI_FRAME = (
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "NumberOfFrames"),
    *("DimensionOrganizationSequence", "DimensionOrganizationType", "DimensionIndexSequence"),
    *("ReferencedImageEvidenceSequence", "SourceImageEvidenceSequence", "PresentationLUTShape"),
    *("ConcatenationUID", "InConcatenationNumber", "InConcatenationTotalNumber"),
    *("ConcatenationFrameOffsetNumber", "SOPInstanceUIDOfConcatenationSource"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths", "ReferencedSeriesSequence"),
    *("FrameType", "PixelPresentation", "VolumetricProperties", "VolumeBasedCalculationTechnique"),
    *("FrameReferenceDateTime", "FrameAcquisitionDuration", "FrameLabel", "FrameLaterality"),
    *("DimensionIndexValues", "StackID", "InStackPositionNumber", "TemporalPositionIndex"),
    *("CardiacCyclePosition", "RespiratoryCyclePosition", *(set(_RENAMED) - set(EXACT))),
)
"""What a single-frame image does not have, or, of lists as long as the series, has no need of"""

_NEVER_ABSENT = ("KVP", "AcquisitionNumber", "SliceThickness", "PositionReferenceIndicator")
"""What a single-frame image has even if it is not known, then empty (type 2)"""

_OF_STACK = (
    *("StackID", "TemporalPositionIndex", "CardiacCyclePosition", "RespiratoryCyclePosition"),
    "NominalPercentageOfCardiacPhase",
)
"""What frames of one volume have in common"""


def flatten(
    whole: Dataset, shared_groups: Dataset, groups: Sequence[Dataset]
) -> tuple[Dataset, list[Dataset], list[str]]:
    """(what holds for all frames of the file, what each has instead or besides, what tells frames apart that make no volume
    together), from all that the file says, the groups that its frames share and those of each frame.
    """
    shared = _elements(shared_groups, whole)
    own = [_elements(item, whole) for item in groups]
    stacks = [" ".join(text(e, k) or text(shared, k) or "-" for k in _OF_STACK) for e in own]
    for elements in own:
        elements.ImageType = _image_type(elements, shared, whole)
    both = _like(whole)
    both.update({element.tag: element for element in whole.elements()})
    both.update(shared)
    for keyword in _NEVER_ABSENT:
        if keyword not in both:
            setattr(both, keyword, None)
    return _of_single_frame(both), [_of_single_frame(elements) for elements in own], stacks


def _elements(groups: Dataset, whole: Dataset) -> Dataset:
    """The elements of all of the functional groups, under the names that they have in a single-frame image."""
    elements = _like(whole)
    for keyword in _GROUPS:
        items = groups.get(keyword) or ()
        # Each of two X-ray sources has a part of the exposure.
        elements.update(_agreed(items, never=keyword == "CTExposureSequence"))
    for keyword in _OF_FILE:
        if keyword in elements:
            del elements[keyword]
    derivations = (
        text(item, "DerivationDescription") for item in groups.get("DerivationImageSequence") or ()
    )
    if derived := "; ".join(dict.fromkeys(filter(None, derivations))):
        elements.DerivationDescription = derived
    for enhanced, single in _RENAMED.items():
        if enhanced in elements:
            setattr(elements, single, _renamed(elements, enhanced, single))
    return elements


def _like(whole: Dataset) -> Dataset:
    """An empty dataset for elements of `whole` as they are in its file, which are converted when they are asked for."""
    empty = Dataset()
    implicit, little = whole.original_encoding
    empty.set_original_encoding(implicit, little, whole.original_character_set)
    return empty


def _agreed(items: Sequence[Dataset], never: bool) -> dict[BaseTag, DataElement | RawDataElement]:
    """What all items of a group agree on, and empty elements for the rest; for all, if several can `never` agree."""
    first, *others = items or (Dataset(),)
    if not others and "SpecificCharacterSet" not in first:
        return {e.tag: e for e in first.elements()}
    # Converted, as the item's own character set is not that of the file.
    return {
        e.tag: e
        if not (others and never) and all(e == other.get(e.tag) for other in others)
        else DataElement(e.tag, e.VR, None)
        for e in first
    }


def _image_type(own: Dataset, shared: Dataset, whole: Dataset) -> list[str]:
    """Image Type from Frame Type and what belongs to it (PS3.3 C.8.16.1, C.8.16.2.1, C.8.15.3.3).

    Of single frames, the third value says only whether they are slices (C.8.2.1.1.1).
    """

    def said(keyword: str) -> str | None:
        return next(filter(None, (text(ds, keyword) for ds in (own, shared, whole))), None)

    first, second, flavour, *others = [*(said("FrameType") or said("ImageType") or "").split("\\"), "", ""]
    scout = flavour == "LOCALIZER" or said("AcquisitionType") == "CONSTANT_ANGLE"
    others += [said("VolumetricProperties") or "", said("VolumeBasedCalculationTechnique") or ""]
    return [
        *(first, second, "LOCALIZER" if scout else "AXIAL"),
        *(value for value in others if value not in ("", "NONE", "VOLUME", "MIXED")),
    ]


def _renamed(elements: Dataset, enhanced: str, single: str) -> str | int | None:
    """The value of the element `enhanced` as that of `single`; None if there is none, or if it is 0.

    Whole numbers have no room for a small exposure, which is not to be said to be 0.
    """
    value, vr = number(elements, enhanced) or 0.0, dictionary_VR(single)
    if vr == "IS":
        return round(value) or None
    if vr == "DS":
        return format_number_as_ds(value) if value else None
    return text(elements, enhanced)


def _of_single_frame(elements: Dataset) -> Dataset:
    for keyword in _OF_MULTI_FRAME:
        if keyword in elements:
            del elements[keyword]
    return elements
