"""The config of a run: the components' own configs, and what belongs to the loop alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ldct_dist.checkpoint.retention import CheckpointConfig
from ldct_dist.config import Config, LocalPath, Positive
from ldct_dist.data.plan import DataConfig
from ldct_dist.models.losses import LossConfig
from ldct_dist.models.registry import ModelConfig
from ldct_dist.train.guard import GuardConfig
from ldct_dist.train.strategy.config import DeepSpeedConfig


def _names_a_folder(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(
            "give up to 100 letters, digits, dots, hyphens and underscores, a letter or digit first"
        )
    return name


Name = Annotated[str, AfterValidator(_names_a_folder)]
Share = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Config):
    """Adam or AdamW under a cosine with linear warm-up."""

    name: Literal["adam", "adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    final_lr: float = Field(0.01, ge=0, le=1)
    """learning rate of the last step, as a share of lr"""
    warmup: int = Field(0, ge=0)
    """steps of linear warm-up"""
    betas: tuple[Share, Share] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float | None = Field(1.0, gt=0)
    """gradients are scaled down to this L2 norm"""
    ema: Share = 0.999
    """decay of the exponential moving average of the weights, which validation and denoising use"""


class ValidationConfig(Config):
    """Whole held-out volumes, shared out over the ranks."""

    every: Positive = 1000
    """steps between validations"""
    split: str = "val"
    protocol: str = "abdomen"
    max_cases: Positive | None = None


class LogConfig(Config):
    every: Positive = 20
    """steps between progress lines and TensorBoard scalars"""
    images: bool = True
    """three-plane images of the first validation case, of some fifty validations at most"""


class RunConfig(Config):
    """One training run; the folder runs/name holds everything it writes."""

    name: Name
    store: LocalPath
    steps: Positive
    runs: LocalPath = Path("runs")
    seed: int = Field(0, ge=0, lt=2**32)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    strategy: Literal["ddp", "deepspeed"] = "ddp"
    zero: Literal[0, 1, 2, 3] = 0
    """what strategy=deepspeed shares out over the ranks: 1: optimizer, average and fp32 weights; 2: gradients too;
    3: the working weights too; 0: nothing, as ddp"""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """bf16: autocast, with weights and optimizer in fp32, and under ZeRO bf16 copies of the weights to work with;
    fp64 is for checking arithmetic"""
    micro_batch: Positive | None = None
    """crops a forward pass; None: the rank's whole share. Gradients accumulate over the share"""
    compile: bool = False
    channels_last: bool = True
    init_from: LocalPath | None = None
    """weights.safetensors of another run to start from (fine-tuning; not a resume)"""
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    guard: GuardConfig = GuardConfig()
    threads: int | None = Field(None, gt=0, le=4096)
    """CPU threads of a rank's arithmetic; None: the rank's share of the cores that it may use, or one where all
    arithmetic is a GPU's. Another number adds in another order: a resume with the same one is bitwise the unbroken
    run"""
    time_limit_s: float | None = Field(None, gt=0)
    """stop, resumable, this long after the start; None: Slurm's time limit, if there is one"""
    grace_s: float = Field(30.0, gt=0)
    """what the scheduler leaves a run between the signal to stop and the kill (Slurm: KillWait, or N of --signal=USR1@N);
    the run says so if a step and a save take longer"""
    hang_s: float = Field(300.0, gt=0, le=1e9)
    """a rank that does nothing for this long is named by the others, which leave with exit code 76 or 77"""

    @property
    def origins(self) -> dict[str, str]:
        """Which code of other packages the run trains with (see `installed.origin`), by the setting that asks for it."""
        named = {"model.name": self.model.origin, "loss.name": self.loss.origin}
        return {key: origin for key, origin in named.items() if origin is not None}

    @property
    def validates(self) -> bool:
        """Whether the run comes to a validation."""
        return self.validation.every <= self.steps
