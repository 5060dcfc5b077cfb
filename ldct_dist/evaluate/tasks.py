"""What is classified: a cohort with labels, or a generated task whose truth is known."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from ldct_dist.ct.dose import DoseConfig, simulate_full_dose, simulate_low_dose
from ldct_dist.ct.phantom import Disc, discs
from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError, few
from ldct_dist.evaluate.classify import Samples, Training
from ldct_dist.evaluate.methods import FULL, LOW, Method, apply
from ldct_dist.evaluate.protocols import Range
from ldct_dist.store.privacy import patient_hash

SIDE = 64  # of the images that the classifier is given
_SLICES_A_CASE = 8

LESION_TRAINING = Training(folds=4, epochs=14)
_LESION_SLICES = 160
_LESION_DOSE = 0.04
_LESION_WINDOW = (-100.0, 220.0)

Labels = dict[str, dict[int | None, int]]
"""case, or patient -> slice, or None for all of it -> 0 or 1."""
_COLUMNS = "case,label or case,slice,label or patient,label"


def read_labels(path: Path) -> tuple[Labels, str]:
    """(the labels in a CSV, whether they are of each "case" or of each "patient").

    Its columns are label, case or patient, and slice where slices of cases have labels of their own; slices count from
    0 at the feet, labels are 0 or 1. Raises UserError naming the line that is not so.
    """
    labels: Labels = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            lines = csv.DictReader(f)
            columns = set(lines.fieldnames or ())
            what = "patient" if columns & {"case", "patient", "slice"} == {"patient"} else "case"
            if missing := {what, "label"} - columns:
                raise UserError(f"{path}: no column {' and '.join(sorted(missing))}; write {_COLUMNS}")
            for line in lines:
                if fault := _add(labels, what, line[what], line.get("slice"), line["label"]):
                    raise UserError(f"{path}, line {lines.line_num}: {fault}")
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file; give a CSV with the columns {_COLUMNS}") from e
    except (OSError, ValueError, csv.Error) as e:  # a slice of thousands of digits is a ValueError
        raise UserError(f"{path}: cannot be read as CSV ({e})") from e
    return labels, what


def _add(labels: Labels, what: str, name: str | None, at: str | None, label: str | None) -> str | None:
    """Add a line's label to `labels`; what is wrong with the line, None if nothing is."""
    if not name:
        return f"it names no {what}"
    if label not in ("0", "1") or not (not at or (at.isascii() and at.isdigit())):
        return "labels are 0 or 1, and slices whole numbers from 0 up"
    own, where = labels.setdefault(name, {}), int(at) if at else None
    if own.get(where, int(label)) != int(label):
        return f"{what} {name} is labelled {own[where]} in an earlier line; give it one label"
    if own and (None in own) != (where is None):
        return f"{what} {name} has both a label for all of it and one for a slice; give one or the other"
    own[where] = int(label)
    return None


def of_cases(labels: Labels, patients: Mapping[str, str], key: bytes) -> Labels:
    """Labels of patients, given to all of their cases. patients: case name to patient, hashed with `key`.

    A patient without a case is named by a number, since IDs must not get into a report.
    """
    cases: dict[str, list[str]] = {}
    for case, patient in patients.items():
        cases.setdefault(patient, []).append(case)
    found: Labels = {}
    for number, (patient, own) in enumerate(labels.items(), 1):
        unknown = [f"patient {number} of the labels"]
        found |= dict.fromkeys(cases.get(patient_hash(key, patient), unknown), own)
    return found


