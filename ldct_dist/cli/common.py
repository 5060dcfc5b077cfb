"""What the verbs share. Heavy modules are imported inside the verbs, so that --help answers at once."""

from __future__ import annotations

import platform
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ldct_dist.errors import UserError
from ldct_dist.provenance import commit, versions

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console(soft_wrap=True, markup=False)  # words in brackets may be part of a path

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings that replace those of the config, such as optim.lr=3e-4 data.crop=[32,96,96]",
    ),
]
Site = Annotated[str | None, typer.Option(help="Site profile: a name in configs/sites, or a path")]


def _print_version(wanted: bool) -> None:
    if wanted:
        own, torch = versions(("ldct_dist", "torch")).values()
        python = platform.python_version()
        print(f"ldct_dist {own} (commit {commit() or 'unknown'}), torch {torch}, Python {python}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Show what runs here, and exit"
        ),
    ] = False,
) -> None:
    """Train 3-D CNNs that denoise low-dose CT: from DICOM to DICOM, on one machine or many nodes."""


def notice(line: str) -> None:
    print(line, file=sys.stderr)


def part_of(text: str) -> tuple[int, int]:
    try:
        i, n = map(int, text.split("/"))
    except ValueError as e:
        raise UserError(f"--part {text}: write it as i/n, such as 0/8") from e
    if not 0 <= i < n:
        raise UserError(f"--part {text}: i counts from 0 and stays below n")
    return i, n


def progress() -> Progress:
    """A progress bar. It disappears at the end, when a line says what was done, and is never printed into a log."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
