"""The training loop. Starting the same run again resumes it; there is no flag for that."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import NoReturn

import torch

from ldct_dist.checkpoint import generation as generations
from ldct_dist.checkpoint.load import newest_valid, read
from ldct_dist.checkpoint.save import Saver
from ldct_dist.data.loader import Batch, Loader
from ldct_dist.data.plan import Plan, lanes_of
from ldct_dist.data.stage import StagedStore
from ldct_dist.errors import UserError
from ldct_dist.evaluate.protocols import protocol_named
from ldct_dist.models.ema import Ema
from ldct_dist.models.losses import build_loss, mask_from_box
from ldct_dist.models.registry import Denoiser, build
from ldct_dist.models.weights import load_weights
from ldct_dist.store.layout import dose_name
from ldct_dist.train.config import OptimConfig, RunConfig
from ldct_dist.train.monitor import Monitor, StepFigures
from ldct_dist.train.run import RunFolder
from ldct_dist.train.state import TrainState
from ldct_dist.train.stop import Stop
from ldct_dist.train.strategy.ddp import DDPStrategy
from ldct_dist.train.validation import validate
from ldct_dist.world import World


class Ending(IntEnum):
    """How training ended; the values are the command's exit codes."""

    DONE = 0
    FENCED = 70
    """a newer start of the run has taken over: do not start this one again"""
    RESUMABLE = 75
    """stopped on request with a checkpoint: start the same command again to go on"""


def train(config: RunConfig, allow_new_data: bool = False) -> Ending:
    """Train, or go on with, the run `config` describes, on all ranks that the launcher started.

    allow_new_data: go on even if the store is not the one that the checkpoint was trained on.
    """
    with Stop(_deadline(config)) as stop:
        world = World.join()
        try:
            return Trainer(config, world, stop, allow_new_data).fit()
        finally:
            world.leave()


