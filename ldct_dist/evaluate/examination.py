"""Every method on every held-out case, and on a phantom: findings that do not depend on each other.

So they may be made in any order, by several processes, and a kill loses only those in work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ldct_dist.ct.dose import UnknownNoiseError
from ldct_dist.ct.dose_config import seed_of
from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError, few
from ldct_dist.evaluate.classify import Samples
from ldct_dist.evaluate.methods import FULL, Method, apply
from ldct_dist.evaluate.metrics import MEASURES, evaluate_volume
from ldct_dist.evaluate.physics.nps import NoisePower, flat_regions, noise_power
from ldct_dist.evaluate.physics.observer import Detectability
from ldct_dist.evaluate.physics.reference import Reference
from ldct_dist.evaluate.physics.trial import Trial, make_trial
from ldct_dist.evaluate.physics.ttf import Transfer
from ldct_dist.evaluate.protocols import Protocol, protocol_named
from ldct_dist.evaluate.report.pictures import pictures_of
from ldct_dist.evaluate.study import Row, Study, StudyConfig, evaluated_dose
from ldct_dist.evaluate.tasks import Cohort
from ldct_dist.store.layout import FULL_DOSE, dose_name
from ldct_dist.store.reader import Store
from ldct_dist.store.record import CaseRecord

PHANTOM = "phantom"
_CASE = "case-"  # no case's name makes an item called PHANTOM
_ENOUGH_REGIONS = 4
Say = Callable[[str, str], None]
"""Called with what is being worked on, and the method."""


@dataclass(frozen=True)
class CaseFindings:
    """What was found on one case, in the terms of `Study`.

    lacks: why noise could not be measured, None where it was. nps: none where there are too few flat regions. pictures:
    None where the report shows none of this case. samples: the labelled slices for the classifier, None if there are none.
    """

    case: str
    scan: dict[str, Any]
    rows: list[Row]
    notes: list[str]
    lacks: str | None = None
    nps: dict[str, NoisePower] = field(default_factory=dict)
    pictures: dict[str, Any] | None = None
    samples: Samples | None = None

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> CaseFindings:
        rows = [Row(**row) for row in plain["rows"]]
        nps = {name: NoisePower(**power) for name, power in plain["nps"].items()}
        seen = plain["samples"]
        samples = seen and Samples(seen["images"], seen["labels"], tuple(seen["patients"]))
        return cls(**{**plain, "rows": rows, "nps": nps, "samples": samples})


@dataclass(frozen=True)
class PhantomFindings:
    """What was found on the phantom, in the terms of `Study`. case: None where no case had enough soft tissue."""

    case: str | None = None
    transfers: dict[str, list[Transfer]] = field(default_factory=dict)
    detection: dict[str, dict[str, Detectability]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> PhantomFindings:
        transfers = {name: [Transfer(**t) for t in found] for name, found in plain["transfers"].items()}
        detection = {
            name: {shape: Detectability(**seen) for shape, seen in found.items()}
            for name, found in plain["detection"].items()
        }
        return cls(**{**plain, "transfers": transfers, "detection": detection})


Findings = CaseFindings | PhantomFindings


def findings_from_plain(plain: dict[str, Any]) -> Findings:
    """The inverse of `dataclasses.asdict`."""
    return CaseFindings.from_plain(plain) if "rows" in plain else PhantomFindings.from_plain(plain)


class Examination:
    """What is to be measured of the cases of config.split.

    items: names of the findings that make a Study. physics: whether more than the protocol's figures in 2-D. shown: of how
    many cases there are pictures. cohort: whose labelled slices are kept for a classifier. Raises UserError for a split,
    a dose or a protocol that is not there.
    """

    def __init__(
        self,
        store: Store,
        config: StudyConfig,
        *,
        physics: bool = True,
        shown: int = 0,
        cohort: Cohort | None = None,
    ) -> None:
        self.store, self.config, self.physics, self.shown, self.cohort = store, config, physics, shown, cohort
        self.dose = evaluated_dose(store, config)
        protocol = protocol_named(config.protocol)
        self.protocols = (protocol, protocol.in_3d()) if physics and protocol.dims == 2 else (protocol,)
        self.cases = [store.cases[int(i)] for i in store.split(config.split)]
        self.items = [*(_CASE + case.name for case in self.cases), *([PHANTOM] if physics else [])]

    def examine(
        self, item: str, methods: Mapping[str, Method], say: Say = lambda what, method: None
    ) -> Findings:
        """Measure every method on the case, or on the phantom. Raises UserError as `apply` does."""
        if item == PHANTOM:
            return self._examine_phantom(methods, say)
        number = [case.name for case in self.cases].index(item.removeprefix(_CASE))
        return self._examine_case(number, methods, say)

    def gather(self, found: Mapping[str, Findings]) -> Study:
        """The study, from the findings of all items."""
        study = Study(self.store.path.name, self.store.fingerprint, self.dose, self.protocols, self.config)
        phantom = found.get(PHANTOM, PhantomFindings())
        assert isinstance(phantom, PhantomFindings)
        lacking: dict[str, list[str]] = {}
        for each in self.cases:
            case = found[_CASE + each.name]
            assert isinstance(case, CaseFindings)
            _add_case(study, case)
            for what in (*case.notes, *([case.lacks] if case.lacks else [])):
                lacking.setdefault(what, []).append(case.case)
        count = len(self.cases)
        for what, cases in lacking.items():
            study.note(f"{what}: {len(cases)} of {count} case{'s' * (count > 1)}, {few(cases, ', ')}")
        if self.physics and not study.nps:
            study.note(f"noise power: no case has {_ENOUGH_REGIONS} flat regions of soft tissue")
        study.phantom_case = phantom.case
        study.transfers, study.detection = phantom.transfers, phantom.detection
        for words in phantom.notes:
            study.note(words)
        return study

    def _examine_case(self, number: int, methods: Mapping[str, Method], say: Say) -> CaseFindings:
        case, count = self.cases[number], len(self.cases)
        low, full = self.volumes(case.name)
        reference = Reference(low, full) if self.physics else None
        notes: dict[str, None] = {}  # each once, in order
        images, rows = {}, []
        for name, method in methods.items():
            say(f"case {number + 1} of {count}, {case.name}", name)
            images[name] = apply(name, method, low)
            figures = {p.name: _figures(images[name], full.hu, p, notes) for p in self.protocols}
            facts = reference.facts(images[name]) if reference else {}
            rows.append(Row(case.name, case.patient, name, figures, **facts))
        images[FULL] = full.hu
        pictures = None
        if reference and number < self.shown:
            pictures = pictures_of(self.protocols[0], reference, images)
        return CaseFindings(
            case=case.name,
            scan=_conditions(full, self.store.record(case.name)),
            rows=rows,
            notes=list(notes),
            lacks=reference.lacks if reference else None,
            nps=_noise_powers(reference, images) if reference else {},
            pictures=pictures,
            samples=self.cohort.samples_of(case.name, images) if self.cohort else None,
        )

    def _examine_phantom(self, methods: Mapping[str, Method], say: Say) -> PhantomFindings:
        """Measurements on a phantom like the first case that has enough soft tissue."""
        lacks: dict[str, None] = {}
        for case in self.cases:
            low, full = self.volumes(case.name)
            try:
                trial = make_trial(
                    full, low, self.config.lesion_mm, self.config.lesion_hu, seed=seed_of(case.name, 0)
                )
            except UserError as e:
                lacks[f"phantom: {e.reason if isinstance(e, UnknownNoiseError) else e}"] = None
            else:
                return _tried(trial, case.name, methods, say)
        return PhantomFindings(notes=list(lacks))

    def volumes(self, case: str) -> tuple[Volume, Volume]:
        """A case at the evaluated dose and at full dose. Raises UserError where they are not the catalogue's: a report would
        name the fingerprint of other voxels than it was made of."""
        try:
            low, full = (self.store.volume(case, dose) for dose in (dose_name(self.dose), FULL_DOSE))
        finally:  # also where another shape was taken for damage
            if self.store.replaced(case):
                raise UserError(
                    f"{self.store.path}: case {case} was ingested again since this started, or by an ingest that has not "
                    "finished; let that finish, then start again"
                )
        return low, full


def measure(store: Store, config: StudyConfig, methods: Mapping[str, Method]) -> Study:
    """Every method on every case of the split. Raises UserError as `Examination` does."""
    examination = Examination(store, config)
    return examination.gather({item: examination.examine(item, methods) for item in examination.items})


def _add_case(study: Study, found: CaseFindings) -> None:
    """Noise power spectra are those of the first case that has them, at the same places in every image."""
    study.scans[found.case] = found.scan
    study.rows += found.rows
    if found.nps and not study.nps:
        study.nps, study.nps_case = found.nps, found.case
    if found.pictures is not None:
        study.pictures[found.case] = found.pictures


def _conditions(full: Volume, record: CaseRecord) -> dict[str, Any]:
    """How a scan was made, as far as its figures depend on it."""
    return {
        "kernel": full.acquisition.kernel,
        "kvp": full.acquisition.kvp,
        "slice_thickness_mm": full.acquisition.slice_thickness_mm,
        "spacing_mm": full.spacing,
        "shape": full.shape,
        "low_dose": record.low_dose,
    }


def _figures(
    image: np.ndarray, full: np.ndarray, protocol: Protocol, notes: dict[str, None]
) -> dict[str, float]:
    """All measures whose windows fit into the volume; the others are noted."""
    figures: dict[str, float] = {}
    for name in MEASURES:
        try:
            figures |= evaluate_volume(image, full, protocol, measures=[name])
        except UserError as e:
            notes[f"{protocol.name}: {e}"] = None
    return figures


def _noise_powers(reference: Reference, images: Mapping[str, np.ndarray]) -> dict[str, NoisePower]:
    """The noise power spectrum of every image, at the same places; none where there are too few flat regions."""
    regions = flat_regions(reference.full, reference.moments)
    if len(regions) < _ENOUGH_REGIONS:
        return {}
    spacing = reference.full.spacing[1:]
    return {
        name: noise_power(np.stack([hu[region] for region in regions]), spacing)
        for name, hu in images.items()
    }


def _tried(trial: Trial, case: str, methods: Mapping[str, Method], say: Say) -> PhantomFindings:
    transfers, detection, notes = {}, {}, []
    for name, method in methods.items():
        say("phantom", name)
        denoise = partial(apply, name, method)
        transfers[name] = trial.transfers(denoise)
        try:
            detection[name] = trial.detection(denoise)
        except UserError as e:
            notes.append(f"phantom, {name}: {e}")
    return PhantomFindings(case, transfers, detection, notes)
