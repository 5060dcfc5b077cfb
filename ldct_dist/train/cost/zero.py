"""What DeepSpeed's ZeRO optimizers hold on a GPU, buffer by buffer.

Read off DeepSpeed 0.19 with the settings of train/strategy/engine.py, and checked against its tensors as they live
(tests/train/test_plan_zero.py): runtime/bf16_optimizer.py is ZeRO 1 in bf16, runtime/zero/stage_1_and_2.py the rest
below ZeRO 3, runtime/zero/stage3.py and partition_parameters.py are ZeRO 3. Gradients are summed and sent in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from ldct_dist.train.strategy.config import BUCKET, PERSISTENT

NORM = 8
"""bytes an element while a gradient's norm is taken, tensor by tensor in fp64"""


@dataclass(frozen=True)
class Held:
    """Bytes on one GPU. weights stay from step to step, gradients until the step.

    The rest is in use for a part of the step. beside: during backward, from its start. reducing: while a bucket of
    gradients is reduced, for the first time when `first` elements of gradients are there. stepping: after backward.
    """

    weights: float
    gradients: float
    beside: float
    reducing: float
    first: int
    stepping: float


@dataclass(frozen=True)
class Network:
    """What ZeRO's memory depends on. sizes: elements of each weight, in the optimizer's order.

    low: bytes of an element of the weights that the network computes with. passes: whether a step has several
    micro-batches.
    """

    sizes: tuple[int, ...]
    low: int
    gpus: int
    passes: bool

    @property
    def parameters(self) -> int:
        return sum(self.sizes)

    @property
    def bucket(self) -> int:
        return min(BUCKET, self.parameters)

    @property
    def whole(self) -> bool:
        """whether one bucket holds all gradients, so that they are reduced after backward"""
        return self.parameters <= BUCKET

    @property
    def largest(self) -> int:
        return max(self.sizes)

    @property
    def first(self) -> int:
        """the least number of elements whose gradients are there when a bucket is first reduced; the last weights' come
        first"""
        if self.whole:
            return self.parameters
        if self.largest <= self.bucket:
            return self.bucket - self.largest
        return sum(self.sizes[len(self.sizes) - self.sizes[::-1].index(self.largest) :])


def held(zero: int, network: Network, optimizer_offloaded: bool, weights_offloaded: bool) -> Held:
    """What a GPU holds under ZeRO stage `zero`, without the optimizer's state. Offloaded is to the node's memory."""
    if zero == 3:
        return _stage_3(network, optimizer_offloaded, weights_offloaded)
    if zero == 1 and network.low == 2 and not optimizer_offloaded:
        # BF16_Optimizer: the sum of all gradients, all-reduced and clipped where it lies; a gradient is cast to be added
        added = 6.0 * network.largest
        return Held(2.0 * network.parameters, 4.0 * network.parameters, 0.0, added, network.parameters, 0.0)
    return _stage_1_and_2(zero, network, optimizer_offloaded)


def _stage_1_and_2(zero: int, network: Network, offloaded: bool) -> Held:
    p, low, share = network.parameters, network.low, network.parameters / network.gpus
    # setup_buckets: allocated with a backward's first gradient; two, where one travels as the other one is filled
    buckets = low * network.bucket * (1.0 if network.whole else 2.0)
    norm = float(NORM * min(network.largest, share))
    if low == 2:
        # allreduce_bucket: a flat copy, and one in fp32, of a bucket, or of a weight larger than one, whose cast to fp32
        # the activations have. The sum is on the GPU even if the step is not (_build_compact_grad_partition_buffer).
        flat = max(6.0 * network.bucket, 2.0 * network.largest)
        # temp_grad_buffer_for_gpu_offload is as large as the largest weight
        gradients = 4.0 * share + (2.0 * network.largest if offloaded else 0.0)
        return Held(2.0 * p, gradients, buckets, buckets + flat, network.first, norm)
    # here the copy is a view if all is one rank's
    flat = 4.0 * max(network.bucket, network.largest) if network.gpus > 1 else 0.0
    if offloaded:
        return Held(4.0 * p, 4.0 * network.largest, buckets, buckets + flat, network.first, norm)
    # copy_grads_in_partition: of weights that this rank owns a part of, all. The step copies its part once more.
    gradients = 4.0 * owned_in_part(network.sizes, network.gpus)
    beside, reducing, stepping = buckets, buckets + flat, max(norm, 4.0 * share)
    if network.whole:  # they are copied when all gradients lie in the bucket, and its flat copy is gone
        beside, reducing = buckets - gradients, buckets + max(flat - gradients, 0.0)
    if network.passes and zero == 2:  # what earlier micro-batches have left
        beside, reducing = beside + gradients, reducing + gradients
    elif network.passes:
        # ZeRO 1 shares nothing out before the last one; what lies in the bucket lies there alone
        beside = buckets + 4.0 * p - gradients
        reducing = max(reducing, buckets + 4.0 * (p - network.bucket))
    return Held(4.0 * p, gradients, beside, reducing, network.first, stepping)


def _stage_3(network: Network, optimizer_offloaded: bool, weights_offloaded: bool) -> Held:
    low = network.low
    share = float(sum(-(-size // network.gpus) for size in network.sizes))
    kept = sum(size for size in network.sizes if size <= PERSISTENT)
    weights = 0.0 if weights_offloaded else low * share
    if network.gpus > 1 or weights_offloaded:
        weights += low * kept
    bucket = 4.0 * network.bucket  # of what is sent, allocated for good
    # reduce_scatter_coalesced: a copy in order of the ranks. A weight larger than the bucket is alone, and needs none.
    copy = 4.0 * network.bucket
    # Weights are gathered ahead into a flat buffer, and copied out of it; a large one comes alone, and needs no copy. A
    # rank that has them all needs neither, unless they are elsewhere.
    parted = network.parameters - kept if network.gpus > 1 or weights_offloaded else 0
    ahead = float(low * min(parted, network.bucket))
    gathered = max(ahead, float(low * min(parted, network.largest)))
    largest = -(-network.largest // network.gpus)
    gradients, stepping = 4.0 * share, max(NORM * largest, 4.0 * share)
    if optimizer_offloaded:
        gradients, stepping = 0.0, 0.0
        copy += 4.0 * largest  # on its way
    if network.whole:  # gathered before there are activations, and let go as backward comes by
        beside, reducing = bucket + gathered, bucket + max(copy, gathered + ahead)
    else:
        beside, reducing = bucket + gathered + ahead, bucket + gathered + copy
    return Held(weights, gradients, beside, reducing, network.first, bucket + stepping)


@lru_cache
def owned_in_part(sizes: tuple[int, ...], gpus: int) -> int:
    """Elements of the weights that a rank owns at least a part of, for the rank with most of them.

    The weights are laid out one after the other, and each rank owns an equal stretch.
    """
    share = -(-sum(sizes) // gpus)
    ends = list(accumulate(sizes))
    ranks = {(end - 1) // share for end in ends} | {
        (end - size) // share for end, size in zip(ends, sizes, strict=True)
    }
    return max(
        sum(
            size
            for end, size in zip(ends, sizes, strict=True)
            if end > rank * share and end - size < (rank + 1) * share
        )
        for rank in ranks
    )
