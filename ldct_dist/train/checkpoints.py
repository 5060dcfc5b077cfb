"""A run and its checkpoints: where its weights come from, and what is saved of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ldct_dist.checkpoint import generation as generations
from ldct_dist.checkpoint import retention
from ldct_dist.checkpoint.load import Found, newest_valid, read
from ldct_dist.checkpoint.save import Outcome, Saver
from ldct_dist.errors import UserError
from ldct_dist.models.registry import Denoiser, build, outline
from ldct_dist.models.weights import load_weights
from ldct_dist.train.config import RunConfig
from ldct_dist.train.run import RunFolder
from ldct_dist.train.state import TrainState
from ldct_dist.train.stop import Stop
from ldct_dist.train.strategy import Strategy
from ldct_dist.world import World


class Checkpoints:
    """Claims a generation of the run in `folder`, takes up its newest valid checkpoint, and saves new ones.

    store: fingerprint of the store that the run is given now; allow_new_data: take up a checkpoint that was
    trained on another one. say: hears what there is to tell, in lines.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        strategy: Strategy,
        world: World,
        store: str,
        allow_new_data: bool,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.folder, self.strategy, self.world = config, folder, strategy, world
        self.store, self.allow_new_data, self._say = store, allow_new_data, say
        self.generation = world.on_main(self._claim)
        self.saver = Saver(folder.checkpoints, folder.generations, self.generation, config.checkpoint, world)
        self.saved: int | None = None
        """step of the latest checkpoint that was taken up or begun"""
        self._heard: Outcome | None = None

    def take_up(self, regular: bool = False) -> TrainState:
        """Load the newest valid checkpoint, or else the first weights, into the strategy; the counters that go with them.

        regular: prefer the newest one that was saved on schedule to one that a stop has made (`retention.is_regular`).
        All ranks end with a UserError if there are checkpoints, but none that is valid.
        """
        self.world.on_main(lambda: retention.complete(self.folder.checkpoints))
        root = self.folder.checkpoints
        found = Found()
        if regular:
            on_schedule = partial(retention.is_regular, config=self.config.checkpoint)
            found = newest_valid(root, self.world, on_schedule)
        if found.path is None:
            found = newest_valid(root, self.world)
        for line in found.passed_over:
            self._say(f"passed over checkpoint {line}")
        if found.path is None or found.manifest is None:
            # A new beginning would in time delete checkpoints that may only be out of reach for now.
            if found.passed_over:
                self.world.refuse(
                    f"no checkpoint in {root} is valid: is a disk or a server offline? Start again "
                    "once it is back, or, to train from the beginning, remove that folder"
                )
            self.strategy.begin(self._first_weights())
            if self.config.init_from is not None:
                self._say(
                    f"fine-tuning: a new run that starts from the weights in {self.config.init_from} (not a resume)"
                )
            self.saved = 0  # the first weights are there anyhow
            return TrainState(self.store)
        counters = found.manifest.state
        self.strategy.load(read(found.path, found.manifest, self.world), counters["updates"])
        state = TrainState.of(counters)
        self.saved = state.step
        self._say(f"resumed at step {state.step} from {found.path}")
        if warning := _other_arithmetic(counters["arithmetic"], _arithmetic(self.config, self.world)):
            self._say(warning)
        before = counters.get("code_of_others", {})  # which older checkpoints lack
        for key, now in self.config.origins.items():
            if before.get(key) != now:
                self._say(f"note: the code of {key} has changed: {before.get(key)}, now {now}")
        if state.store != self.store:
            state.store = self.store
            self._say(
                f"--allow-new-data: from step {state.step} on this run trains on {self.config.store}, before that it "
                "trained on another store; it may have been trained on patients that are held out now"
            )
        return state

    def _first_weights(self) -> Denoiser:
        """Those of rank 0, on every rank. A node that draws other numbers, or has another file, would begin elsewhere."""

        def own() -> Denoiser:
            if self.world.is_main:
                return first_weights(self.config)
            return outline(self.config.model).to_empty(device="cpu")

        weights = self.world.on_each(own)
        for p in weights.parameters():
            self.world.share(p.data)
        return weights

    def _claim(self) -> int:
        """The next generation. Claiming it ends an earlier start that still runs, so a refused start claims none.

        Raises UserError if the newest checkpoint was trained on another store.
        """
        sound, _ = retention.newest_first(self.folder.checkpoints)
        if sound and sound[0][1].state["store"] != self.store and not self.allow_new_data:
            raise UserError(
                f"{self.config.store} is not the store that {self.folder.path} was trained on (its "
                "fingerprint differs): give the run its old store, start a new run with init_from=, or continue this "
                "one on the new data with --allow-new-data"
            )
        return generations.claim(self.folder.generations)

    def save(self, state: TrainState) -> None:
        """Start saving, and return at once, unless an earlier save is still under way."""
        facts = {"updates": self.strategy.updates, "arithmetic": _arithmetic(self.config, self.world)}
        facts |= {"code_of_others": self.config.origins}
        self.saver.save(state.step, self.strategy.parts(state.step), state.counters() | facts)
        self.saved = state.step

    def commit(self, state: TrainState) -> Outcome:
        """Have this step saved, if it is not, and wait for it."""
        outcome = self.saver.finish()
        if self.saved != state.step or (outcome is not None and outcome.path is None):
            self.save(state)
            outcome = self.saver.finish()
        if outcome is None:
            # An earlier start has saved this step, so no save of this one has cleared away what a killed save left.
            outcome = Outcome(self.folder.checkpoint(state.step), 0.0, warning=self.saver.prune())
        if outcome.warning is not None and outcome is not self._heard:
            self._say(f"warning: {outcome.warning}")
        return outcome

    def hear(self, stop: Stop) -> None:
        """Report a save that has ended since the last call, and tell `stop` how long it took."""
        outcome = self.saver.last
        if outcome is None or outcome is self._heard:
            return
        self._heard, stop.save_s = outcome, outcome.seconds
        if outcome.error is not None and not outcome.fenced:
            self._say(
                f"warning: a checkpoint was not written: {outcome.error}; training goes on, and the last good one is kept"
            )
        for warning in (outcome.warning, stop.too_slow()):
            if warning is not None:
                self._say(f"warning: {warning}")


def first_weights(config: RunConfig) -> Denoiser:
    """The network as a new run begins with it: from the seed, or from the file that init_from names.

    Raises UserError if that file is missing or damaged, or holds another network than the run's.
    """
    path = config.init_from
    if path is None:
        torch.manual_seed(config.seed)
        return build(config.model)
    source = load_weights(path)
    if source.config != config.model:
        raise UserError(
            f"{path} holds {source.config}, the run's model is {config.model}: make them the same"
        )
    return source


def _arithmetic(config: RunConfig, world: World) -> dict[str, Any]:
    """What the order of additions depends on. Where none of it changes, sums are the same bit for bit."""
    return {
        "ranks": world.size,
        "threads": torch.get_num_threads(),
        "zero": config.zero,
        "device": world.device.type,
        "torch": str(torch.__version__),
    }


def _other_arithmetic(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    changed = [key for key in now if before.get(key) != now[key]]
    if not changed:
        return None
    way_back = f"; threads={before['threads']} would make them match" if changed == ["threads"] else ""
    return (
        f"note: {', '.join(f'{k} {before.get(k)}, now {now[k]}' for k in changed)}: the samples stay the same, but sums are "
        f"rounded differently from here on, so losses do not match the unbroken run in every last digit{way_back}"
    )
