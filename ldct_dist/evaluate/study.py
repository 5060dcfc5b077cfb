"""All methods on all held-out cases: the figures and measurements from which the report is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from ldct_dist.config import Config
from ldct_dist.ct.dose_config import seed_of
from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError, few
from ldct_dist.evaluate.baselines import baseline_named
from ldct_dist.evaluate.methods import FULL, LOW, Method, apply, network, tuned_baselines
from ldct_dist.evaluate.metrics import MEASURES, evaluate_volume
from ldct_dist.evaluate.physics.nps import NoisePower, flat_regions, noise_power
from ldct_dist.evaluate.physics.observer import Detectability
from ldct_dist.evaluate.physics.reference import Reference
from ldct_dist.evaluate.physics.trial import make_trial
from ldct_dist.evaluate.physics.ttf import Transfer
from ldct_dist.evaluate.protocols import Protocol, protocol_named
from ldct_dist.store.layout import FULL_DOSE, dose_name
from ldct_dist.store.reader import Store
from ldct_dist.store.record import CaseRecord

_ENOUGH_REGIONS = 4
_TUNED_ON = 4  # cases
Say = Callable[[str, str], None]
"""Called with what is being worked on, and the method."""


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
    rows: list[Row] = field(default_factory=list)
    nps: dict[str, NoisePower] = field(default_factory=dict)
    nps_case: str | None = None
    phantom_case: str | None = None
    """whose voxels, kernel and noise the phantom got"""
    transfers: dict[str, list[Transfer]] = field(default_factory=dict)
    detection: dict[str, dict[str, Detectability]] = field(default_factory=dict)
    """by method, then by the lesions' shape"""
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


Show = Callable[[str, Volume, Volume, Mapping[str, np.ndarray]], None]
"""Called for every case with its name, low dose, full dose, and each method's image."""


def methods_for(
    store: Store,
    config: StudyConfig,
    weights: Mapping[str, Path],
    peers: Mapping[str, Method],
    baselines: Sequence[str],
    say: Say = lambda what, method: None,
) -> dict[str, Method]:
    """The low dose itself, then the baselines, the peers and the networks, by name.

    Baselines are tuned on a few cases of the other splits. Raises UserError for what does not exist.
    """
    # Everything that can be refused is, before filters are tuned, which takes minutes.
    dose = _dose(store, config)
    for name in baselines:
        baseline_named(name)
    networks = {name: network(path, config.bf16, config.strength) for name, path in weights.items()}
    methods: dict[str, Method] = {LOW: lambda low: low.hu}
    if baselines:
        others = np.flatnonzero(store.splits != config.split)
        if not len(others):
            raise UserError(
                f"{store.path}: every case is in split {config.split!r}, so none is left to tune baselines on; do "
                "without them: --baselines ''"
            )
        say("tuning filters", ", ".join(baselines))
        spread = others[np.linspace(0, len(others) - 1, min(_TUNED_ON, len(others))).astype(int)]
        names = [store.cases[int(i)].name for i in spread]
        pairs = [(store.volume(name, dose_name(dose)), store.volume(name, FULL_DOSE)) for name in names]
        methods |= tuned_baselines(baselines, pairs)
    return methods | dict(peers) | networks


def measure(
    store: Store,
    config: StudyConfig,
    methods: Mapping[str, Method],
    *,
    physics: bool = True,
    show: Show = lambda *_: None,
    say: Say = lambda what, method: None,
) -> Study:
    """Every method on every case of the split; without `physics`, only the protocol's figures in 2-D.

    Raises UserError for a split, a dose or a protocol that is not there.
    """
    protocol = protocol_named(config.protocol)
    dose = _dose(store, config)
    protocols = (protocol, protocol.in_3d()) if physics and protocol.dims == 2 else (protocol,)
    study = Study(store.path.name, store.fingerprint, dose, protocols, config)
    chosen, no_phantom = store.split(config.split), []
    lacking: dict[str, list[str]] = {}
    for number, i in enumerate(chosen, start=1):
        case = store.cases[int(i)]
        low, full = (store.volume(case.name, d) for d in (dose_name(dose), FULL_DOSE))
        study.scans[case.name] = _conditions(full, store.record(case.name))
        reference = Reference(low, full) if physics else None
        if reference and reference.lacks:
            lacking.setdefault(reference.lacks, []).append(case.name)
        images = {}
        for name, method in methods.items():
            say(f"case {number} of {len(chosen)}, {case.name}", name)
            images[name] = apply(name, method, low)
            figures = {p.name: _figures(images[name], full.hu, p, study) for p in protocols}
            facts = reference.facts(images[name]) if reference else {}
            study.rows.append(Row(case.name, case.patient, name, figures, **facts))
        if reference:
            _noise_powers(study, case.name, reference, images)
        show(case.name, low, full, images)
        if physics and study.phantom_case is None:
            no_phantom += _try_phantom(study, config, methods, case.name, low, full, say)
    for what, cases in lacking.items():
        study.note(f"{what}: {len(cases)} of {len(chosen)} case{'s' * (len(chosen) > 1)}, {few(cases, ', ')}")
    # Noted only here: what one case lacks, another may have.
    if physics and not study.nps:
        study.note(f"noise power: no case has {_ENOUGH_REGIONS} flat regions of soft tissue")
    if study.phantom_case is None:
        for words in no_phantom:
            study.note(words)
    return study


def _dose(store: Store, config: StudyConfig) -> float:
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


def _figures(image: np.ndarray, full: np.ndarray, protocol: Protocol, study: Study) -> dict[str, float]:
    """All measures whose windows fit into the volume; the others are noted."""
    figures: dict[str, float] = {}
    for name in MEASURES:
        try:
            figures |= evaluate_volume(image, full, protocol, measures=[name])
        except UserError as e:
            study.note(f"{protocol.name}: {e}")
    return figures


def _noise_powers(study: Study, case: str, reference: Reference, images: Mapping[str, np.ndarray]) -> None:
    """Add noise power spectra of the first case with enough flat regions, at the same places in every image."""
    if study.nps:
        return
    full = reference.full
    regions = flat_regions(full, reference.moments)
    if len(regions) >= _ENOUGH_REGIONS:
        study.nps_case = case
        for name, hu in {**images, FULL: full.hu}.items():
            study.nps[name] = noise_power(np.stack([hu[region] for region in regions]), full.spacing[1:])


def _try_phantom(
    study: Study,
    config: StudyConfig,
    methods: Mapping[str, Method],
    case: str,
    low: Volume,
    full: Volume,
    say: Say,
) -> list[str]:
    """Add measurements on a phantom like the first case that has enough soft tissue; what this case lacks, if anything."""
    try:
        trial = make_trial(full, low, config.lesion_mm, config.lesion_hu, seed=seed_of(case, 0))
    except UserError as e:
        return [f"phantom: {e}"]
    study.phantom_case = case
    for name, method in methods.items():
        say("phantom", name)
        denoise = partial(apply, name, method)
        study.transfers[name] = trial.transfers(denoise)
        try:
            study.detection[name] = trial.detection(denoise)
        except UserError as e:
            study.note(f"phantom, {name}: {e}")
    return []
