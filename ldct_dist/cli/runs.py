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
            help="Go on with a run although its store changed: weights, optimizer and step stay, samples are "
            "other ones from here on, and patients held out now may have been trained on",
        ),
    ] = False,
) -> None:
    """Train, or go on with a run that was stopped: the same command does both.

    One process alone, or many under torchrun or srun. USR1, USR2, TERM and INT stop it with a checkpoint; a second
    INT stops it at once.

    Exit codes: 0 done; 75 stopped with a checkpoint, start again to go on; 76 a rank stopped answering, start again
    to go on; 77 the same before this start had saved anything, read the line first; 70 taken over by a newer start;
    65 losses out of hand, the line names the samples; 2 a mistake in what was given.

    Example: ldct-dist train configs/mayo2016_unet3d.yaml store=/scratch/ct.zarr optim.lr=3e-4
    """
    from ldct_dist.cluster.rank import train as run

    raise typer.Exit(run(config, overrides or [], allow_new_data))


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="The run's YAML; its store need not be there")],
    overrides: Overrides = None,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs")] = "8,64,512",
    gpu: Annotated[
        str, typer.Option(help="h100-80g, h200-141g, a100-80g, a100-40g or v100-32g")
    ] = "h100-80g",
    json: Annotated[bool, typer.Option("--json", help="Everything, bytes and seconds, for programs")] = False,
) -> None:
    """What a run will need and take: memory by part, what fits, step time, GPU-hours. Needs no GPU.

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
    weights: Annotated[Path, typer.Argument(help="weights.safetensors, a checkpoint, or a run")],
    source: Annotated[Path, typer.Argument(help="Folder with DICOM; every CT series in it is denoised")],
    out: Annotated[Path, typer.Argument(help="Folder for the derived series")],
    part: Annotated[
        str | None,
        typer.Option(help="i/n: SOURCE holds a folder a case; every n-th of them from the i-th (from 0)"),
    ] = None,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Quicker on GPUs; how a run with precision=bf16 validates itself")
    ] = False,
    strength: Annotated[
        float,
        typer.Option(
            help="Share of what the network changes; below 1, some of the noise stays, and what it hides"
        ),
    ] = 1.0,
) -> None:
    """Denoise DICOM series into derived DICOM series, on a GPU where there is one.

    Stopped amid several series or cases, the same command goes on with what is missing.

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
            help="Any number of weights.safetensors, checkpoints or runs; last, a store",
        ),
    ],
    split: Annotated[str, typer.Option(help="Which cases: those held out, or val, or train")] = "test",
    protocol: Annotated[
        str,
        typer.Option(
            help="Window, what counts, averaging and dose: chest, abdomen, neuro, full-range, ldctbench-chest, "
            "ldctbench-abdomen, ldctbench-neuro or redcnn-l506; or one of them with -3d"
        ),
    ] = "abdomen",
    dose: Annotated[
        float | None, typer.Option(help="Dose fraction of the input; without it, the protocol's")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="See denoise; tables say so")] = False,
    strength: Annotated[float, typer.Option(help="See denoise; tables say so")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Folder for a report: HTML, JSON, CSV")] = None,
    baselines: Annotated[
        str, typer.Option(help="Filters that the report compares, tuned on another split; '' for none")
    ] = "gaussian,bilateral,nlm,tv",
    peer: Annotated[
        list[str] | None, typer.Option(help="name=module:function, a function of a Volume that gives HU")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="CSV (case,label or case,slice,label or patient,label; 0 or 1): the report classifies, too"
        ),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            help="Of the ingest, where labels are of patients and it is not STORE.key beside the store"
        ),
    ] = None,
    cases_shown: Annotated[int, typer.Option(min=0, help="Cases of which the report holds images")] = 3,
    lesion_mm: Annotated[float, typer.Option(help="Diameter of the model observer's lesions, mm")] = 6.0,
    lesion_hu: Annotated[float, typer.Option(help="Contrast of the model observer's lesions, HU")] = 15.0,
) -> None:
    """Low dose against denoised on a store's held-out cases: a table, and with --out a whole report.

    Example: ldct-dist evaluate runs/a/ runs/b/ /scratch/ct.zarr --out report/
    """
    from ldct_dist.evaluate.run import evaluate as run

    *weights, store = paths
    if not os.path.exists(store / "zarr.json"):  # unlike Path's, this answers where nothing may be looked at
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
    """The main job on real CT in a few minutes: ingest, train, kill, resume, denoise, compare."""
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
