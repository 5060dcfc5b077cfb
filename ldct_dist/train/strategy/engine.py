"""DeepSpeed's engine and Adam, set up for a run, or refused in one line where they cannot do what is asked."""

from __future__ import annotations

import io
import os
import socket
import time
import warnings
from contextlib import AbstractContextManager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ldct_dist.errors import UserError
from ldct_dist.models.execution import autocast
from ldct_dist.models.registry import Denoiser
from ldct_dist.train.config import RunConfig
from ldct_dist.train.optim import build_optimizer
from ldct_dist.train.strategy.config import BUCKET, PERSISTENT, DeepSpeedConfig
from ldct_dist.train.strategy.disk import STRETCH, folder_on_this_node, lies_in_memory
from ldct_dist.world import World, backend_of

COMPILING_S = 600.0
"""a compilation that takes longer counts as killed"""


class _Working(nn.Module):
    """The network under the run's autocast: input and output are float32 HU, whatever the type of its weights."""

    def __init__(self, model: Denoiser, precision: AbstractContextManager[Any]) -> None:
        super().__init__()
        self.model, self._precision = model, precision

    def forward(self, hu: torch.Tensor) -> torch.Tensor:
        with self._precision:
            return self.model(hu)


def build_engine(model: Denoiser, optimizer: Optimizer, config: RunConfig, world: World) -> Any:
    """DeepSpeed's engine, which uses the process group of `world`."""
    deepspeed = _deepspeed(world)
    if not dist.is_initialized():  # one rank alone
        dist.init_process_group(backend_of(world.device), store=dist.HashStore(), rank=0, world_size=1)
    with redirect_stdout(io.StringIO()):  # it prints memory figures that nobody asked for
        engine, *_ = deepspeed.initialize(
            model=_Working(model, autocast(world.device, config.precision == "bf16")),
            optimizer=optimizer,
            config=_settings(config, world, sum(p.numel() for p in model.parameters())),
            dist_init_required=False,
        )
    return engine


def _settings(config: RunConfig, world: World, parameters: int) -> dict[str, Any]:
    """The run's config as DeepSpeed's own, for a network of so many parameters."""
    gpu, places = world.device.type == "cuda", config.deepspeed
    zero: dict[str, Any] = {
        "stage": config.zero,
        # Below ZeRO 3, it fills a second bucket while the first is sent: of no use where one holds all gradients.
        "overlap_comm": gpu and (config.zero == 3 or parameters > BUCKET),
        # The bucket is allocated in full, however little it holds.
        "reduce_bucket_size": min(BUCKET, parameters),
        # Weights that are gathered ahead and kept for backward. DeepSpeed's default, 1e9, is nearly every whole network.
        "stage3_max_live_parameters": BUCKET,
        "stage3_max_reuse_distance": BUCKET,
        "stage3_param_persistence_threshold": PERSISTENT,
    }
    # To DeepSpeed, what is on a disk is on the CPU (see disk.py).
    for what, place in (("offload_optimizer", places.optimizer), ("offload_param", places.parameters)):
        if place != "gpu":
            zero[what] = {"device": "cpu", "pin_memory": gpu and place == "cpu"}
    if places.optimizer == "nvme":
        # So that a step's second pass finds in memory what its first has read.
        zero["sub_group_size"] = STRETCH
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only counts with it
        "steps_per_print": None,
        "gradient_clipping": config.optim.clip_norm or 0.0,
        "bf16": {
            "enabled": config.precision == "bf16",
            "check_grad_overflow": False,  # the guard judges gradients before they are applied
            "immediate_grad_update": True,  # ZeRO 1: gradients in bf16 are freed once they are added in fp32
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
    }


def on_cpu(optimizer: Optimizer) -> bool:
    """Whether this is DeepSpeed's Adam for the CPU."""
    return type(optimizer).__name__ == "DeepSpeedCPUAdam"


def build_adam(model: Denoiser, config: RunConfig, world: World) -> Optimizer:
    if config.deepspeed.optimizer == "gpu":
        return build_optimizer(model.parameters(), config.optim)
    o = config.optim
    adam = _deepspeed(world).ops.adam.DeepSpeedCPUAdam(
        model.parameters(), lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, adamw_mode=o.name == "adamw"
    )
    adam.register_step_pre_hook(_forget_powers)
    return adam


