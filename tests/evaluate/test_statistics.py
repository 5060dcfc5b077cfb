import math

import numpy as np
import pytest

from ldct_dist.evaluate.statistics import by_patient, estimate, holm, paired_tests


def test_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(60):
        patients = [f"p{i // 3}" for i in range(60)]
        # Patients differ by 2, a patient's cases by 1: treated as independent, cases would promise too much.
        values = 30 + np.repeat(rng.normal(0, 2, 20), 3) + rng.normal(0, 1, 60)
        found = estimate(values, patients)
        assert found.n == 20
        held += found.low <= 30 <= found.high
    assert held >= 51


def test_patients_weigh_alike_however_many_cases_they_have():
    assert by_patient([1.0, 3.0, 10.0], ["a", "a", "b"]) == {"a": 2.0, "b": 10.0}
    assert estimate([1.0, 3.0, 10.0], ["a", "a", "b"]).mean == 6.0


def test_one_patient_has_a_mean_and_no_interval():
    found = estimate([1.0, 3.0], ["a", "a"])
    assert (found.mean, found.low, found.high, found.n) == (2.0, None, None, 1)
    assert estimate([math.inf], ["a"]).mean is None
    assert paired_tests({"x": [1.0, 3.0], "y": [2.0, 2.0]}, ["a", "a"])[0].p is None


def test_a_consistent_difference_is_found_and_a_random_one_is_not():
    rng = np.random.default_rng(1)
    base = rng.normal(30, 5, 12)
    patients = [f"p{i}" for i in range(12)]
    methods = {"worse": base + 1 + rng.random(12), "base": base, "other": base + rng.normal(0, 1, 12)}
    tests = {(t.a, t.b): t for t in paired_tests(methods, patients)}
    assert tests["worse", "base"].p == pytest.approx(2 / 2**12)
    assert tests["worse", "base"].p_holm == pytest.approx(3 * 2 / 2**12)
    assert tests["worse", "base"].difference > 1
    assert tests["base", "other"].p_holm > 0.05


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_equal_methods_do_not_differ():
    found = paired_tests({"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0]}, ["p", "q", "r"])[0]
    assert (found.difference, found.p, found.p_holm) == (0, 1, 1)
