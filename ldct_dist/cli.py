"""The command line: one thin function a verb, which parses, calls and prints.

Heavy modules are imported inside the verbs, so that --help answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ldct_dist.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Low-dose CT to full-dose quality with 3-D CNNs: DICOM in, training on any number of nodes, DICOM out.",
)
console = Console(soft_wrap=True)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as optim.lr=3e-4 data.crop=[32,96,96]"),
]


def main() -> None:
    """Run the command; a user's mistake is one line on stderr and exit code 2."""
    try:
        app()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


@app.command()
def ingest(
    source: Annotated[
        Path, typer.Argument(help="Folder with the DICOM files, nested as it may be, or a manifest (CSV)")
    ],
    store: Annotated[Path, typer.Argument(help="The store to write, or to go on with")],
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(help="YAML with these settings")] = None,
    part: Annotated[
        str, typer.Option(help="i/n: every n-th case from the i-th (from 0), for array jobs")
    ] = "0/1",
) -> None:
    """DICOM to a Zarr store; what is refused is listed and does not stop the others.

    Example: ldct-dist ingest /data/dicom /scratch/ct.zarr dose=0.25 splits='{train: 0.8, val: 0.1, test: 0.1}'
    """
    from ldct_dist import config as configs
    from ldct_dist.store.ingest import IngestConfig, Survey
    from ldct_dist.store.ingest import ingest as run

    settings = configs.read(IngestConfig, config, overrides or [])
    with _progress() as bar:
        task = bar.add_task("ingest", total=None)

        def announce(survey: Survey) -> None:
            console.print(
                f"{survey.cases} cases to write: {survey.files} files, about {survey.bytes / 2**30:.2f} GiB "
                f"({survey.free / 2**30:.1f} GiB are free there, unless a quota leaves less)"
            )
            if survey.bytes > survey.free:
                _notice(
                    "warning: the disk will probably be full before the end; cases that are whole by then stay"
                )
            bar.update(task, total=survey.cases)

        report = run(
            source, store, settings, part=_part(part), announce=announce, progress=lambda _: bar.advance(task)
        )
    console.print(
        f"{len(report.written)} cases written, {len(report.skipped)} were there already, "
        f"{len(report.rejected)} refused -> {store}"
    )
    for refusal in report.rejected[:20]:
        console.print(f"  refused: {refusal.reason}", markup=False)
    if report.rejected:
        console.print(f"  all refusals: {report.rejected_csv}")
        raise typer.Exit(1)


@app.command()
def finalise(store: Annotated[Path, typer.Argument(help="The store whose parts are all written")]) -> None:
    """Write a store's catalogue, once every task of an array job has done its --part of the ingest.

    Example: ldct-dist finalise /scratch/ct.zarr
    """
    from ldct_dist.store.ingest import finalise as run

    console.print(f"{run(store)} cases -> {store}")


@app.command()
def info(
    store: Annotated[Path, typer.Argument(help="A store")],
    cases: Annotated[bool, typer.Option("--cases", help="Also list every case")] = False,
) -> None:
    """What a store holds: cases, doses, spacing, noise, splits, size.

    Example: ldct-dist info /scratch/ct.zarr
    """
    from ldct_dist.store.reader import Store
    from ldct_dist.store.summary import listing, rows, summary

    opened = Store(store)
    with console.status("adding up files"):
        found = rows(opened)
    console.print(f"{store}, fingerprint {opened.fingerprint[:16]}", markup=False)
    console.print(summary(found))
    console.print("noise: standard deviation in soft tissue at full dose, HU; spacing in mm")
    if cases:
        console.print(listing(found))
    else:
        console.print(f"each case: ldct-dist info {store} --cases", markup=False)


