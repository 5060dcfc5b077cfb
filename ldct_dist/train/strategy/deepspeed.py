"""ZeRO (Rajbhandari et al. 2020) by DeepSpeed: ranks share out what each would else hold whole.

ZeRO 1 shares out the optimizer's state, the moving average and the fp32 weights, 2 the gradients as well, 3 the
working weights too. What a rank owns is the same stretch of all of these.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ldct_dist.checkpoint.load import WEIGHTS
from ldct_dist.checkpoint.pieces import Part, Piece
from ldct_dist.errors import UserError
from ldct_dist.models.ema import decay_after
from ldct_dist.models.registry import Denoiser, build
from ldct_dist.train.config import RunConfig
from ldct_dist.train.optim import build_optimizer
from ldct_dist.train.strategy.config import DeepSpeedConfig
from ldct_dist.train.strategy.ddp import to_channels_last
from ldct_dist.train.strategy.parts import MOMENTS, RAW_WEIGHTS, parts_of
from ldct_dist.train.strategy.zero import Owned, zero_of
from ldct_dist.world import World

BUCKET = 50_000_000
"""elements that are reduced or gathered at a time"""


class DeepSpeedStrategy:
    """Holds this rank's share of the network, of its moving average and of its optimizer's state.

    Micro-batches before the last one talk to no other rank under ZeRO 1; under 2 and 3 each one reduces its
    gradients, of which no rank has room for all.
    """

    def __init__(self, model: Denoiser, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        _choose_device(world)
        parameters = dict(model.named_parameters())
        self._shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        self._adam = _optimizer(model, config)
        self._engine = _engine(model, self._adam, config, world)
        self._zero = zero_of(self._engine.optimizer)
        self._owned = {name: self._zero.owned(p) for name, p in parameters.items()}
        self._state = [_state(master) for master in self._zero.masters]
        self._set_updates(0)

    @torch.no_grad()
    def begin(self, weights: Denoiser) -> None:
        """Train from `weights`: the average starts there, the optimizer has seen nothing yet."""
        given = weights.named_parameters()
        self.load(((file, name, p) for name, p in given for file in (WEIGHTS, RAW_WEIGHTS)), 0)

    def warm_up(self) -> None:
        """Nothing: ZeRO adds in the same order from the first step on."""

    def __call__(self, hu: torch.Tensor) -> torch.Tensor:
        """The network on float32 HU (b, 1, z, y, x), in the precision of the run."""
        if self.config.channels_last:
            hu = hu.contiguous(memory_format=torch.channels_last_3d)
        return self._engine(hu)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around the forward and backward of one micro-batch."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def clip(self) -> torch.Tensor:
        """The gradient's L2 norm over all ranks, a scalar; `step` scales it down to optim.clip_norm."""
        return self._zero.norm()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply the gradients, and let the average follow."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._engine.step()
        decay = decay_after(self.updates, self.config.optim.ema)
        for state in self._state:
            state["average"].lerp_(state["raw"], 1 - decay)
        self.updates += 1

    def forget_gradients(self) -> None:
        self._zero.drop_gradients()

    @property
    @torch.no_grad()
    def averaged(self) -> Denoiser:
        """The network with the averaged weights, whole on every rank, gathered parameter by parameter."""
        with torch.device("meta"):
            model = build(self.config.model)
        model.to_empty(device=self.world.device)
        for name, parameter in model.named_parameters():
            whole = torch.zeros(parameter.numel(), device=self.world.device)
            if (owned := self._owned[name]) is not None:
                whole[owned.start :][: owned.count] = self._values(owned, "average")
            parameter.copy_(self.world.sum(whole).view_as(parameter))
        if self.config.channels_last:
            to_channels_last(model)
        return model.requires_grad_(False).eval()

    def parts(self, step: int) -> dict[str, Part]:
        """Files of a checkpoint, of which this rank gives the pieces that it owns."""
        average, raw, *moments = (
            {name: self._piece(name, key) for name in self._shapes} for key in ("average", "raw", *MOMENTS)
        )
        by_moment = {
            f"{name}/{key}": piece
            for key, pieces in zip(MOMENTS, moments, strict=True)
            for name, piece in pieces.items()
        }
        return parts_of(average, raw, by_moment, self.config.model, step, self.world.size)

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, str, torch.Tensor]], updates: int) -> None:
        """Keep of each (file, name, whole tensor) what this rank owns."""
        for state in self._state:
            for key in MOMENTS:
                state[key].zero_()  # a checkpoint of step 0 has none
        for file, name, tensor in tensors:
            if file in (WEIGHTS, RAW_WEIGHTS):
                key = "average" if file == WEIGHTS else "raw"
            else:
                name, key = name.rsplit("/", 1)
            if (owned := self._owned[name]) is not None:
                self._values(owned, key).copy_(tensor.reshape(-1)[owned.start :][: owned.count])
        self._set_updates(updates)
        self._zero.spread()

    def _set_updates(self, updates: int) -> None:
        """Steps applied so far: what Adam's bias correction and the average's decay depend on."""
        self.updates = updates
        for master, state in zip(self._zero.masters, self._state, strict=True):
            step = updates if _on_cpu(self._adam) else torch.tensor(float(updates))
            self._adam.state[master] = {"step": step, **{key: state[key] for key in MOMENTS}}

    def _values(self, owned: Owned, key: str) -> torch.Tensor:
        return self._state[owned.master][key].narrow(0, owned.place, owned.count)

    def _piece(self, name: str, key: str) -> Piece:
        owned = self._owned[name]
        if owned is None:
            return Piece(self._shapes[name], 0, torch.empty(0))
        return Piece(self._shapes[name], owned.start, self._values(owned, key))


