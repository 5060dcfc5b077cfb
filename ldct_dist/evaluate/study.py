"""All methods on all held-out cases: the figures and measurements from which the report is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from ldct_dist.config import Config
from ldct_dist.errors import UserError
from ldct_dist.evaluate.physics.nps import NoisePower
from ldct_dist.evaluate.physics.observer import Detectability
from ldct_dist.evaluate.physics.ttf import Transfer
from ldct_dist.evaluate.protocols import Protocol, protocol_named
from ldct_dist.store.layout import FULL_DOSE, dose_name
from ldct_dist.store.reader import Store


class StudyConfig(Config):
    """What is evaluated, and how.

    split: the cases. protocol: by name; its 3-D form is measured as well. dose: fraction of full dose of the input;
    None: the protocol's own. bf16: how networks calculate. strength: share of what they change. lesion_mm,
    lesion_hu: diameter and contrast of the lesions for the model observer.
    """

    split: str = "test"
    protocol: str = "abdomen"
    dose: float | None = Field(None, gt=0, lt=1)
    bf16: bool = False
    strength: float = Field(1.0, gt=0, le=1)
    lesion_mm: float = Field(6.0, gt=0)
    lesion_hu: float = Field(15.0, ge=-1000, le=3000)


@dataclass(frozen=True)
class Row:
    """One method on one case. figures: protocol -> measure -> value. bias_hu: tissue -> HU.

    conspicuous: share of the body's voxels where the image is off from full dose by more than the noise of full dose
    makes likely; None where that cannot be told. noise_hu: standard deviation in soft tissue; None where there is too
    little of it.
    """

    case: str
    patient: str
    method: str
    figures: dict[str, dict[str, float]]
    bias_hu: dict[str, float] = field(default_factory=dict)
    conspicuous: float | None = None
    noise_hu: float | None = None


@dataclass
class Study:
    """All that was measured. scans: by case, how it was made. weights: by network, the hash of its file. notes: what could
    not be measured, and why."""

    store: str
    fingerprint: str
    dose: float
    protocols: tuple[Protocol, ...]
    config: StudyConfig
    scans: dict[str, dict[str, Any]] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    code_of_others: dict[str, str] = field(default_factory=dict)
    """by network, where it is another package's: see `ModelConfig.origin`"""
    rows: list[Row] = field(default_factory=list)
    nps: dict[str, NoisePower] = field(default_factory=dict)
    nps_case: str | None = None
    phantom_case: str | None = None
    """whose voxels, kernel and noise the phantom got"""
    transfers: dict[str, list[Transfer]] = field(default_factory=dict)
    detection: dict[str, dict[str, Detectability]] = field(default_factory=dict)
    """by method, then by the lesions' shape"""
    pictures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """of the cases that the report shows: see `report.pictures`"""
    notes: list[str] = field(default_factory=list)

    @property
    def nps_regions(self) -> int | None:
        """the same in every image"""
        return next((nps.regions for nps in self.nps.values()), None)

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(row.method for row in self.rows))

    def note(self, words: object) -> None:
        if str(words) not in self.notes:
            self.notes.append(str(words))

    def of(self, method: str) -> list[Row]:
        return [row for row in self.rows if row.method == method]


def evaluated_dose(store: Store, config: StudyConfig) -> float:
    """The dose that is evaluated. Raises UserError if a case of the split does not have it."""
    dose = config.dose or protocol_named(config.protocol).dose
    for case in (store.cases[int(i)] for i in store.split(config.split)):
        if dose_name(dose) not in case.doses:
            whose = "" if config.dose else f", at which protocol {config.protocol} compares"
            lower = [there for there in case.doses if there != FULL_DOSE]
            give = (
                f"give one that it has: --dose {' or '.join(lower)}" if lower else "ingest it with that dose"
            )
            raise UserError(
                f"{store.path}: case {case.name} has doses {', '.join(case.doses)}, not {dose_name(dose)}{whose}; {give}"
            )
    return dose
