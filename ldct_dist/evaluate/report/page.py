"""The report: one HTML page that needs nothing but itself, results.json and cases.csv."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import ldct_dist
from ldct_dist.errors import UserError
from ldct_dist.evaluate import results
from ldct_dist.evaluate.figures import minus
from ldct_dist.evaluate.kept import AGAIN
from ldct_dist.evaluate.methods import FULL, LOW
from ldct_dist.evaluate.report import tables
from ldct_dist.evaluate.report.curves import curves, strokes
from ldct_dist.evaluate.study import Study
from ldct_dist.files import replacing, sync

PAGE, JSON, CSV = "index.html", "results.json", "cases.csv"


def write_report(out: Path, study: Study, classification: dict[str, Any] | None = None) -> Path:
    """The page's path. All files are whole, or as they were before. Raises UserError where they cannot be written."""
    written = {
        JSON: results.to_json(study, classification),
        CSV: results.to_csv(study),
        PAGE: render(study, classification),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as together:
            for name, text in written.items():
                temporary = together.enter_context(replacing(out / name))
                # Names of weights or stores need not be UTF-8.
                temporary.write_bytes(text.encode(errors="backslashreplace"))
                sync(temporary)  # before the first gets its name, and not only before it gets its own
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror}); {AGAIN}") from e
    return out / PAGE


def render(study: Study, classification: dict[str, Any] | None = None) -> str:
    """The page as HTML."""
    templates = Environment(
        loader=PackageLoader("ldct_dist.evaluate.report", ""), autoescape=True, undefined=StrictUndefined
    )
    templates.policies["json.dumps_kwargs"] = {}  # do not sort: views and cases come in their own order
    return templates.get_template("page.html").render(
        version=ldct_dist.__version__,
        study=study,
        cases=len({row.case for row in study.rows}),
        patients=len({row.patient for row in study.rows}),
        summaries=[tables.summary(study, p.name, str(p)) for p in study.protocols],
        physics=tables.physics(study),
        bias=tables.bias(study),
        tests=[tables.tests(study, p.name) for p in study.protocols],
        per_case=tables.per_case(study),
        scans=tables.scans(study),
        classification=tables.classification(classification) if classification else [],
        curves=_curves(study),
        strokes=strokes([*study.methods, FULL]),
        pictures={"cases": study.pictures, "low": LOW, "full": FULL},
        shown=[m for m in study.methods if m != LOW],
    )


def _curves(study: Study) -> list[str]:
    pictures, drawn = [], strokes([*study.methods, FULL])
    if study.nps:
        lines = {name: nps.radial() for name, nps in study.nps.items()}
        pictures.append(curves(lines, drawn, "noise power", "frequency, 1/mm", "HU² mm²"))
    per_contrast = zip(*study.transfers.values(), strict=True)
    for transfers in per_contrast:
        contrast = minus(f"{round(transfers[0].contrast_hu, -1):+.0f}")
        lines = {n: (t.frequency, t.ttf) for n, t in zip(study.transfers, transfers, strict=True)}
        pictures.append(
            curves(lines, drawn, f"TTF, edges of {contrast} HU", "frequency, 1/mm", "TTF", top=1.2)
        )
    return pictures
