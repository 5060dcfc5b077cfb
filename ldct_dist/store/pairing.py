"""Which full-dose series goes with which low-dose one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from pydantic import Field

from ldct_dist.config import Config
from ldct_dist.ct.dicom import Series, find_series
from ldct_dist.ct.headers import Header, UnknownSeries, read_headers
from ldct_dist.ct.nature import NotAVolume
from ldct_dist.errors import UserError, few
from ldct_dist.store.conventions import FOLDERS, is_projections
from ldct_dist.store.manifest import Row, read_manifest
from ldct_dist.store.paircheck import PairCheckConfig, check_grid
from ldct_dist.store.privacy import names_patient

S = TypeVar("S")
T = TypeVar("T")

_THICKNESS_TOLERANCE_MM = 0.05
_BATCH = 32  # files whose headers a process reads at a time, at most: of enhanced CT, each may have thousands
_SAYS_LOW = re.compile(
    r"(low|reduced|quarter)[ _-]?dose|(?<![a-z])(low|reduced|quarter)[ _-]?\d+mm",  # none is "Flow 5mm"
    re.IGNORECASE,
)


class PairingConfig(Config):
    """How the source is laid out, and which series to take where a patient has several."""

    layout: Literal["auto", "manifest", "mayo2016", "tcia", "simulate"] = "auto"
    """manifest: a CSV with the columns case, patient, full, low and, if wanted, dose and split. mayo2016: folders
    such as full_1mm/L067 and quarter_1mm/L067. tcia: LDCT-and-Projection-data, by its folders PATIENT/STUDY/SERIES or
    by SeriesDescription. simulate: every series is full dose, and its low dose is simulated. auto: whichever of these
    it looks like"""
    kernel: str | None = None
    """take only series with this kernel (shell wildcards, such as B30*)"""
    thickness_mm: float | None = Field(None, gt=0)
    """take only series with slices this thick"""
    dose: float | None = Field(None, gt=0, lt=1)
    """take only pairs whose low dose is this fraction of the full dose"""
    check: PairCheckConfig = PairCheckConfig()


@dataclass(frozen=True)
class Pair:
    """The series of a case that is to be made. patient: as the source names them. low: None if it is to be simulated. dose:
    of `low`, as a fraction. name, dose and split: None where the source does not say."""

    full: Series
    patient: str
    low: Series | None = None
    name: str | None = None
    dose: float | None = None
    split: str | None = None


@dataclass(frozen=True)
class Refusal:
    """Something in the source that will not become a case, and why. harmless: it is no volume by its nature, such as a scout,
    so nothing is lost with it."""

    where: str
    reason: str
    harmless: bool = False


class Map(Protocol):
    """The builtin `map`, or one that distributes the items over processes."""

    def __call__(self, function: Callable[[S], T], items: Sequence[S], /) -> Iterable[T]: ...


def find_pairs(source: Path, config: PairingConfig, share_out: Map = map) -> tuple[list[Pair], list[Refusal]]:
    """(the cases in `source`, what was refused, the harmless last).

    It reads headers, by way of `share_out`, but no pixels. Raises UserError if there is nothing at all, or if `source` is
    not what config.layout says.
    """
    if source.is_file():
        if config.layout not in ("auto", "manifest"):
            raise UserError(f"{source}: a file, but pairing.layout={config.layout} takes a folder")
        pairs, refused = _by_manifest(source, config, share_out)
    elif config.layout == "manifest":
        raise UserError(f"{source}: not a file; pairing.layout=manifest takes the CSV itself as the source")
    else:
        pairs, refused = _by_folders(source, config, share_out)
    found = bool(pairs or refused)
    pairs = [p for p in pairs if config.dose is None or p.low is None or p.dose == config.dose]
    sound, mismatched = _check_grids(pairs, config.check)
    if not (sound or mismatched or refused):
        raise UserError(
            f"{source}: no series matches pairing.kernel, pairing.thickness_mm and pairing.dose"
            if found
            else f"{source}: no DICOM files below it"
        )
    return sound, sorted(refused + mismatched, key=lambda refusal: refusal.harmless)


def _by_folders(source: Path, config: PairingConfig, share_out: Map) -> tuple[list[Pair], list[Refusal]]:
    def read(paths: Sequence[Path]) -> Iterable[Header | UserError]:
        size = max(1, min(_BATCH, len(paths) // 256))
        batches = [paths[i : i + size] for i in range(0, len(paths), size)]
        return chain.from_iterable(share_out(read_headers, batches))

    series, errors = find_series(source, read, is_projections)
    layout = _recognised(series, source) if config.layout == "auto" else config.layout
    refused = [Refusal(str(source), str(e), isinstance(e, NotAVolume)) for e in errors]
    if not series and not refused:
        raise UserError(f"{source}: no DICOM files below it")
    wanted = [s for s in series if _wanted(s, config)]
    if series and not wanted:
        kernels, slices = sorted({_kernel(s) for s in series}), sorted({_thickness(s) for s in series})
        raise UserError(
            f"{source}: none of its {len(series)} series matches pairing.kernel and pairing.thickness_mm; there are the "
            f"kernels {few(kernels, ', ')}, and slices of {few([f'{mm:g}' for mm in slices], ', ')} mm"
        )
    if layout == "simulate":
        pairs = []
        for one in wanted:
            if config.layout == "auto" and _SAYS_LOW.search(one.description or ""):
                refused.append(Refusal(_folder(one), _not_full(one, "its description says low dose")))
            else:
                pairs.append(Pair(one, one.patient_id))
        return pairs, refused
    pairs, unpaired = _by_patient(wanted, layout)
    return pairs, refused + unpaired


def _recognised(series: Sequence[Series], source: Path) -> str:
    """The layout that the series show: that of a collection as soon as one series has low dose in it, else "simulate".

    Raises UserError where a series would be taken for full dose although its folder says low dose, or although this
    package has simulated or denoised it.
    """
    for name, folders in FOLDERS.items():
        places = (folders.place(s) for s in series)
        if any(place and place[0] == "low" for place in places):
            return name
    for one in series:
        if _SAYS_LOW.search(str(one.place.relative_to(source))):
            raise UserError(_not_full(one, "its folder or file says low dose, but the layout is unknown"))
        if one.is_own_output:
            raise UserError(_not_full(one, "made by ldct_dist, so not a full dose"))
    return "simulate"


def _not_full(series: Series, why: str) -> str:
    return f"{series.name}: {why}; pair it by a manifest, or set pairing.layout=simulate to take every series as full dose"


def _by_patient(series: Sequence[Series], layout: str) -> tuple[list[Pair], list[Refusal]]:
    folders = FOLDERS[layout]
    pairs: list[Pair] = []
    refused: list[Refusal] = []
    groups: dict[str, dict[str, list[Series]]] = {}
    for one in series:
        if place := folders.place(one):
            role, patient = place
            groups.setdefault(patient, {"full": [], "low": []})[role].append(one)
        else:
            why = (
                f"{one.name}: in the layout {layout}, which others here have, nothing says whether it is full or low dose; "
                "ingest it from a folder apart, or pair all by a manifest"
            )
            refused.append(Refusal(_folder(one), why))
    for patient, group in groups.items():
        try:
            full, low = (_only(group[role], f"{patient}, {role} dose") for role in ("full", "low"))
        except UserError as e:
            refused.append(Refusal(patient, str(e)))
        else:
            pairs.append(Pair(full, patient, low, dose=folders.dose(patient)))
    return pairs, refused


def _by_manifest(path: Path, config: PairingConfig, share_out: Map) -> tuple[list[Pair], list[Refusal]]:
    rows, errors = read_manifest(path)
    pairs: list[Pair] = []
    refused = [Refusal(str(path), str(e)) for e in errors]
    if not rows and not refused:
        raise UserError(f"{path}: no rows; write one per case")
    if config.dose is not None:
        rows = [row for row in rows if row.dose in (None, config.dose)]
    taken: set[str] = set()
    for row, found in zip(rows, share_out(partial(_pair_of, config), rows), strict=True):
        if row.case in taken:
            found = UserError(f"case {row.case} is listed twice; list each once, or set pairing.dose")
        if isinstance(found, UserError):
            refused.append(Refusal(row.where, f"{row.where}: {found}"))
        else:
            taken.add(row.case)
            pairs.append(found)
    return pairs, refused


def _pair_of(config: PairingConfig, row: Row) -> Pair | UserError:
    """The pair that the row describes, or why there is none."""
    if config.dose is not None and row.low is not None and row.dose is None:
        return UserError("no dose, which pairing.dose needs; fill it in")
    try:
        full, low = (_series_in(folder, config) if folder else None for folder in (row.full, row.low))
    except UserError as e:
        return e
    assert full is not None
    if names_patient(row.case, full.slices[0], (row.patient, full.patient_id)):
        return UserError(
            f"case {row.case} names the patient, and the store would show that to everybody; rename it"
        )
    return Pair(full, row.patient, low, row.case, row.dose, row.split)


def _series_in(folder: Path, config: PairingConfig) -> Series:
    found, refused = find_series(folder)
    wanted = [s for s in found if _wanted(s, config)]
    damaging = [e for e in refused if not wanted or isinstance(e, UnknownSeries)]
    if damaging:
        raise damaging[0]
    return _only(wanted, str(folder))


def _wanted(series: Series, config: PairingConfig) -> bool:
    if config.kernel is not None and not fnmatchcase(series.acquisition.kernel or "", config.kernel):
        return False
    return (
        config.thickness_mm is None
        or abs(_thickness(series) - config.thickness_mm) <= _THICKNESS_TOLERANCE_MM
    )


def _kernel(series: Series) -> str:
    return series.acquisition.kernel or "unknown"


def _thickness(series: Series) -> float:
    """Slice thickness in mm; where the tag is missing, the distance between slices."""
    return series.acquisition.slice_thickness_mm or series.spacing[0]


def _only(series: Sequence[Series], what: str) -> Series:
    if not series:
        raise UserError(
            f"{what}: no usable series; check the folder, and pairing.kernel and thickness_mm if set"
        )
    if len(series) > 1:
        choices = "; ".join(f"{_folder(s)} (kernel {_kernel(s)}, {_thickness(s):g} mm)" for s in series)
        raise UserError(
            f"{what}: {len(series)} series to choose from, {choices}; set pairing.kernel or pairing.thickness_mm"
        )
    return series[0]


def _folder(series: Series) -> str:
    return str(series.place)


def _check_grids(pairs: Sequence[Pair], limits: PairCheckConfig) -> tuple[list[Pair], list[Refusal]]:
    sound: list[Pair] = []
    refused: list[Refusal] = []
    for pair in pairs:
        try:
            if pair.low is not None:
                check_grid(pair.full, pair.low, limits)
        except UserError as e:
            where = pair.name or _folder(pair.full)
            refused.append(Refusal(where, f"{where}: {e}"))
        else:
            sound.append(pair)
    return sound, refused