@dataclass(frozen=True)
class Cohort:
    """The labelled slices of the cases that are evaluated.

    A label of a whole case is given to 8 slices spread over its middle. Slices are resampled to 64 x 64 and clipped to
    `window`. patients: of these cases, by case name. Raises UserError if none of them has a label.
    """

    labels: Labels
    window: Range
    patients: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.labels.keys().isdisjoint(self.patients):
            raise UserError(
                "labels: none is for a case that is evaluated; they are for "
                + (few(list(self.labels), ", ") or "no case at all")
            )

    def samples_of(self, name: str, images: Mapping[str, np.ndarray]) -> Samples | None:
        """The labelled slices of a case, of its images (z, y, x) in HU by kind; None if it has no label."""
        chosen = self.chosen(name, len(next(iter(images.values()))))
        if not chosen:
            return None
        seen = {
            kind: np.stack([shown(hu[at], self.window) for at, _ in chosen]) for kind, hu in images.items()
        }
        return Samples(seen, np.array([label for _, label in chosen]), (self.patients[name],) * len(chosen))

    def chosen(self, name: str, count: int) -> list[tuple[int, int]]:
        """(slice, label) of the samples of a case of `count` slices. Raises UserError where a labelled one is not there."""
        chosen = []
        for at, label in self.labels.get(name, {}).items():
            if at is None:
                spread = np.linspace(0.2 * (count - 1), 0.8 * (count - 1), min(_SLICES_A_CASE, count))
                chosen += [(int(z), label) for z in np.unique(spread.round())]
            elif at < count:
                chosen.append((at, label))
            else:
                raise UserError(f"labels: case {name} has slices 0 to {count - 1}, not {at}")
        return chosen


def joined(cases: Sequence[Samples]) -> Samples:
    """The samples of several cases, which have the same kinds of images."""
    images = {kind: np.concatenate([case.images[kind] for case in cases]) for kind in cases[0].images}
    labels = np.concatenate([case.labels for case in cases])
    return Samples(images, labels, tuple(patient for case in cases for patient in case.patients))


def shown(hu: np.ndarray, window: Range, side: int = SIDE) -> np.ndarray:
    """A slice (y, x) in HU as the classifier sees it: (side, side) float32 in [0, 1].

    Each pixel is the mean of the area that it covers. Single voxels would have all of their noise, which no reader of a
    small image sees.
    """
    means = adaptive_avg_pool2d(torch.from_numpy(hu.astype(np.float32))[None], side)[0].numpy()
    return np.clip((means - window[0]) / (window[1] - window[0]), 0, 1)


def _lesion_scans() -> tuple[Volume, Volume, np.ndarray]:
    """(low dose, full dose, labels) of a generated task: is there a lesion?

    Each slice shows the liver of another patient around a suspicious place. All have vessels; every other one has a
    lesion, 40 HU darker than the liver and 10 to 16 mm wide.
    """
    rng = np.random.default_rng(0)
    spacing, side, inner = (5.0, 3.0, 3.0), 64, slice(16, 48)
    labels = np.arange(_LESION_SLICES) % 2
    slices = []
    for label in labels:
        filled = [Disc(0, 0, rng.uniform(82, 88), 60.0)]
        filled += [
            Disc(30 * np.cos(angle), 30 * np.sin(angle), rng.uniform(3, 5), 140.0)
            for angle in rng.uniform(0, 2 * np.pi, 3)
        ]
        if label:
            x, y = rng.uniform(-6, 6, 2)
            filled.append(Disc(x, y, rng.uniform(5, 8), 20.0))
        slices.append(discs((1, side, side), spacing, filled))
    scanner = DoseConfig(photons=1e5, cutoff_per_mm=0.17)
    full = simulate_full_dose(np.concatenate(slices), spacing, seed=0, config=scanner)
    low = simulate_low_dose(full, _LESION_DOSE, seed=1, config=scanner)
    low, full = (replace(scan, hu=np.ascontiguousarray(scan.hu[:, inner, inner])) for scan in (low, full))
    return low, full, labels


def lesion_samples(methods: Mapping[str, Method]) -> Samples:
    """The generated task at 4 % of the dose: at low dose, under each method and at full dose; for `LESION_TRAINING`.

    A method is given one slice at a time, since the next is another patient's.
    """
    low, full, labels = _lesion_scans()
    images = {LOW: low.hu}
    for name, method in methods.items():
        images[name] = np.concatenate([apply(name, method, replace(low, hu=hu[None])) for hu in low.hu])
    images[FULL] = full.hu
    seen = {
        kind: np.stack([shown(hu, _LESION_WINDOW, side=32) for hu in volume])
        for kind, volume in images.items()
    }
    return Samples(seen, labels, tuple(f"patient {i}" for i in range(len(labels))))
