"""The CSV in which a user says which full-dose series goes with which low-dose one."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldct_dist.ct.headers import is_dicom
from ldct_dist.errors import UserError
from ldct_dist.store.record import WORD

NEEDED = ("case", "patient", "full", "low")
OPTIONAL = ("dose", "split")
_WORD = re.compile(rf"(?!zarr\.json$){WORD}", re.IGNORECASE)  # zarr.json is Zarr's own


@dataclass(frozen=True)
class Row:
    """One case to be. full, low: folders, of one series or of several to choose from, or files of enhanced CT; low: None, to
    be simulated. dose: of `low`, as a fraction of the full dose; None, like split, where the CSV is silent."""

    where: str
    case: str
    patient: str
    full: Path
    low: Path | None
    dose: float | None
    split: str | None


def read_manifest(path: Path) -> tuple[list[Row], list[UserError]]:
    """The rows of the CSV at `path`, and one UserError for each that cannot be used.

    Columns: case, patient, full, low and, if wanted, dose and split; folders count from the CSV's own.
    Raises UserError if `path` is no CSV with these columns.
    """
    try:
        if is_dicom(path):
            raise UserError(
                f"{path}: a DICOM file; give the folder that holds the series, or a manifest (CSV)"
            )
        with open(path, newline="", encoding="utf-8-sig") as f:  # Excel begins its CSVs with a BOM
            lines = csv.DictReader(f)
            _check_columns(path, lines.fieldnames or [])
            # Spreadsheets add empty ones.
            numbered = [(lines.line_num, line) for line in lines if any(line.values())]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path}: not readable as a CSV ({e}); save it as CSV in UTF-8") from e
    rows: list[Row] = []
    refused: list[UserError] = []
    for number, line in numbered:
        try:
            rows.append(_row(path, number, line))
        except UserError as e:
            refused.append(e)
    return rows, refused


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    missing = [c for c in NEEDED if c not in columns]
    unknown = [c for c in columns if c not in NEEDED + OPTIONAL]
    if missing or unknown:
        faults = [f"no column {c!r}" for c in missing] + [f"unknown column {c!r}" for c in unknown]
        raise UserError(
            f"{path}: {', '.join(faults)}; the columns of a manifest are {', '.join(NEEDED)} and, optionally, "
            f"{' and '.join(OPTIONAL)}, separated by commas"
        )


def _row(path: Path, number: int, line: dict[str, str | None]) -> Row:
    where = f"{path}, line {number}"
    if None in line.values() or None in line:
        raise UserError(f"{where}: not as many fields as the first line has; correct it")
    cells = {column: (value or "").strip() for column, value in line.items()}
    for column in ("patient", "full"):
        if not cells[column]:
            raise UserError(f"{where}: no {column}; fill it in")
    for column in ("case", "split"):
        if cells.get(column, column) and not _WORD.fullmatch(cells.get(column, column)):
            raise UserError(
                f"{where}: {column} {cells[column]!r}; use 1 to 64 letters, digits, dots, hyphens and underscores"
            )
    if not cells["case"]:
        raise UserError(f"{where}: no case; name it, for example scan-{number:03d}")
    return Row(
        where=where,
        case=cells["case"],
        patient=cells["patient"],
        full=path.parent / cells["full"],
        low=path.parent / cells["low"] if cells["low"] else None,
        dose=_dose(where, cells.get("dose", "")),
        split=cells.get("split") or None,
    )


def _dose(where: str, text: str) -> float | None:
    if not text:
        return None
    try:
        dose = float(text)
    except ValueError:
        dose = 0.0
    if not 0.01 <= dose <= 0.99:
        raise UserError(
            f"{where}: dose {text!r}; write a fraction of the full dose from 0.01 to 0.99, such as 0.25"
        )
    return dose
