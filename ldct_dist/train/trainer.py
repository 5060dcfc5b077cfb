"""The training loop. Starting the same run again resumes it; there is no flag for that."""

from __future__ import annotations

import os
import time
from typing import NoReturn

import torch

from ldct_dist.data.loader import Batch, Loader
from ldct_dist.data.plan import Plan
from ldct_dist.data.stage import StagedStore
from ldct_dist.errors import UserError, few
from ldct_dist.models.losses import build_loss, mask_from_box
from ldct_dist.models.registry import outline
from ldct_dist.train import preflight
from ldct_dist.train.agreement import Agreed, agree
from ldct_dist.train.checkpoints import Checkpoints
from ldct_dist.train.config import RunConfig
from ldct_dist.train.ending import Ending
from ldct_dist.train.guard import blame
from ldct_dist.train.monitor import Monitor, Mute, StepFigures
from ldct_dist.train.optim import learning_rate
from ldct_dist.train.run import RunFolder
from ldct_dist.train.state import TrainState
from ldct_dist.train.stop import Stop
from ldct_dist.train.strategy import build_strategy
from ldct_dist.train.validation import Validated, held_out, validate
from ldct_dist.train.watch import Watch
from ldct_dist.world import World

SLOW = 12.0
"""Times hang_s that phases may take which cannot show progress: hashing a checkpoint, compiling, saving."""


def train(config: RunConfig, allow_new_data: bool = False) -> Ending:
    """Train, or go on with, the run `config` describes, on all ranks that the launcher started.

    allow_new_data: go on even if the store is not the one that the checkpoint was trained on.
    If a rank stops answering, or is gone, the process ends with Ending.HUNG or Ending.HUNG_EARLY.
    """
    # NCCL would abort the process a minute after a rank is gone, and no scheduler would know to start it again.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    with (
        Stop(config.time_limit_s, config.grace_s) as stop,
        World.join(config.threads, works_on_cpu=config.deepspeed.optimizer != "gpu") as world,
    ):
        return Trainer(config, world, stop, allow_new_data).fit()


