"""Work over many cases as an array job: ingest, then the catalogue; or denoising a cohort."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ldct_dist import files
from ldct_dist.cluster import jobs
from ldct_dist.cluster.sbatch import Script, render
from ldct_dist.cluster.shape import CPUS_PER_PART, Options, with_cores
from ldct_dist.cluster.site import read_site
from ldct_dist.cluster.snapshot import snapshot_code
from ldct_dist.errors import UserError


@dataclass(frozen=True)
class Parts:
    """The script of the array; the command that does the same on one machine, without Slurm; the words of the
    `ldct-dist` that ends the array; and a file to copy before it is submitted: (from, to)."""

    script: Script
    here: str
    then: Sequence[str] | None = None
    pinned: tuple[Path, Path] | None = None


def array_script(
    name: str,
    command: Sequence[str],
    folder: Path,
    parts: int,
    options: Options,
    site: str | None,
    at_once: int | None = None,
) -> Script:
    """The script of an array: task i runs `ldct-dist COMMAND --part i/parts`. folder: for its logs and scripts.

    at_once: tasks that run at a time, at most; None: as many as Slurm lets.
    """
    if parts < 1:
        raise UserError(f"--parts {parts}: at least one")
    if at_once is not None and at_once < 1:
        raise UserError(f"--at-once {at_once}: at least one")
    profile = read_site(site)
    return Script(
        name=f"ldct-{name}",
        command=["-m", "ldct_dist", *command],
        code=folder / "code" / "SNAPSHOT",
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
    """Submit the array, and after it, once all tasks have ended, what ends it as a job of its own.

    Returns the job ids. Raises UserError if Slurm does not answer, or refuses.
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
            options={k: v for k, v in script.options.items() if not k.startswith("gpus")},
        )
        ids.append(_submit(last, "end.sbatch", f"--dependency=afterany:{ids[0]}"))
    return ids


def _prepared(parts: Parts) -> Script:
    """The array's script once what it needs is in its folder."""
    script = parts.script
    try:
        script.folder.mkdir(parents=True, exist_ok=True)
        if parts.pinned is not None:
            source, copy = parts.pinned
            with files.replacing(copy) as temporary:
                shutil.copyfile(source, temporary)
    except OSError as e:
        raise UserError(f"{script.folder}: {e.strerror}; choose a place that can be written") from e
    return replace(script, code=snapshot_code(script.folder / "code"))


def _submit(script: Script, name: str, *options: str) -> str:
    path = script.folder / name
    files.replace(path, render(script))
    return jobs.sbatch(path, *options)
