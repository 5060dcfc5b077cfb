"""The report's tables: what stands in each cell, what it is sorted by, and what a caption says of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ldct_dist.ct.volume import AIR_HU
from ldct_dist.evaluate import results
from ldct_dist.evaluate.figures import minus
from ldct_dist.evaluate.metrics import LABELS
from ldct_dist.evaluate.physics.lesions import BALL, ROD
from ldct_dist.evaluate.physics.tissue import TISSUES
from ldct_dist.evaluate.statistics import Estimate
from ldct_dist.evaluate.study import Study

_NONE = "–"
_DIGITS = {"rmse_hu": 2, "psnr_db": 2, "ssim": 4, "vif": 4}


@dataclass(frozen=True)
class Cell:
    """text: what stands there; value: what it is sorted by."""

    text: str
    value: float | str


@dataclass(frozen=True)
class Table:
    """caption says what the numbers mean, in paragraphs where it is long; the first column names the row."""

    caption: str
    columns: list[str]
    rows: list[list[Cell]]


def summary(study: Study, protocol: str, words: str) -> Table:
    measured = results.measured(study, protocol)
    found = results.summary(study, protocol)
    rows = [
        [Cell(method, method), *(_estimate(row[m], _DIGITS[m]) for m in measured)]
        for method, row in found.items()
    ]
    where = "in 3-D" if protocol.endswith("-3d") else "slice by slice"
    means = _means(e for row in found.values() for e in row.values())
    caption = f"Against full dose, {where}: {minus(words)}. {means}."
    return Table(caption, ["method", *(LABELS[m] for m in measured)], rows)


def tests(study: Study, protocol: str) -> Table:
    found = [(measure, t) for measure, pairs in results.tests(study, protocol).items() for t in pairs]
    caption = f"{protocol}: {_means(t.difference for _, t in found)}."
    most = max((t for _, t in found), key=lambda t: t.difference.n, default=None)
    if tested := most is not None and most.least_p is not None:
        caption += (
            " Paired Wilcoxon tests over patients, Holm-corrected for all pairs of a measure. "
            f"With {most.difference.n} patients, p is at least {most.least_p:.2g}, and at least "
            f"{most.least_p_holm:.2g} when corrected."
        )
    else:
        caption += " Tests need two patients or more."
    rows = [
        [
            Cell(f"{t.a} − {t.b}", f"{t.a} {t.b}"),
            Cell(LABELS[measure], measure),
            _estimate(t.difference, _DIGITS[measure], sign=True),
            *((_p(t.p), _p(t.p_holm)) if tested else ()),
            Cell(str(t.difference.n), t.difference.n),
        ]
        for measure, t in found
    ]
    columns = ["pair", "measure", "mean difference", *(("p", "p, corrected") if tested else ()), "patients"]
    return Table(caption, columns, rows)


def bias(study: Study) -> Table:
    found = results.bias(study)
    tissues = list(next(iter(found.values())))
    rows = [[Cell(m, m), *(_estimate(row[t], 1, sign=True) for t in tissues)] for m, row in found.items()]
    means = _means(e for row in found.values() for e in row.values())
    ranges = minus(", ".join(f"{t} {TISSUES[t][0]:g} to {TISSUES[t][1]:g}" for t in tissues))
    caption = (
        f"Mean of image − full dose in each tissue, found by the full dose's local mean in HU: {ranges}. HU end at "
        f"{minus(f'{AIR_HU:g}')}, which cuts noise in air: the noisier of two images reads higher there. {means}."
    )
    return Table(caption, ["method", *(f"{t}, HU" for t in tissues)], rows)


def physics(study: Study) -> Table:
    contrasts = [round(t.contrast_hu, -1) for t in next(iter(study.transfers.values()), [])]
    rows, estimates = [], []
    for method, found in results.physics(study).items():
        seen = found["detection"]
        noise, conspicuous = (Estimate(**found[key]) for key in ("noise_hu", "conspicuous"))
        estimates += [noise, conspicuous]
        rows.append(
            [
                Cell(method, method),
                _estimate(noise, 1),
                _number(found["nps_mean_frequency_per_mm"], 3),
                *(_falls_to_half(t) for t in found["ttf"]),
                *(_detection(seen.get(shape)) for shape in (BALL, ROD)),
                _estimate(conspicuous, 2, scale=100),
            ]
        )
    columns = ["method", "noise, HU", "mean NPS frequency, 1/mm"]
    columns += [minus(f"TTF 50\u00a0% at {c:+.0f} HU, 1/mm") for c in contrasts]
    columns += [f"d′ of a {shape}" for shape in (BALL, ROD)]
    columns += ["voxels off, %"]
    lesion = minus(f"{study.config.lesion_mm:g} mm and {study.config.lesion_hu:+g} HU")
    patches = next((s for seen in study.detection.values() for s in seen.values()), None)
    counted = f", in {patches.present} patches with one and {patches.absent} without" if patches else ""
    caption = (
        "Noise: median standard deviation in windows of 6 mm, at least 5 voxels, about a fitted plane, in the patients' "
        "soft tissue; wider blotches do not show in it.\n"
        "TTF and d′: measured on a phantom with the kernel and the noise of "
        f"{study.phantom_case or 'no case'}, in the same scans for every method.\n"
        "TTF 50 %: the frequency at which the TTF has fallen to a half; > where it has not by the Nyquist frequency.\n"
        "d′, with its 95 % interval: of a channelised Hotelling observer without noise of its own, who sees one slice and "
        f"looks for lesions of {lesion}, balls, and rods across all slices{counted}.\n"
        "Voxels off (conspicuous in cases.csv): share of the body where the difference from full dose, smoothed by 2 mm, "
        "is beyond 4 σ of full dose's own noise. It counts what an image adds, loses or blurs, and the noise that it "
        "keeps, which is the only difference of a simulated low dose.\n"
        f"{_means(estimates)}."
    )
    return Table(caption, columns, rows)


def _falls_to_half(ttf: dict[str, Any]) -> Cell:
    """The frequency at which the TTF is down to a half. A TTF that stays above it is the sharpest, and sorted as such."""
    if math.isfinite(ttf["f50_per_mm"]):
        return _number(ttf["f50_per_mm"], 2)
    last, at_last = ttf["curve"][-1]
    if math.isnan(at_last):  # there is no edge left
        return Cell(_NONE, "")
    return Cell(f"> {_digits(last, 2)}", last)


def _detection(found: dict[str, float] | None) -> Cell:
    if found is None:
        return Cell(_NONE, "")
    return Cell(f"{found['d_prime']:.2f} [{found['low']:.2f}, {found['high']:.2f}]", found["d_prime"])


def scans(study: Study) -> Table:
    rows = [
        [
            Cell(case, case),
            Cell(*[scan["low_dose"]["made"]] * 2) if scan["low_dose"] else Cell("not known", ""),
            Cell(scan["kernel"] or _NONE, scan["kernel"] or ""),
            _number(scan["kvp"], 0),
            _number(scan["slice_thickness_mm"], 1),
            Cell(" × ".join(f"{mm:.3g}" for mm in scan["spacing_mm"]), scan["spacing_mm"][0]),
            Cell(" × ".join(map(str, scan["shape"])), scan["shape"][0]),
        ]
        for case, scan in study.scans.items()
    ]
    columns = [
        "case",
        "low dose",
        "kernel",
        "kVp",
        "slice thickness, mm",
        "voxel, mm (z, y, x)",
        "voxels (z, y, x)",
    ]
    return Table("How the scans were made.", columns, rows)


def per_case(study: Study) -> Table:
    columns = [(p.name, m) for p in study.protocols for m in results.measured(study, p.name)]
    tissues = list(next(iter(results.bias(study).values())))
    rows = [
        [
            Cell(row.case, row.case),
            Cell(row.method, row.method),
            *(_number(row.figures[p].get(m), _DIGITS[m]) for p, m in columns),
            *(_number(row.bias_hu.get(t), 1, sign=True) for t in tissues),
        ]
        for row in study.rows
    ]
    named = [LABELS[m] + (" (3\u2011D)" if p.endswith("-3d") else "") for p, m in columns]
    caption = f"Every case, protocol {minus(str(study.protocols[0]))}. Bias in HU by tissue."
    return Table(caption, ["case", "method", *named, *(f"bias, {t}" for t in tissues)], rows)


def classification(found: dict[str, Any]) -> list[Table]:
    measures = ("auc", "accuracy", "sensitivity", "specificity")
    rows = [
        [Cell(name, name), *(_interval(row[k]) for k in measures)] for name, row in found["images"].items()
    ]
    caption = (
        f"The same CNN trained on each kind of image, patients kept apart over {found['training']['folds']} folds; "
        f"{found['samples']} samples of {found['patients']} patients, 95 % intervals over patients (expanded percentile "
        "bootstrap; none where no draw differs). Scores of all folds are pooled; no interval or test includes how they "
        "would vary from training to training."
    )
    pairs = [
        [
            Cell(f"{t['a']} − {t['b']}", f"{t['a']} {t['b']}"),
            _number(t["auc_difference"], 3, sign=True),
            *(_p(t[key]) for key in ("delong_p", "delong_p_holm", "mcnemar_p", "mcnemar_p_holm")),
        ]
        for t in found["tests"]
    ]
    columns = ["pair", "AUC difference", "p, DeLong", "corrected", "p, McNemar", "corrected"]
    return [
        Table(caption, ["images", "AUC", "accuracy", "sensitivity", "specificity"], rows),
        Table(
            "Paired tests on the same samples, with the patient as the unit, Holm-corrected for all pairs.",
            columns,
            pairs,
        ),
    ]


def _means(estimates: Iterable[Estimate]) -> str:
    """The sentence of a caption that says what the table's estimates are."""
    found = list(estimates)
    if max((e.n for e in found), default=0) == 1:
        return "Of one patient, so without intervals"
    kinds = sorted({e.interval for e in found if e.interval})
    return "Means over patients" + (f", with 95 % intervals ({' or '.join(kinds)})" if kinds else "")


