"""Work over many cases as an array job: ingest, then the catalogue; denoising a cohort; evaluation, then the report."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ldct_dist import files
from ldct_dist.cluster import jobs
from ldct_dist.cluster.sbatch import Script, render
from ldct_dist.cluster.shape import CPUS_PER_PART, Options, with_cores
from ldct_dist.cluster.site import read_site
from ldct_dist.cluster.snapshot import snapshot_code, snapshot_place
from ldct_dist.errors import UserError


@dataclass(frozen=True)
class Parts:
    """An array job over many cases."""

    script: Script
    here: str
    """the command that does the same on one machine, without Slurm"""
    then: Sequence[str] | None = None
    """arguments of the `ldct-dist` that runs once all tasks have ended"""
    then_on_gpus: bool = False
    """whether that gets the GPUs of a task"""
    pinned: Mapping[Path, Path] = field(default_factory=dict)
    """files to copy, to from, before the array is submitted"""


def array_script(
    name: str,
    command: Sequence[str],
    folder: Path,
    parts: int,
    options: Options,
    site: str | None,
    at_once: int | None = None,
) -> Script:
    """The script of an array: task i runs `ldct-dist COMMAND --part i/parts`.

    folder: for logs and scripts. at_once: how many tasks may run at a time; None: as many as Slurm allows.
    """
    if parts < 1:
        raise UserError(f"--parts {parts}: at least one")
    if at_once is not None and at_once < 1:
        raise UserError(f"--at-once {at_once}: at least one")
    profile = read_site(site)
    return Script(
        name=f"ldct-{name}",
        command=["-m", "ldct_dist", *command],
        code=snapshot_place(folder),
        folder=folder,
        workdir=Path.cwd(),
        python=sys.executable,
        options=with_cores(options, profile, CPUS_PER_PART),
        site=profile,
        kind="parts",
        parts=parts,
        at_once=at_once,
    )


def submit_parts(parts: Parts) -> list[str]:
    """Submit the array, and as a second job `Parts.then`, which waits until all tasks have ended; the job ids.

    Raises UserError if Slurm does not answer, or refuses.
    """
    script = parts.script
    render(script)  # a mistake is said before anything is written
    jobs.refuse_without_slurm(f"on this machine by {parts.here}")
    with jobs.undone_if_refused(script.folder):
        script = _prepared(parts)
        ids = [_submit(script, "array.sbatch")]
    if parts.then is not None:
        last = replace(
            script,
            command=["-m", "ldct_dist", *parts.then],
            name=f"{script.name}-end",
            kind="single",
            options={
                k: v for k, v in script.options.items() if parts.then_on_gpus or not k.startswith("gpus")
            },
        )
        ids.append(_submit(last, "end.sbatch", f"--dependency=afterany:{ids[0]}"))
    return ids


def _prepared(parts: Parts) -> Script:
    """Copy the pinned files and the code into the array's folder; the script that runs that code."""
    script = parts.script
    try:
        script.folder.mkdir(parents=True, exist_ok=True)
        for copy, source in parts.pinned.items():
            with files.replacing(copy) as temporary:
                shutil.copyfile(source, temporary)
    except OSError as e:
        raise UserError(f"{script.folder}: {e.strerror}; choose a place that can be written") from e
    return replace(script, code=snapshot_code(script.folder))


def _submit(script: Script, name: str, *options: str) -> str:
    path = script.folder / name
    files.replace(path, render(script))
    return jobs.sbatch(path, *options)
