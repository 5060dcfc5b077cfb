"""Whether a difference is more than luck: intervals and paired tests, with the patient as the unit.

Cases of one patient are not independent, so they are averaged first: patients are resampled, and patients are paired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
from scipy.stats import bootstrap, norm, rankdata, t, wilcoxon

_RESAMPLES = 9999
_EXACT = 500  # patients: takes a quarter of a second
_FEW = 10
"""Patients: with fewer, even a corrected bootstrap covers less than it says, .92 with 5 and .88 with 4."""
_SEED = 0  # of the bootstrap: the same study gives the same interval


@dataclass(frozen=True)
class Estimate:
    """A mean over n patients with its 95 % interval, and which kind that is; both None for fewer than two patients."""

    mean: float | None
    low: float | None
    high: float | None
    n: int
    interval: Literal["Student t", "expanded percentile bootstrap"] | None


@dataclass(frozen=True)
class Paired:
    """Method a against b on the same patients.

    difference: mean of a - b over the patients, with the interval of that mean. p: of the two-sided Wilcoxon
    signed-rank test over those on whom a and b differ: exact, among ties as well, for up to 500, and by the normal
    distribution, which allows for ties, for more. p_holm: corrected for all the pairs that were tested together.
    least_p, least_p_holm: the smallest values that these can have with so many patients. All four are None for fewer than
    two patients.
    """

    a: str
    b: str
    difference: Estimate
    p: float | None
    p_holm: float | None
    least_p: float | None
    least_p_holm: float | None


def by_patient(values: Sequence[float], patients: Sequence[str]) -> dict[str, float]:
    """Each patient's mean over its cases, in the order in which patients first appear. Values that are not finite, such as
    the PSNR of equal images, are left out."""
    grouped: dict[str, list[float]] = {}
    for value, patient in zip(values, patients, strict=True):
        if np.isfinite(value):
            grouped.setdefault(patient, []).append(value)
    return {patient: float(np.mean(own)) for patient, own in grouped.items()}


def estimate(
    values: Sequence[float],
    patients: Sequence[str],
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """Mean over patients of each patient's mean.

    within: the lowest and highest value that such a mean can have. The interval is cut off there, and covers the truth
    as often as before, since the truth lies there too.

    With fewer than 10 patients, Student's t interval, which takes them to be normally distributed. From there on the
    bootstrap's expanded percentiles, which allow for skew.
    """
    found = _mean(np.array(list(by_patient(values, patients).values())))
    if found.low is None or found.high is None:
        return found
    return replace(found, low=max(found.low, within[0]), high=min(found.high, within[1]))


def tail(n: int) -> float:
    """The probability beyond each end of a 95 % interval by percentile bootstrap over n patients.

    It is below .025, since plain percentiles are too narrow: they lack what Student's t, and n - 1 in place of n, account
    for (Hesterberg, Am Stat 69 (2015), 3.3).
    """
    return float(norm.cdf(math.sqrt(n / (n - 1)) * t.ppf(0.025, n - 1)))


def paired_tests(methods: Mapping[str, Sequence[float]], patients: Sequence[str]) -> list[Paired]:
    """Every method against every other on the patients that both have a value for.

    methods: name -> one value a case, in the order of `patients`.
    """
    means = {name: by_patient(values, patients) for name, values in methods.items()}
    pairs = list(combinations(means, 2))
    differences = [
        np.array([means[a][patient] - means[b][patient] for patient in means[a] if patient in means[b]])
        for a, b in pairs
    ]
    p_values = [_wilcoxon(each) for each in differences]
    tested = [p for p in p_values if p is not None]
    corrected = iter(holm(tested))
    found = []
    for (a, b), each, p in zip(pairs, differences, p_values, strict=True):
        least = 2.0 ** (1 - len(each))  # all differences of one sign
        ps = (None,) * 4 if p is None else (p, next(corrected), least, min(1.0, len(tested) * least))
        found.append(Paired(a, b, _mean(each), *ps))
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number, in the same order (Holm, Scand J Stat 6 (1979))."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _mean(means: np.ndarray) -> Estimate:
    """The estimate from the patients' own means, (n,)."""
    n = len(means)
    if n < 2:
        return Estimate(float(means[0]) if n else None, None, None, n, None)
    mean = float(means.mean())
    if n < _FEW:
        reach = float(t.ppf(0.975, n - 1) * means.std(ddof=1) / math.sqrt(n))
        return Estimate(mean, mean - reach, mean + reach, n, "Student t")
    found = bootstrap(
        (means,),
        np.mean,
        n_resamples=_RESAMPLES,
        confidence_level=1 - 2 * tail(n),
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return Estimate(mean, float(found.low), float(found.high), n, "expanded percentile bootstrap")


def _wilcoxon(differences: np.ndarray) -> float | None:
    if len(differences) < 2:
        return None
    apart = differences[differences != 0]
    if len(apart) > _EXACT:
        return float(wilcoxon(apart, method="asymptotic").pvalue)
    # Not scipy's, which counts zeros as patients, and with ties among more than 13 takes the normal distribution.
    ranks = (2 * rankdata(np.abs(apart))).astype(int)  # twice, because ties share halves
    chances = np.zeros(ranks.sum() + 1)  # of each sum of ranks that are positive
    chances[0] = 1
    for rank in ranks:
        negative = chances / 2
        chances = negative.copy()
        chances[rank:] += negative[:-rank]
    positive = ranks[apart > 0].sum()
    return min(1.0, 2 * float(chances[max(positive, ranks.sum() - positive) :].sum()))
