"""How public collections say which dose a series has, and which patient: by folder names, or in the headers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ldct_dist.ct.dicom import Series
from ldct_dist.ct.headers import SUFFIXES

_MAYO = re.compile(r"(full|quarter)[ _-]?(dose|\d+mm)([ _-](\d+mm|sharp))*", re.IGNORECASE)

Place = tuple[Literal["full", "low"], str]
"""(the role of a series, its patient)."""


def mayo_place(series: Series) -> Place | None:
    """full_1mm/L067, quarter_3mm_sharp/L067 or quarter_dose/L067, with anything above and below; or L067/full_1mm. A file
    that holds all of a series may have such a name, too: L067/full_1mm.dcm. In full_1mm/L067.dcm or L067/full_1mm/1.dcm,
    either may be the patient, so the header says who it is, or else the folder above."""
    place, folders = series.place, series.paths[0].parent.absolute().parts
    one_file = place == series.paths[0]
    parts = (
        (*folders, place.stem if place.suffix.lower() in SUFFIXES else place.name) if one_file else folders
    )
    for i, part in enumerate(parts):
        if match := _MAYO.fullmatch(part):
            if i + 1 < len(folders):
                patient = folders[i + 1]
            elif i + 1 < len(parts):
                patient = series.patient_id or parts[i - 1]
            else:
                patient = parts[i - 1]
            return ("full" if match[1].lower() == "full" else "low"), patient
    return None


def tcia_place(series: Series) -> Place | None:
    """C002/STUDY/1.000000-Full Dose Images-62464; or, where folders are named by UIDs, the same from the headers."""
    parts = series.paths[0].parent.absolute().parts
    of_folder = (parts[-1], parts[-3]) if len(parts) > 3 else ("", "")
    for said, patient in (of_folder, (series.description or "", series.patient_id)):
        if match := re.search(r"(full|low) dose images", said, re.IGNORECASE):
            return ("full" if match[1].lower() == "full" else "low"), patient
    return None


def is_projections(folder: str) -> bool:
    """LDCT-and-Projection-data keeps tens of thousands of projections beside a patient's images."""
    return re.search(r"(full|low) dose projections", folder, re.IGNORECASE) is not None


def tcia_dose(patient: str) -> float:
    """Chests (C...) at 10 %, abdomens (L...) and heads (N...) at 25 %: Moen et al., Med Phys 48 (2021)."""
    return 0.10 if patient.upper().startswith("C") else 0.25


@dataclass(frozen=True)
class Folders:
    place: Callable[[Series], Place | None]
    dose: Callable[[str], float]


FOLDERS = {
    "mayo2016": Folders(mayo_place, lambda patient: 0.25),
    "tcia": Folders(tcia_place, tcia_dose),
}
