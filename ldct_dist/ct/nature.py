"""Recognising DICOM files that are something else than slices of a CT scan in HU."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydicom.uid import CTImageStorage, UID_dictionary

from ldct_dist.ct.headers import Header
from ldct_dist.ct.multiframe import MULTI_FRAME
from ldct_dist.ct.pixels import rescale
from ldct_dist.errors import UserError

_IMAGE_TYPES = {
    "LOCALIZER": "a localizer (scout view)",
    "MIP|MINIP|MAX_IP|MIN_IP|MAXIMUM|MINIMUM": "a maximum or minimum intensity projection",
    "(VOLUME|SURFACE)_RENDER|CURVED_MPR|DISTORTED": "a rendering or a curved reformat",
    "SUBTRACTION|DIVISION|MULTIPLICATION|STD_DEVIATION|MTT|TTP|RCB[FV]|[TZ]_(TEST|SCORE)": "calculated from images",
    "MAT(ERIAL)?_(SPECIFIC|FRACTION(AL)?)|EFF_ATOMIC_NUM|ELECTRON_DENSITY": "a map of a material, not of HU",
}
"""Words in ImageType, such as the MIP of "CT_SOM5 MIP", and what such an image is: DICOM PS3.3 C.8.2.1.1.1 for multi-energy
CT, C.8.16.1.4 and C.8.16.2.1 for calculated ones. Flat reformats and virtual monoenergetic images are not here: they are in
HU, as are many DERIVED images."""


class NotAVolume(UserError):
    """A series that is no volume by its nature, not by damage: a scout, a dose report, a projection, bolus tracking,
    another modality."""


def refuse_other_than_ct(headers: Sequence[Header]) -> None:
    """Raises NotAVolume if all of the series is something else than CT by its nature, and UserError if a part of it is,
    or if its values are not HU."""
    natures = [_other_nature(h) for h in headers]
    others = [nature for nature in natures if nature is not None]
    if others:
        # A stray image among CT slices is a mistake that the user is to correct: the slices must not be passed over.
        raise (NotAVolume if len(others) == len(headers) else UserError)(others[0])
    for h in headers:
        if h.modality is None:
            raise UserError(f"{h.name}: not CT (Modality missing); export the original CT images")
        if (h.frames or 1) > 1:
            raise UserError(
                f"{h.name}: several frames in what says it is a single one; export the original CT images"
            )
        if h.tilt and abs(h.tilt) > 0.1:
            raise UserError(f"gantry tilt of {h.tilt:g} degrees; give a reconstruction without tilt")
        try:
            rescale(h.slope, h.intercept)
        except UserError as e:
            raise UserError(f"{h.name}: {e}") from e


def _other_nature(header: Header) -> str | None:
    """What the file is instead of a CT slice; None if it is one."""
    if header.modality not in ("CT", None):
        return f"not CT (Modality {header.modality}); correct its header if it should be"
    if header.sop_class not in (CTImageStorage, *MULTI_FRAME):
        return f"{header.name} is no CT image ({_sop_class_name(header)}); export the original CT images"
    if header.rescale_type not in (None, "HU"):
        return f"RescaleType {header.rescale_type}: its values are not HU; give the HU reconstruction"
    for pattern, nature in _IMAGE_TYPES.items():
        if re.search(rf"(?<![A-Z])({pattern})(?![A-Z])", (header.image_type or "").upper()):
            return f"{header.name} is {nature}; give the axial slices alone"
    return None


def _sop_class_name(header: Header) -> str:
    return UID_dictionary.get(header.sop_class or "", (header.sop_class or "no SOP class",))[0]
