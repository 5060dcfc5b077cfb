"""The state of a run: all tensors that a checkpoint must hold, by file and by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from ldct_dist.checkpoint.load import WEIGHTS
from ldct_dist.checkpoint.save import Part
from ldct_dist.models.ema import Ema
from ldct_dist.models.registry import Denoiser
from ldct_dist.models.weights import weights_facts

RAW_WEIGHTS = "weights-raw.safetensors"


@dataclass
class TrainState:
    """model, its moving average and its optimizer, and the counters that go with them.

    `step` is the number of steps done, which is also the position in the data: nothing else has to be
    remembered, since the sample order and the random numbers of a step follow from the seed and the step.
    """

    model: Denoiser
    ema: Ema
    optimizer: Optimizer
    store: str
    """fingerprint of the store it is trained on"""
    step: int = 0
    skipped: int = 0
    """steps whose loss or gradient was not finite, and which changed nothing"""
    best: float | None = None
    """lowest validation RMSE so far, HU"""
    validated: tuple[int, float] | None = None
    """step and RMSE in HU of the latest validation"""

    def note_validation(self, rmse_hu: float) -> bool:
        """Keep the RMSE measured at this step; whether it is the lowest so far."""
        self.validated = (self.step, rmse_hu)
        improved = self.best is None or rmse_hu < self.best
        self.best = rmse_hu if improved else self.best
        return improved

    def counters(self) -> dict[str, Any]:
        """What the manifest carries; `validation` is the score of exactly these weights, if there is one."""
        current = self.validated is not None and self.validated[0] == self.step
        return {
            "step": self.step,
            "skipped": self.skipped,
            "best": self.best,
            "validation": self.validated[1] if self.validated is not None and current else None,
            "ema_updates": self.ema.updates,
            "store": self.store,
        }

    def parts(self, shards: int) -> dict[str, Part]:
        """Files of a checkpoint: weights as people use them, and the optimizer's state in `shards` files."""
        facts = weights_facts(self.model.config, step=str(self.step))
        parts = {
            WEIGHTS: Part(dict(self.ema.module.named_parameters()), facts),
            RAW_WEIGHTS: Part(dict(self.model.named_parameters()), facts),
        }
        tensors = self._optimizer_tensors()
        names = sorted(tensors)
        for i in range(shards):
            share = {name: tensors[name] for name in names[i::shards]}
            parts[f"optimizer-{i + 1:05d}-of-{shards:05d}.safetensors"] = Part(share)
        return parts

    @torch.no_grad()
    def load(self, file: str, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor of a checkpoint back where `parts` took it from."""
        if file in (WEIGHTS, RAW_WEIGHTS):
            module = self.ema.module if file == WEIGHTS else self.model
            module.get_parameter(name).copy_(tensor)
        else:
            name, key = name.rsplit("/", 1)
            parameter = self.model.get_parameter(name)
            # Adam keeps its step count on the CPU and everything shaped like the parameter beside it.
            device = "cpu" if tensor.ndim == 0 else parameter.device
            self.optimizer.state[parameter][key] = tensor.to(device, copy=True)

    def load_counters(self, counters: dict[str, Any]) -> None:
        self.step, self.skipped = counters["step"], counters["skipped"]
        self.best, self.ema.updates = counters["best"], counters["ema_updates"]

    def _optimizer_tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}/{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