class Trainer:
    """One start of a run: claims a generation, takes up the newest valid checkpoint, and steps."""

    def __init__(self, config: RunConfig, world: World, stop: Stop, allow_new_data: bool = False) -> None:
        self.config, self.world, self.stop = config, world, stop
        self.allow_new_data = allow_new_data
        self.store = StagedStore(config.store, config.data.stage)
        self.plan = Plan(self.store, config.data, config.seed)
        self.state = self._fresh_state()
        self._refuse_misfits()
        self.strategy = DDPStrategy(self.state.model, world, config.precision == "bf16", config.compile)
        self.loss = build_loss(config.loss)
        # The first thing written: every mistake above leaves no trace.
        self.folder = RunFolder(config.runs / config.name)
        for line in world.agree(lambda: self.folder.open(config)):
            self._say(f"changed since the last start: {line}")
        self.generation = world.agree(lambda: generations.claim(self.folder.generations))
        self.saver = Saver(
            self.folder.checkpoints, self.folder.generations, self.generation, config.checkpoint, world
        )
        self._step_seconds = 0.0

    def fit(self) -> Ending:
        """Train to the last step, or until asked to stop."""
        self._resume()
        if self.world.is_main:
            self.folder.record_start(self.world, self.generation, self.state.step)
        loader = Loader(self.plan, self.world.rank, self.world.size, self.world.device)
        monitor = self.open_monitor()
        try:
            self._warm_up()
            steps = range(self.state.step, self.config.steps)
            with self.store.staging(self.plan, self.world, steps, self._held_out()):
                while self.state.step < self.config.steps:
                    ending = self.advance(loader, monitor)
                    if ending is not None:
                        return ending
            return self._finish(monitor)
        finally:
            loader.close()
            if monitor is not None:
                monitor.close()

    def train_step(self, batch: Batch, fault: str | None = None) -> tuple[float, float, bool, int]:
        """One optimizer step on this rank's share of the global batch.

        Returns the loss and gradient norm of the global batch, whether the step was applied (it is not,
        on any rank, where one of the two is not finite), and how many ranks ask to stop. If any rank's batch
        comes with a `fault`, all ranks end.
        """
        config, state = self.config, self.state
        # Random numbers of a step follow from the step alone: nothing to save, nothing to restore.
        torch.manual_seed(config.seed * 1_000_003 + state.step * self.world.size + self.world.rank)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, state.step, config.steps)

        state.optimizer.zero_grad()
        loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
        size = config.micro_batch or len(batch)
        for start, micro in enumerate(batch.split(size)):
            last = (start + 1) * size >= len(batch)
            with self.strategy.accumulating(last):
                restored = self.strategy(self._cast(micro.low))
                mask = mask_from_box(micro.box, micro.low.shape[2:])
                share = self.loss(restored, self._cast(micro.full), mask).sum() / len(batch)
                self.strategy.backward(share)
            loss += share.detach()
        norm = self.strategy.clip(config.optim.clip_norm)

        wish = float(self.stop.wanted(self._seconds_to_save()) or self.saver.fenced)
        pulse = self.world.sum(torch.stack((loss, loss.new_tensor(wish), loss.new_tensor(fault is not None))))
        if pulse[2].item():
            self._end_on(fault)
        mean_loss, wishes = pulse[0].item() / self.world.size, int(pulse[1].item())
        applied = math.isfinite(mean_loss) and math.isfinite(norm.item())
        if applied:
            self.saver.staged()  # a save under way may still be copying the weights
            state.optimizer.step()
            state.ema.update(state.model)
        else:
            state.skipped += 1
        state.step += 1
        return mean_loss, norm.item(), applied, wishes

    def advance(self, loader: Loader, monitor: Monitor | None) -> Ending | None:
        """One step and what falls due after it; an Ending if the run is to stop here."""
        start = time.perf_counter()
        batch, fault = self._fetch(loader)
        lr = learning_rate(self.config.optim, self.state.step, self.config.steps)
        loss, norm, applied, wishes = self.train_step(batch, fault)
        self._step_seconds = time.perf_counter() - start
        step = self.state.step
        if monitor is not None:
            monitor.step(StepFigures(step, loss, lr, norm, applied, loader.waited_s, self._step_seconds))
        if wishes:
            return self._leave(monitor)
        improved = step % self.config.validation.every == 0 and self._validate(monitor)
        if improved or step % self.config.checkpoint.every == 0:
            self._save(monitor)
        return None

    def _fetch(self, loader: Loader) -> tuple[Batch, str | None]:
        """This rank's next batch; or one of air, and what is wrong with the data.

        A rank that ended here would leave the others waiting for its gradients. It goes along to the end of
        the step, where all learn of it.
        """
        try:
            return loader.batch(self.state.step), None
        except UserError as e:
            return loader.air(), str(e)

    def _end_on(self, fault: str | None) -> NoReturn:
        """Keep what was learnt, and end every rank with the first fault; None on ranks that have none."""
        faults = [f for f in self.world.gather(fault) if f is not None]
        if self.state.step > 0:
            self._save(None)
            self.saver.finish()
        self.world.refuse(faults[0])

    def _held_out(self) -> Sequence[int]:
        """The cases that this run will validate on."""
        config = self.config.validation
        if config.every > self.config.steps:
            return ()
        return self.store.split(config.split)[: config.max_cases].tolist()

    def _leave(self, monitor: Monitor | None) -> Ending:
        """All ranks have agreed to stop at this step: save, commit, and say how to go on."""
        self._save(monitor)
        outcome = self.saver.finish()
        assert outcome is not None
        if monitor is not None:
            monitor.say(
                outcome.error
                or f"stopped at step {self.state.step} ({self.stop.reason or 'another rank'}); start the same command again to go on"
            )
        return Ending.FENCED if outcome.fenced else Ending.RESUMABLE

    def _finish(self, monitor: Monitor | None) -> Ending:
        last = self.saver.finish()
        if last is None or last.path is None or last.path.name != f"step-{self.state.step:08d}":
            self._save(monitor)
        outcome = self.saver.finish()
        assert outcome is not None
        if outcome.error is not None and not outcome.fenced:
            raise UserError(
                f"the last checkpoint of {self.folder.path} could not be written: {outcome.error}"
            )
        if monitor is not None:
            monitor.say(outcome.error or f"done: {self.config.steps} steps, weights in {outcome.path}")
        return Ending.FENCED if outcome.fenced else Ending.DONE

    def _resume(self) -> None:
        group = self.world.group()
        found = newest_valid(self.folder.checkpoints, self.world, group)
        for line in found.passed_over:
            self._say(f"passed over checkpoint {line}")
        if found.path is None or found.manifest is None:
            if self.config.init_from is not None:
                self._start_from(self.config.init_from)
            return
        new_data = found.manifest.state["store"] != self.store.fingerprint
        if new_data and not self.allow_new_data:
            raise UserError(
                f"{self.config.store} is not the store that {self.folder.path} was trained on (another "
                "fingerprint): give the run its store back, start a new run with init_from, or let this one go on "
                "with other data by --allow-new-data"
            )
        for file, name, tensor in read(found.path, found.manifest, self.world, group):
            self.state.load(file, name, tensor)
        self.state.load_counters(found.manifest.state)
        self._say(f"resumed at step {self.state.step} from {found.path}")
        if new_data:
            self.state.best = None  # was measured on other cases
            self._say(
                f"--allow-new-data: from step {self.state.step} on this run trains on {self.config.store}, up to there "
                "on another store; patients that are held out now may be among those it was trained on"
            )

    def _start_from(self, path: Path) -> None:
        source = load_weights(path, self.world.device)
        if source.config != self.config.model:
            raise UserError(
                f"{path} holds {source.config}, the run's model is {self.config.model}: make them the same"
            )
        self.state.model.load_state_dict(source.state_dict())
        self.state.ema = Ema(self.state.model, self.config.optim.ema)
        self._say(f"fine-tuning: a new run that starts from the weights in {path} (not a resume)")

    def _refuse_misfits(self) -> None:
        """What the parts of the config ask of each other and of this machine."""
        config, model = self.config, self.state.model
        lanes_of(self.world.rank, self.world.size, config.data.batch)
        if any(c % s for c, s in zip(config.data.crop, model.stride, strict=True)):
            raise UserError(
                f"data.crop={list(config.data.crop)}: {config.model.name} takes crops whose sides are multiples of "
                f"{list(model.stride)} (z, y, x)"
            )
        if config.validation.every <= config.steps:
            self.store.split(config.validation.split)
            protocol_named(config.validation.protocol)
        if config.compile and self.world.device.type == "cpu" and shutil.which("g++") is None:
            raise UserError("compile=true needs a C++ compiler on CPU: install g++, or set compile=false")

    def _say(self, line: str) -> None:
        if self.world.is_main:
            print(line, flush=True)

    def _fresh_state(self) -> TrainState:
        config = self.config
        torch.manual_seed(config.seed)
        model: Denoiser = build(config.model).to(self.world.device)
        if config.channels_last:
            to_channels_last(model)
        if config.precision == "fp64":
            model = model.double()
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optim.name]
        optimizer = kind(
            model.parameters(),
            lr=config.optim.lr,
            betas=config.optim.betas,
            weight_decay=config.optim.weight_decay,
        )
        return TrainState(model, Ema(model, config.optim.ema), optimizer, store=self.store.fingerprint)

    def _warm_up(self) -> None:
        size = self.config.micro_batch or self.config.data.batch // self.world.size
        crop = torch.zeros((size, 1, *self.config.data.crop), device=self.world.device)
        self.strategy.warm_up(self._cast(crop))

    def _cast(self, hu: torch.Tensor) -> torch.Tensor:
        if self.config.precision == "fp64":
            hu = hu.double()
        return hu.contiguous(memory_format=torch.channels_last_3d) if self.config.channels_last else hu

    def _save(self, monitor: Monitor | None) -> None:
        before = self.saver.finish()
        if before is not None and before.error is not None and monitor is not None:
            monitor.say(
                f"warning: a checkpoint was not written: {before.error}; training goes on, the last good one stays"
            )
        self.saver.save(self.state.step, self.state.parts(self.world.size), self.state.counters())

    def _validate(self, monitor: Monitor | None) -> bool:
        """Whether the weights are the best so far."""
        config, bf16 = self.config.validation, self.config.precision == "bf16"
        done = validate(
            self.state.ema.module, self.store, dose_name(self.config.data.dose), config, self.world, bf16
        )
        if monitor is not None:
            monitor.validation(self.state.step, done.figures, config.protocol)
            if self.config.log.images and done.first is not None:
                monitor.image(self.state.step, done.first, protocol_named(config.protocol).window)
        return self.state.note_validation(done.figures["rmse_hu"])

    def open_monitor(self) -> Monitor | None:
        if not self.world.is_main:
            return None
        c = self.config
        return Monitor(self.folder, self.state.step, c.steps, c.data.batch, c.log.every)

    def _seconds_to_save(self) -> float:
        """What must be left of the time limit: one more step and twice the latest save."""
        last = self.saver.last.seconds if self.saver.last is not None else 30.0
        return self._step_seconds + 2 * last + 5.0


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from lr to final_lr * lr at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, steps - 1 - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def to_channels_last(model: Denoiser) -> None:
    """The layout in which 3-D convolutions run fastest, on CPU and GPU.

    Kernels of one voxel keep the plain layout: they are both at once, and DDP wants their gradients'
    strides to be those of the parameter.
    """
    for p in model.parameters():
        if p.ndim == 5 and p[0, 0].numel() > 1:
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d)


def _deadline(config: RunConfig) -> float | None:
    return time.time() + config.time_limit_s if config.time_limit_s is not None else None
