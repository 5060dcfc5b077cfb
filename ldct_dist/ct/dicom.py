"""CT series found in folders and read as Volumes, or refused in one line each."""

from __future__ import annotations

import filecmp
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
from pydicom import Dataset

from ldct_dist.ct.geometry import SAME_PLACE_MM, Vector, stack
from ldct_dist.ct.headers import Header, UnknownSeries, read_headers
from ldct_dist.ct.nature import NotAVolume, refuse_other_than_ct
from ldct_dist.ct.pixels import Slice, read_dataset, read_slice
from ldct_dist.ct.stored import Stored
from ldct_dist.ct.unity import refuse_incomplete, refuse_mixed
from ldct_dist.ct.volume import Acquisition, Volume, is_axial
from ldct_dist.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Series:
    """A CT series whose headers make a regular stack; its pixels are not read yet.

    slices: one file each, or one frame of a file, in the order of the Volume: positions (mm along the slice normal) ascend,
    towards the head for axial series. patient_id is the patient's real one: hash it before storing it. derivation: how the series was made, if
    not by a scanner. spacing, origin and direction: as in Volume.
    """

    slices: tuple[Stored, ...]
    series_uid: str
    study_uid: str | None
    patient_id: str
    description: str | None
    derivation: str | None
    acquisition: Acquisition
    shape: tuple[int, int, int]
    positions: tuple[float, ...]
    spacing: Vector
    origin: Vector
    direction: tuple[Vector, Vector, Vector]

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(stored.path for stored in self.slices)

    @property
    def place(self) -> Path:
        """The folder of its files; if all of it is in one file, that file."""
        paths = set(self.paths)
        return paths.pop() if len(paths) == 1 else self.paths[0].parent

    @property
    def name(self) -> str:
        """How errors call the series: its folder, description and UID."""
        return _name(self.paths, self.description, self.series_uid)

    @property
    def is_own_output(self) -> bool:
        """Whether this package denoised it or simulated its dose."""
        return "ldct_dist" in (self.derivation or "")


ReadHeaders = Callable[[Sequence[Path]], Iterable[Header | UserError]]


def find_series(
    folder: Path | str,
    read_headers: ReadHeaders = read_headers,
    skip: Callable[[str], bool] = lambda name: False,
) -> tuple[list[Series], list[UserError]]:
    """The usable CT series anywhere below `folder`, or in that one file, and one UserError for each series or file refused.

    Only headers are read, by `read_headers` if that is given, such as in several processes. Files that are
    not DICOM are passed over, and so are exact copies of others, hidden folders, and those whose name `skip` knows. Both
    lists are in order of path.
    Raises UserError if `folder` is neither.
    """
    folder = Path(folder)
    if not (os.path.isdir(folder) or os.path.isfile(folder)):  # Path's own would raise PermissionError
        raise UserError(
            f"{folder}: no such folder, or it may not be read; give the folder that holds the DICOM files"
        )
    groups: dict[str, list[Header]] = {}
    refused: list[UserError] = []
    paths = list(_files_below(folder, refused.append, skip)) if os.path.isdir(folder) else [folder]
    for outcome in read_headers(paths):
        if isinstance(outcome, UserError):
            refused.append(outcome)
        else:
            groups.setdefault(outcome.series_uid, []).append(outcome)
    found: list[Series] = []
    for headers in map(_without_copies, groups.values()):
        try:
            found.append(_series(headers))
        except UserError as e:
            name = _name([h.path for h in headers], headers[0].description, headers[0].series_uid)
            refused.append(type(e)(f"{name}: {e}"))
    return found, refused


def sound_series(folder: Path | str, notice: Callable[[str], None] = lambda line: None) -> list[Series]:
    """The CT series below `folder`.

    What is no volume by its nature, such as the scouts in clinical exports, is passed over. `notice` is told of that, and
    of series that are not axial or that this package has made. Raises UserError if there is no series, or if anything
    else was refused: an unreadable file may be a slice that a series now lacks.
    """
    found, refused = find_series(folder)
    damaged = [e for e in refused if not isinstance(e, NotAVolume)]
    if damaged:
        others = (
            f" ({len(found)} other series are usable: move it out of {folder} to use them)" if found else ""
        )
        raise UserError(f"{damaged[0]}{others}")
    if not found:
        raise (
            refused[0]
            if refused
            else UserError(f"{folder}: no CT series in it; give the folder that holds the DICOM files")
        )
    for e in refused:
        notice(f"passed over: {e}")
    for series in found:
        if series.is_own_output:
            notice(f"made by ldct_dist from a scan, not a scan itself: {series.name}")
        if not is_axial(series.direction):
            notice(f"not axial, which scans and a network's training data are: {series.name}")
    return found


def one_series(folder: Path | str, notice: Callable[[str], None] = lambda line: None) -> Series:
    """The only CT series below `folder`. Raises UserError as `sound_series` does, and if there are several."""
    found = sound_series(folder, notice)
    if len(found) > 1:
        raise UserError(f"{folder}: {len(found)} CT series below it; give the folder of one of them")
    return found[0]


def read_series(series: Series) -> Volume:
    """The series' HU, padding and everything below AIR_HU as AIR_HU.

    Raises UserError, naming the file, for pixel data that is truncated or cannot be made int16 HU.
    """
    slices = (_slice(series, stored) for stored in series.slices)
    first = next(slices)  # before memory is taken: it shows whether Rows and Columns, of all slices, are true
    hu = np.empty(series.shape, np.int16)
    for slice_, target in zip(chain([first], slices), hu, strict=True):
        slice_.meaning.write_hu(slice_.patterns, target)
    return Volume(hu, series.spacing, series.origin, series.direction, series.acquisition)


