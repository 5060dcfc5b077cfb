"""Which full-dose series goes with which low-dose one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ldct_dist.config import Config
from ldct_dist.ct.dicom import Series, find_series
from ldct_dist.errors import UserError


class PairingConfig(Config):
    """How the source folder is laid out, and which series to take where a patient has several."""

    layout: Literal["simulate"] = "simulate"
    """simulate: every series is full dose, and its low dose is simulated"""


@dataclass(frozen=True)
class Pair:
    """One case to be: low is None where it is to be simulated; name and split where the source says them."""

    full: Series
    low: Series | None = None
    name: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Refusal:
    """Something in the source that will not become a case, and why."""

    where: str
    reason: str


def find_pairs(source: Path, config: PairingConfig) -> tuple[list[Pair], list[Refusal]]:
    """The cases that `source` offers, and what was refused. Raises UserError if it offers nothing at all."""
    series, errors = find_series(source)
    refused = [Refusal(str(source), str(e)) for e in errors]
    if not series and not refused:
        raise UserError(f"{source}: no DICOM files below it")
    return [Pair(s) for s in series], refused
