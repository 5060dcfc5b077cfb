"""Data parallelism: every rank holds the whole network and sees its share of the global batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldct_dist.checkpoint.load import WEIGHTS
from ldct_dist.checkpoint.pieces import Part
from ldct_dist.models.ema import Ema
from ldct_dist.models.execution import autocast, lay_out
from ldct_dist.models.registry import Denoiser
from ldct_dist.train.config import RunConfig
from ldct_dist.train.optim import build_optimizer
from ldct_dist.train.strategy.parts import MOMENTS, RAW_WEIGHTS, parts_of
from ldct_dist.world import World


class DDPStrategy:
    """Holds the network, its moving average and its optimizer; with one rank that is all.

    After the last `backward` the gradients are the mean over the ranks, bitwise the same on all of them.
    """

    def __init__(self, model: Denoiser, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        model = model.to(world.device)
        lay_out(model, config.channels_last)
        if config.precision == "fp64":
            model = model.double()
        self.model = model
        self.ema = Ema(model, config.optim.ema)
        self.optimizer = build_optimizer(model.parameters(), config.optim)
        self._autocast = autocast(world.device, config.precision == "bf16")
        self._wrapped: nn.Module = torch.compile(model) if config.compile else model  # type: ignore[assignment]

    def begin(self, weights: Denoiser) -> None:
        """Train from `weights`: the average starts there, the optimizer has seen nothing yet."""
        self.model.load_state_dict(weights.state_dict())
        self.ema = Ema(self.model, self.config.optim.ema)
        self.optimizer.state.clear()

    def warm_up(self) -> None:
        """Connect to the other ranks, and do two backward passes whose gradients are thrown away.

        Connecting is done here, under the watch, since NCCL may wait for ever for a rank that it does not reach.
        DDP sorts its buckets anew after the first backward pass, which changes the order of summation over the ranks:
        without this, the first step after a resume would be summed in another order than in the unbroken run. The
        second pass lays the gradients into the new buckets.
        """
        if self.world.size == 1:
            return
        # Strides of an axis of one voxel or channel move no byte, and backends fill them in as they like.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        devices = [self.world.device] if self.world.device.type == "cuda" else None
        self._wrapped = DistributedDataParallel(
            self._wrapped, device_ids=devices, gradient_as_bucket_view=True
        )
        share = self.config.data.batch // self.world.size
        size = min(self.config.micro_batch or share, share)
        hu = torch.zeros((size, 1, *self.config.data.crop), device=self.world.device)
        for _ in range(2):
            self.optimizer.zero_grad()
            self(hu).float().sum().mul(0.0).backward()
        self.forget_gradients()

    def __call__(self, hu: torch.Tensor) -> torch.Tensor:
        """The network on float32 HU (b, 1, z, y, x), in the precision of the run."""
        if self.config.precision == "fp64":
            hu = hu.double()
        with self._autocast:
            return self._wrapped(hu)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around the forward and backward of one micro-batch: only the last one talks to other ranks."""
        with nullcontext() if last or self.world.size == 1 else self._wrapped.no_sync():  # type: ignore[operator]
            yield

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip(self) -> torch.Tensor:
        """Scale the gradients down to an L2 norm of at most optim.clip_norm; the norm they had, a scalar."""
        limit = self.config.optim.clip_norm
        return nn.utils.clip_grad_norm_(self.model.parameters(), float("inf") if limit is None else limit)

    def step(self, lr: float) -> None:
        """Apply the gradients to the weights, and update the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.ema.update(self.model)

    def forget_gradients(self) -> None:
        # DDP's gradients are views of its buckets, and stay: new ones would take memory beside the buckets.
        self.optimizer.zero_grad(set_to_none=self.world.size == 1)

    @property
    def averaged(self) -> Denoiser:
        """The network with the averaged weights, whole on every rank: what validation and people use."""
        return self.ema.module

    def parts(self, step: int) -> dict[str, Part]:
        """Files of a checkpoint, of tensors that are whole on every rank."""
        moments = {
            f"{name}/{key}": state[key]
            for name, parameter in self.model.named_parameters()
            if (state := self.optimizer.state[parameter])
            for key in MOMENTS
        }
        average, raw = (dict(module.named_parameters()) for module in (self.ema.module, self.model))
        return parts_of(average, raw, moments, self.model.config, step, self.world.size)

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, str, torch.Tensor]], updates: int) -> None:
        """Load the (file, name, tensor) of a checkpoint, written by any strategy at any world size."""
        self.optimizer.state.clear()
        for file, name, tensor in tensors:
            if file in (WEIGHTS, RAW_WEIGHTS):
                module = self.ema.module if file == WEIGHTS else self.model
                module.get_parameter(name).copy_(tensor)
                continue
            name, key = name.rsplit("/", 1)
            parameter = self.model.get_parameter(name)
            state = self.optimizer.state[parameter]
            state[key] = torch.empty_like(parameter).copy_(tensor)
            # Adam keeps a count of steps for each parameter, on the parameter's device.
            state["step"] = torch.tensor(float(updates), device=parameter.device)
        self.ema.updates = updates

    @property
    def updates(self) -> int:
        """Steps applied so far: the average's decay depends on it."""
        return self.ema.updates
