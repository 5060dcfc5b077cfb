"""The verb that compares images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ldct_dist.cli.common import app, console, part_of
from ldct_dist.errors import UserError
from ldct_dist.files import real


@app.command()
def evaluate(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="WEIGHTS... STORE",
            help="One or more weights.safetensors, checkpoints or runs, as PATH or as NAME=PATH, by which tables call "
            "them; then the store",
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
    part: Annotated[
        str | None,
        typer.Option(
            help="i/n, for array jobs: measure only every n-th case, starting at case i (counted from 0), and keep the "
            "findings in --out, where the same command without --part finds them"
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only check the arguments, and measure nothing")
    ] = False,
) -> Any:
    """Compare low dose and denoised with full dose on a store's held-out cases: prints a table; --out adds a report.

    If it is stopped while it measures for a report, the same command goes on with the cases that are missing.

    Example: ldct-dist evaluate runs/a/ runs/b/ /scratch/ct.zarr --out report/
    """
    from ldct_dist.evaluate.evaluation import Evaluation
    from ldct_dist.evaluate.run import evaluate as run

    *weights, store = paths
    if not os.path.exists(store / "zarr.json"):  # Path.exists would raise PermissionError
        raise UserError(
            f"{store}: not a store (no zarr.json that may be read); evaluate takes weights and, last, a store"
        )
    if part is not None and out is None:
        raise UserError("--part: its findings are for a report; add --out FOLDER")
    numbers = part_of(part) if part is not None else None
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
    request = Evaluation(_named(weights), store, options, out, filters, peer or [], labels, key, cases_shown)
    if check:
        return request
    return run(request, numbers, console)


def _named(words: list[Path]) -> dict[str, Path]:
    """Weights by the names that tables call them: those given, or those of runs and files if they are unique, else whole
    paths."""
    given = [_given_name(word) for word in words]
    own = [real(path).name for _, path in given]
    named = {}
    for (name, path), file in zip(given, own, strict=True):
        name = name or (file if own.count(file) == 1 and file != "weights.safetensors" else str(path))
        if name in named:
            raise UserError(
                f"{name}: two of the weights have this name; give them names of their own, as NAME=PATH"
            )
        named[name] = path
    return named


def _given_name(word: Path) -> tuple[str | None, Path]:
    """(name, path) of NAME=PATH; None where `word` is a path alone."""
    text = str(word)
    if not os.path.exists(word):
        for at, letter in enumerate(text):
            if letter == "=" and at and os.path.exists(text[at + 1 :]):
                return text[:at], Path(text[at + 1 :])
    return None, word
