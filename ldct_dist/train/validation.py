"""Validation on whole held-out volumes, shared out over the ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ldct_dist.ct.volume import Volume
from ldct_dist.denoise.tiles import NotFiniteError, denoise_volume
from ldct_dist.errors import UserError
from ldct_dist.evaluate.metrics import evaluate_volume
from ldct_dist.evaluate.protocols import protocol_named
from ldct_dist.models.registry import Denoiser
from ldct_dist.store.layout import FULL_DOSE, dose_name
from ldct_dist.store.reader import Store
from ldct_dist.train.config import RunConfig
from ldct_dist.world import World


@dataclass(frozen=True)
class Validated:
    """Mean figures over the cases, none if any failed; and the first case's low dose, denoised and full dose,
    on rank 0.
    """

    figures: dict[str, float]
    failed: list[str]
    """cases for which the network's answer is not finite"""
    first: dict[str, Volume] | None

    @property
    def rmse_hu(self) -> float | None:
        return self.figures.get("rmse_hu")


def held_out(store: Store, config: RunConfig) -> list[int]:
    """The cases that the run validates on."""
    return store.split(config.validation.split)[: config.validation.max_cases].tolist()


def validate(
    model: Denoiser,
    store: Store,
    config: RunConfig,
    world: World,
    go_on: Callable[[float], bool],
    tick: Callable[[int, int], None],
) -> Validated | None:
    """Denoise the cases of the validation split and measure them; the same figures on every rank.

    Before each round of one case a rank, all ranks call `go_on` with the seconds that the round before took; where
    it says no, the answer is None. `tick` hears of every tile.
    All ranks end if one of them finds a damaged case: the first with a UserError that names it.
    """
    protocol = protocol_named(config.validation.protocol)
    cases, dose = held_out(store, config), dose_name(config.data.dose)
    mine: list[tuple[int, str, dict[str, float] | None]] = []
    first, fault, seconds = None, None, 0.0
    for i in range(world.rank, world.rank + len(cases), world.size):
        if not go_on(seconds):
            return None
        if i >= len(cases) or fault is not None:
            continue
        start = time.perf_counter()
        name = store.cases[cases[i]].name
        try:
            low, full = store.volume(name, dose), store.volume(name, FULL_DOSE)
        except UserError as e:
            fault = str(e)  # for all ranks to hear: the others wait for this one's figures
            continue
        try:
            hu = denoise_volume(
                model, low.hu, device=world.device, bf16=config.precision == "bf16", progress=tick
            )
        except NotFiniteError:
            mine.append((i, name, None))
            continue
        denoised = replace(low, hu=hu)
        mine.append((i, name, evaluate_volume(hu, full.hu, protocol)))
        if i == 0:
            first = {"low dose": low, "denoised": denoised, "full dose": full}
        seconds = time.perf_counter() - start
    shares = world.gather((mine, fault))
    if faults := [f for _, f in shares if f is not None]:
        world.refuse(faults[0])
    # by case number, so that the mean adds up in the same order for every number of ranks
    rows = sorted((row for share, _ in shares for row in share), key=lambda row: row[0])
    failed = [name for _, name, figures in rows if figures is None]
    whole = [figures for _, _, figures in rows if figures is not None] if not failed else []
    return Validated(
        {key: float(np.mean([row[key] for row in whole])) for key in (whole or [{}])[0]}, failed, first
    )
