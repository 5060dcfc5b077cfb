"""What a rank's memory is used for, part by part, under each strategy.

ZeRO after Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models" (2020):
stage 1 shards the optimizer's state, 2 the gradients as well, 3 the weights as well. What DeepSpeed holds beyond that
is in cost/zero.py.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from ldct_dist.data.loader import READY
from ldct_dist.train.config import RunConfig
from ldct_dist.train.cost.count import StepCost, count
from ldct_dist.train.cost.zero import Network, held
from ldct_dist.train.strategy.parts import STATE_BYTES

PROCESS = 2 << 30
"""bytes of the node's memory that Python, torch, CUDA and NCCL take in each process"""
BATCHES = 1 + READY
"""on the device at a time: the one in use, and those that the loader has made ahead"""


@dataclass(frozen=True)
class Sharing:
    """A strategy and where it keeps what."""

    name: str
    zero: int | None = None
    """ZeRO's stage; None: DDP"""
    offload_optimizer: bool = False
    """whether the optimizer's state, with the gradients, is in the node's memory and not on the GPU"""
    offload_weights: bool = False
    """whether the weights are there as well"""
    nvme: bool = False
    """whether what is offloaded is on the node's disk instead"""


STRATEGIES = (
    Sharing("ddp"),
    Sharing("zero 1", 1),
    Sharing("zero 2", 2),
    Sharing("zero 3", 3),
    Sharing("zero 2 offload", 2, True),
    Sharing("zero 3 offload", 3, True, True),
    Sharing("zero 3 nvme", 3, True, True, True),
)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at their peak. workspace: what is in use for a part of a step only, and the strategy's buffers."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    batches: float
    activations: float
    workspace: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    @property
    def without_batches_ahead(self) -> float:
        """the total of a step for which no loader makes batches ahead"""
        return self.total - self.batches * (1 - 1 / BATCHES)


@dataclass(frozen=True)
class Node:
    """Bytes of a node's memory and of its disk that all its ranks take together: a job's --mem has to be larger.

    It includes the copy of the state that is made to be saved beside training.
    """

    memory: float
    disk: float


@dataclass(frozen=True)
class Activations:
    """Bytes of activations for any number of crops; a single crop 1.5 times as large counts as 1.5.

    Extrapolated from the costs of two micro-batches, of `few` crops and of one `more`, with `voxels` voxels a crop: both
    run the same kernels, after each of which the memory in use is a constant (the weights' copies) plus a part that is
    proportional to the voxels. From two crops and three: a single one has an ambiguous memory layout, which spares it
    some copies.
    """

    few: StepCost
    more: StepCost
    voxels: int

    @classmethod
    def of(cls, config: RunConfig) -> Activations:
        return cls(count(config, 2), count(config, 3), math.prod(config.data.crop))

    def saved(self, crops: float) -> float:
        return self._of(crops, self.few.saved, self.more.saved)

    def peak(self, crops: float) -> float:
        return max(self._live(crops))

    def peak_with_gradients(self, crops: float) -> tuple[float, float]:
        """(peak, the weights' gradients in it), where gradients are allocated while activations are freed."""
        pairs = zip(self._live(crops), self.few.gradients, strict=True)
        return max((live + gradients, float(gradients)) for live, gradients in pairs)

    def peak_without_copies(self, crops: float, copied: int, first: int = 0) -> float:
        """The peak from the time on at which `first` weights have gradients, without the weights' copies.

        copied: bytes of the copy of one weight. A copy is freed when the weight's gradient is there.
        """
        pairs = zip(self._live(crops), (size // 4 for size in self.few.gradients), strict=True)
        p = self.few.parameters
        return max(
            (max(0.0, live - copied * (p - done)) for live, done in pairs if done >= first), default=0.0
        )

    def _live(self, crops: float) -> list[float]:
        return [self._of(crops, few, more) for few, more in zip(self.few.live, self.more.live, strict=True)]

    def _of(self, crops: float, few: float, more: float) -> float:
        return few + (crops - self.few.crops) * (more - few)


def memory(
    sharing: Sharing, config: RunConfig, activations: Activations, crops: float, share: float, gpus: int
) -> Memory:
    """The memory of one of `gpus` ranks, with `crops` crops a micro-batch and `share` crops a rank and step."""
    p = float(activations.few.parameters)
    tensors = 3 if config.data.augment.lesions.count else 2  # low, full and weights, fp32
    batches = BATCHES * share * tensors * 4.0 * activations.voxels
    saved, peak = activations.saved(crops), activations.peak(crops)
    if sharing.zero is None:
        # DDP's buckets hold all gradients all the time, and so do sums over micro-batches. On a single GPU with one
        # micro-batch, gradients are allocated while activations are freed.
        gradients = 4 * p
        if gpus == 1 and share <= crops:
            peak, gradients = activations.peak_with_gradients(crops)
            peak -= gradients
        saved = min(saved, peak)
        return Memory(4 * p, gradients, 8 * p, 4 * p, batches, saved, peak - saved)
    # DeepSpeed's weights are in bf16 themselves, so autocast makes no copies of them in bf16.
    low, copied = (2, 2) if config.precision == "bf16" else (4, 0)
    network = Network(activations.few.sizes, low, gpus, share > crops)
    zero = held(sharing.zero, network, sharing.offload_optimizer, sharing.offload_weights)
    saved = max(0.0, saved - copied * p)
    workspace = max(
        zero.beside + activations.peak_without_copies(crops, copied),
        zero.reducing + activations.peak_without_copies(crops, copied, zero.first),
        zero.stepping,
    )
    kept = 0.0 if sharing.offload_optimizer else p / gpus
    return Memory(
        weights=zero.weights,
        gradients=zero.gradients,
        optimizer=12 * kept,  # fp32 weights and both moments
        ema=4 * kept,
        batches=batches,
        activations=saved,
        workspace=workspace - saved,
    )


def node(sharing: Sharing, config: RunConfig, parameters: int, gpus: int, per_node: int) -> Node:
    """What a node takes that has up to `per_node` of `gpus` ranks, for a network of so many parameters."""
    ranks, p = min(gpus, per_node), parameters / gpus
    low = 2 if config.precision == "bf16" else 4
    # Every rank has the first weights whole until they are handed over; that is over before the first save.
    first, saving = 4.0 * parameters, STATE_BYTES * p
    offloaded = sums = 0.0
    if sharing.offload_optimizer:
        # With the step's gradients, and weights that are in use or on their way to the GPU.
        offloaded = (STATE_BYTES + 4 + low) * p
    if sharing.offload_optimizer and (sharing.zero == 3 or low == 4):
        sums = 4 * p  # of gradients, in memory of their own, from which the step's are copied
    process = PROCESS + (config.data.memory_mib << 20)
    if sharing.nvme:
        return Node(ranks * (process + first + sums), ranks * (offloaded + saving))
    return Node(ranks * (process + offloaded + sums + max(first, saving)), 0)
