"""Functional groups of multi-frame CT as the elements that a single-frame image has.

A multi-frame file states once what all its frames share, and for each frame what differs, in functional groups (DICOM
PS3.3 C.7.6.16; those of CT: A.38, C.8.15.3; of series converted from single frames: A.70). A single-frame image has the
same elements as its own, most of them under the same names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pydicom import Dataset
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.tag import BaseTag
from pydicom.valuerep import format_number_as_ds

from ldct_dist.ct.values import number, text

_GROUPS = (
    *("PixelMeasuresSequence", "PlanePositionSequence", "PlaneOrientationSequence"),
    *("PixelValueTransformationSequence", "FrameVOILUTSequence", "FrameContentSequence"),
    *("FrameAnatomySequence", "IrradiationEventIdentificationSequence"),
    *("CTImageFrameTypeSequence", "CTAcquisitionDetailsSequence", "CTTableDynamicsSequence"),
    *("CTPositionSequence", "CTGeometrySequence", "CTReconstructionSequence", "CTExposureSequence"),
    *("CTXRayDetailsSequence", "CTAcquisitionTypeSequence"),
    *("CardiacSynchronizationSequence", "RespiratorySynchronizationSequence"),
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
"""What no group says instead of the file"""

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

_TRIVIAL = ("", "NONE", "VOLUME", "AXIAL")
"""Values of Frame Type and the like that say no more than that there are slices"""

_NEVER_ABSENT = ("KVP", "AcquisitionNumber", "SliceThickness", "PositionReferenceIndicator")
"""What a single-frame image has even if it is not known, then empty (type 2)"""

_OF_STACK = (
    *("StackID", "TemporalPositionIndex", "CardiacCyclePosition", "RespiratoryCyclePosition"),
    *("NominalPercentageOfCardiacPhase", "NominalPercentageOfRespiratoryPhase"),
)
"""What frames of one volume have in common"""


class Elements(NamedTuple):
    """Elements of single-frame images. shared: what all frames of a file have. own: what each has instead, or besides.
    stacks: for each a text that is the same for frames of one stack, time and phase."""

    shared: Dataset
    own: list[Dataset]
    stacks: list[str]


def flatten(whole: Dataset, shared_groups: Dataset, groups: Sequence[Dataset]) -> Elements:
    """What `whole`, a multi-frame file, says of its frames, by itself, by the groups that they share and by those of each."""
    shared = _elements(shared_groups, whole)
    own = [_elements(item, whole) for item in groups]
    stacks = [" ".join(_said(k, elements, shared) or "-" for k in _OF_STACK) for elements in own]
    for elements in own:
        elements.ImageType = _image_type(elements, shared, whole)
    everything = _like(whole)
    everything.update({element.tag: element for element in whole.elements()})
    everything.update(shared)
    for keyword in _NEVER_ABSENT:
        if keyword not in everything:
            setattr(everything, keyword, None)
    return Elements(_of_single_frame(everything), [_of_single_frame(elements) for elements in own], stacks)


def _elements(groups: Dataset, whole: Dataset) -> Dataset:
    """The elements of all of the functional groups, under the names that they have in a single-frame image."""
    elements = _like(whole)
    for keyword in filter(groups.__contains__, _GROUPS):
        # Each of two X-ray sources has a part of the exposure.
        elements.update(_agreed(groups[keyword].value, never=keyword == "CTExposureSequence"))
    for keyword in filter(elements.__contains__, _OF_FILE):
        if keyword in whole or keyword == "SpecificCharacterSet":
            del elements[keyword]
    derivations = (
        text(item, "DerivationDescription") for item in groups.get("DerivationImageSequence") or ()
    )
    if derived := "; ".join(dict.fromkeys(filter(None, derivations))):
        elements.DerivationDescription = derived
    for enhanced in filter(elements.__contains__, _RENAMED):
        _rename(elements, enhanced, _RENAMED[enhanced])
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
    possible = not (others and never)
    # Converted, as the item's own character set is not that of the file.
    agreed = {e.tag: possible and all(e == other.get(e.tag) for other in others) for e in first}
    return {e.tag: e if agreed[e.tag] else DataElement(e.tag, e.VR, None) for e in first}


def _said(keyword: str, *datasets: Dataset) -> str | None:
    """What the first of the datasets says that says something."""
    return next(filter(None, (text(ds, keyword) for ds in datasets if keyword in ds)), None)


def _image_type(own: Dataset, shared: Dataset, whole: Dataset) -> list[str]:
    """Image Type from Frame Type and what belongs to it (PS3.3 C.8.16.1, C.8.16.2.1, C.8.15.3.3), and from the Image Type
    that a frame had before its series was converted.

    Of single frames, the third value says only whether they are slices (C.8.2.1.1.1).
    """
    frame_type = _said("FrameType", own, shared) or _said("ImageType", whole) or ""
    first, second, *values = [*frame_type.split("\\"), ""]
    values += (_said("ImageType", own, shared) or "").split("\\")[2:]
    values += [
        _said(k, own, shared, whole) or ""
        for k in ("VolumetricProperties", "VolumeBasedCalculationTechnique")
    ]
    scout = "LOCALIZER" in values or _said("AcquisitionType", own, shared) == "CONSTANT_ANGLE"
    others = [value for value in dict.fromkeys(values) if value not in _TRIVIAL]
    return [first, second, "LOCALIZER" if scout else "AXIAL", *others]


def _rename(elements: Dataset, enhanced: str, single: str) -> None:
    """Give the element `single` what `enhanced` says. Whole numbers have no room for a small exposure, which is not said to
    be 0."""
    value = None
    if (vr := dictionary_VR(single)) in ("IS", "DS"):
        found = number(elements, enhanced) or 0.0
        value = round(found) if vr == "IS" else found and format_number_as_ds(found)
    elif text(elements, enhanced):  # it can be converted
        value = elements[enhanced].value
    if value or single not in elements:
        setattr(elements, single, value or None)


def _of_single_frame(elements: Dataset) -> Dataset:
    for keyword in _OF_MULTI_FRAME:
        if keyword in elements:
            del elements[keyword]
    return elements