def _state(master: torch.Tensor) -> dict[str, torch.Tensor]:
    """A flat stretch of the fp32 weights, and what is kept beside it."""
    raw = master.detach()
    return {"raw": raw, "average": raw.clone(), **{key: torch.zeros_like(raw) for key in MOMENTS}}


class _Working(nn.Module):
    """The network in the precision of the run: its weights are bf16, what goes in and comes out is float32 HU."""

    def __init__(self, model: Denoiser, autocast: AbstractContextManager[Any]) -> None:
        super().__init__()
        self.model, self._autocast = model, autocast

    def forward(self, hu: torch.Tensor) -> torch.Tensor:
        with self._autocast:
            return self.model(hu)


def _engine(model: Denoiser, optimizer: Optimizer, config: RunConfig, world: World) -> Any:
    """DeepSpeed's engine on the process group of `world`."""
    import deepspeed

    # What training does not use shall not be compiled, for minutes, as a run starts.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It calls functions that torch has since renamed.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    if not dist.is_initialized():  # one rank alone
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    bf16 = config.precision == "bf16"
    autocast = torch.autocast(world.device.type, torch.bfloat16) if bf16 else nullcontext()
    with redirect_stdout(io.StringIO()):  # it tells memory figures that nobody asked for
        engine, *_ = deepspeed.initialize(
            model=_Working(model, autocast),
            optimizer=optimizer,
            config=_settings(config, world),
            dist_init_required=False,
        )
    return engine


def _settings(config: RunConfig, world: World) -> dict[str, Any]:
    """The run's config in DeepSpeed's words."""
    gpu, places = world.device.type == "cuda", config.deepspeed
    zero: dict[str, Any] = {
        "stage": config.zero,
        "overlap_comm": gpu,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if places.optimizer != "gpu":
        zero["offload_optimizer"] = {"device": places.optimizer, "pin_memory": gpu}
    if places.parameters != "gpu":
        zero["offload_param"] = {"device": places.parameters, "pin_memory": gpu}
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only counts with it
        "steps_per_print": None,
        "gradient_clipping": config.optim.clip_norm or 0.0,
        # The guard judges gradients before they are applied.
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
    }


def _on_cpu(optimizer: Optimizer) -> bool:
    """Whether it is DeepSpeed's Adam for masters on the CPU."""
    return type(optimizer).__name__ == "DeepSpeedCPUAdam"


def _optimizer(model: Denoiser, config: RunConfig) -> Optimizer:
    if config.deepspeed.optimizer == "gpu":
        return build_optimizer(model.parameters(), config.optim)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    o = config.optim
    return DeepSpeedCPUAdam(
        model.parameters(), lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, adamw_mode=o.name == "adamw"
    )


def refuse_deepspeed(config: RunConfig, world: World) -> None:
    """Raises UserError where the run asks for what DeepSpeed cannot do, here or at all."""
    places = config.deepspeed
    if config.strategy == "ddp" and (config.zero or places != DeepSpeedConfig()):
        raise UserError("zero and deepspeed are for strategy=deepspeed: set it, or leave them out")
    if config.zero == 0 and places != DeepSpeedConfig():
        raise UserError(
            "deepspeed.optimizer and deepspeed.parameters move what ZeRO shares out: set zero=1, 2 or 3"
        )
    if config.zero == 0:
        return
    if config.precision == "fp64":
        raise UserError(f"zero={config.zero} has no fp64: precision=fp64 is for strategy=ddp, or take fp32")
    if config.compile:
        raise UserError("compile=true is for strategy=ddp: set compile=false")
    if "nvme" in (places.optimizer, places.parameters):
        raise UserError(
            "deepspeed: nothing is kept on NVMe so far, that is not proven to come back: take cpu"
        )
    if places.parameters != "gpu" and config.zero != 3:
        raise UserError(
            f"deepspeed.parameters={places.parameters} is for zero=3: below it, every GPU keeps all parameters"
        )
    _refuse_missing(config, world)


def _refuse_missing(config: RunConfig, world: World) -> None:
    _choose_device(world)
    try:
        from deepspeed.ops.op_builder import CPUAdamBuilder
    except ImportError as e:
        raise UserError(
            f"strategy=deepspeed: DeepSpeed is missing ({e}): pip install 'ldct_dist[deepspeed]'"
        ) from e
    if config.deepspeed.optimizer == "cpu":
        try:
            CPUAdamBuilder().load()
        except (RuntimeError, OSError, ImportError) as e:
            raise UserError(
                f"deepspeed.optimizer=cpu: its Adam could not be compiled ({str(e).splitlines()[-1]}): install g++ "
                "and ninja, or leave the optimizer on the GPU"
            ) from e


def _choose_device(world: World) -> None:
    """DeepSpeed asks the environment, as it is imported, which device is this rank's; `world` has chosen it."""
    os.environ |= {"DS_ACCELERATOR": world.device.type, "LOCAL_RANK": str(world.device.index or 0)}
