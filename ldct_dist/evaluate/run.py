"""`ldct-dist evaluate`: from weights and a store to a table, or to a whole report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.status import Status

from ldct_dist import config as configs
from ldct_dist.checkpoint.load import weights_of
from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError, few
from ldct_dist.evaluate.classify import Training, classify, patient_folds
from ldct_dist.evaluate.compare import COLUMNS, Comparison, print_classification, print_comparison
from ldct_dist.evaluate.methods import LOW, peers_beside
from ldct_dist.evaluate.protocols import protocol_named
from ldct_dist.evaluate.report.page import write_report
from ldct_dist.evaluate.report.pictures import Pictures
from ldct_dist.evaluate.statistics import by_patient
from ldct_dist.evaluate.study import Say, Study, StudyConfig, measure, methods_for
from ldct_dist.evaluate.tasks import Cohort, of_cases, read_labels
from ldct_dist.files import refuse_unwritable
from ldct_dist.models.weights import weights_hash
from ldct_dist.store.privacy import default_key_path, key_id, load_key
from ldct_dist.store.reader import Store


def evaluate(
    weights: Mapping[str, Path],
    store: Path,
    options: Mapping[str, Any],
    out: Path | None,
    baselines: Sequence[str],
    peers: Sequence[str],
    labels: Path | None,
    key: Path | None,
    cases_shown: int,
    console: Console,
) -> None:
    """Measure, print, and write a report to `out` where that is given; baselines and labels are for the report.

    weights: files, checkpoints or runs, by the names that tables call them. key: by which labels of patients find the
    store's cases; STORE.key unless given. Raises UserError for what is not there.
    """
    weights = {name: weights_of(path) for name, path in weights.items()}
    config = configs.validate(StudyConfig, dict(options), "evaluate")
    protocol_named(config.protocol)
    others = peers_beside(weights, peers)
    opened = Store(store)
    if out is None and labels is not None:
        raise UserError("--labels: classification is part of the report; add --out FOLDER")
    if labels is None and key is not None:
        raise UserError("--key: only labels of patients need it; add --labels FILE.csv, or leave it out")
    cohort = _cohort(opened, config, labels, key or default_key_path(opened.path)) if labels else None
    if out is not None:
        refuse_unwritable(out)
    pictures = Pictures(protocol_named(config.protocol), cases_shown)

    def show(name: str, low: Volume, full: Volume, images: Mapping[str, np.ndarray]) -> None:
        if out is not None:
            pictures.add(name, low, full, images)
        if cohort:
            cohort.add(name, low, full, images)

    with console.status("denoising and measuring") as status:
        say = _say(console, status)
        methods = methods_for(opened, config, weights, others, baselines if out else (), say)
        study = measure(opened, config, methods, physics=out is not None, show=show, say=say)
        study.weights = {name: weights_hash(path) for name, path in weights.items()}
        if cohort:
            lost, bare = _unmatched(opened, cohort)
            if lost:
                study.note(f"labels without a case in {opened.path.name}: {len(lost)}")
            if bare:
                study.note(f"classification of cases without a label: {few(bare, ', ')}")
            say("classifying", "each kind of image")
        classified = classify(cohort.samples()) if cohort else None
    print_comparison(_comparison(study), console)
    if classified:
        print_classification(classified, console)
    for note in study.notes:
        console.print(f"not measured: {note}", markup=False)
    if cohort and lost:
        # Here alone: a label that is no case's may be a patient's name, and a report is handed on.
        console.print(f"labels without a case: {few(lost, ', ')}", markup=False)
    if out is not None:
        console.print(f"report -> {write_report(out, study, pictures, classified)}")


def _say(console: Console, status: Status) -> Say:
    """A terminal tells what goes on now; a log has a line when the next thing begins."""
    said: set[str] = set()

    def say(what: str, method: str) -> None:
        if console.is_terminal:
            status.update(f"{what}: {method}")
        elif what not in said:
            said.add(what)
            console.print(what, markup=False)

    return say


def _cohort(store: Store, config: StudyConfig, labels: Path, key: Path) -> Cohort:
    """The cohort of the labels. Raises UserError for all that can be wrong with them, before anything is denoised."""
    known, unit = read_labels(labels)
    if unit == "patient":
        if not os.path.exists(key):  # Path.exists would raise PermissionError
            raise UserError(
                f"{labels}: labels of patients need the store's key, and {key} is not there, or may not be read; say "
                "where it is by --key, or label cases"
            )
        secret = load_key(key)
        if not {key_id(secret), None} & set(store.table["key_id"].to_pylist()):
            raise UserError(f"{labels}: {key} is not the key of {store.path}; give the right file by --key")
        known = of_cases(known, {case.name: case.patient for case in store.cases}, secret)
    cases = [store.cases[int(i)] for i in store.split(config.split)]
    window = protocol_named(config.protocol).window
    cohort = Cohort(known, window, {case.name: case.patient for case in cases})
    own = [(case.patient, label) for case in cases for _, label in cohort.chosen(case.name, case.shape[0])]
    whose, what = map(np.array, zip(*own, strict=True))
    patient_folds(what, whose, Training().folds, Training().seed)
    return cohort


def _unmatched(store: Store, cohort: Cohort) -> tuple[list[str], list[str]]:
    """(labels without a case, cases without a label): a slip of the pen shows in nothing else."""
    there = {case.name for case in store.cases}
    lost = [name for name in cohort.labels if name not in there]
    return lost, [name for name in cohort.patients if name not in cohort.labels]


def _comparison(study: Study) -> Comparison:
    """Means over patients of what is finite, as in the report."""
    name, rows = study.protocols[0].name, study.of(LOW)
    cases, patients = len(rows), len({row.patient for row in rows})
    whose = (
        f"{cases} case{'s' * (cases > 1)} of {patients} patient{'s' * (patients > 1)} in {study.config.split}"
    )
    if patients > 1:
        whose += ", means over patients,"

    def mean(method: str, key: str) -> float:
        own = study.of(method)
        values = [row.figures[name].get(key, np.nan) for row in own]
        means = by_patient(values, [row.patient for row in own])
        return float(np.mean(list(means.values()))) if means else values[0]

    figures = {method: {key: mean(method, key) for key in COLUMNS} for method in study.methods}
    return Comparison(whose, name, figures)
