"""What a run will need and take, before anyone queues: `ldct-dist plan`."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import asdict, dataclass
from typing import Any

from ldct_dist.errors import UserError
from ldct_dist.files import GIB
from ldct_dist.models.locality import refuse_what_needs_values
from ldct_dist.models.losses import share_counted
from ldct_dist.models.registry import Denoiser, outline
from ldct_dist.train.config import RunConfig
from ldct_dist.train.cost import speed
from ldct_dist.train.cost.gpus import Gpu, gpu_named
from ldct_dist.train.cost.memory import PROCESS, STRATEGIES, Activations, Memory, Node, Sharing, memory, node
from ldct_dist.train.preflight import refuse_crop
from ldct_dist.train.strategy.parts import STATE_BYTES

OUTSIDE = 1.5 * GIB
"""of a GPU's memory that CUDA, cuDNN and NCCL take for themselves"""
FRAGMENTED = 0.05
"""share of the rest that the allocator cannot use"""
SLICE = 512
"""voxels that a CT slice is wide: no crop is wider"""
MOST = 1_000_000
"""GPUs: more than any machine has"""


@dataclass(frozen=True)
class Fit:
    """What a micro-batch takes on a GPU, in bytes, and whether it fits."""

    micro_batch: int
    memory: Memory
    total: float
    fits: bool


@dataclass(frozen=True)
class Times:
    """How long a step and the whole run take. sent: bytes a GPU and step; efficiency: 1 where no time goes to waiting
    for other GPUs."""

    sent: float
    step_s: float
    efficiency: float
    hours: float
    gpu_hours: float


@dataclass(frozen=True)
class Row:
    """One strategy on one number of GPUs.

    fits: what each size of micro-batch takes. micro_batch: the largest of them that fits; None if none does.
    largest_crop: voxels (z, y, x) of the largest crop that fits if a GPU has one at a time. changed: how this run differs
    from the config's, where so many GPUs cannot share its batch evenly, else None.
    """

    strategy: str
    gpus: int
    batch: int
    steps: int
    """as many as make up the crops of the config's steps and batch"""
    changed: str | None
    fits: list[Fit]
    largest_crop: tuple[int, int, int] | None
    micro_batch: int | None
    times: Times | None
    node: Node


@dataclass(frozen=True)
class Plan:
    model: str
    parameters: int
    radius: tuple[int, int, int]
    crop: tuple[int, int, int]
    counted: float
    """share of a crop's voxels that count in the loss, in the middle of a volume"""
    flops_per_step: int
    """of all GPUs together, without recomputation"""
    gpu: str
    usable: float
    """bytes of a GPU"""
    checkpoint: int
    """bytes"""
    save_s: float
    rows: list[Row]
    assumed: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(config: RunConfig, gpu: str, gpus: list[int]) -> Plan:
    """The plan of a run on each of these numbers of GPUs of one kind.

    Raises UserError for a config that would not train, and for a GPU that is not known or lacks the precision.
    """
    kind = gpu_named(gpu)
    if kind.peak(config.precision) is None:
        known = [p for p in ("fp32", "bf16") if kind.peak(p) is not None]
        raise UserError(f"precision={config.precision}: {gpu} is planned for in {', '.join(known)}")
    if not gpus or min(gpus) < 1 or max(gpus) > MOST:
        raise UserError(f"--gpus: give numbers of GPUs from 1 to {MOST}, such as 8,64,512")
    model = outline(config.model)
    refuse_crop(config, model)
    if config.model.origin is not None:
        refuse_what_needs_values(model)
    crop = config.data.crop
    activations = Activations.of(config)
    parameters = activations.few.parameters
    usable = (kind.memory - OUTSIDE) * (1 - FRAGMENTED)
    margin = config.loss.margin_for(model.radius, crop)
    checkpoint = STATE_BYTES * parameters
    return Plan(
        model=config.model.label,
        parameters=parameters,
        radius=model.radius,
        crop=crop,
        counted=share_counted(margin, crop),
        flops_per_step=config.data.batch * activations.few.flops // activations.few.crops,
        gpu=gpu,
        usable=usable,
        checkpoint=checkpoint,
        save_s=checkpoint / speed.DISK,
        rows=[
            _row(s, config, activations, model, kind, n, usable)
            for n in dict.fromkeys(gpus)
            for s in STRATEGIES
        ],
        assumed=_assumed(kind),
    )


def _row(
    sharing: Sharing,
    config: RunConfig,
    activations: Activations,
    model: Denoiser,
    gpu: Gpu,
    gpus: int,
    usable: float,
) -> Row:
    batch = max(1, round(config.data.batch / gpus)) * gpus
    share, steps = batch // gpus, -(-config.steps * config.data.batch // batch)
    changed = None
    if batch != config.data.batch:
        changed = (
            f"data.batch {config.data.batch} -> {batch}, steps {config.steps} -> {steps}: the config's batch cannot "
            f"be shared evenly by {gpus} GPU{'s' if gpus > 1 else ''}"
        )
    fits = []
    for micro in _micro_batches(config.micro_batch, share):
        needed = memory(sharing, config, activations, micro, share, gpus)
        fits.append(Fit(micro, needed, needed.total, needed.total <= usable))
    chosen = max((fit.micro_batch for fit in fits if fit.fits), default=None)
    largest = _largest_crop(sharing, config, activations, model.stride, gpus, usable)
    times = None
    if chosen is not None:
        took = speed.timing(sharing, config, activations.few, share, chosen, gpu, gpus)
        hours = steps * took.step_s / 3600
        times = Times(took.sent, took.step_s, took.efficiency, hours, hours * gpus)
    beside = node(sharing, config, activations.few.parameters, gpus, gpu.per_node)
    return Row(sharing.name, gpus, batch, steps, changed, fits, largest, chosen, times, beside)


def _micro_batches(wanted: int | None, share: int) -> list[int]:
    """The config's own size; without one, the powers of two up to a rank's share, and the share itself."""
    if wanted is not None:
        return [min(wanted, share)]
    return sorted({2**i for i in range(share.bit_length())} | {share})


def _largest_crop(
    sharing: Sharing,
    config: RunConfig,
    activations: Activations,
    stride: tuple[int, int, int],
    gpus: int,
    usable: float,
) -> tuple[int, int, int] | None:
    """The largest crop (z, y, x) that fits: square and as deep as the config's, or deeper if it is as wide as a slice."""
    deep = config.data.crop[0]
    crops = [(deep, edge, edge) for edge in range(stride[1], SLICE, stride[1])]
    crops += [(z, SLICE, SLICE) for z in range(deep, 32 * deep, stride[0])]

    def needed(crop: tuple[int, int, int]) -> float:
        times = math.prod(crop) / activations.voxels
        return memory(sharing, config, activations, times, times, gpus).total

    fitting = bisect_right(crops, usable, key=needed)
    return crops[fitting - 1] if fitting else None


def _assumed(gpu: Gpu) -> dict[str, Any]:
    return {
        "gpu": asdict(gpu),
        "arithmetic_share": speed.ARITHMETIC,
        "copies_share": speed.COPIES,
        "links_share": speed.LINKS,
        "launch_s": speed.LAUNCH_S,
        "disk_bytes_per_s": speed.DISK,
        "host_adam_bytes_per_s": speed.HOST_ADAM,
        "nvme_bytes_per_s": speed.NVME,
        "outside_bytes": OUTSIDE,
        "fragmented_share": FRAGMENTED,
        "process_bytes": PROCESS,
        "left_out": "waiting for data, validation, torch.compile's fusion",
    }
