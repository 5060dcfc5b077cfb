"""Denoising a folder of cases, each completely or not at all.

It is safe to kill and to start again, in parts or as a whole, even while another start is still at work.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from ldct_dist.denoise.claim import claim
from ldct_dist.denoise.volumes import SeriesDenoiser
from ldct_dist.errors import UserError
from ldct_dist.files import TEMPORARY, left_unfinished, refuse_inside


@dataclass
class CohortReport:
    written: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """cases that were there already"""
    refused: list[str] = field(default_factory=list)
    """one line a case that could not be denoised"""


def cases_of(source: Path) -> list[Path]:
    """The folders directly in `source`, each a case, sorted by name and without hidden ones. Raises UserError if there
    is none."""
    there = source.iterdir() if source.is_dir() else ()
    cases = sorted(path for path in there if path.is_dir() and not path.name.startswith("."))
    if not cases:
        raise UserError(
            f"{source}: no folders in it; give the cohort's folder, which holds one folder for each case"
        )
    return cases


def denoise_cohort(
    denoise: SeriesDenoiser,
    source: Path,
    out: Path,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[str], None] = lambda case: None,
) -> CohortReport:
    """Denoise each case of `source` into a folder of its name in `out`; what is there already stays.

    part: (i, n) takes every n-th case from the i-th. A case that is refused does not stop the others.
    Raises UserError where `out` has cases by another network, since a cohort must not be mixed, or is in `source`.
    """
    report = CohortReport()
    refuse_inside(out, source)
    cases = cases_of(source)[part[0] :: part[1]]
    claim(out, denoise.name)
    for case in cases:
        target = out / case.name
        if target.exists():
            report.skipped.append(case.name)
            continue
        try:
            # In a folder of this start alone: another one may be working on the same case.
            with TemporaryDirectory(
                prefix=f"{TEMPORARY}{case.name}-", dir=out, ignore_cleanup_errors=True
            ) as partial:
                denoise(case, Path(partial, case.name))
                Path(partial, case.name).rename(target)
        except (UserError, OSError) as e:
            if target.exists():  # the other start was quicker
                report.skipped.append(case.name)
            else:
                report.refused.append(f"{case.name}: {e}")
            continue
        # Left by starts that were killed, or that were slower than this one.
        for left in left_unfinished(target):
            shutil.rmtree(left, ignore_errors=True)
        report.written.append(case.name)
        progress(case.name)
    return report
