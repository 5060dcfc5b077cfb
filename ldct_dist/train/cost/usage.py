"""How well a run uses its devices, for TensorBoard."""

from __future__ import annotations

import math
import resource

import torch

from ldct_dist.files import GIB
from ldct_dist.train.config import RunConfig
from ldct_dist.train.cost.count import count
from ldct_dist.train.cost.gpus import peak_of_device
from ldct_dist.world import World


class Usage:
    """The use of one rank's device, of which rank 0's stands for all.

    FLOPs are counted once, as the run starts, and only for GPUs: the peak of a CPU is not known well enough to compare
    with.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        self._device = world.device
        self._crops = config.data.batch / world.size
        self._voxels = math.prod(config.data.crop)
        self.flops, self.peak = None, None
        if world.device.type == "cuda":
            self.flops = self._crops * count(config, 1).flops
            self.peak = peak_of_device(torch.cuda.get_device_name(world.device), config.precision)

    def scalars(self, steps: int, seconds: float) -> dict[str, float]:
        """Figures by their names in TensorBoard, for so many steps that took so many seconds.

        MFU as Chowdhery et al. (PaLM, 2022) define it: FLOPs without recomputation, against the data sheet's peak.
        """
        rate = steps / seconds
        told = {
            "workload/voxels_per_s_per_rank": rate * self._crops * self._voxels,
            "workload/peak_memory_gib": self._peak_bytes() / GIB,
        }
        if self.flops is not None:
            told |= {
                "workload/flops_per_step_per_gpu": self.flops,
                "workload/tflops_per_gpu": rate * self.flops / 1e12,
            }
            if self.peak is not None:
                told["workload/mfu_percent"] = 100 * rate * self.flops / self.peak
        return told

    def _peak_bytes(self) -> int:
        """The most memory used so far: by tensors on the GPU, or without one by the process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
