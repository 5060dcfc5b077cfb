"""Where a rank's memory goes, part by part, under each way of sharing a network out.

ZeRO after Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models" (2020):
stage 1 shares out the optimizer's state, 2 the gradients too, 3 the weights too. What DeepSpeed holds besides is in
cost/zero.py.
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
"""on the device: the one at work, and those that the loader has made ahead"""


@dataclass(frozen=True)
class Sharing:
    """A strategy: `zero` None is DDP. offload: what lies in the node's memory, the optimizer with its
    gradients, or the weights too; nvme: on its disk."""

    name: str
    zero: int | None = None
    offload_optimizer: bool = False
    offload_weights: bool = False
    nvme: bool = False


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
    """Bytes on one GPU when they are most. workspace: what comes and goes within a step, and the strategy's buffers."""

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
        """what a step takes that no loader feeds"""
        return self.total - self.batches * (1 - 1 / BATCHES)


@dataclass(frozen=True)
class Node:
    """Bytes of a node's memory and of its disk, all its ranks together: what an `sbatch --mem` has to be above.

    The copies of the state that is being saved beside training count from the first save on.
    """

    memory: float
    disk: float


@dataclass(frozen=True)
class Activations:
    """Bytes of activations for any number of crops, or for one so many times as large.

    From the costs of two micro-batches, `few` and one crop more, of `voxels` voxels each: what lives after a kernel
    grows with the voxels from what the weights' copies take, and the kernels are the same ones (for a single crop
    they are not quite: its layouts are ambiguous, which spares copies).
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
        """What lives at most where the weights' gradients come as the activations go, and what of it are gradients."""
        pairs = zip(self._live(crops), self.few.gradients, strict=True)
        return max((live + gradients, float(gradients)) for live, gradients in pairs)

    def peak_without_copies(self, crops: float, copied: int, first: int = 0) -> float:
        """What lives at most once there are gradients of `first` weights, besides copies of the weights, of so many bytes
        each. They go as the gradients come."""
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
    """Of one of `gpus` ranks, with `crops` crops a micro-batch and `share` crops a rank and step."""
    p = float(activations.few.parameters)
    tensors = 3 if config.data.augment.lesions.count else 2  # low, full and weights, fp32
    batches = BATCHES * share * tensors * 4.0 * activations.voxels
    saved, peak = activations.saved(crops), activations.peak(crops)
    if sharing.zero is None:
        # DDP's buckets, and sums over micro-batches, hold all gradients all the time; else they come as activations go
        gradients = 4 * p
        if gpus == 1 and share <= crops:
            peak, gradients = activations.peak_with_gradients(crops)
            peak -= gradients
        saved = min(saved, peak)
        return Memory(4 * p, gradients, 8 * p, 4 * p, batches, saved, peak - saved)
    # autocast's copies of the weights in bf16 are needless where the weights are in bf16 themselves, as DeepSpeed's are
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
    """Of a node with at most `per_node` of `gpus` ranks."""
    ranks, p = min(gpus, per_node), parameters / gpus
    low = 2 if config.precision == "bf16" else 4
    # the first weights, whole on every rank until they are handed over, before any save
    first, saving = 4.0 * parameters, STATE_BYTES * p
    offloaded = sums = 0.0
    if sharing.offload_optimizer:  # with the step's gradients, and weights at work or on their way to the GPU
        offloaded = (STATE_BYTES + 4 + low) * p
    if sharing.offload_optimizer and (sharing.zero == 3 or low == 4):
        sums = 4 * p  # of gradients, in memory of their own, from which the step's are copied
    process = PROCESS + (config.data.memory_mib << 20)
    if sharing.nvme:
        return Node(ranks * (process + first + sums), ranks * (offloaded + saving))
    return Node(ranks * (process + offloaded + sums + max(first, saving)), 0)
