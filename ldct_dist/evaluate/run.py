"""`ldct-dist evaluate`: from weights and a store to a table, or to a whole report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ldct_dist import config as configs
from ldct_dist.errors import UserError
from ldct_dist.evaluate.compare import Comparison, print_comparison
from ldct_dist.evaluate.methods import peer
from ldct_dist.evaluate.protocols import protocol_named
from ldct_dist.evaluate.report.page import prepare, write_report
from ldct_dist.evaluate.report.pictures import Pictures
from ldct_dist.evaluate.study import Study, StudyConfig, measure, methods_for
from ldct_dist.store.reader import Store


def evaluate(
    weights: Mapping[str, Path],
    store: Path,
    options: Mapping[str, Any],
    out: Path | None,
    baselines: Sequence[str],
    peers: Sequence[str],
    labels: Path | None,
    cases_shown: int,
    console: Console,
) -> None:
    """Measure, print, and write a report to `out` where that is given; baselines and labels are for the report.

    weights, by the names that tables call them. Raises UserError for what is not there.
    """
    config = configs.validate(StudyConfig, dict(options), "evaluate")
    protocol_named(config.protocol)
    opened = Store(store)
    if out is None and labels is not None:
        raise UserError("--labels: classification is part of the report; add --out FOLDER")
    if out is not None:
        prepare(out)
    with console.status("denoising and measuring") as status:
        chosen = methods_for(opened, config, weights, dict(map(peer, peers)), baselines if out else ())
        pictures = Pictures(protocol_named(config.protocol), cases_shown)
        study = (
            measure(opened, config, chosen, physics=out is not None, show=pictures.add, say=status.update)
            if out
            else measure(opened, config, chosen, physics=False, say=status.update)
        )
    print_comparison(_comparison(study), console)
    for note in study.notes:
        console.print(f"not measured: {note}", markup=False)
    if out is not None:
        console.print(f"report -> {write_report(out, study, pictures)}")


def _comparison(study: Study) -> Comparison:
    """Means over cases of what is finite."""
    name = study.protocols[0].name

    def mean(method: str, key: str) -> float:
        values = [row.figures[name].get(key, np.nan) for row in study.of(method)]
        return float(np.mean(values)) if np.isfinite(values).any() else values[0]

    keys = ("rmse_hu", "psnr_db", "ssim")
    return Comparison(name, {method: {key: mean(method, key) for key in keys} for method in study.methods})
