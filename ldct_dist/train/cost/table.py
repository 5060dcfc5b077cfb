"""A plan as a person reads it."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ldct_dist.files import GIB, MIB
from ldct_dist.train.cost.memory import Memory
from ldct_dist.train.cost.plan import Fit, Plan, Row

PARTS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "optim",
    "ema": "ema",
    "batches": "data",
    "activations": "activ.",
    "workspace": "work",
}
assert tuple(PARTS) == tuple(Memory.__dataclass_fields__)


def print_plan(plan: Plan, console: Console) -> None:
    console.print(
        f"[bold]{plan.model}[/]  {_si(plan.parameters)} parameters, {_si(plan.flops_per_step)}FLOPs a step, sees "
        f"{_size(plan.radius)} voxels (z, y, x) to each side",
        markup=True,
    )
    console.print(
        f"crops of {_size(plan.crop)}: {100 * plan.counted:.0f} % of the voxels inside a volume count in the loss"
    )
    console.print(f"checkpoint {_bytes(plan.checkpoint)}, saved in {plan.save_s:.1f} s, beside training")
    for gpus in dict.fromkeys(row.gpus for row in plan.rows):
        rows = [row for row in plan.rows if row.gpus == gpus]
        first = rows[0]
        title = f"{gpus} x {plan.gpu}: batch {first.batch}, {first.steps} steps"
        console.print()
        if first.changed:
            console.print(f"[yellow]not the config's run: {first.changed}[/]", markup=True)
        _print_table(_memory_table(title, rows, plan.usable), console)
        _print_table(_time_table(title, rows), console)
        console.print(_nodes(rows))
    console.print()
    console.print(_assumptions(plan), markup=True)


def _print_table(table: Table, console: Console) -> None:
    """Print the table; where the console is too narrow for it, a line of words for each row."""
    unlimited = console.options.update(width=1000)
    if console.measure(table, options=unlimited).minimum <= console.width:
        console.print(table)
        return
    console.print(table.title, soft_wrap=False)
    names = [str(column.header) for column in table.columns[1:]]
    for name, *cells in zip(*(column.cells for column in table.columns), strict=True):
        words = ", ".join(f"{what} {cell}" for what, cell in zip(names, cells, strict=True))
        console.print(f"{name}: {words}" if name else f"  {words}", soft_wrap=False)


def _memory_table(title: str, rows: list[Row], usable: float) -> Table:
    unit, size = _unit(max(fit.total for row in rows for fit in row.fits))
    title += f"; {unit} a GPU, of {_bytes(usable)} usable (! too much)"
    table = _table(title, ("micro", *PARTS.values(), "total"))
    for row in rows:
        for fit in row.fits:
            name = row.strategy if fit is row.fits[0] else ""
            table.add_row(name, *_figures(fit, size), style="" if fit.fits else "red")
    return table


def _figures(fit: Fit, size: int) -> list[str]:
    parts = [_short(getattr(fit.memory, part) / size) for part in PARTS]
    return [str(fit.micro_batch), *parts, _short(fit.total / size) + ("" if fit.fits else "!")]


def _time_table(title: str, rows: list[Row]) -> Table:
    unit, size = _unit(max((row.times.sent for row in rows if row.times), default=0))
    table = _table(title, ("micro", "largest crop", f"{unit} sent", "step s", "scaling", "hours", "GPU-h"))
    for row in rows:
        largest, times = _size(row.largest_crop) if row.largest_crop else "none", row.times
        if times is None:
            table.add_row(row.strategy, "-", largest, *["-"] * 5)
            continue
        table.add_row(
            *(row.strategy, str(row.micro_batch), largest, _short(times.sent / size), f"{times.step_s:.3f}"),
            *(f"{100 * times.efficiency:.0f} %", _short(times.hours), _short(times.gpu_hours)),
        )
    return table


def _nodes(rows: list[Row]) -> str:
    needs = [
        f"{row.strategy} {_bytes(row.node.memory)}"
        + (f" (and {_bytes(row.node.disk)} of its disk)" if row.node.disk else "")
        for row in rows
    ]
    return f"each node's RAM: {', '.join(needs)}"


def _assumptions(plan: Plan) -> str:
    a, gpu = plan.assumed, plan.assumed["gpu"]
    return (
        f"[dim]Assumed, not measured: {100 * a['arithmetic_share']:.0f} % of the data sheet's FLOPs in convolutions and "
        f"{100 * a['copies_share']:.0f} % of {gpu['bandwidth'] / 1e12:.2f} TB/s in the rest; "
        f"{100 * a['links_share']:.0f} % of {gpu['nvlink'] / 1e9:.0f} GB/s within a node of {gpu['per_node']}, of "
        f"{gpu['network'] / 1e9:.0f} GB/s a GPU between nodes, and of {gpu['host'] / 1e9:.0f} GB/s to the node's memory; "
        f"{a['nvme_bytes_per_s'] / 1e9:.0f} GB/s of a node's NVMe; {a['disk_bytes_per_s'] / 1e9:.0f} GB/s to disk; "
        f"{a['process_bytes'] / GIB:.0f} GiB of a node's RAM for each process, and its share of data.memory_mib. "
        f"Left out: {a['left_out']}.[/]"
    )


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("strategy", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _size(voxels: tuple[int, int, int]) -> str:
    return "x".join(map(str, voxels))


def _unit(most: float) -> tuple[str, int]:
    """(the unit for figures of which the largest is `most` bytes, bytes of one unit)."""
    return ("GiB", GIB) if most >= GIB else ("MiB", MIB)


def _bytes(number: float) -> str:
    unit, size = _unit(number)
    return f"{_short(number / size)} {unit}"


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def _si(number: float) -> str:
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f} "