def read_slices(series: Series) -> Iterator[tuple[Dataset, Slice]]:
    """Each slice's dataset and values, in the order of the Volume. Raises as read_series does."""
    for stored in series.slices:
        slice_ = _slice(series, stored)
        yield read_dataset(stored), slice_


def _slice(series: Series, stored: Stored) -> Slice:
    slice_ = read_slice(stored)
    if slice_.patterns.shape != series.shape[1:]:
        raise UserError(
            f"{stored.path}: its compressed pixels are of another size than Rows and Columns say; export the file again"
        )
    return slice_


def _files_below(
    folder: Path, refuse: Callable[[UserError], object], skip: Callable[[str], bool] = lambda name: False
) -> Iterator[Path]:
    """The files that `find_series` looks into; `refuse` hears of folders that cannot be read."""
    seen = set()
    waiting = [os.fspath(folder)]
    while waiting:
        parent = waiting.pop()
        real = os.path.realpath(parent)
        if real in seen:  # a link back into the tree would repeat its slices, or never end
            continue
        seen.add(real)
        try:
            with os.scandir(parent) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as e:
            refuse(UnknownSeries(f"{e.filename}: {e.strerror}; make the folder readable or remove it"))
            continue
        folders = [entry for entry in found if _is_folder(entry)]
        # Hidden: .snapshot and .Trash hold other copies of the same slices.
        waiting += [e.path for e in reversed(folders) if not (e.name.startswith(".") or skip(e.name))]
        yield from (Path(e.path) for e in found if not _is_folder(e) and _to_be_read(e))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to where one may not look
        return False


def _to_be_read(entry: os.DirEntry[str]) -> bool:
    """No pipe, which one would wait for. What cannot be looked at, such as a link to a slice that was not fetched, is:
    reading it says why."""
    try:
        # As the folder's listing says: to look at millions of files, one by one, takes a shared file system an hour.
        return entry.is_file(follow_symlinks=False) or stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return True


def _name(paths: Sequence[Path], description: str | None, series_uid: str) -> str:
    folder = os.path.commonpath([path.parent for path in paths])
    return (
        f"{folder}: series {description!r} ({series_uid})"
        if description
        else f"{folder}: series {series_uid}"
    )


def _without_copies(headers: Sequence[Header]) -> list[Header]:
    """Without the slices of files that are exact copies of others, as exports have them where a folder was copied twice."""
    kept: dict[tuple[Any, ...], list[Path]] = {}
    copies: set[Path] = set()
    for path, header in {h.path: h for h in headers}.items():
        # With the position: some anonymisers give all slices one UID, and each would be compared with all others.
        alike = kept.setdefault((header.instance_uid, header.position, header.stored.size), [])
        if any(_same_bytes(path, other) for other in alike):
            copies.add(path)
        else:
            alike.append(path)
    return [h for h in headers if h.path not in copies]


def _same_bytes(a: Path, b: Path) -> bool:
    try:
        return filecmp.cmp(a, b, shallow=False)
    except OSError:  # gone since, or out of reach: they are refused, as two different files in one place are
        return False


def _series(headers: Sequence[Header]) -> Series:
    refuse_other_than_ct(headers)
    folder = os.path.join(os.path.commonpath([h.path.parent for h in headers]), "")
    # Not the files' own names, which files of two folders often share.
    names = [h.stored.called(str(h.path).removeprefix(folder)) for h in headers]
    refuse_incomplete(headers)
    refuse_mixed(headers, names)
    first = headers[0]
    for h in headers:
        _required(h.instance_uid, "SOPInstanceUID", h)  # which a series derived from this one refers to
    positions = [_required(h.position, "ImagePositionPatient", h) for h in headers]
    orientation = _required(first.orientation, "ImageOrientationPatient", first)
    pixel_spacing = _required(first.pixel_spacing, "PixelSpacing", first)
    rows, columns = _required(first.matrix, "Rows and Columns", first)
    if max(math.dist(position, positions[0]) for position in positions) < SAME_PLACE_MM:
        raise NotAVolume(
            "a single slice, or the same place again and again (bolus tracking), is no volume; give the whole series"
        )
    grid = stack(positions, orientation, pixel_spacing, names)
    return Series(
        slices=tuple(headers[i].stored for i in grid.order),
        series_uid=first.series_uid,
        study_uid=first.study_uid,
        patient_id=first.patient_id or "",
        description=first.description,
        derivation=first.derivation,
        acquisition=_acquisition(headers),
        shape=(len(headers), rows, columns),
        positions=grid.positions,
        spacing=grid.spacing,
        origin=grid.origin,
        direction=grid.direction,
    )


def _required(value: T | None, keyword: str, header: Header) -> T:
    if value is None:
        raise UserError(f"no usable {keyword} in {header.name}; export the original CT images")
    return value


def _acquisition(headers: Sequence[Header]) -> Acquisition:
    """Facts on which all slices agree; tube current modulation varies the exposure, so its mean."""
    exposures = [h.exposure_mas for h in headers if h.exposure_mas is not None]
    return Acquisition(
        manufacturer=_agreed([h.manufacturer for h in headers]),
        model=_agreed([h.model for h in headers]),
        kernel=_agreed([h.kernel for h in headers]),
        kvp=_agreed([h.kvp for h in headers]),
        exposure_mas=fmean(exposures) if exposures else None,
        slice_thickness_mm=_agreed([h.thickness for h in headers]),
        source_mm=_agreed([h.source_mm for h in headers]),
    )


def _agreed(values: Sequence[T | None]) -> T | None:
    return values[0] if all(v == values[0] for v in values) else None
