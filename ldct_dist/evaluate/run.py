"""`ldct-dist evaluate`: from weights and a store to a table, or to a whole report."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.status import Status

from ldct_dist.errors import few
from ldct_dist.evaluate.compare import COLUMNS, Comparison, print_classification, print_comparison
from ldct_dist.evaluate.evaluation import Evaluation
from ldct_dist.evaluate.examination import Say
from ldct_dist.evaluate.methods import LOW
from ldct_dist.evaluate.report.page import write_report
from ldct_dist.evaluate.statistics import by_patient
from ldct_dist.evaluate.study import Study
from ldct_dist.evaluate.tasks import Cohort
from ldct_dist.store.reader import Store


def evaluate(request: Evaluation, part: tuple[int, int] | None, console: Console) -> None:
    """Measure, write the report if there is to be one, and print.

    part: (i, n) measures every n-th case from the i-th and the findings are kept for the start that makes the report,
    which is one without a part.
    """
    with console.status("denoising and measuring") as status:
        say = _say(console, status)
        found = request.measured(part or (0, 1), say, lambda line: console.print(line, markup=False))
        if part is not None:
            console.print(
                f"part {part[0]}/{part[1]}: {len(found)} measured; once all parts are done, the same command without "
                "--part makes the report"
            )
            return
        study = request.examination.gather(found)
        study.weights, study.code_of_others = request.hashes, request.origins
        lost, bare = _unmatched(request.store, request.cohort) if request.cohort else ([], [])
        if lost:
            study.note(f"labels without a case in {request.store.path.name}: {len(lost)}")
        if bare:
            study.note(f"classification of cases without a label: {few(bare, ', ')}")
        if request.cohort:
            say("classifying", "each kind of image")
        classified = request.classified(found)
    page = None
    if request.out is not None and request.kept is not None:
        # First: whoever reads what is printed may stop listening, as `head` does.
        page = write_report(request.out, study, classified)
        request.kept.forget()
    print_comparison(_comparison(study), console)
    if classified:
        print_classification(classified, console)
    for note in study.notes:
        console.print(f"not measured: {note}", markup=False)
    if lost:
        # Here alone: a label that is no case's may be a patient's name, and a report is handed on.
        console.print(f"labels without a case: {few(lost, ', ')}", markup=False)
    if page is not None:
        console.print(f"report -> {page}")


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
