"""A plan as a person reads it."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ldct_dist.train.cost.gpus import GIB
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
        f"{_size(plan.radius)} voxels (z, y, x) to each side"
    )
    console.print(
        f"crops of {_size(plan.crop)}: {100 * plan.counted:.0f} % of the voxels inside a volume count in the loss"
    )
    console.print(
        f"checkpoint {plan.checkpoint / GIB:.1f} GiB, saved in {plan.save_s:.0f} s, beside training"
    )
    for gpus in dict.fromkeys(row.gpus for row in plan.rows):
        rows = [row for row in plan.rows if row.gpus == gpus]
        first = rows[0]
        title = f"{gpus} x {plan.gpu}: batch {first.batch}, {first.steps} steps"
        console.print()
        console.print(
            _memory_table(title + f"; GiB a GPU, of {plan.usable / GIB:.1f} usable (! too much)", rows)
        )
        console.print(_time_table(title, rows))
        console.print(_nodes(rows))
    console.print()
    console.print(_assumptions(plan))


def _memory_table(title: str, rows: list[Row]) -> Table:
    table = _table(title, ("micro", *PARTS.values(), "total"))
    for row in rows:
        for fit in row.fits:
            name = row.strategy if fit is row.fits[0] else ""
            table.add_row(name, *_figures(fit), style="" if fit.fits else "red")
    return table


def _figures(fit: Fit) -> list[str]:
    parts = [_short(getattr(fit.memory, part) / GIB) for part in PARTS]
    return [str(fit.micro_batch), *parts, _short(fit.total / GIB) + ("" if fit.fits else "!")]


def _time_table(title: str, rows: list[Row]) -> Table:
    table = _table(title, ("micro", "largest crop", "GiB sent", "step s", "scaling", "hours", "GPU-h"))
    for row in rows:
        largest, times = _size(row.largest_crop) if row.largest_crop else "none", row.times
        if times is None:
            table.add_row(row.strategy, "-", largest, *["-"] * 5)
            continue
        table.add_row(
            *(row.strategy, str(row.micro_batch), largest, _short(times.sent / GIB), f"{times.step_s:.3f}"),
            *(f"{100 * times.efficiency:.0f} %", _short(times.hours), _short(times.gpu_hours)),
        )
    return table


def _nodes(rows: list[Row]) -> str:
    needs = [
        f"{row.strategy} {_short(row.node.memory / GIB)}"
        + (f" (and {_short(row.node.disk / GIB)} of its disk)" if row.node.disk else "")
        for row in rows
    ]
    return f"GiB of each node's RAM: {', '.join(needs)}"


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


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def _si(number: float) -> str:
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f} "
