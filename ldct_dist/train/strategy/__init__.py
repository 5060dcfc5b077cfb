"""How a network is trained by many ranks: what holds its weights, its moving average and its optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import torch

from ldct_dist.checkpoint.pieces import Part
from ldct_dist.models.registry import Denoiser
from ldct_dist.world import World

if TYPE_CHECKING:
    from ldct_dist.train.config import RunConfig


class Strategy(Protocol):
    """What the Trainer calls. Every rank makes the same calls in the same order."""

    def begin(self, weights: Denoiser) -> None:
        """Train from `weights`: the average starts there, the optimizer has seen nothing yet."""

    def warm_up(self) -> None:
        """Done once at each start, so that a resumed run adds in the same order as an unbroken one."""

    def __call__(self, hu: torch.Tensor) -> torch.Tensor:
        """The network on float32 HU (b, 1, z, y, x), in the precision of the run."""

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward of one micro-batch."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of this rank's `loss`; after the last micro-batch it is the mean over ranks."""

    def clip(self) -> torch.Tensor:
        """The gradient's L2 norm over all ranks, a scalar; not finite where the gradient is not. Gradients above
        optim.clip_norm are scaled down to it, here or in `step`."""

    def step(self, lr: float) -> None:
        """Apply the gradients to the weights, and update the average."""

    def forget_gradients(self) -> None:
        """Drop the gradients, applied or not."""

    @property
    def averaged(self) -> Denoiser:
        """The network with the averaged weights, whole on every rank: what validation and people use."""

    @property
    def updates(self) -> int:
        """Steps applied so far: the average's decay depends on it."""

    def parts(self, step: int) -> dict[str, Part]:
        """The files of a checkpoint, the same for every strategy. Their tensors may be changed once a save has staged
        them."""

    def load(self, tensors: Iterable[tuple[str, str, torch.Tensor]], updates: int) -> None:
        """Load the (file, name, whole tensor) of a checkpoint, whichever strategy and number of ranks wrote it."""


def build_strategy(model: Denoiser, config: RunConfig, world: World) -> Strategy:
    """The strategy that the config asks for. ZeRO 0 shards nothing, so it is DDP; only ZeRO 1 to 3 import DeepSpeed."""
    if config.zero == 0:
        from ldct_dist.train.strategy.ddp import DDPStrategy

        return DDPStrategy(model, config, world)
    from ldct_dist.train.strategy.deepspeed import DeepSpeedStrategy

    return DeepSpeedStrategy(model, config, world)
