"""A study as numbers for machines: results.json, cases.csv, and means with intervals for tables."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
from dataclasses import asdict
from typing import Any

import ldct_dist
from ldct_dist.evaluate.methods import FULL
from ldct_dist.evaluate.metrics import LIMITS, MEASURES
from ldct_dist.evaluate.physics.nps import NoisePower
from ldct_dist.evaluate.physics.tissue import TISSUES
from ldct_dist.evaluate.statistics import Estimate, Paired, estimate, paired_tests
from ldct_dist.evaluate.study import Row, Study
from ldct_dist.provenance import commit, versions

_MISSING = math.nan
_ANY = (-math.inf, math.inf)
_PACKAGES = ("torch", "numpy", "scipy", "scikit-image")


def summary(study: Study, protocol: str) -> dict[str, dict[str, Estimate]]:
    """method -> measure -> mean over patients with its interval; the measures that at least one case has."""
    return {
        method: {
            measure: _over_patients(
                rows,
                [row.figures[protocol].get(measure, _MISSING) for row in rows],
                LIMITS.get(measure, _ANY),
            )
            for measure in measured(study, protocol)
        }
        for method, rows in _by_method(study).items()
    }


def measured(study: Study, protocol: str) -> list[str]:
    return [m for m in MEASURES if any(m in row.figures[protocol] for row in study.rows)]


def tests(study: Study, protocol: str) -> dict[str, list[Paired]]:
    """measure -> every method against every other, corrected for all pairs of that measure."""
    patients = [row.patient for row in next(iter(_by_method(study).values()))]
    return {
        measure: paired_tests(
            {
                method: [row.figures[protocol].get(measure, _MISSING) for row in rows]
                for method, rows in _by_method(study).items()
            },
            patients,
        )
        for measure in measured(study, protocol)
    }


def bias(study: Study) -> dict[str, dict[str, Estimate]]:
    """method -> tissue -> HU; the tissues that at least one case has."""
    there = [tissue for tissue in TISSUES if any(tissue in row.bias_hu for row in study.rows)]
    return {
        method: {t: _over_patients(rows, [row.bias_hu.get(t, _MISSING) for row in rows]) for t in there}
        for method, rows in _by_method(study).items()
    }


def physics(study: Study) -> dict[str, dict[str, Any]]:
    """method -> noise, added or lost structure, spectrum, detectability and TTF; None for what could not be measured."""
    found: dict[str, dict[str, Any]] = {}
    for method, rows in _by_method(study).items():
        seen = study.detection.get(method, {})
        found[method] = {
            "noise_hu": asdict(_over_patients(rows, [_number(row.noise_hu) for row in rows], (0, math.inf))),
            "conspicuous": asdict(_over_patients(rows, [_number(row.conspicuous) for row in rows], (0, 1))),
            **_noise_power(study.nps.get(method)),
            "detection": {shape: asdict(of) for shape, of in seen.items()},
            "ttf": [
                {
                    "contrast_hu": t.contrast_hu,
                    "f50_per_mm": t.falls_to(0.5),
                    "curve": _pairs(t.frequency, t.ttf),
                }
                for t in study.transfers.get(method, [])
            ],
        }
    return found


def _noise_power(nps: NoisePower | None) -> dict[str, Any]:
    return {
        "nps_mean_frequency_per_mm": nps.mean_frequency if nps else None,
        "nps_radial": _pairs(*nps.radial()) if nps else None,
    }


def software() -> dict[str, str | None]:
    """The versions on which the numbers depend."""
    return {
        "ldct_dist": ldct_dist.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        **versions(_PACKAGES),
    }


def to_json(study: Study, classification: dict[str, Any] | None = None) -> str:
    """Everything but the pictures. What is not finite, such as the PSNR of equal images, becomes null."""
    plain = {
        "versions": software(),
        "config": study.config.model_dump(),
        "store": study.store,
        "fingerprint": study.fingerprint,
        "dose": study.dose,
        "weights": study.weights,
        "code_of_others": study.code_of_others,
        "scans": study.scans,
        "protocols": [asdict(protocol) for protocol in study.protocols],
        "summary": {p.name: _plain(summary(study, p.name)) for p in study.protocols},
        "tests": {
            p.name: {m: [asdict(t) for t in ts] for m, ts in tests(study, p.name).items()}
            for p in study.protocols
        },
        "tissues_hu": TISSUES,
        "bias_hu": _plain(bias(study)),
        "physics": physics(study),
        "full_dose": _noise_power(study.nps.get(FULL)),
        "nps_case": study.nps_case,
        "nps_regions": study.nps_regions,
        "phantom_case": study.phantom_case,
        "classification": classification,
        "cases": [asdict(row) for row in study.rows],
        "notes": study.notes,
    }
    return json.dumps(_finite(plain), indent=1, allow_nan=False) + "\n"


def to_csv(study: Study) -> str:
    """A line a case and method; columns name their protocol. Empty where there is no number."""
    columns = [(p.name, measure) for p in study.protocols for measure in measured(study, p.name)]
    written = io.StringIO()
    lines = csv.writer(written, lineterminator="\n")
    named = [f"{measure} ({protocol})" for protocol, measure in columns]
    lines.writerow(
        [
            "case",
            "patient",
            "method",
            "dose",
            *named,
            *(f"bias_hu {t}" for t in TISSUES),
            "noise_hu",
            "conspicuous",
        ]
    )
    for row in study.rows:
        values = [row.figures[protocol].get(measure) for protocol, measure in columns]
        values += [*(row.bias_hu.get(t) for t in TISSUES), row.noise_hu, row.conspicuous]
        lines.writerow([row.case, row.patient, row.method, study.dose, *map(_finite, values)])
    return written.getvalue()


def _by_method(study: Study) -> dict[str, list[Row]]:
    return {method: study.of(method) for method in study.methods}


def _over_patients(rows: list[Row], values: list[float], within: tuple[float, float] = _ANY) -> Estimate:
    return estimate(values, [row.patient for row in rows], within=within)


def _number(value: float | None) -> float:
    return _MISSING if value is None else value


def _pairs(x: Any, y: Any) -> list[list[float]]:
    return [[float(a), float(b)] for a, b in zip(x, y, strict=True)]


def _plain(table: dict[str, dict[str, Estimate]]) -> dict[str, dict[str, Any]]:
    return {method: {key: asdict(value) for key, value in row.items()} for method, row in table.items()}


def _finite(value: Any) -> Any:
    """`value` with None in place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