def _estimate(found: Estimate, digits: int, *, scale: float = 1, sign: bool = False) -> Cell:
    if found.mean is None:
        return Cell(_NONE, "")
    words = _digits(found.mean * scale, digits, sign)
    if found.low is not None and found.high is not None:
        words += f" [{_digits(found.low * scale, digits)}, {_digits(found.high * scale, digits)}]"
    return Cell(words, found.mean)


def _interval(found: list[Any]) -> Cell:
    value, low, high = found
    words = "" if low is None else f" [{_digits(low, 3)}, {_digits(high, 3)}]"
    return Cell(_digits(value, 3) + words, value)


def _number(value: float | None, digits: int, *, sign: bool = False) -> Cell:
    if value is None or not math.isfinite(value):
        return Cell(_NONE, "")
    return Cell(_digits(value, digits, sign), value)


def _p(value: float | None) -> Cell:
    """Two digits: few patients leave few values that a p can have. And no p is 0."""
    if value is None:
        return Cell(_NONE, "")
    return Cell(f"{value:.2g}" if value >= 1e-4 else "< 0.0001", value)


def _digits(value: float, digits: int, sign: bool = False) -> str:
    """Rounded, with a real minus, and no minus before a zero."""
    rounded = round(value, digits) + 0.0
    return minus(f"{rounded:{'+' if sign and rounded else ''}.{digits}f}")