@app.command()
def simulate(
    source: Annotated[Path, typer.Argument(help="Folder with one full-dose DICOM series")],
    out: Annotated[Path, typer.Argument(help="New folder for the low-dose series")],
    dose: Annotated[float, typer.Option(help="Fraction of the dose to keep")] = 0.25,
    seed: Annotated[int, typer.Option(help="Same seed, same noise")] = 0,
) -> None:
    """A DICOM series as it would look at a lower dose.

    Example: ldct-dist simulate full/ quarter/ --dose 0.25
    """
    from ldct_dist.ct.derived import write_derived
    from ldct_dist.ct.dicom import one_series, read_series
    from ldct_dist.ct.dose import simulate_low_dose

    series = one_series(source, _notice)
    with console.status("simulating"):
        low = simulate_low_dose(read_series(series), dose, seed)
    files = write_derived(
        series, low.hu, out, f"Simulated at {dose:g} of the dose by ldct_dist (projection domain)"
    )
    console.print(f"{len(files)} slices -> {out}")


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="A store, the folder of a run, or a weights file")],
) -> None:
    """Check every byte of a store, a run's checkpoints or a weights file against the checksums written with it.

    Names each fault, with its case and array, and ends with exit code 1 if there are any.

    Example: ldct-dist verify /scratch/ct.zarr
    """
    from ldct_dist.checkpoint.load import verify_run
    from ldct_dist.models.weights import verify_weights
    from ldct_dist.store.verify import verify as verify_store

    if path.is_file():
        faults = verify_weights(path)
    elif (path / "checkpoints").is_dir():
        faults = verify_run(path / "checkpoints")
    elif (path / "cases").is_dir() or (path / "zarr.json").exists():
        with _progress() as bar:
            task = bar.add_task("verify", total=None)
            faults = verify_store(path, lambda done, total: bar.update(task, completed=done, total=total))
    else:
        raise UserError(f"{path}: neither a store (zarr.json), a run (checkpoints/) nor a weights file")
    for fault in faults:
        console.print(fault, markup=False)
    if faults:
        raise typer.Exit(1)
    console.print(f"{path}: every byte is as it was written")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The run's YAML; see configs/")],
    overrides: Overrides = None,
    allow_new_data: Annotated[
        bool,
        typer.Option(
            "--allow-new-data",
            help="Go on with a run although its store changed: weights, optimizer and step stay, samples are "
            "other ones from here on, and patients held out now may have been trained on",
        ),
    ] = False,
) -> None:
    """Train, or go on with a run that was stopped: the same command does both.

    One process alone, or many under torchrun or srun. USR1, USR2, TERM and INT stop it with a checkpoint; a second
    INT stops it at once.

    Exit codes: 0 done; 75 stopped with a checkpoint, start again to go on; 76 a rank stopped answering, start again
    to go on; 70 taken over by a newer start; 65 losses out of hand, the line names the samples; 2 a mistake in what
    was given.

    Example: ldct-dist train configs/mayo2016_unet3d.yaml store=/scratch/ct.zarr optim.lr=3e-4
    """
    from ldct_dist.cluster.rank import train as run

    raise typer.Exit(run(config, overrides or [], allow_new_data))


@app.command(context_settings={"ignore_unknown_options": True})
def submit(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG|ingest ...|denoise ... [KEY=VALUE]... [--SBATCH-OPTION VALUE]...",
            help="The run's YAML, overrides, and options of sbatch: --nodes 2 --gpus-per-node 4 --time 24:00:00",
        ),
    ],
    cluster: Annotated[
        str, typer.Option(help="slurm; local: here, in the background; debug: here, in this process")
    ] = "slurm",
    site: Annotated[str | None, typer.Option(help="A profile in configs/sites, or a path to one")] = None,
    allow_new_data: Annotated[bool, typer.Option("--allow-new-data", help="See train")] = False,
    parts: Annotated[
        int | None, typer.Option(help="Tasks of an array: 8 for ingest, as many as cases for denoise")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job script, submit nothing")] = False,
) -> None:
    """Train as a job: saved and requeued at the time limit, on preemption and after a node failure.

    The code and the config are copied into the run's folder, and requeues run these copies. One rank a GPU; on
    CPUs, --ntasks-per-node says how many.

    `submit ingest SOURCE STORE` and `submit denoise WEIGHTS COHORT OUT`, a folder of cases, are arrays.

    Example: ldct-dist submit configs/mayo2016_unet3d.yaml optim.lr=3e-4 --nodes 2 --gpus-per-node 4
    --time 24:00:00 --partition gpu
    """
    from ldct_dist.cluster.command import announce, parse, parse_parts
    from ldct_dist.cluster.parts import submit_parts
    from ldct_dist.cluster.sbatch import render as render_parts
    from ldct_dist.cluster.submit import dry_run as render
    from ldct_dist.cluster.submit import start

    if arguments[0] in ("ingest", "denoise"):
        script, then = parse_parts(arguments, site, parts)
        if dry_run:
            print(render_parts(script), end="")
            return
        for number in submit_parts(script, then):
            console.print(f"job      {number}", highlight=False)
        console.print(f"logs     {script.folder}", markup=False, highlight=False)
        return
    request = parse(arguments, site, allow_new_data)
    if dry_run:
        print(render(request), end="")
        return
    job = start(request, cluster)
    for line in announce(request, job, cluster):
        console.print(line, markup=False, highlight=False)
    if cluster == "debug":
        job.results()


