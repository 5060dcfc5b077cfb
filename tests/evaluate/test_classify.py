import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import binomtest, norm

from ldct_dist.errors import UserError
from ldct_dist.evaluate.classify import (
    Classifier,
    Samples,
    Training,
    auc,
    classify,
    delong,
    mcnemar,
    patient_folds,
    performance,
    resamples,
)
from ldct_dist.evaluate.tasks import (
    LESION_TRAINING,
    SIDE,
    Cohort,
    joined,
    lesion_samples,
    of_cases,
    read_labels,
    shown,
)
from ldct_dist.store.privacy import patient_hash

WINDOW = (-100.0, 220.0)


@pytest.fixture(scope="module")
def found():
    """The generated task, on low dose, on a filtered and on full dose."""
    samples = lesion_samples({"denoised": lambda low: gaussian_filter(low.hu.astype(float), (0, 1, 1))})
    return classify(samples, LESION_TRAINING)


def test_the_intervals_of_low_and_full_dose_part(found):
    low, full = (found["images"][kind]["auc"] for kind in ("low dose", "full dose"))
    assert low[2] < (full[0] if full[1] is None else full[1])
    for value, *interval in (row["auc"] for row in found["images"].values()):
        assert interval == [None, None] or interval[0] <= value <= interval[1]
    pair = next(t for t in found["tests"] if (t["a"], t["b"]) == ("low dose", "full dose"))
    assert pair["delong_p_holm"] < 0.01
    assert found["training"] == {"folds": 4, "epochs": 14, "lr": 3e-3, "seed": 0}
    assert pair["delong_p"] <= pair["delong_p_holm"]


def test_figures_agree_with_each_other(found):
    for row in found["images"].values():
        balanced = (row["sensitivity"][0] + row["specificity"][0]) / 2
        assert row["accuracy"][0] == pytest.approx(balanced)  # as many with a lesion as without


def test_labels_that_say_nothing_give_chance():
    rng = np.random.default_rng(0)
    images = {"noise": rng.random((60, 16, 16), np.float32)}
    samples = Samples(images, rng.permutation(np.arange(60) % 2), tuple(f"p{i % 20}" for i in range(60)))
    row = classify(samples, Training(folds=3, epochs=4))["images"]["noise"]
    assert row["auc"][1] < 0.5 < row["auc"][2]


def test_a_bootstrap_whose_draws_agree_gives_no_interval():
    """All right on twenty patients is no proof that no patient would be mistaken."""
    labels = np.arange(40) % 2
    images = np.repeat(labels, 256).reshape(40, 16, 16).astype(np.float32)
    samples = Samples({"plain": images}, labels, tuple(f"p{i // 2}" for i in range(40)))
    row = classify(samples, Training(folds=3, epochs=4))["images"]["plain"]
    assert row["auc"] == row["accuracy"] == [1.0, None, None]


@pytest.mark.parametrize("positive", [5, 10])
def test_intervals_hold_the_truth_where_one_class_has_few_patients(positive, monkeypatch):
    """Then its patients are what an AUC is uncertain by, however many the other class has."""
    monkeypatch.setattr("ldct_dist.evaluate.classify._RESAMPLES", 300)
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), 2)
    labels = (patients < positive).astype(int)
    truth = norm.cdf(1 / np.sqrt(2))
    held = 0
    for seed in range(300):
        scores = labels + rng.normal(0, np.sqrt(0.5), 40)[patients] + rng.normal(0, np.sqrt(0.5), 80)
        _, low, high = performance(labels, scores, patients, resamples(labels, patients, seed))["auc"]
        held += low <= truth <= high
    assert held / 300 == pytest.approx(0.95, abs=0.03)


def test_a_patient_is_in_one_fold_and_classes_in_all():
    labels = np.array([1, 1, 0, 0] * 12)
    patients = np.repeat([f"p{i}" for i in range(24)], 2)
    fold = patient_folds(labels, patients, 4, seed=0)
    assert all(len(set(fold[patients == p])) == 1 for p in patients)
    for k in range(4):
        assert set(labels[fold == k]) == {0, 1}
    with pytest.raises(UserError, match="label at least 4 of each"):
        patient_folds(labels[:8], patients[:8], 4, seed=0)


