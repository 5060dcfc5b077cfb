"""How long a step takes and what it sends, from the data sheets' figures and the share of them that programs reach."""

from __future__ import annotations

from dataclasses import dataclass

from ldct_dist.train.config import RunConfig
from ldct_dist.train.cost.count import StepCost
from ldct_dist.train.cost.gpus import Gpu, Precision
from ldct_dist.train.cost.memory import Sharing
from ldct_dist.train.strategy.config import BUCKET

ARITHMETIC = 0.5
"""share of the data sheet's FLOPs that convolutions reach"""
COPIES = 0.8
"""share of the memory's bandwidth that pointwise kernels reach"""
LINKS = 0.7
"""share of a link's bandwidth that collectives reach"""
LAUNCH_S = 5e-6
"""seconds to launch a kernel, which is all that those of small crops take"""
NVME = 2e9
"""bytes a second from and to the NVMe of a node, if its page cache holds nothing of it"""
HOST_ADAM = 25e9
"""bytes a second that Adam moves in the node's memory, for each GPU of the node"""
LAST_BUCKET = 25 << 20
"""bytes of gradients that DDP sends when the backward pass has ended"""
DISK = 1e9
"""bytes a second into checkpoints, from all ranks together"""
ADAM_BYTES = 28
"""moved a parameter by Adam in one fused kernel"""
AVERAGE_BYTES = 12
"""moved a parameter by the moving average"""


@dataclass(frozen=True)
class Timing:
    """One step on one GPU. exposed_s: those of its seconds in which it only waits for communication."""

    step_s: float
    exposed_s: float
    sent: float
    """bytes that each GPU sends to others"""

    @property
    def efficiency(self) -> float:
        """Share of the time that is not spent on waiting for communication."""
        return 1 - self.exposed_s / self.step_s


def compute_s(cost: StepCost, crops: int, gpu: Gpu, precision: Precision) -> float:
    """Seconds for forward and backward of so many crops at once: the sum of the kernels' rooflines."""
    peak = gpu.peak(precision)
    assert peak is not None
    arithmetic, copies = ARITHMETIC * peak, COPIES * gpu.bandwidth
    times = crops / cost.crops
    return sum(max(times * op.flops / arithmetic, times * op.bytes / copies, LAUNCH_S) for op in cost.ops)


def timing(
    sharing: Sharing, config: RunConfig, cost: StepCost, share: int, micro: int, gpu: Gpu, gpus: int
) -> Timing:
    """The timing of a step in which each of `gpus` ranks has `share` crops, `micro` at a time.

    cost: of a micro-batch of any size, which is scaled.
    """
    p, passes = float(cost.parameters), -(-share // micro)
    compute = share / micro * compute_s(cost, micro, gpu, config.precision)
    link = LINKS * gpu.between(gpus)
    low = 2 if config.precision == "bf16" else 4
    hidden, after, window = _sent(sharing, p, low, passes, gpus)
    kept = p if sharing.zero is None else p / gpus
    update = (ADAM_BYTES + AVERAGE_BYTES) * kept / (COPIES * gpu.bandwidth)
    host, owned = 0.0, p / gpus
    nvme: float = NVME / min(gpus, gpu.per_node)
    if sharing.offload_optimizer:  # gradients there, weights back, arithmetic on the node's processors
        update = (4 + low) * owned / gpu.host + (ADAM_BYTES + AVERAGE_BYTES) * owned / HOST_ADAM
        if sharing.nvme:
            update += (4 + ADAM_BYTES + AVERAGE_BYTES) * owned / nvme
    if sharing.offload_weights:
        host = 2 * passes * low * owned / (min(nvme, gpu.host) if sharing.nvme else gpu.host)
    exposed = max(0.0, hidden / link + host - window * compute) + after / link
    return Timing(compute + exposed + update, exposed, hidden + after)


def _sent(sharing: Sharing, p: float, low: int, passes: int, gpus: int) -> tuple[float, float, float]:
    """(bytes that each GPU sends while it computes, bytes that it sends afterwards, share of the computing time that the
    former can hide in).

    For ring algorithms, in which an all-reduce sends twice what a gather or a scatter of the same data does. Gradients
    are sent in fp32. As counted in DeepSpeed 0.19: ZeRO 1 and 2 all-reduce the gradients although each rank needs only
    what it owns (average_tensor, use_multi_rank_bucket_allreduce), and only ZeRO 3 scatters them; 2 and 3 do so after
    each micro-batch.
    """
    others = (gpus - 1) / gpus
    backward, reduce, weights = 2 / 3, 2 * others * 4 * p, others * low * p
    if sharing.zero is None:
        after = min(reduce, 2 * others * LAST_BUCKET)
        return reduce - after, after, backward / passes
    if sharing.zero == 3:
        # Each micro-batch gathers the weights twice, but for those with which forward ends and backward begins.
        again = others * low * (p - min(p, BUCKET))
        return passes * (reduce / 2 + weights + again), 0.0, 1.0
    if sharing.zero == 2:
        reduce *= passes
    # With a single bucket, and in BF16_Optimizer, gradients are reduced after backward.
    if p <= BUCKET or (sharing.zero == 1 and low == 2):
        return 0.0, reduce + weights, 0.0
    return reduce, weights, backward if sharing.zero == 2 else backward / passes
