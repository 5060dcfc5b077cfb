"""Verbs that train a network, and that use one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ldct_dist.cli.common import Overrides, app, console, notice, part_of, progress
from ldct_dist.errors import UserError

DEMO_CONFIG = Path("configs/demo.yaml")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The run's YAML; see configs/")],
    overrides: Overrides = None,
    allow_new_data: Annotated[
        bool,
        typer.Option(
            "--allow-new-data",
            help="Resume although the store has changed since: weights, optimizer and step are kept, but the samples "
            "differ from here on, and patients that are held out now may have been trained on before",
        ),
    ] = False,
) -> None:
    """Train a network, or resume a run that was stopped: it is the same command.

    Runs as one process, or as many under torchrun or srun. The signals USR1, USR2, TERM and INT (Ctrl-C) stop it with a
    checkpoint; a second INT stops it at once.

    Exit codes: 0 done; 75 stopped with a checkpoint, start again to resume; 76 a rank stopped answering, start again
    to resume; 77 the same, but nothing had been saved since this start, read the error first; 70 a newer start of the
    run has taken over; 65 the loss got out of hand, the error names the samples; 2 a mistake in the command, the config
    or the data, read the error.

    Example: ldct-dist train configs/mayo2016_unet3d.yaml store=/scratch/ct.zarr optim.lr=3e-4
    """
    from ldct_dist.cluster.rank import train as run

    raise typer.Exit(run(config, overrides or [], allow_new_data))


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="The run's YAML; its store need not exist yet")],
    overrides: Overrides = None,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs to compare")] = "8,64,512",
    gpu: Annotated[
        str, typer.Option(help="Kind of GPU: h100-80g, h200-141g, a100-80g, a100-40g or v100-32g")
    ] = "h100-80g",
    json: Annotated[
        bool, typer.Option("--json", help="Print all figures as JSON, in bytes and seconds")
    ] = False,
) -> None:
    """Estimate what a run will need: memory by part, what fits, step time, GPU-hours. Needs no GPU.

    Example: ldct-dist plan configs/mayo2016_unet3d.yaml model.size=xl --gpus 8,64 --gpu a100-80g
    """
    from ldct_dist import config as configs
    from ldct_dist.train.config import RunConfig
    from ldct_dist.train.cost.plan import plan as make
    from ldct_dist.train.cost.table import print_plan

    try:
        numbers = [int(n) for n in gpus.split(",")]
    except ValueError as e:
        raise UserError(f"--gpus {gpus}: give numbers of GPUs from 1 on, such as 8,64,512") from e
    made = make(configs.read(RunConfig, config, overrides or []), gpu, numbers)
    if json:
        console.print_json(data=made.as_json())
    else:
        print_plan(made, console)


@app.command()
def denoise(
    weights: Annotated[
        Path, typer.Argument(help="A weights.safetensors, a checkpoint, or a run (its best weights)")
    ],
    source: Annotated[Path, typer.Argument(help="Folder with DICOM; every CT series in it is denoised")],
    out: Annotated[Path, typer.Argument(help="Folder for the derived series")],
    part: Annotated[
        str | None,
        typer.Option(
            help="i/n, for array jobs: SOURCE holds one folder per case; denoise only every n-th, starting at case i (counted from 0)"
        ),
    ] = None,
    bf16: Annotated[
        bool,
        typer.Option(
            "--bf16",
            help="Calculate in bf16: faster on GPUs, and what validation does in a run with precision=bf16",
        ),
    ] = False,
    strength: Annotated[
        float,
        typer.Option(
            help="Share of the network's change to apply, above 0 and up to 1; below 1, some of the noise stays"
        ),
    ] = 1.0,
) -> None:
    """Denoise DICOM series and write the results as derived DICOM series. Uses a GPU if there is one.

    If it is stopped part-way through several series or cases, the same command does those that are missing.

    Example: ldct-dist denoise runs/mayo/ /data/patient-7 /data/patient-7-denoised
    """
    from ldct_dist.denoise.cohort import denoise_cohort
    from ldct_dist.denoise.volumes import SeriesDenoiser, denoise_series

    if part is not None:
        denoiser = SeriesDenoiser.load(weights, bf16=bf16, strength=strength)
        report = denoise_cohort(
            denoiser,
            source,
            out,
            part_of(part),
            progress=lambda case: console.print(f"{case}: denoised"),
        )
        console.print(
            f"cases: {len(report.written)} denoised, {len(report.skipped)} there already -> {out}",
        )
        for refusal in report.refused:
            console.print(f"  refused: {refusal}")
        raise typer.Exit(1 if report.refused else 0)
    with progress() as bar:
        task = bar.add_task("denoise", total=1.0)
        files = denoise_series(
            weights,
            source,
            out,
            bf16=bf16,
            strength=strength,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            notice=notice,
        )
    console.print(f"{len(files)} slices -> {out}")


@app.command()
def evaluate(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="WEIGHTS... STORE",
            help="One or more weights.safetensors, checkpoints or runs; then the store",
        ),
    ],
    split: Annotated[str, typer.Option(help="The cases to evaluate: test, val or train")] = "test",
    protocol: Annotated[
        str,
        typer.Option(
            help="Sets the window, which voxels count, how to average, and the dose: chest, abdomen, neuro, full-range, "
            "ldctbench-chest, ldctbench-abdomen, ldctbench-neuro or redcnn-l506; add -3d to measure in 3-D"
        ),
    ] = "abdomen",
    dose: Annotated[
        float | None,
        typer.Option(help="Dose of the input, as a fraction of full dose; default: the protocol's"),
    ] = None,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Calculate in bf16, as denoise --bf16 does; the tables say so")
    ] = False,
    strength: Annotated[float, typer.Option(help="As denoise --strength; the tables say so")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Write a report (HTML, JSON, CSV) to this folder")] = None,
    baselines: Annotated[
        str,
        typer.Option(help="Classic filters to compare in the report, tuned on the other splits; '' for none"),
    ] = "gaussian,bilateral,nlm,tv",
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="Another method to compare, as NAME=MODULE:FUNCTION; the function takes a Volume and returns HU. Repeatable"
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="CSV with the columns case,label or case,slice,label or patient,label (0 or 1): adds a classification "
            "task to the report"
        ),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            help="Key file of the ingest, needed if --labels names patients and the key is not at STORE.key"
        ),
    ] = None,
    cases_shown: Annotated[
        int, typer.Option(min=0, help="Number of cases that the report shows images of")
    ] = 3,
    lesion_mm: Annotated[
        float, typer.Option(help="Diameter in mm of the lesions that the model observer looks for")
    ] = 6.0,
    lesion_hu: Annotated[float, typer.Option(help="Contrast of those lesions, in HU")] = 15.0,
) -> None:
    """Compare low dose and denoised with full dose on a store's held-out cases: prints a table; --out adds a report.

    Example: ldct-dist evaluate runs/a/ runs/b/ /scratch/ct.zarr --out report/
    """
    from ldct_dist.evaluate.run import evaluate as run

    *weights, store = paths
    if not os.path.exists(store / "zarr.json"):  # Path.exists would raise PermissionError
        raise UserError(
            f"{store}: not a store (no zarr.json that may be read); evaluate takes weights and, last, a store"
        )
    manner = (" in bf16" if bf16 else "") + (f" at strength {strength:g}" if strength < 1 else "")
    named = {_name_of(path, weights) + manner: path for path in weights}
    options = {
        "split": split,
        "protocol": protocol,
        "dose": dose,
        "bf16": bf16,
        "strength": strength,
        "lesion_mm": lesion_mm,
        "lesion_hu": lesion_hu,
    }
    filters = [name.strip() for name in baselines.split(",") if name.strip()]
    run(named, store, options, out, filters, peer or [], labels, key, cases_shown, console)


@app.command()
def demo(
    config: Annotated[Path, typer.Argument(help="The demo's YAML")] = DEMO_CONFIG,
    overrides: Overrides = None,
) -> None:
    """Run the whole pipeline on real CT in a few minutes: ingest, train, kill, resume, denoise, compare."""
    from ldct_dist.demo import run

    if "=" in str(config) and not config.exists():  # an override, and the config left out
        config, overrides = DEMO_CONFIG, [str(config), *(overrides or [])]
    if not config.exists():
        raise UserError(
            f"{config}: no such config file here; start the demo from the folder of the clone, or give the path of the "
            "configs/demo.yaml there"
        )
    run(config, overrides or [], console)


def _name_of(path: Path, among: list[Path]) -> str:
    """The name of these weights in tables: that of the run or file if it is unique, else the whole path."""
    name = path.resolve().name
    same = [other for other in among if other.resolve().name == name]
    return name if len(same) == 1 and name != "weights.safetensors" else str(path)