@app.command()
def status(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Runs, or folders of runs; without any: runs/")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts: a list of objects")] = False,
) -> None:
    """How runs are: their state in Slurm, step, loss, speed, last checkpoint and its age, time to go.

    Works without Slurm, too. Example: ldct-dist status runs/mayo runs/sweep
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
    grace: Annotated[float, typer.Option(help="Seconds that saving and stopping may take")] = 600.0,
) -> None:
    """Stop a run, saving a checkpoint first; no requeue follows. Starting it again goes on from there.

    Example: ldct-dist cancel runs/mayo
    """
    from ldct_dist.cluster.cancel import cancel as run_cancel

    run_cancel(run, grace, say=lambda line: console.print(line, markup=False))


@app.command(context_settings={"ignore_unknown_options": True})
def doctor(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [--SRUN-OPTION VALUE]...",
            help="The run's YAML, to check the time to save and the room it needs; for --nodes, options of srun",
        ),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(help="As a job on so many nodes; without it, this machine alone")
    ] = None,
    tasks: Annotated[int, typer.Option(help="Ranks a node: as many as it has GPUs")] = 2,
    site: Annotated[str | None, typer.Option(help="A profile in configs/sites, or a path to one")] = None,
    runs: Annotated[Path | None, typer.Option(help="The folder of runs; else the config's, or runs/")] = None,
    write_mib: Annotated[int, typer.Option(help="MiB a rank writes to measure the speed")] = 64,
) -> None:
    """Is this site fit for a run? One line a check, green or what to do. Run it before the first big job.

    Example: ldct-dist doctor configs/mayo2016_unet3d.yaml --nodes 2 --tasks 4 --gpus-per-node 4 --partition gpu
    """
    from ldct_dist import config as configs
    from ldct_dist.cluster.command import split
    from ldct_dist.cluster.doctor import launch_here, launch_job
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
        raise typer.Exit(launch_here(passed_on, tasks))
    raise typer.Exit(launch_job(passed_on, folder, nodes, tasks, site, options))


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
        console.print(f"{finding.name:<14}  {finding.text}", markup=False, highlight=False)

    run = configs.read(RunConfig, config) if config is not None else None
    raise typer.Exit(0 if rank(runs, run, grace, write_mib, report) else 1)


@app.command(context_settings={"ignore_unknown_options": True})
def sweep(
    config: Annotated[Path, typer.Argument(help="The YAML that the runs share")],
    axes: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE[,VALUE]... [--SBATCH-OPTION=VALUE]...",
            help="Such as lr=1e-4,3e-4 model=unet3d-s,nafnet3d-s --partition=gpu",
        ),
    ],
    cluster: Annotated[
        str, typer.Option(help="slurm: one array job; local: here, one after the other")
    ] = "slurm",
    site: Annotated[str | None, typer.Option(help="A profile in configs/sites, or a path to one")] = None,
) -> None:
    """Train every combination of the given values; TensorBoard's HParams view holds them side by side.

    A key is dotted (optim.lr) or its last part where only one ends so (lr); model=unet3d-s is a network and its
    size. Options of sbatch are for each run. The same sweep again goes on with the runs that are neither done nor
    queued.

    Example: ldct-dist sweep configs/mayo2016_unet3d.yaml lr=1e-4,3e-4 model=unet3d-s,nafnet3d-s --gpus-per-node 4
    --time 24:00:00
    """
    from ldct_dist.cluster.array import submit_array
    from ldct_dist.cluster.command import split
    from ldct_dist.cluster.submit import Request
    from ldct_dist.cluster.sweep import plan, run_here

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    words, options = split(axes)
    planned = plan(config, words)
    say(f"{len(planned.points)} runs -> {planned.folder}")
    code = 0
    if cluster == "local":
        code = run_here(planned, config, Request(planned.points[0].config, options).tasks_per_node, say)
    elif cluster == "slurm":
        job = submit_array(planned, options, site, say)
        say(f"job {job}; how it goes: ldct-dist status {planned.folder}" if job else "nothing is left to do")
    else:
        raise UserError(f"--cluster {cluster}: slurm or local")
    say(f"side by side: tensorboard --logdir {planned.folder}, under HParams")
    raise typer.Exit(code)


@app.command("sweep-task", hidden=True)
def sweep_task(configs: list[Path]) -> None:
    """What a sweep's array job starts on every rank."""
    from ldct_dist.cluster.array import train_task

    raise typer.Exit(train_task(configs))