def _forget_powers(adam: Any, *_: object) -> None:
    """Have Adam work out the powers of its betas from the number of the step.

    It multiplies them up from step to step, which rounds otherwise than a resumed run that begins with a power. At
    other betas, here those of a step on one number that nobody has, it begins anew.
    """
    nothing = [torch.zeros(1) for _ in range(4)]
    adam.ds_opt_adam.adam_update(adam.opt_id, 0, 0.0, 0.0, 0.0, 1.0, 0.0, False, *nothing)


def refuse_contradictions(config: RunConfig) -> None:
    """Raises UserError where the config asks for what DeepSpeed cannot do on any machine."""
    places = config.deepspeed
    if config.strategy == "ddp" and (config.zero or places != DeepSpeedConfig()):
        raise UserError("zero and deepspeed are for strategy=deepspeed: set it, or leave them out")
    if config.zero == 0 and places != DeepSpeedConfig():
        raise UserError(
            "deepspeed.optimizer and deepspeed.parameters move what ZeRO shards: set zero=1, 2 or 3"
        )
    if config.zero == 0:
        return
    if config.precision == "fp64":
        raise UserError(f"zero={config.zero} has no fp64: set precision=fp32, or strategy=ddp and zero=0")
    if config.compile:
        raise UserError("compile=true is for strategy=ddp: set compile=false")
    if places.parameters != "gpu" and config.zero != 3:
        raise UserError(
            f"deepspeed.parameters={places.parameters} is for zero=3: with less, every GPU keeps all parameters"
        )


def refuse_deepspeed(config: RunConfig, world: World) -> None:
    """Raises UserError where the config asks for what DeepSpeed cannot do on this machine."""
    if config.zero == 0:
        return
    places = config.deepspeed
    if "nvme" in (places.optimizer, places.parameters):
        folder = folder_on_this_node(places.nvme_path)
        if world.local_rank == 0 and lies_in_memory(folder):
            print(
                f"warning: deepspeed.nvme_path={places.nvme_path} on {socket.gethostname()} is a tmpfs, so the state "
                "takes the node's memory all the same: name a folder on a disk, or say cpu instead of nvme",
                flush=True,
            )
    _refuse_missing(config, world)


def _refuse_missing(config: RunConfig, world: World) -> None:
    try:
        builders = _deepspeed(world).ops.op_builder
    except ImportError as e:
        raise UserError(
            f"strategy=deepspeed: DeepSpeed is missing ({e}): pip install 'ldct_dist[deepspeed]'"
        ) from e
    if (place := config.deepspeed.optimizer) != "gpu":
        try:
            _await_compiler(world)
            builders.CPUAdamBuilder().load()
        except UserError:
            raise
        except Exception as e:
            # Compiling fails in many ways: a missing nvcc has an exception class of its own.
            raise UserError(
                f"deepspeed.optimizer={place}: its Adam could not be compiled ({str(e)[-200:]}): install g++ and ninja, "
                "and nvcc on a node with GPUs, or leave the optimizer on the GPU"
            ) from e


def _await_compiler(world: World) -> None:
    """Tell the user that the first start compiles DeepSpeed's Adam, and wait for another process that is at it.

    torch itself would wait for ever, and silently, for a process that was killed while compiling. Raises UserError if
    there seems to be one.
    """
    # Imported here, since on nodes with CUDA's compiler but no GPU, such as login nodes, it prints a warning.
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory("cpu_adam", verbose=False))
    lock = folder / "lock"
    if world.is_main and not (folder / "cpu_adam.so").exists():
        print(f"deepspeed: its Adam for CPUs is compiled, once, into {folder}: a minute or two", flush=True)
    while (age := _age(lock)) is not None:
        if age > COMPILING_S:
            raise UserError(
                f"{lock} has been there for {age / 60:.0f} minutes: the process that compiled DeepSpeed's Adam was killed; delete it"
            )
        time.sleep(0.5)


def _age(path: Path) -> float | None:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None


def _deepspeed(world: World) -> Any:
    """The library, imported without its output, and only by runs that use it."""
    # It takes the device from the environment, and is to take the one of `world`.
    os.environ |= {"DS_ACCELERATOR": world.device.type, "LOCAL_RANK": str(world.device.index or 0)}
    # It calls functions that torch has since renamed.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    with redirect_stdout(io.StringIO()):
        import deepspeed

        if world.device.type == "cpu":
            # Training does not use it, and it would be compiled for minutes as the run starts.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
