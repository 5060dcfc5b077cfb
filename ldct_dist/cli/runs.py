"""Verbs that train a network, and that use one."""

from __future__ import annotations

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
        str,
        typer.Option(
            help="Kind of GPU: b200-180g, h200-141g, h100-80g, a100-80g, a100-40g, l40s-48g, a40-48g or v100-32g"
        ),
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
    source: Annotated[
        Path,
        typer.Argument(help="Folder with DICOM, every CT series in it is denoised; or an enhanced CT file"),
    ],
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
