"""A folder of cases, each denoised whole or not at all: safe to kill and to start again, in parts or at once, and while
another start is still at it."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from ldct_dist.denoise.claim import claim
from ldct_dist.denoise.volumes import SeriesDenoiser
from ldct_dist.errors import UserError
from ldct_dist.files import refuse_inside


@dataclass
class CohortReport:
    written: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """cases that were there already"""
    refused: list[str] = field(default_factory=list)
    """one line a case that could not be denoised"""


def cases_of(source: Path) -> list[Path]:
    """The folders right below `source`, hidden ones left out, a case each, in the order of their names. Raises UserError
    without any."""
    there = source.iterdir() if source.is_dir() else ()
    cases = sorted(path for path in there if path.is_dir() and not path.name.startswith("."))
    if not cases:
        raise UserError(f"{source}: no folder in it; a cohort is a folder that holds a folder a case")
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
    Raises UserError for an `out` whose cases another network made, as a cohort is not mixed, and for one in `source`.
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
            # A folder of its own: another start may be at this case, too.
            with TemporaryDirectory(prefix=f".{case.name}-", dir=out, ignore_cleanup_errors=True) as partial:
                denoise(case, Path(partial, case.name))
                Path(partial, case.name).rename(target)
        except (UserError, OSError) as e:
            if target.exists():  # that one was quicker
                report.skipped.append(case.name)
            else:
                report.refused.append(f"{case.name}: {e}")
            continue
        # Of starts that were killed, or are too late.
        for left in out.glob(f".{glob.escape(case.name)}-????????"):
            shutil.rmtree(left, ignore_errors=True)
        report.written.append(case.name)
        progress(case.name)
    return report
