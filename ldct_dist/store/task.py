"""One case of an ingest: what it is to be made of, and the making of it in a worker process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ldct_dist import files
from ldct_dist.ct import noise
from ldct_dist.ct.dicom import Series, read_series
from ldct_dist.ct.dose_config import DoseConfig, seed_of
from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError, memory_for
from ldct_dist.store import layout
from ldct_dist.store.paircheck import PairCheckConfig, check_images
from ldct_dist.store.pairing import Pair
from ldct_dist.store.privacy import identifying_words, key_id, keyed_hash, patient_hash, scrubbed
from ldct_dist.store.record import CaseRecord, case_metadata, read_record


@dataclass(frozen=True)
class Task:
    """A case that is to be made. patient: a keyed hash. provenances: by split, what `CaseRecord.provenance` would be in that
    split. dose: fraction of the low dose."""

    store: Path
    name: str
    pair: Pair
    patient: str
    key_id: str
    split: str
    provenances: dict[str, str]
    dose: float
    seed: int
    simulation: DoseConfig
    check: PairCheckConfig

    @property
    def provenance(self) -> str:
        return self.provenances[self.split]

    @cached_property
    def found(self) -> CaseRecord | None:
        """The record of the case that was there at the first look, whatever it was made from; None if there was none, or a
        damaged one."""
        try:
            return read_record(self.store / layout.CASES / self.name)
        except UserError:
            return None

    @property
    def record(self) -> CaseRecord | None:
        """The record of the case, if it is there and was made from the same source and settings, in any split."""
        found = self.found
        return found if found is not None and found.provenance == self.provenances.get(found.split) else None

    @property
    def replaces_dose(self) -> str | None:
        """The simulated dose of the case that is there, if it is to be replaced by one of another dose."""
        found = self.found
        if found is None or self.pair.low is not None or (found.low_dose or {}).get("made") != "simulated":
            return None
        return next(
            (dose for dose in found.doses if dose not in (layout.FULL_DOSE, layout.dose_name(self.dose))),
            None,
        )

    def move(self, record: CaseRecord) -> None:
        """Move the case, which is there with `record`, to the task's split; its voxels stay."""
        moved = replace(record, split=self.split, provenance=self.provenance)
        files.replace(self.store / layout.CASES / self.name / "zarr.json", case_metadata(moved))


def task(
    store: Path,
    pair: Pair,
    split: str,
    key: bytes,
    *,
    dose: float,
    seed: int,
    simulation: DoseConfig,
    check: PairCheckConfig,
    splits: Iterable[str] = (),
) -> Task:
    """The task of making a case of `pair`. Its provenance includes the files' sizes and times of change.

    splits: other splits in which the case may be already.
    """
    dose = pair.dose or dose
    series = [s for s in (pair.full, pair.low) if s is not None]
    uids = [s.series_uid for s in series]
    patient = patient_hash(key, pair.patient)
    how = [f"{dose:g}", str(seed), simulation.model_dump_json(), patient]
    made_of = [*uids, *_states(series), *how]
    return Task(
        store=store,
        name=pair.name or f"case-{keyed_hash(key, 'case', *uids)[:12]}",
        pair=pair,
        patient=patient,
        key_id=key_id(key),
        split=split,
        provenances={s: keyed_hash(key, "provenance", *made_of, s) for s in {split, *splits}},
        dose=dose,
        seed=seed_of(pair.full.series_uid, seed),
        simulation=simulation,
        check=check,
    )


def make_case(task: Task) -> str | None:
    """Write the case into the store; None if it was written, else a line that says why it was refused.

    Raises OSError if the store cannot be written.
    """
    try:
        with memory_for(task.pair.full.name, "give fewer workers or more memory"):
            doses, moments, low_dose = _volumes(task)
            layout.write_case(
                task.store,
                task.name,
                doses,
                patient=task.patient,
                split=task.split,
                provenance=task.provenance,
                noise_hu=_noise_hu(moments),
                low_dose=low_dose,
                key_id=task.key_id,
            )
    except UserError as e:
        return str(e)
    return None


def _volumes(task: Task) -> tuple[dict[float, Volume], noise.LocalMoments, dict[str, Any]]:
    """The case's volumes by dose fraction, some moments of the full dose, and `CaseRecord.low_dose`.

    Raises UserError if a volume is unsound or they are no pair.
    """
    pair = task.pair
    full = read_series(pair.full)
    moments = noise.sampled_moments(full)
    if pair.low is None:
        from ldct_dist.ct.dose import matched, simulate_low_dose  # imports torch, which pairs do not need

        try:
            config = matched(full, task.simulation)
            low = simulate_low_dose(full, task.dose, task.seed, config)
        except UserError as e:
            raise UserError(f"{pair.full.name}: {e}") from e
        low_dose = {"made": "simulated", "config": config.model_dump()}
    else:
        low = read_series(pair.low)
        try:
            check_images(full, low, moments, task.check)
        except UserError as e:
            raise UserError(f"{pair.name or pair.full.name}: {e}") from e
        low_dose = {"made": "simulated" if pair.low.is_own_output else "acquired"}
    words = identifying_words(pair.full.slices[0], pair.patient)
    acquisition = scrubbed(full.acquisition, words)
    return {1.0: replace(full, acquisition=acquisition), task.dose: low}, moments, low_dose


def _noise_hu(moments: noise.LocalMoments) -> float | None:
    """Standard deviation of the noise in soft tissue, HU; None where there is too little of it to tell."""
    where = moments.homogeneous
    return None if where is None else round(noise.noise_std(moments, where), 2)


def _states(series: list[Series]) -> list[str]:
    """Size and time of change of each file, by which a source that was exported again under the same UIDs is noticed."""
    return [f"{stored.size} {stored.changed}" for s in series for stored in s.slices]