class Trainer:
    """One start of a run: takes up the newest valid checkpoint, and steps."""

    def __init__(self, config: RunConfig, world: World, stop: Stop, allow_new_data: bool = False) -> None:
        self.config, self.world, self.stop = config, world, stop
        self.store = world.on_each(lambda: StagedStore(config.store, config.data.stage))
        preflight.refuse_disagreement(config, self.store, world)
        self.plan = world.on_each(lambda: Plan(self.store, config.data, config.seed))
        self.folder = RunFolder(config.runs / config.name)
        model = world.on_each(lambda: outline(config.model))
        world.on_each(lambda: preflight.refuse_conflicts(config, model, self.store, self.folder, world))
        self.loader = world.on_each(lambda: Loader(self.plan, world.rank, world.size, world.device))
        introduction = preflight.introduction(config, model, self.store, world)
        # Its weights get their values in `take_up`, so that no rank holds a second network for longer than it must.
        self.strategy = build_strategy(model.to_empty(device="cpu"), config, world)
        self.loss = world.on_each(lambda: build_loss(config.loss, world.device))
        self.margin = config.loss.margin_for(model.radius, config.data.crop)
        self.state = TrainState(self.store.fingerprint)
        # The first thing that is written: a mistake found above leaves no trace.
        for line in world.on_main(lambda: self.folder.open(config)):
            self._say(f"changed since the last start: {line}")
        notes = (
            preflight.note_on_padding(config, self.store),
            preflight.note_on_margin(config, model, self.store),
        )
        for line in (introduction, *filter(None, notes)):
            self._say(line)
        self.checkpoints = Checkpoints(
            config, self.folder, self.strategy, world, self.store.fingerprint, allow_new_data, self._say
        )
        claim = self.folder.generation(self.checkpoints.generation)
        self.watch = Watch(claim, config.hang_s, world, self.checkpoints.saver.has_saved)
        self.monitor = Monitor(self.folder, config, world) if world.is_main else Mute()

    def fit(self) -> Ending:
        """Train to the last step, or until asked to stop."""
        with self.watch, self.loader, self.monitor:
            self.take_up()
            start = self.checkpoints.generation, self.state.step
            self.world.on_main(lambda: self.folder.record_start(self.config, self.world, *start))
            self._enter("first pass", SLOW)
            self.strategy.warm_up()
            batches = range(self.state.position, self.state.moved + self.config.steps)
            validated = held_out(self.store, self.config) if self.config.validates else ()
            with self.store.staging(self.plan, self.world, batches, validated):
                ending = self.between_steps()
                while ending is None:
                    ending = self.advance()
            return ending

    def take_up(self, regular: bool = False) -> None:
        """Load the newest valid checkpoint, or begin with the first weights; `regular`: see `Checkpoints.take_up`."""
        self._enter("loading a checkpoint", SLOW)
        self.state = self.checkpoints.take_up(regular)
        self._began = self.state.step
        self.world.on_main(lambda: self.monitor.rewind(self.state.step))

    def advance(self) -> Ending | None:
        """One step, and what is due after it; an Ending if the run is to stop here."""
        start, lr = time.perf_counter(), self.lr
        agreed = self.train_step(*self._fetch())
        seconds = self.stop.step_s = time.perf_counter() - start
        figures = StepFigures(
            step=self.state.step,
            loss=agreed.loss,
            lr=lr,
            grad_norm=agreed.norm,
            applied=not self.state.guard.stretch,
            wait_s=self.loader.waited_s,
            seconds=seconds,
        )
        self.monitor.step(figures)
        self.checkpoints.hear(self.stop)
        if agreed.to_stop and self.state.step < self.config.steps:
            return self._leave()
        return self.between_steps()

    def train_step(self, batch: Batch, damage: str | None = None) -> Agreed:
        """One optimizer step on this rank's share of the global batch, or none if the guard finds fault with it.

        damage: what is wrong with this rank's data. If any rank's is damaged, all ranks end.
        """
        state = self.state
        # Random numbers of a step follow from the step alone: nothing to save, nothing to restore.
        torch.manual_seed(self.config.seed * 1_000_003 + state.step * self.world.size + self.world.rank)
        losses = self._accumulate_gradients(batch)
        self._enter("agreement")
        agreed = agree(self.world, losses, self.strategy.clip(), self._to_stop, damage is not None)
        if agreed.damaged:
            self._end_on(damage)
        fault = state.guard.fault(agreed.loss, agreed.finite, self.config.guard.spike)
        if fault is None:
            self._enter("optimizer", SLOW)  # a save under way may still be copying the weights
            self.checkpoints.saver.staged()
            self.strategy.step(self.lr)
            state.guard.applied(agreed.loss)
        else:
            state.guard.skip(f"{fault}: {blame(losses.tolist(), batch.crops, self.world)}")
            self._say(f"step {state.step + 1} skipped: {state.guard.stretch[-1]}")
        self.strategy.forget_gradients()
        state.step += 1
        return agreed

    def between_steps(self) -> Ending | None:
        """What is due before the next step: going back, validation, saving, the end; an Ending if the run stops here."""
        state, config = self.state, self.config
        if len(state.guard.stretch) >= config.guard.patience:
            return self._roll_back()
        improved = False
        if state.step > 0 and state.step % config.validation.every == 0 and not state.is_validated:
            validated = self._validate()
            if validated is None:
                # The next start makes up for it, but only once: a job that is too short for a validation is to come
                # to its next step all the same.
                return self._leave(without_validation=state.step == self._began)
            improved = state.note_validation(validated.rmse_hu, validated.basis)
        # Not after skipped steps: going back is to lead to before them.
        regular = state.step % config.checkpoint.every == 0 and not state.guard.stretch
        if improved or (regular and self.checkpoints.saved != state.step):
            self._enter("saving", SLOW)
            self.checkpoints.save(state)
        return self._finish() if state.step >= config.steps else None

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return learning_rate(self.config.optim, self.state.step, self.config.steps)

    def _fetch(self) -> tuple[Batch, str | None]:
        """This rank's next batch; where its data is damaged, a batch of air and what is wrong.

        A rank that ended here would leave the others waiting for its gradients. So it takes part in the step, at
        whose end all learn of the damage.
        """
        self._enter("data")
        try:
            return self.loader.batch(self.state.position), None
        except UserError as e:
            return self.loader.air(), str(e)

    def _accumulate_gradients(self, batch: Batch) -> torch.Tensor:
        """Forward and backward, one micro-batch after the other; the loss of each of this rank's crops, (b,)."""
        micro_batches = list(batch.split(self.config.micro_batch or len(batch)))
        patience = SLOW if self.config.compile else 1.0
        losses = []
        for micro in micro_batches:
            with self.strategy.accumulating(last=micro is micro_batches[-1]):
                self._enter("forward", patience)
                mask = mask_from_box(micro.box, micro.low.shape[2:], self.margin)
                weights = mask if micro.weights is None else mask * micro.weights
                by_crop = self.loss(self.strategy(micro.low), micro.full, weights)
                self._enter("backward", patience)
                self.strategy.backward(by_crop.sum() / len(batch))
            losses.append(by_crop.detach())
        return torch.cat(losses)

    @property
    def _to_stop(self) -> bool:
        return self.stop.wanted or self.checkpoints.saver.fenced

    def _validate(self) -> Validated | None:
        """Figures of the averaged weights; None if the run is to stop before they are complete."""
        averaged = self.strategy.averaged
        try:
            done = validate(averaged, self.store, self.config, self.world, self._go_on, self.watch.tick)
        except UserError as e:
            self._end_on(str(e))
        if done is not None:
            self.monitor.validation(self.state.step, done)
        return done

    def _go_on(self, seconds: float) -> bool:
        """Whether no rank asks to stop, between two rounds of a validation; the latest took `seconds`."""
        self.stop.note_round(seconds)
        self._enter("validation")
        return not self.world.any(self._to_stop)

    def _leave(self, without_validation: bool = False) -> Ending:
        """All ranks have agreed to stop at this step: save, commit, and say how to go on.

        without_validation: the next start is not to validate this step's weights either.
        """
        if self.world.any(self.checkpoints.saver.fenced):
            self._say(f"stopped at step {self.state.step}: a newer start of this run has taken over")
            return Ending.FENCED
        if without_validation:
            self.state.pass_over_validation()
            self.checkpoints.save(self.state)
        self._enter("saving before the stop", SLOW)
        outcome, step = self.checkpoints.commit(self.state), self.state.step
        if outcome.error is None:
            reason = self.stop.reason or "another rank was asked to stop"
            self._say(f"stopped at step {step} ({reason}); start the same command again to go on")
            return Ending.RESUMABLE
        self._say(f"stopped at step {step}, which was not saved: {outcome.error}")
        if outcome.fenced:
            return Ending.FENCED
        if not self.checkpoints.saver.has_saved():  # started again, it would only do the same steps again
            self._end_unsaved(outcome.error)
        return Ending.RESUMABLE

    def _finish(self) -> Ending:
        self._enter("saving at the end", SLOW)
        outcome = self.checkpoints.commit(self.state)
        if outcome.fenced:
            self._say(str(outcome.error))
            return Ending.FENCED
        if outcome.error is not None:
            self._end_unsaved(outcome.error)
        self._say(
            f"done: {self.state.step} steps, weights in {self.folder.checkpoint(self.state.step)}; next: ldct-dist denoise "
            f"or evaluate, which take the best ones of {self.folder.path}"
        )
        return Ending.DONE

    def _end_unsaved(self, error: str) -> NoReturn:
        self.world.refuse(
            f"the last checkpoint of {self.folder.path} could not be written ({error}); make room and start the same "
            "command again"
        )

    def _roll_back(self) -> Ending | None:
        """Go back to the last valid checkpoint, and on with the data that comes after the bad stretch."""
        before, limit = self.state, self.config.guard.rollbacks
        outcome = self.checkpoints.saver.finish()
        what = f"{len(before.guard.stretch)} steps in a row were skipped, up to step {before.step}"
        if before.guard.rollbacks >= limit:
            self._say(
                f"error: {what}, after going back {limit} times: {few(before.guard.stretch)}. Look at these samples "
                "(the lines above name all of them); if they are sound, start a new run with a lower optim.lr"
            )
            return Ending.FENCED if outcome is not None and outcome.fenced else Ending.UNSTABLE
        self.take_up(regular=True)
        self.state = self.state.after_rollback_of(before)
        self._say(f"{what}: went back to step {self.state.step}, goes on with batch {self.state.position}")
        return None

    def _end_on(self, damage: str | None) -> NoReturn:
        """Keep what was learnt, and end every rank with what is wrong on the first of those whose data is damaged.

        damage: None on a rank whose data is not.
        """
        known = [d for d in self.world.gather(damage) if d is not None]
        if self.state.step > 0:
            self._enter("saving before the end", SLOW)
            outcome = self.checkpoints.commit(self.state)
            if outcome.error is not None:
                self._say(f"step {self.state.step} was not saved: {outcome.error}")
        self.world.refuse(known[0])

    def _enter(self, phase: str, patience: float = 1.0) -> None:
        self.watch.enter(phase, self.state.step, patience)

    def _say(self, line: str) -> None:
        if self.world.is_main:
            print(line, flush=True)