@app.command()
def denoise(
    weights: Annotated[Path, typer.Argument(help="weights.safetensors, a checkpoint, or a run")],
    source: Annotated[Path, typer.Argument(help="Folder with DICOM; every CT series in it is denoised")],
    out: Annotated[Path, typer.Argument(help="New folder for the derived series")],
    part: Annotated[
        str | None,
        typer.Option(help="i/n: SOURCE holds a folder a case; every n-th of them from the i-th (from 0)"),
    ] = None,
) -> None:
    """Denoise DICOM series into derived DICOM series.

    Example: ldct-dist denoise runs/mayo/ /data/patient-7 /data/patient-7-denoised
    """
    from ldct_dist.denoise.cohort import denoise_cohort
    from ldct_dist.denoise.volumes import denoise_series

    if part is not None:
        report = denoise_cohort(_weights(weights), source, out, _part(part))
        console.print(
            f"{len(report.written)} cases denoised, {len(report.skipped)} were there already -> {out}"
        )
        for refusal in report.refused:
            console.print(f"  refused: {refusal}", markup=False)
        raise typer.Exit(1 if report.refused else 0)
    with _progress() as bar:
        task = bar.add_task("denoise", total=1.0)
        files = denoise_series(
            _weights(weights),
            source,
            out,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            notice=_notice,
        )
    console.print(f"{len(files)} slices -> {out}")


@app.command()
def evaluate(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="WEIGHTS... STORE",
            help="Any number of weights.safetensors, checkpoints or runs; last, a store",
        ),
    ],
    split: Annotated[str, typer.Option(help="Which cases")] = "test",
    protocol: Annotated[
        str, typer.Option(help="Window, data range, averaging and dose, by name")
    ] = "ldctbench-abdomen",
    dose: Annotated[
        float | None, typer.Option(help="Dose fraction of the input; without it, the protocol's")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for a report: HTML, JSON, CSV")] = None,
    baselines: Annotated[
        str, typer.Option(help="Filters that the report compares, tuned on another split; '' for none")
    ] = "gaussian,bilateral,nlm,tv",
    peer: Annotated[
        list[str] | None, typer.Option(help="name=module:function, a function of a Volume that gives HU")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="CSV (case,label or case,slice,label): the report classifies, too")
    ] = None,
    cases_shown: Annotated[int, typer.Option(help="Cases of which the report holds images")] = 3,
    lesion_mm: Annotated[float, typer.Option(help="Diameter of the model observer's lesions")] = 6.0,
    lesion_hu: Annotated[float, typer.Option(help="Contrast of the model observer's lesions")] = 25.0,
) -> None:
    """Low dose against denoised on a store's held-out cases: a table, and with --out a whole report.

    Example: ldct-dist evaluate runs/a/ runs/b/ /scratch/ct.zarr --out report/
    """
    from ldct_dist.evaluate.run import evaluate as run

    *weights, store = paths
    named = {_name_of(path, weights): _weights(path) for path in weights}
    options = {
        "split": split,
        "protocol": protocol,
        "dose": dose,
        "lesion_mm": lesion_mm,
        "lesion_hu": lesion_hu,
    }
    filters = [name.strip() for name in baselines.split(",") if name.strip()]
    run(named, store, options, out, filters, peer or [], labels, cases_shown, console)


@app.command()
def demo(
    config: Annotated[Path, typer.Argument(help="The demo's YAML")] = Path("configs/demo.yaml"),
    overrides: Overrides = None,
) -> None:
    """The main job on real CT in a few minutes: ingest, train, kill, resume, denoise, compare."""
    from ldct_dist.demo import run

    run(config, overrides or [], console)


def _notice(line: str) -> None:
    print(line, file=sys.stderr)


def _weights(path: Path) -> Path:
    """The weights file that a run, a checkpoint or a file name stands for."""
    from ldct_dist.checkpoint.load import weights_of

    return weights_of(path)


def _name_of(path: Path, among: list[Path]) -> str:
    """What a table calls these weights: a run's name where that tells them apart, else the whole path."""
    same = [other for other in among if other.resolve().name == path.resolve().name]
    return path.resolve().name if len(same) == 1 and path.is_dir() else str(path)


def _part(text: str) -> tuple[int, int]:
    try:
        i, n = map(int, text.split("/"))
    except ValueError as e:
        raise UserError(f"--part {text}: write it as i/n, such as 0/8") from e
    if not 0 <= i < n:
        raise UserError(f"--part {text}: i counts from 0 and stays below n")
    return i, n


def _progress():
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
