import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import norm

from ldct_dist.ct.volume import Volume
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
)
from ldct_dist.evaluate.tasks import LESION_TRAINING, SIDE, Cohort, lesion_samples, read_labels

WINDOW = (-100.0, 220.0)


@pytest.fixture(scope="module")
def found():
    """The generated task, on low dose, on a filtered and on full dose."""
    samples = lesion_samples({"denoised": lambda low: gaussian_filter(low.hu.astype(float), (0, 1, 1))})
    return classify(samples, LESION_TRAINING)


def test_the_intervals_of_low_and_full_dose_part(found):
    low, full = (found["images"][kind]["auc"] for kind in ("low dose", "full dose"))
    assert low[2] < full[1]
    assert all(row["auc"][1] <= row["auc"][0] <= row["auc"][2] for row in found["images"].values())
    pair = next(t for t in found["tests"] if (t["a"], t["b"]) == ("low dose", "full dose"))
    assert pair["delong_p_holm"] < 0.01
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


def test_a_patient_is_in_one_fold_and_classes_in_all():
    labels = np.array([1, 1, 0, 0] * 12)
    patients = np.repeat([f"p{i}" for i in range(24)], 2)
    fold = patient_folds(labels, patients, 4, seed=0)
    assert all(len(set(fold[patients == p])) == 1 for p in patients)
    for k in range(4):
        assert set(labels[fold == k]) == {0, 1}
    with pytest.raises(UserError, match="too few for 4 folds"):
        patient_folds(labels[:8], patients[:8], 4, seed=0)


def test_auc_by_hand():
    assert auc(np.array([0, 0, 1, 1]), np.array([1.0, 3.0, 2.0, 4.0])) == 0.75
    assert auc(np.array([0, 1]), np.array([1.0, 1.0])) == 0.5


def test_delong_has_the_size_it_says_and_finds_a_difference():
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 2
    p_values = []
    for _ in range(300):
        shared = rng.normal(size=120)
        a, b = (labels + shared + rng.normal(size=120) for _ in range(2))
        p_values.append(delong(labels, a, b))
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.035)
    worse = norm.ppf(rng.random(120))
    assert delong(labels, labels + 0.5 * rng.normal(size=120), worse) < 1e-4
    assert delong(labels, worse, worse) == 1


def test_mcnemar_counts_where_they_part():
    a = np.array([True] * 10 + [False] * 2 + [True] * 50)
    b = np.array([False] * 10 + [True] * 2 + [True] * 50)
    assert mcnemar(a, b) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(a, a) == 1


def test_classifier_takes_any_side_that_halves_three_times():
    assert Classifier(64)(torch.zeros(3, 1, 64, 64)).shape == (3,)
    assert Classifier(16)(torch.zeros(2, 1, 16, 16)).shape == (2,)


def test_labels_by_case_and_by_slice(tmp_path):
    (tmp_path / "labels.csv").write_text("case,slice,label\na,,1\nb,2,0\nb,3,1\n")
    cohort = Cohort(read_labels(tmp_path / "labels.csv"), (-40.0, 160.0), {"a": "p", "b": "q", "c": "r"})
    for name in "abc":
        volume = Volume(np.full((20, 32, 32), 60, np.int16), (5.0, 1.0, 1.0))
        cohort.add(name, volume, volume, {"low dose": volume.hu})
    samples = cohort.samples()
    assert samples.labels.tolist() == [1] * 8 + [0, 1]
    assert samples.patients == ("p",) * 8 + ("q",) * 2
    assert set(samples.images) == {"low dose", "full dose"}
    assert samples.images["low dose"].shape == (10, SIDE, SIDE)
    np.testing.assert_allclose(samples.images["low dose"], 0.5)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name,label\na,1\n", "no column case"),
        ("case,label\na,covid\n", "line 2: labels are 0 or 1"),
        ("case,slice,label\na,0,1\na,-1,0\n", "line 3"),
    ],
)
def test_mistakes_in_labels_name_the_line(tmp_path, text, told):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=told):
        read_labels(tmp_path / "labels.csv")


def test_labels_of_nothing_evaluated_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_labels(tmp_path / "none.csv")
    with pytest.raises(UserError, match="none of them is of a case"):
        Cohort({"x": {None: 1}}, WINDOW, {}).samples()
    volume = Volume(np.zeros((3, 16, 16), np.int16), (5.0, 1.0, 1.0))
    with pytest.raises(UserError, match="slices 0 to 2, not 7"):
        Cohort({"x": {7: 1}}, WINDOW, {"x": "p"}).add("x", volume, volume, {})
