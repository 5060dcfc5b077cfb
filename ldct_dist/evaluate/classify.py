"""Does a classifier do better on denoised images? The same small CNN is trained anew on each kind of image.

Folds keep a patient's samples together, and are the same for every kind of image, so that the comparison is paired. Tests
are two-sided, with the patient as the unit: DeLong's for AUCs (Biometrics 44 (1988)) and McNemar's exact one for right
and wrong answers, in forms that allow for several samples a patient and, with one each, are the published tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch
from scipy.stats import norm, rankdata
from torch import nn

from ldct_dist.errors import UserError
from ldct_dist.evaluate.statistics import holm, tail

_BATCH = 16
_CHANNELS = 8  # of the first convolution; each later one has twice as many
_RESAMPLES = 2000


@dataclass(frozen=True)
class Samples:
    """What is classified.

    images: kind, such as "low dose", to (n, side, side) float32 in [0, 1]. All kinds show the same n samples; side is a
    multiple of 8. labels: (n,) 0 or 1. patients: (n,) the patient of each sample.
    """

    images: Mapping[str, np.ndarray]
    labels: np.ndarray
    patients: tuple[str, ...]


@dataclass(frozen=True)
class Training:
    """folds of the cross-validation; epochs of Adam at `lr`; seed of the folds, the weights and the batches."""

    folds: int = 5
    epochs: int = 30
    lr: float = 3e-3
    seed: int = 0


class Classifier(nn.Module):
    """(b, 1, side, side) in [0, 1] -> (b,) logits: convolutions with LeakyReLU and pooling, then fully connected
    layers."""

    def __init__(self, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = [1, _CHANNELS, 2 * _CHANNELS, 4 * _CHANNELS]
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.LeakyReLU(0.1), nn.MaxPool2d(2)]
        inner = widths[-1] * (side // 8) ** 2
        self.layers = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(inner, 32), nn.LeakyReLU(0.1), nn.Linear(32, 1), nn.Flatten(0)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(4 * (images - 0.5))


def classify(samples: Samples, training: Training | None = None) -> dict[str, Any]:
    """Cross-validated performance on each kind of image, and paired tests between the kinds, ready for JSON.

    auc, accuracy, sensitivity and specificity are (value, low, high), as `performance` has them.
    Raises UserError where a class has too few patients for the folds.
    """
    training = training or Training()
    labels, patients = np.asarray(samples.labels), np.asarray(samples.patients)
    fold = patient_folds(labels, patients, training.folds, training.seed)
    scores = {kind: _out_of_fold(images, labels, fold, training) for kind, images in samples.images.items()}
    drawn = resamples(labels, patients, training.seed)
    return {
        "training": asdict(training),
        "samples": len(labels),
        "patients": len(set(samples.patients)),
        "images": {kind: performance(labels, s, patients, drawn) for kind, s in scores.items()},
        "tests": _tests(labels, scores, patients),
    }


def patient_folds(labels: np.ndarray, patients: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """(n,) the fold of each sample. All samples of a patient are in one fold, and patients with positive samples are spread
    evenly over the folds. Raises UserError if a class has fewer patients than there are folds."""
    names = np.unique(patients)
    positive, negative = (
        np.array([(labels[patients == n] == label).any() for n in names]) for label in (1, 0)
    )
    if min(positive.sum(), negative.sum()) < folds:
        raise UserError(
            f"classification: of the patients that are evaluated, {positive.sum()} have samples labelled 1 and "
            f"{negative.sum()} have samples labelled 0; label at least {folds} of each, since it trains on {folds} folds"
        )
    rng = np.random.default_rng(seed)
    dealt = np.concatenate([rng.permutation(names[positive]), rng.permutation(names[~positive])])
    fold_of = {name: i % folds for i, name in enumerate(dealt)}
    return np.array([fold_of[patient] for patient in patients])


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive sample scores above a negative one."""
    positive = labels == 1
    n1, n0 = positive.sum(), (~positive).sum()
    return float((rankdata(scores)[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def performance(
    labels: np.ndarray, scores: np.ndarray, patients: np.ndarray, drawn: list[np.ndarray]
) -> dict[str, list[float | None]]:
    """auc, accuracy, sensitivity and specificity of the scores as (value, low, high).

    low and high are a 95 % interval: expanded percentiles over `drawn`, of `resamples`. They are expanded for the number
    of patients on which a measure rests, which for an AUC is that of the smaller class. They are None where all draws
    agree, such as where no sample is mistaken, since that does not make the value certain.
    """
    positive, negative = (len(np.unique(patients[labels == label])) for label in (1, 0))
    measures = {
        "auc": (auc, min(positive, negative)),
        "accuracy": (_accuracy, len(np.unique(patients))),
        "sensitivity": (_sensitivity, positive),
        "specificity": (_specificity, negative),
    }
    found: dict[str, list[float | None]] = {}
    for name, (measure, rests_on) in measures.items():
        again = [measure(labels[sample], scores[sample]) for sample in drawn]
        beyond = tail(rests_on)
        interval = (
            map(float, np.quantile(again, [beyond, 1 - beyond])) if min(again) < max(again) else (None, None)
        )
        found[name] = [measure(labels, scores), *interval]
    return found


def resamples(labels: np.ndarray, patients: np.ndarray, seed: int) -> list[np.ndarray]:
    """Bootstrap resamples: the indices of the samples of patients drawn with replacement. Draws without one of the classes
    are repeated."""
    rng = np.random.default_rng(seed)
    of = [np.flatnonzero(patients == name) for name in np.unique(patients)]
    drawn: list[np.ndarray] = []
    while len(drawn) < _RESAMPLES:
        sample = np.concatenate([of[i] for i in rng.integers(0, len(of), len(of))])
        if 0 < labels[sample].mean() < 1:
            drawn.append(sample)
    return drawn


def delong(labels: np.ndarray, a: np.ndarray, b: np.ndarray, patients: np.ndarray) -> float:
    """p value of the hypothesis that scores a and b have the same AUC. Only patients are assumed to be independent
    (Obuchowski, Biometrics 53 (1997))."""
    positive = labels == 1
    n1, n0 = positive.sum(), (~positive).sum()
    placed = []
    for scores in (a, b):
        ranks = rankdata(scores)
        # The share of the other class that each sample is on the right side of.
        shares = np.empty(len(labels))
        shares[positive] = (ranks[positive] - rankdata(scores[positive])) / n0
        shares[~positive] = 1 - (ranks[~positive] - rankdata(scores[~positive])) / n1
        placed.append(shares)
    apart = placed[0] - placed[1]
    difference = apart[positive].mean()
    _, whose = np.unique(patients, return_inverse=True)
    # By patient, what its samples of each class contribute to the difference beyond its expectation.
    of1, of0 = (
        np.bincount(whose, (apart - difference) * each / each.sum()) for each in (positive, ~positive)
    )
    k1, k0 = (len(np.unique(whose[each])) for each in (positive, ~positive))
    k = len(of1)
    variance = k1 / (k1 - 1) * of1 @ of1 + k0 / (k0 - 1) * of0 @ of0 + 2 * k / (k - 1) * of1 @ of0
    if variance == 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * norm.sf(abs(difference) / math.sqrt(variance)))


def mcnemar(right_a: np.ndarray, right_b: np.ndarray, patients: np.ndarray) -> float:
    """p value of the hypothesis that a and b are right equally often; exact, from the patients on whom they differ.

    Under that hypothesis, a patient's excess of right answers of a could as well be b's. p is the share of all ways to
    swap them for which the sum is at least as far from 0.
    """
    _, whose = np.unique(patients, return_inverse=True)
    excess = np.bincount(whose, right_a.astype(float) - right_b).astype(int)
    shares = np.ones(1)  # of the sums from -k to k in steps of 1
    for size in np.abs(excess):
        shares = (np.pad(shares, (0, 2 * size)) + np.pad(shares, (2 * size, 0))) / 2
    sums = np.arange(len(shares)) - len(shares) // 2
    return min(1.0, float(shares[np.abs(sums) >= abs(excess.sum())].sum()))


def _out_of_fold(images: np.ndarray, labels: np.ndarray, fold: np.ndarray, training: Training) -> np.ndarray:
    """(n,) the logit of each sample, by the network that has not seen its patient."""
    scores = np.empty(len(labels), np.float32)
    data, target = torch.from_numpy(images[:, None]).float(), torch.from_numpy(labels).float()
    for k in range(training.folds):
        held_out = torch.from_numpy(fold == k)
        model = _fit(data[~held_out], target[~held_out], training, seed=training.seed + k)
        with torch.inference_mode():
            scores[fold == k] = model(data[held_out]).numpy()
    return scores


def _fit(data: torch.Tensor, target: torch.Tensor, training: Training, seed: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(data.shape[-1])
        optimiser = torch.optim.Adam(model.parameters(), lr=training.lr, weight_decay=1e-4)
        # Both classes count alike, however rare one is.
        loss = nn.BCEWithLogitsLoss(pos_weight=(target == 0).sum() / (target == 1).sum())
        for _ in range(training.epochs):
            for batch in torch.randperm(len(data)).split(_BATCH):
                images = data[batch].flip(-1) if torch.rand(()) < 0.5 else data[batch]
                optimiser.zero_grad()
                loss(model(images), target[batch]).backward()
                optimiser.step()
    return model.eval()


def _accuracy(labels: np.ndarray, scores: np.ndarray) -> float:
    return float(((scores > 0) == (labels == 1)).mean())


def _sensitivity(labels: np.ndarray, scores: np.ndarray) -> float:
    return float((scores[labels == 1] > 0).mean())


def _specificity(labels: np.ndarray, scores: np.ndarray) -> float:
    return float((scores[labels == 0] <= 0).mean())


def _tests(
    labels: np.ndarray, scores: Mapping[str, np.ndarray], patients: np.ndarray
) -> list[dict[str, Any]]:
    pairs = list(combinations(scores, 2))
    right = {kind: (s > 0) == (labels == 1) for kind, s in scores.items()}
    tests = {
        "delong": [delong(labels, scores[a], scores[b], patients) for a, b in pairs],
        "mcnemar": [mcnemar(right[a], right[b], patients) for a, b in pairs],
    }
    corrected = {name: holm(p_values) for name, p_values in tests.items()}
    return [
        {
            "a": a,
            "b": b,
            "auc_difference": auc(labels, scores[a]) - auc(labels, scores[b]),
            **{f"{name}_p": tests[name][i] for name in tests},
            **{f"{name}_p_holm": corrected[name][i] for name in tests},
        }
        for i, (a, b) in enumerate(pairs)
    ]
