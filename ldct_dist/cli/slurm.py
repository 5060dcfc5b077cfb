"""Verbs for runs on a cluster, or many at once."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup, TyperOption

from ldct_dist.cli.common import Site, app, console
from ldct_dist.errors import UserError

if TYPE_CHECKING:
    from ldct_dist.cluster.parts import Parts

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the job script and submit nothing")]


@app.command(context_settings={"ignore_unknown_options": True})
def submit(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG|ingest|denoise|evaluate|KEY=VALUE|--SBATCH-OPTION=VALUE",
            help="The run's YAML, settings (optim.lr=3e-4), and sbatch options (--nodes 2 --gpus-per-node 4 --time 24:00:00)",
        ),
    ],
    cluster: Annotated[
        str,
        typer.Option(
            help="slurm; or, for training only, local (this machine, in the background) or debug (this process)"
        ),
    ] = "slurm",
    site: Site = None,
    allow_new_data: Annotated[bool, typer.Option("--allow-new-data", help="As for train")] = False,
    parts: Annotated[
        int | None,
        typer.Option(
            help="Number of array tasks; default: 8 for ingest, one per case for denoise (at most 256) and for evaluate "
            "(at most 8)"
        ),
    ] = None,
    at_once: Annotated[
        int | None, typer.Option(help="Maximum number of array tasks that run at the same time")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Submit a job to Slurm that trains, and that is requeued after the time limit, preemption, a node failure or a hang.

    Code and config are copied into the run's folder, and requeued jobs use these copies. There is one rank per GPU; on
    CPUs, set the number of ranks by --ntasks-per-node.

    `submit ingest SOURCE STORE`, `submit denoise WEIGHTS COHORT OUT` and `submit evaluate WEIGHTS... STORE --out REPORT`
    submit array jobs; COHORT is a folder with one folder per case.

    Example: ldct-dist submit configs/mayo2016_unet3d.yaml optim.lr=3e-4 --nodes 2 --gpus-per-node 4
    --time 24:00:00 --partition gpu
    """
    if arguments[0] in ("ingest", "denoise", "evaluate"):
        if allow_new_data:
            raise UserError(f"--allow-new-data: for a run that goes on, not for {arguments[0]}; leave it out")
        _submit_array(arguments, cluster, site, parts, at_once, dry_run)
        return
    if parts is not None or at_once is not None:
        raise UserError(
            "--parts and --at-once: for an array, of ingest, denoise or evaluate; a run is one job: leave them out"
        )
    from ldct_dist.cluster.command import announce, parse
    from ldct_dist.cluster.submit import dry_run as render
    from ldct_dist.cluster.submit import start

    request = parse(arguments, site, allow_new_data)
    if dry_run:
        print(render(request), end="")
        return
    job = start(request, cluster)
    for line in announce(request, job, cluster):
        console.print(line, highlight=False)
    if cluster == "debug":
        job.results()


def _submit_array(
    arguments: list[str],
    cluster: str,
    site: str | None,
    parts: int | None,
    at_once: int | None,
    dry_run: bool,
) -> None:
    from ldct_dist.cluster.command import parse_parts
    from ldct_dist.cluster.parts import submit_parts
    from ldct_dist.cluster.sbatch import render

    make = _evaluation if arguments[0] == "evaluate" else parse_parts
    array = make(arguments, site, parts, at_once)
    if cluster != "slurm":
        raise UserError(f"--cluster {cluster}: an array is Slurm's alone; on this machine: {array.here}")
    if dry_run:
        print(render(array.script), end="")
        return
    number, *last = submit_parts(array)
    console.print(
        f"job      {number}  array of {array.script.parts} task{'s' * (array.script.parts > 1)}",
        highlight=False,
    )
    for then in last:
        console.print(
            f"job      {then}  after the array: ldct-dist {shlex.join(array.then or [])}", highlight=False
        )
    console.print(f"logs     {array.script.folder}", highlight=False)