def test_auc_by_hand():
    assert auc(np.array([0, 0, 1, 1]), np.array([1.0, 3.0, 2.0, 4.0])) == 0.75
    assert auc(np.array([0, 1]), np.array([1.0, 1.0])) == 0.5


def plain_delong(labels, a, b):
    """As published, from the kernel of every pair."""
    kernels = [np.sign(s[labels == 1][:, None] - s[labels == 0]) / 2 + 0.5 for s in (a, b)]
    apart = kernels[0] - kernels[1]
    variances = [apart.mean(axis).var(ddof=1) / apart.shape[1 - axis] for axis in (0, 1)]
    return 2 * norm.sf(abs(apart.mean()) / np.sqrt(sum(variances)))


def test_one_sample_a_patient_makes_the_plain_tests():
    rng = np.random.default_rng(0)
    labels, patients = np.arange(60) % 2, np.array([f"p{i:02}" for i in range(60)])
    for _ in range(5):
        a, b = (labels + rng.normal(size=60).round(1) for _ in range(2))  # with ties
        assert delong(labels, a, b, patients) == pytest.approx(plain_delong(labels, a, b))
        right_a, right_b = rng.random(60) < 0.9, rng.random(60) < 0.6
        only_a, only_b = (right_a & ~right_b).sum(), (right_b & ~right_a).sum()
        expected = binomtest(only_a, only_a + only_b).pvalue
        assert mcnemar(right_a, right_b, patients) == pytest.approx(expected)


@pytest.mark.parametrize("both", [False, True])
def test_tests_of_clustered_samples_have_the_size_they_say(both):
    """40 patients of 8 slices, which are much alike, and two methods no better than each other; labels are the
    patient's, or there are `both` in every patient."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), 8)
    labels = np.arange(320) % 2 if both else patients % 2
    p_values = []
    for _ in range(400):
        a, b = (labels - 0.5 + rng.normal(size=40)[patients] + 0.5 * rng.normal(size=320) for _ in range(2))
        right = ((s > 0) == (labels == 1) for s in (a, b))
        p_values.append((delong(labels, a, b, patients), mcnemar(*right, patients)))
    rejected = (np.array(p_values) < 0.05).mean(axis=0)
    assert rejected == pytest.approx([0.05, 0.05], abs=0.025)


def test_delong_finds_a_difference():
    rng = np.random.default_rng(0)
    labels, patients = np.arange(120) % 2, np.arange(120)
    worse = norm.ppf(rng.random(120))
    assert delong(labels, labels + 0.5 * rng.normal(size=120), worse, patients) < 1e-4
    assert delong(labels, worse, worse, patients) == 1


def test_mcnemar_counts_where_they_part():
    a = np.array([True] * 10 + [False] * 2 + [True] * 50)
    b = np.array([False] * 10 + [True] * 2 + [True] * 50)
    assert mcnemar(a, b, np.arange(62)) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(a, a, np.arange(62)) == 1
    # All ten are one patient's and the two another's: the sums can be 8 or 12 of either sign, and this is an 8.
    assert mcnemar(a, b, np.array([0] * 10 + [1] * 2 + [2] * 50)) == 1


def test_classifier_takes_any_side_that_halves_three_times():
    assert Classifier(64)(torch.zeros(3, 1, 64, 64)).shape == (3,)
    assert Classifier(16)(torch.zeros(2, 1, 16, 16)).shape == (2,)


def test_labels_by_case_and_by_slice(tmp_path):
    (tmp_path / "labels.csv").write_text("case,slice,label\na,,1\nb,2,0\nb,3,1\n")
    cohort = Cohort(read_labels(tmp_path / "labels.csv")[0], (-40.0, 160.0), {"a": "p", "b": "q", "c": "r"})
    hu = np.full((20, 32, 32), 60, np.int16)
    a, b, c = (cohort.samples_of(name, {"low dose": hu, "full dose": hu}) for name in "abc")
    assert c is None
    samples = joined([a, b])
    assert samples.labels.tolist() == [1] * 8 + [0, 1]
    assert samples.patients == ("p",) * 8 + ("q",) * 2
    assert set(samples.images) == {"low dose", "full dose"}
    assert samples.images["low dose"].shape == (10, SIDE, SIDE)
    np.testing.assert_allclose(samples.images["low dose"], 0.5)


def test_labels_of_a_patient_are_of_all_their_cases():
    key, (positive, negative) = bytes(32), ({None: 1}, {None: 0})
    cases = {"a1": patient_hash(key, "L067"), "b": patient_hash(key, "L096"), "a2": patient_hash(key, "L067")}
    labels = {"L096": negative, "L001": negative, "L067": positive}
    assert of_cases(labels, cases, key) == {
        **{"a1": positive, "a2": positive, "b": negative},
        "patient 2 of the labels": negative,
    }
    other = bytes([1] * 32)
    assert not of_cases(labels, cases, other).keys() & cases.keys()


def test_smaller_images_have_less_noise():
    """A pixel of 64 x 64 holds 8 x 8 of the slice's voxels; sampled, one of them would stand for all."""
    noise = np.random.default_rng(0).normal(60, 30, (512, 512))
    seen = shown(noise, (-400.0, 600.0)) * 1000 - 400
    np.testing.assert_allclose(seen, noise.reshape(64, 8, 64, 8).mean((1, 3)), atol=1e-3)
    assert seen.std() == pytest.approx(30 / 8, rel=0.05)
    assert shown(noise[:500, :300], WINDOW).shape == (SIDE, SIDE)


