"""Enhanced (multi-frame) CT taken apart: each of its frames as the single-frame CT image that it stands for.

A multi-frame file states once what all its frames share, and for each frame what differs, in functional groups (DICOM
PS3.3 C.7.6.16; those of CT: A.38, C.8.15.3; of series converted from single frames: A.70). A single-frame image has the
same elements as its own, so only this module needs to know of the difference.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pydicom
from pydicom import Dataset
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.encaps import encapsulate, get_frame
from pydicom.tag import BaseTag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
)
from pydicom.valuerep import format_number_as_ds

from ldct_dist.ct.bounds import Bounded
from ldct_dist.ct.values import number, text
from ldct_dist.errors import UserError

MULTI_FRAME = (EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
"""SOP classes"""

_GROUPS = (
    *("PixelMeasuresSequence", "PlanePositionSequence", "PlaneOrientationSequence"),
    *("PixelValueTransformationSequence", "FrameVOILUTSequence", "FrameContentSequence"),
    *("FrameAnatomySequence", "DerivationImageSequence", "IrradiationEventIdentificationSequence"),
    *("CTImageFrameTypeSequence", "CTAcquisitionDetailsSequence", "CTTableDynamicsSequence"),
    *("CTPositionSequence", "CTGeometrySequence", "CTReconstructionSequence", "CTExposureSequence"),
    *("CTXRayDetailsSequence", "UnassignedSharedConvertedAttributesSequence"),
    "UnassignedPerFrameConvertedAttributesSequence",
)
"""The functional groups whose elements are those of a single-frame image"""

_RENAMED = {
    "ExposureInmAs": "Exposure",
    "XRayTubeCurrentInmA": "XRayTubeCurrent",
    "ExposureTimeInms": "ExposureTime",
    "DistanceSourceToDataCollectionCenter": "DistanceSourceToPatient",
    "FrameAcquisitionNumber": "AcquisitionNumber",
    "FrameAcquisitionDateTime": "AcquisitionDateTime",
    "FrameComments": "ImageComments",
}
"""What single-frame images call the same; whole numbers there, where their VR is IS"""

_OF_MULTI_FRAME = (
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "NumberOfFrames"),
    *("DimensionOrganizationSequence", "DimensionOrganizationType", "DimensionIndexSequence"),
    *("ReferencedImageEvidenceSequence", "SourceImageEvidenceSequence", "PresentationLUTShape"),
    *("ConcatenationUID", "InConcatenationNumber", "InConcatenationTotalNumber"),
    *("ConcatenationFrameOffsetNumber", "SOPInstanceUIDOfConcatenationSource"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *("FrameType", "PixelPresentation", "VolumetricProperties", "VolumeBasedCalculationTechnique"),
    *("FrameReferenceDateTime", "FrameAcquisitionDuration", "FrameLabel", "FrameLaterality"),
    *("DimensionIndexValues", "StackID", "InStackPositionNumber", "TemporalPositionIndex"),
    *("CardiacCyclePosition", "RespiratoryCyclePosition", *_RENAMED),
)
"""Elements that a single-frame image does not have"""

_PIXEL_DATA = (0x7FE0, 0x0010)
_UNDEFINED = 0xFFFFFFFF


@dataclass(frozen=True)
class MultiFrame:
    """A multi-frame file but for its pixels, in the elements of single-frame images.

    shared: what holds for every frame; own: what each frame has instead or besides. start: offset in the file at which
    the pixels begin; length: of one frame's, in bytes, None where they are compressed. offsets: the extended offset table
    of compressed pixels, where there is one.
    """

    path: Path
    shared: Dataset
    own: tuple[Dataset, ...]
    start: int
    length: int | None
    offsets: tuple[bytes, bytes] | None

    def frame(self, index: int) -> Dataset:
        """Frame `index`, counted from 0, with its pixels. It keeps the SOP class and UID of the whole, whose part it is.

        Raises what pydicom does on damaged bytes.
        """
        single = deepcopy(self.shared)
        single.update(deepcopy(self.own[index]))
        with self.path.open("rb") as f:
            f.seek(self.start)
            if self.length is None:
                frame = get_frame(f, index, number_of_frames=len(self.own), extended_offsets=self.offsets)
                single.add_new("PixelData", "OB", encapsulate([frame]))
            else:
                f.seek(index * self.length, 1)
                single.add_new("PixelData", "OW", f.read(self.length))
        return single


@lru_cache(4)  # its frames are asked for one by one
def read_multi_frame(path: Path, changed: int) -> MultiFrame:
    """The file at `path`, last changed at `changed`, ns, so that another file there is not taken for it.

    Raises UserError where frames and functional groups do not match, or values are colours; on damaged bytes, what
    pydicom does.
    """
    with Bounded(path.open("rb", buffering=0)) as f:
        whole = pydicom.dcmread(f, stop_before_pixels=True, force=True)
        if whole.file_meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            raise UserError(f"{path}: a deflated multi-frame file; export it without compression")
        start, length = _pixels(path, f, whole)
    if text(whole, "PixelPresentation") not in (None, "MONOCHROME"):
        raise UserError(f"{path}: some of its values are colours, not HU; export the scan's own images")
    groups = whole.get("PerFrameFunctionalGroupsSequence") or ()
    if number(whole, "NumberOfFrames") != len(groups):
        raise UserError(
            f"{path}: NumberOfFrames {text(whole, 'NumberOfFrames')}, but functional groups of {len(groups)} frames; "
            "export the file again"
        )
    first = int(number(whole, "ConcatenationFrameOffsetNumber") or 0) + 1
    own = [_elements_of(item, whole) for item in groups]
    for i, elements in enumerate(own, start=first):
        elements.InstanceNumber = i
    shared = _shared(whole)
    size = None if length == _UNDEFINED else _frame_length(path, shared, length, len(own))
    return MultiFrame(path, shared, tuple(own), start, size, _extended_offsets(whole))


def _pixels(path: Path, f: Bounded, whole: Dataset) -> tuple[int, int]:
    """(offset, length in bytes) of the value of Pixel Data, before which pydicom stopped reading `whole` from `f`."""
    implicit, little = whole.original_encoding
    element = struct.Struct(("<" if little else ">") + ("HHL" if implicit else "HH4xL"))
    head = f.read(element.size)
    if len(head) < element.size or (fields := element.unpack(head))[:2] != _PIXEL_DATA:
        raise UserError(f"{path}: no pixel data, or truncated; export the file again")
    return f.tell(), fields[2]


def _frame_length(path: Path, shared: Dataset, length: int, frames: int) -> int:
    """Bytes of one frame. Raises UserError if the `frames` of the file at `path` do not make up `length` bytes."""
    frame = 2 * int((number(shared, "Rows") or 0) * (number(shared, "Columns") or 0))
    if not frame:
        raise UserError(f"{path}: no usable Rows and Columns; export the file again")
    if length < frames * frame:
        raise UserError(f"{path}: truncated pixel data; export the file again")
    if length > frames * frame + 1:
        raise UserError(
            f"{path}: more pixel data than Rows, Columns and NumberOfFrames say; export the file again"
        )
    return frame


def _extended_offsets(whole: Dataset) -> tuple[bytes, bytes] | None:
    table, lengths = whole.get("ExtendedOffsetTable"), whole.get("ExtendedOffsetTableLengths")
    return (table, lengths) if table and lengths else None


def _shared(whole: Dataset) -> Dataset:
    shared = _like(whole)
    shared.file_meta = whole.file_meta
    shared.update({element.tag: element for element in whole.elements()})
    for groups in whole.get("SharedFunctionalGroupsSequence") or ():
        shared.update(_elements_of(groups, whole))
    return _without_enhanced(shared)


def _elements_of(groups: Dataset, whole: Dataset) -> Dataset:
    """The elements of all of the functional groups, under the names that they have in a single-frame image."""
    elements = _like(whole)
    for keyword in _GROUPS:
        elements.update(_agreed(groups.get(keyword) or ()))
    if frame_type := text(elements, "FrameType"):
        elements.ImageType = _image_type(frame_type, text(elements, "VolumeBasedCalculationTechnique"))
    for enhanced, single in _RENAMED.items():
        if (value := _renamed(elements, enhanced, single)) is not None:
            setattr(elements, single, value)
    return _without_enhanced(elements)


def _like(whole: Dataset) -> Dataset:
    """An empty dataset for elements of `whole` as they are in its file, which are converted when they are asked for."""
    empty = Dataset()
    implicit, little = whole.original_encoding
    empty.set_original_encoding(implicit, little, whole.original_character_set)
    return empty


def _agreed(items: Sequence[Dataset]) -> dict[BaseTag, DataElement | RawDataElement]:
    """What all items of a group agree on: of several X-ray sources, each has one."""
    first, *others = items or (Dataset(),)
    return {
        e.tag: e
        for e in first.elements()
        if all(e.tag in other and other.get_item(e.tag).value == e.value for other in others)
    }


def _image_type(frame_type: str, technique: str | None) -> list[str]:
    """Image Type from Frame Type and Volume Based Calculation Technique (PS3.3 C.8.16.1, C.8.16.2.1.3).

    Of single frames, the third value says only whether they are slices (C.8.2.1.1.1).
    """
    first, second, flavour, *others = [*frame_type.split("\\"), "", ""]
    said = [value for value in (*others, technique) if value not in (None, "", "NONE", "VOLUME")]
    return [first, second, "LOCALIZER" if flavour == "LOCALIZER" else "AXIAL", *said]


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


def _without_enhanced(elements: Dataset) -> Dataset:
    for keyword in _OF_MULTI_FRAME:
        if keyword in elements:
            del elements[keyword]
    return elements
