"""The shape of a job: nodes, ranks a node, cores a rank, from what a person and a site's profile ask of sbatch."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ldct_dist.cluster.site import Site
from ldct_dist.errors import UserError

Options = Mapping[str, str | bool]
"""of sbatch, by their long names; true for those without a value"""
CPUS_PER_RANK = 8
"""for training, the loader's threads, saving and the watchdog, which would share one core by Slurm's own default"""
CPUS_PER_PART = 4
"""for a task of an array, which works on as many cases at a time"""
_RIVALS = (
    ("cpus-per-task", "cpus-per-gpu"),
    ("mem", "mem-per-cpu", "mem-per-gpu"),
    ("gpus", "gpus-per-node"),  # and gres, as far as it asks for GPUs
)
"""options that say the same thing in different words: sbatch refuses two of a group that contradict each other"""
_LIMIT = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_UNREAD = ("gpus", "gpus-per-task", "gpus-per-socket", "ntasks")


def shaped(given: Options, site: Site) -> dict[str, str | bool]:
    """All options of a job of ranks: those given, those of the site that they do not override, and the job's whole shape.

    There is one rank for each GPU; without GPUs, as many as --ntasks-per-node says, or one. Raises UserError for a shape
    that the ranks would refuse once the job has waited in the queue, and for GPUs that are not asked for by node.
    """
    options = {"nodes": "1", **with_cores(given, site, CPUS_PER_RANK)}
    gpus = gpus_per_node(options)
    if "ntasks-per-node" not in options:
        for key in _UNREAD:
            if key in options:
                raise UserError(
                    f"--{key}={options[key]}: say how many GPUs of a node to take (--gpus-per-node), or how many "
                    "ranks to start on it (--ntasks-per-node)"
                )
        options["ntasks-per-node"] = str(gpus or 1)
    if gpus and number(options, "ntasks-per-node") != gpus:
        raise UserError(
            f"{options['ntasks-per-node']} ranks per node for {gpus} GPUs: each rank takes one GPU; leave "
            "--ntasks-per-node out"
        )
    return options


def with_cores(given: Options, site: Site, cores: int) -> dict[str, str | bool]:
    """`merged`, with `cores` a task where neither the options nor the site say how many."""
    options = merged(given, site)
    return options if "cpus-per-gpu" in options else {"cpus-per-task": str(cores), **options}


def merged(given: Options, site: Site) -> dict[str, str | bool]:
    """The options given, and those of the site that they neither replace nor contradict under another name."""
    named = {*given, *(["gpus-per-node"] if _gpus_of(given) else [])}
    dropped = {key for rivals in _RIVALS if named.intersection(rivals) for key in rivals}
    options = {key: value for key, value in site.sbatch_options().items() if key not in dropped}
    if "gpus-per-node" in dropped and _gpus_of(options):
        others = [words for words in _resources(options) if not _is_gpu(words)]
        del options["gres"]
        options |= {"gres": ",".join(others)} if others else {}
    return {**options, **given}


def number(options: Options, key: str) -> int:
    """The option's value. Raises UserError if it is not a number from 1 on."""
    text = str(options[key])
    if not text.isdigit() or int(text) == 0:
        raise UserError(f"--{key}={text}: give a number from 1 on")
    return int(text)


def ranks(options: Options) -> int:
    """The ranks of a job of that shape (see `shaped`)."""
    return number(options, "nodes") * number(options, "ntasks-per-node")


def limit_s(options: Options) -> int | None:
    """--time in seconds, 0 of which mean no limit; None where it is not given, or written otherwise ("infinite").

    Slurm's forms: minutes, minutes:seconds, hours:minutes:seconds and days-hours[:minutes[:seconds]].
    """
    written = _LIMIT.fullmatch(str(options.get("time", "")))
    if written is None:
        return None
    days, *rest = written.groups()
    numbers = [int(n) for n in rest if n is not None]
    units = (3600, 60, 1) if days or len(numbers) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(n * unit for n, unit in zip(numbers, units, strict=False))


def gpus_per_node(options: Options) -> int:
    """GPUs that --gpus-per-node (4, a100:4) or --gres (gpu:4, gpu:a100:4, beside other resources) asks for; else 0."""
    asked = _gpus_of(options)
    if "gpus-per-node" in options:
        asked = str(options["gpus-per-node"]).split(",")
    return sum(_count(words) for words in asked)


def _resources(options: Options) -> list[str]:
    """The resources that --gres asks for."""
    return [words for words in str(options.get("gres", "")).split(",") if words]


def _gpus_of(options: Options) -> list[str]:
    """The GPUs that --gres asks for."""
    return [words for words in _resources(options) if _is_gpu(words)]


def _is_gpu(resource: str) -> bool:
    return resource.removeprefix("gres:").split(":")[0] == "gpu"


def _count(words: str) -> int:
    """How many of a resource are asked for: 4 of gpu:a100:4, and 1 of gpu:a100."""
    last = words.rpartition(":")[2]
    return int(last) if last.isdigit() else 1