def _evaluation(arguments: list[str], site: str | None, parts: int | None, at_once: int | None) -> Parts:
    """`evaluate` with its own options, which its own parser reads, and those of sbatch."""
    from ldct_dist.cluster.command import evaluation_parts, set_apart, split

    verbs = typer.main.get_command(app)
    assert isinstance(verbs, TyperGroup)
    verb = verbs.commands["evaluate"]
    options_of = [option for option in verb.params if isinstance(option, TyperOption)]
    takes = {name: not option.is_flag for option in options_of for name in option.opts}
    own, others = set_apart(arguments[1:], takes)
    if {word.partition("=")[0] for word in own} & {"--part", "--check"}:
        raise UserError(
            "submit evaluate: it divides the work and checks its arguments itself; leave out --part and --check"
        )
    words, options = split(others)
    # --check comes first, or an --out that lacks its value would take it, and all would be measured here and now.
    request = verb.main(["--check", *words, *own], "ldct-dist submit evaluate", standalone_mode=False)
    return evaluation_parts(request, words, own, options, site, parts, at_once)


@app.command()
def status(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Runs, or folders of runs; default: runs/")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, for scripts")] = False,
) -> None:
    """Show how runs are doing: state, step, loss, speed, last checkpoint and its age, time left.

    Works with and without Slurm.

    Example: ldct-dist status runs/mayo runs/sweep
    """
    import json
    import time

    from ldct_dist.cluster.status import render
    from ldct_dist.cluster.status import status as read

    rows, fault = read(runs or [Path("runs")])
    now = time.time()
    if as_json:
        print(json.dumps([row.as_json(now) for row in rows], indent=1))
    else:
        print(render(rows, now, console.width if console.is_terminal else None))
    if fault is not None:
        print(f"{fault}; this is what the run folders say", file=sys.stderr)


@app.command()
def cancel(
    run: Annotated[Path, typer.Argument(help="The folder of a run")],
    grace: Annotated[float, typer.Option(help="Seconds to wait for the run to save and stop")] = 600.0,
) -> None:
    """Save a checkpoint and stop a run, without a requeue. Starting it again resumes it.

    Example: ldct-dist cancel runs/mayo
    """
    from ldct_dist.cluster.cancel import cancel as run_cancel

    run_cancel(run, grace, say=lambda line: console.print(line))


@app.command(context_settings={"ignore_unknown_options": True})
def doctor(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG|--SRUN-OPTION=VALUE",
            help="The run's YAML, to check how long saving takes and the disk space; with --nodes, also srun options",
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Check as a job on this many nodes; default: check this machine only"),
    ] = None,
    tasks: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks per node; default: one per GPU, or two on a machine without GPUs"),
    ] = None,
    site: Site = None,
    runs: Annotated[
        Path | None, typer.Option(help="The folder for runs; default: the config's, or runs/")
    ] = None,
    write_mib: Annotated[
        int, typer.Option(min=1, help="MiB that each rank writes to measure the disk's speed")
    ] = 64,
) -> None:
    """Check that a site can run training: one line per check, ok or what to do. Run it before the first big job.

    Example: ldct-dist doctor configs/mayo2016_unet3d.yaml --nodes 2 --tasks 4 --gpus-per-node 4 --partition gpu
    """
    from ldct_dist import config as configs
    from ldct_dist.cluster.command import split
    from ldct_dist.cluster.doctor import launch_here, launch_job
    from ldct_dist.cluster.local import ranks_here
    from ldct_dist.train.config import RunConfig

    words, options = split(arguments or [])
    if len(words) > 1 or (nodes is None and (options or site)):
        raise UserError(
            f"doctor {' '.join(arguments or [])}: one CONFIG; options of srun and --site go with --nodes"
        )
    run = configs.read(RunConfig, Path(words[0])) if words else None
    folder = runs or (run.runs if run is not None else Path("runs"))
    passed_on = [f"--write-mib={write_mib}", f"--runs={folder}", *words]
    if nodes is None:
        raise typer.Exit(launch_here(passed_on, tasks or ranks_here()))
    options |= {"nodes": str(nodes)} | ({} if tasks is None else {"ntasks-per-node": str(tasks)})
    raise typer.Exit(launch_job(passed_on, folder, site, options))