def test_images_are_averaged_before_the_window_cuts_them():
    """Otherwise noise would change the brightness of what lies at the window's ends."""
    noise = np.random.default_rng(0).normal(-100, 30, (512, 512))
    assert shown(noise + 20, WINDOW).mean() == pytest.approx(20 / 320, abs=0.001)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name,label\na,1\n", "no column case"),
        ("case,label\na,covid\n", "line 2: labels are 0 or 1"),
        ("case,slice,label\na,0,1\na,-1,0\n", "line 3"),
        ("case,slice,label\n\na,²,1\n", "line 3: labels are 0 or 1, and slices whole numbers"),
        ("label,case\n1\n", "line 2: it names no case"),
        ("patient,label\nL067,1\n,0\n", "line 3: it names no patient"),
        ("patient,slice,label\nL067,3,1\n", "no column case"),
        ("case,label\na,1\na,1\na,0\n", "line 4: case a is labelled 1 in an earlier line"),
        (
            "case,slice,label\na,,1\na,3,0\n",
            "line 3: case a has both a label for all of it and one for a slice",
        ),
        ("case,label\n" + "a" * 200_000 + ",1\n", "cannot be read as CSV"),
        ("case,slice,label\na," + "9" * 5000 + ",1\n", "cannot be read as CSV"),
    ],
)
def test_mistakes_in_labels_name_the_line(tmp_path, text, told):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=told):
        read_labels(tmp_path / "labels.csv")


def test_labels_of_nothing_evaluated_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file; give a CSV"):
        read_labels(tmp_path / "none.csv")
    with pytest.raises(UserError, match="none is for a case"):
        Cohort({"x": {None: 1}}, WINDOW, {"y": "p"})
    with pytest.raises(UserError, match="they are for no case at all"):
        Cohort({}, WINDOW, {"y": "p"})
    with pytest.raises(UserError, match="they are for x0, x1, x2, x3, and 996 more"):
        Cohort({f"x{i}": {None: 1} for i in range(1000)}, WINDOW, {"y": "p"})
    with pytest.raises(UserError, match="slices 0 to 2, not 7"):
        Cohort({"x": {7: 1}}, WINDOW, {"x": "p"}).chosen("x", 3)
