import math

import numpy as np
import pytest
from scipy.stats import rankdata, wilcoxon

from ldct_dist.evaluate.statistics import Estimate, Paired, by_patient, estimate, holm, paired_tests


@pytest.mark.parametrize(
    ("patients", "times", "kind"),
    [
        (2, 1000, "Student t"),
        (4, 1000, "Student t"),
        (9, 1000, "Student t"),
        (10, 300, "expanded percentile bootstrap"),
        (20, 300, "expanded percentile bootstrap"),
    ],
)
def test_intervals_hold_the_truth_as_often_as_they_say(patients, times, kind):
    rng = np.random.default_rng(0)
    cases = np.repeat([f"p{i}" for i in range(patients)], 3)
    held = 0
    for _ in range(times):
        # Patients differ by 2, a patient's cases by 1: treated as independent, cases would promise too much.
        values = 30 + np.repeat(rng.normal(0, 2, patients), 3) + rng.normal(0, 1, len(cases))
        found = estimate(values, cases)
        assert (found.n, found.interval) == (patients, kind)
        held += found.low <= 30 <= found.high
    assert held / times == pytest.approx(0.95, abs=0.025)


def test_students_interval_by_hand():
    found = estimate([1.0, 2.0], ["a", "b"])
    assert (found.low, found.high) == pytest.approx((1.5 - 12.706 / 2, 1.5 + 12.706 / 2), abs=1e-3)


def test_an_interval_ends_where_its_mean_cannot_be():
    """Three patients, one of them odd: Student's t would have an RMSE below 0, and an SSIM above 1."""
    values, patients = [6.0, 7.0, 50.0], ["a", "b", "c"]
    free, cut = estimate(values, patients), estimate(values, patients, within=(0, math.inf))
    assert free.low < 0 == cut.low
    assert (cut.mean, cut.high) == (free.mean, free.high)
    alike = [0.97, 0.96, 0.7]
    free, cut = estimate(alike, patients), estimate(alike, patients, within=(-1, 1))
    assert free.high > 1 == cut.high
    assert (cut.mean, cut.low) == (free.mean, free.low)


def test_patients_weigh_alike_however_many_cases_they_have():
    assert by_patient([1.0, 3.0, 10.0], ["a", "a", "b"]) == {"a": 2.0, "b": 10.0}
    assert estimate([1.0, 3.0, 10.0], ["a", "a", "b"]).mean == 6.0


def test_one_patient_has_a_mean_and_no_interval():
    found = estimate([1.0, 3.0], ["a", "a"])
    assert found == Estimate(2.0, None, None, 1, None)
    assert estimate([math.inf], ["a"]).mean is None
    pair = paired_tests({"x": [1.0, 3.0], "y": [2.0, 2.0]}, ["a", "a"])[0]
    assert pair == Paired("x", "y", Estimate(0.0, None, None, 1, None), None, None, None, None)


def test_a_consistent_difference_is_found_and_a_random_one_is_not():
    rng = np.random.default_rng(1)
    base = rng.normal(30, 5, 12)
    patients = [f"p{i}" for i in range(12)]
    methods = {"worse": base + 1 + rng.random(12), "base": base, "other": base + rng.normal(0, 1, 12)}
    tests = {(t.a, t.b): t for t in paired_tests(methods, patients)}
    assert tests["worse", "base"].p == pytest.approx(2 / 2**12)
    assert tests["worse", "base"].p_holm == pytest.approx(3 * 2 / 2**12)
    assert tests["worse", "base"].least_p_holm == tests["worse", "base"].p_holm
    assert tests["worse", "base"].difference.low > 1
    assert tests["base", "other"].p_holm > 0.05
    assert tests["base", "other"].difference.low < 0 < tests["base", "other"].difference.high


def test_pairs_are_closer_than_patients():
    """What patients have in common does not widen the interval of the difference."""
    base = np.array([10.0, 20.0, 30.0, 40.0])
    patients = ["p", "q", "r", "s"]
    pair = paired_tests({"a": base + np.array([1.0, 1.1, 0.9, 1.0]), "b": base}, patients)[0]
    assert (pair.difference.low, pair.difference.high) == pytest.approx((0.87, 1.13), abs=0.01)
    assert estimate(base + 1, patients).low < estimate(base, patients).mean


@pytest.mark.parametrize(
    ("patients", "least", "least_holm"), [(4, 0.125, 1.0), (10, 2 / 2**10, 15 * 2 / 2**10)]
)
def test_few_patients_and_many_pairs_allow_no_small_p(patients, least, least_holm):
    """Six methods as far apart on every patient as can be."""
    methods = {f"m{k}": [10.0**k * (i + 1) for i in range(patients)] for k in range(6)}
    tests = paired_tests(methods, [f"p{i}" for i in range(patients)])
    assert len(tests) == 15
    for pair in tests:
        assert (pair.least_p, pair.least_p_holm) == pytest.approx((least, least_holm))
        assert (pair.p, pair.p_holm) == pytest.approx((least, least_holm))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_patients_on_whom_methods_do_not_differ_leave_the_p_exact():
    """Four of twenty differ, all one way: 2 of the 16 ways to sign them are as far from none."""
    a = [1.0, 2.0, 3.0, 4.0] + [0.0] * 16
    (pair,) = paired_tests({"a": a, "b": [0.0] * 20}, [f"p{i}" for i in range(20)])
    assert pair.p == pytest.approx(2 / 16)


@pytest.mark.parametrize("patients", [5, 15, 20])
def test_p_is_exact_with_ties(patients):
    """Of all the ways to sign the ranks, the share that is as far from even."""
    steps = np.random.default_rng(3).integers(1, 5, patients) * np.random.default_rng(4).choice(
        [-1, 1, 1], patients
    )
    (pair,) = paired_tests({"a": steps, "b": [0.0] * patients}, [f"p{i}" for i in range(patients)])
    ranks = rankdata(np.abs(steps))
    sums = np.zeros(1)
    for rank in ranks:
        sums = np.concatenate([sums, sums + rank])
    off = np.abs(sums - ranks.sum() / 2)
    assert pair.p == pytest.approx((off >= abs(ranks[steps > 0].sum() - ranks.sum() / 2) - 1e-9).mean())


def test_p_of_many_patients_is_that_of_the_normal_distribution():
    """At the number where one gives way to the other, they agree."""
    rng = np.random.default_rng(0)
    differences = rng.normal(0.1, 1, 501)
    exact, normal = (
        paired_tests({"a": differences[:n], "b": np.zeros(n)}, [f"p{i}" for i in range(n)])[0].p
        for n in (500, 501)
    )
    assert exact == pytest.approx(wilcoxon(differences[:500], method="asymptotic").pvalue, rel=0.01)
    assert normal == wilcoxon(differences, method="asymptotic").pvalue


def test_equal_methods_do_not_differ():
    found = paired_tests({"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0]}, ["p", "q", "r"])[0]
    assert (found.difference.mean, found.p, found.p_holm) == (0, 1, 1)
