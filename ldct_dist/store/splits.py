"""Which split each case is in: all cases of a patient are in the same one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate

from ldct_dist.errors import UserError
from ldct_dist.store.pairing import Pair, Refusal
from ldct_dist.store.privacy import keyed_hash

_NAMED = 4  # patients that an error names

Shares = Mapping[str, float]
"""a split's share of the patients"""
Patterns = Mapping[str, str]
"""pattern of a patient (shell wildcards) to its split; the first that fits decides"""


def check_shares(shares: Shares, patterns: Patterns) -> None:
    """Raises UserError unless the shares, none of them negative, add up to 1 and the patterns' splits are among them."""
    total = sum(shares.values())
    if min(shares.values(), default=0.0) < 0 or abs(total - 1) > 1e-6:
        raise UserError(
            f"splits: the shares {shares} add up to {total:g}; they must add up to 1, and none may be below 0"
        )
    for split in patterns.values():
        _check_name(split, shares)


def check_named(
    pairs: Sequence[Pair], refused: Sequence[Refusal], shares: Shares, patterns: Patterns
) -> None:
    """Raises UserError if a source names a split that does not exist, or if a pattern fits no patient: the one whom it was
    to hold out might then be trained on."""
    for pair in pairs:
        if pair.split:
            _check_name(pair.split, shares)
    deciding = {_pattern(pair, patterns) for pair in pairs}
    for pattern in patterns:
        if pattern not in deciding:
            raise UserError(
                f"split_of: {pattern!r} applies to no patient: {_why_idle(pattern, pairs, refused)}"
            )


def split_of_each(pairs: Sequence[Pair], key: bytes, shares: Shares, patterns: Patterns) -> list[str]:
    """The split of each pair: the source's own, or its pattern's, or drawn by the keyed hash of the patient.

    Raises UserError if a patient, or a study, would stand in more than one.
    """
    named = [_named(pair, patterns) for pair in pairs]
    others = {pair.patient for pair, split in zip(pairs, named, strict=True) if split is None}
    drawn = _drawn(others, {split for split in named if split}, key, shares)
    splits = [split or drawn[pair.patient] for pair, split in zip(pairs, named, strict=True)]
    _refuse_leaks(pairs, splits)
    return splits


def _check_name(split: str, shares: Shares) -> None:
    if split not in shares:
        raise UserError(
            f"split {split!r} is not one of {', '.join(shares)}; correct it, or add it to splits "
            "(with a share of 0 if no patient is to be drawn for it)"
        )


def _named(pair: Pair, patterns: Patterns) -> str | None:
    pattern = _pattern(pair, patterns)
    return pair.split if pattern is None else patterns[pattern]


def _pattern(pair: Pair, patterns: Patterns) -> str | None:
    """The pattern that decides for the pair, if one does."""
    if pair.split:
        return None
    return next((pattern for pattern in patterns if fnmatchcase(pair.patient, pattern)), None)


def _why_idle(pattern: str, pairs: Sequence[Pair], refused: Sequence[Refusal]) -> str:
    patients = sorted({pair.patient for pair in pairs})
    if any(fnmatchcase(patient, pattern) for patient in patients):
        return "an earlier pattern, or the manifest, decides for all patients that it matches; put it first, or leave it out"
    called = ", ".join(patients[:_NAMED]) + (", ..." if len(patients) > _NAMED else "")
    lacking = f", and some were refused, the first for: {refused[0].reason}" if refused else ""
    return f"the patients are {called}{lacking}; correct it (* matches any characters), or leave it out"


def _drawn(patients: Collection[str], filled: Collection[str], key: bytes, shares: Shares) -> dict[str, str]:
    """The split of each patient, who falls into one whatever others there are, so that a cohort may grow.

    But a tenth of ten patients is nobody in one cohort of three. So a split with a share that nobody falls into, and that
    is not among those `filled` already, gets the patient of the largest split who fell nearest to it. As the cohort grows,
    that patient may go back, but beyond the first few no other is held out later.
    """
    at = {patient: int(keyed_hash(key, "split", patient)[:13], 16) / 16**13 for patient in patients}
    ends = dict(zip(shares, accumulate(shares.values()), strict=True))
    largest = max(shares, key=lambda split: shares[split])  # also where the shares end a little below 1
    split_of = {patient: next((s for s in ends if u < ends[s]), largest) for patient, u in at.items()}
    fallen = set(split_of.values()).union(filled)
    for split in (s for s, share in shares.items() if share > 0 and s not in fallen):
        held = Counter([*split_of.values(), *filled])
        giver = largest if held[largest] > 1 else max(shares, key=lambda s: held[s])
        if held[giver] > 1:
            middle = ends[split] - shares[split] / 2
            of_giver = (patient for patient in at if split_of[patient] == giver)
            split_of[min(of_giver, key=lambda patient: abs(at[patient] - middle))] = split
    return split_of


def _refuse_leaks(pairs: Sequence[Pair], splits: Sequence[str]) -> None:
    of: dict[str, set[str]] = {}
    for pair, split in zip(pairs, splits, strict=True):
        for whose in _whose(pair):
            of.setdefault(whose, set()).add(split)
    leaking = [pair for pair in pairs if any(len(of[whose]) > 1 for whose in _whose(pair))]
    if leaking:
        where = ", ".join(pair.name or str(pair.full.place) for pair in leaking[:6])
        raise UserError(
            f"{len(leaking)} cases of one patient or study would be in more than one split ({where}); "
            "give all cases of a patient one split"
        )


def _whose(pair: Pair) -> set[str]:
    """What identifies the patient: the name, and the study, which is of one patient however a manifest names them."""
    studies = {series.study_uid for series in (pair.full, pair.low) if series}
    return {pair.patient, *filter(None, studies)}
