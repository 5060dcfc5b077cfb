"""What a DICOM file is, if it is no slice of a CT scan in HU."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydicom.uid import CTImageStorage, UID_dictionary

from ldct_dist.ct.headers import Header
from ldct_dist.ct.pixels import rescale
from ldct_dist.errors import UserError

_IMAGE_TYPES = {
    "LOCALIZER": "a localizer (scout view)",
    "MIP|MINIP|MIN_IP": "a maximum or minimum intensity projection",
    "MAT(ERIAL)?_(SPECIFIC|FRACTION(AL)?)|EFF_ATOMIC_NUM|ELECTRON_DENSITY": "a map of a material, not of HU",
}
"""What words of ImageType say of an image, such as CT_SOM5 MIP; those of multi-energy CT: DICOM PS3.3 C.8.2.1.1.1.
Reformats and virtual monoenergetic images are HU, and so are many that call themselves DERIVED."""


class NotAVolume(UserError):
    """By its nature, not by damage: a scout, a dose report, a projection, bolus tracking, another modality."""


def refuse_other_than_ct(headers: Sequence[Header]) -> None:
    """Raises NotAVolume if the series of these headers is something else by its nature, and UserError if a part of it
    is, or if its values are not HU."""
    natures = [_other_nature(h) for h in headers]
    others = [nature for nature in natures if nature is not None]
    if others:
        # One stray image in a series of CT slices is a mistake to correct; the slices must not go unseen with it.
        raise (NotAVolume if len(others) == len(headers) else UserError)(others[0])
    for h in headers:
        if h.modality is None:
            raise UserError(f"{h.path.name}: not CT (Modality missing); export the original CT images")
        if (h.frames or 1) > 1 or "Enhanced" in _sop_class_name(h):
            raise UserError(
                "enhanced (multi-frame) CT is not supported; convert it to one file a slice, as emf2sf of dcm4che does"
            )
        if h.tilt and abs(h.tilt) > 0.1:
            raise UserError(f"gantry tilt of {h.tilt:g} degrees; give a reconstruction without tilt")
        try:
            rescale(h.slope, h.intercept)
        except UserError as e:
            raise UserError(f"{h.path.name}: {e}") from e


def _other_nature(header: Header) -> str | None:
    """What the file is instead of a slice of CT; None if it is one, or a multi-frame CT."""
    if header.modality not in ("CT", None):
        return f"not CT (Modality {header.modality}); nothing to do unless it should be"
    if header.sop_class != CTImageStorage and "Enhanced" not in _sop_class_name(header):
        return f"{header.path.name} is no CT image ({_sop_class_name(header)}); export the original CT images"
    if header.rescale_type not in (None, "HU"):
        return f"RescaleType {header.rescale_type}: its values are not HU; give the HU reconstruction"
    for pattern, nature in _IMAGE_TYPES.items():
        if re.search(rf"(?<![A-Z])({pattern})(?![A-Z])", (header.image_type or "").upper()):
            return f"{header.path.name} is {nature}; give the axial slices alone"
    return None


def _sop_class_name(header: Header) -> str:
    return UID_dictionary.get(header.sop_class or "", (header.sop_class or "no SOP class",))[0]