@app.command("doctor-rank", hidden=True)
def doctor_rank(
    config: Annotated[Path | None, typer.Argument()] = None,
    runs: Annotated[Path, typer.Option()] = Path("runs"),
    grace: Annotated[float, typer.Option()] = 300.0,
    write_mib: Annotated[int, typer.Option()] = 64,
) -> None:
    """What doctor starts on every rank, by srun or here."""
    from ldct_dist import config as configs
    from ldct_dist.cluster.checks import Finding
    from ldct_dist.cluster.doctor import rank
    from ldct_dist.train.config import RunConfig

    def report(finding: Finding) -> None:
        mark, colour = ("ok", "green") if finding.ok else ("BAD", "red")
        console.print(f"{mark:<5}", style=colour, end="")
        console.print(f"{finding.name:<14}  {finding.text}", highlight=False)

    run = configs.read(RunConfig, config) if config is not None else None
    raise typer.Exit(0 if rank(runs, run, grace, write_mib, report) else 1)


@app.command(context_settings={"ignore_unknown_options": True})
def sweep(
    config: Annotated[Path, typer.Argument(help="The YAML that all the runs share")],
    axes: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE,...|--SBATCH-OPTION=VALUE",
            help="Values to combine, and sbatch options: lr=1e-4,3e-4 model=unet3d-s,nafnet3d-s --partition=gpu",
        ),
    ],
    cluster: Annotated[
        str, typer.Option(help="slurm (one array job) or local (this machine, one run after the other)")
    ] = "slurm",
    site: Site = None,
    dry_run: DryRun = False,
) -> None:
    """Train every combination of the given values; TensorBoard's HParams tab compares the runs.

    Keys may be shortened where that is unambiguous (lr for optim.lr); model=unet3d-s sets network and size. sbatch
    options apply to each run. Run the same sweep again to start the runs that are neither done nor queued.

    Example: ldct-dist sweep configs/mayo2016_unet3d.yaml lr=1e-4,3e-4 model=unet3d-s,nafnet3d-s --gpus-per-node 4
    --time 24:00:00
    """
    from ldct_dist.cluster.array import dry_run as render
    from ldct_dist.cluster.array import submit_array
    from ldct_dist.cluster.command import split
    from ldct_dist.cluster.shape import number, shaped
    from ldct_dist.cluster.site import read_site
    from ldct_dist.cluster.sweep import plan, run_here

    def say(line: str) -> None:
        console.print(line, highlight=False)

    words, options = split(axes)
    planned = plan(config, words)
    if dry_run:
        print(render(planned, options, site) or "nothing is left to do\n", end="")
        return
    say(f"{len(planned.points)} runs -> {planned.folder}")
    folder = shlex.quote(str(planned.folder))
    code = 0
    if cluster == "local":
        ranks = number(shaped(options, read_site(site)), "ntasks-per-node")
        code = run_here(planned, config, ranks, say)
    elif cluster == "slurm":
        job = submit_array(planned, options, site, say)
        say(f"job {job}; how it goes: ldct-dist status {folder}" if job else "nothing is left to do")
    else:
        raise UserError(f"--cluster {cluster}: slurm or local")
    say(f"to compare the runs: tensorboard --logdir {folder}, HParams tab")
    raise typer.Exit(code)


@app.command("sweep-task", hidden=True)
def sweep_task(configs: list[Path]) -> None:
    """What a sweep's array job starts on every rank."""
    from ldct_dist.cluster.array import train_task

    raise typer.Exit(train_task(configs))
