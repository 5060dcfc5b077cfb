"""Whether a difference is more than luck: intervals and paired tests, with the patient as the unit.

Cases of one patient are not independent, so they are averaged first: patients are resampled, and patients are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import bootstrap, wilcoxon

_RESAMPLES = 9999


@dataclass(frozen=True)
class Estimate:
    """A mean over n patients with its 95 % bootstrap interval; None where fewer than two patients leave none."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Paired:
    """Method a against b on the same n patients. difference: mean of a - b. p: of the Wilcoxon signed-rank test, None
    with fewer than two patients; p_holm: corrected for all the pairs that were tested together."""

    a: str
    b: str
    difference: float
    n: int
    p: float | None
    p_holm: float | None


def by_patient(values: Sequence[float], patients: Sequence[str]) -> dict[str, float]:
    """Each patient's mean over its cases, in the order in which patients first appear. What is not finite, such as the
    PSNR of equal images, is left out."""
    grouped: dict[str, list[float]] = {}
    for value, patient in zip(values, patients, strict=True):
        if np.isfinite(value):
            grouped.setdefault(patient, []).append(value)
    return {patient: float(np.mean(own)) for patient, own in grouped.items()}


def estimate(values: Sequence[float], patients: Sequence[str], seed: int = 0) -> Estimate:
    """The mean over patients, and the interval in which it would fall with other patients (percentile bootstrap)."""
    means = list(by_patient(values, patients).values())
    if len(means) < 2:
        return Estimate(means[0] if means else None, None, None, len(means))
    found = bootstrap(
        (means,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return Estimate(float(np.mean(means)), float(found.low), float(found.high), len(means))


def paired_tests(methods: Mapping[str, Sequence[float]], patients: Sequence[str]) -> list[Paired]:
    """Every method against every other on the patients that both have a value for.

    methods: name -> one value a case, in the order of `patients`.
    """
    means = {name: by_patient(values, patients) for name, values in methods.items()}
    tested = []
    for a, b in combinations(means, 2):
        both = [patient for patient in means[a] if patient in means[b]]
        differences = np.array([means[a][patient] - means[b][patient] for patient in both])
        difference = float(differences.mean()) if both else 0.0
        tested.append((a, b, difference, len(both), _wilcoxon(differences)))
    corrected = iter(holm([p for *_, p in tested if p is not None]))
    return [Paired(*row, None if row[-1] is None else next(corrected)) for row in tested]


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number, in the same order (Holm, Scand J Stat 6 (1979))."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _wilcoxon(differences: np.ndarray) -> float | None:
    if len(differences) < 2:
        return None
    return float(wilcoxon(differences).pvalue) if differences.any() else 1.0
