"""Validation on whole held-out volumes, shared out over the ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ldct_dist.ct.volume import Volume
from ldct_dist.denoise.tiles import NotFiniteError, denoise_volume
from ldct_dist.errors import UserError, memory_for
from ldct_dist.evaluate.metrics import evaluate_volume
from ldct_dist.models.registry import Denoiser
from ldct_dist.store.layout import FULL_DOSE, dose_name
from ldct_dist.store.reader import Store
from ldct_dist.train.config import RunConfig
from ldct_dist.world import World

Figures = dict[str, float]


@dataclass(frozen=True)
class Validated:
    """The outcome of a validation."""

    figures: Figures
    """means over the cases, and the low dose's RMSE, of which the network is to leave less; empty if any failed"""
    failed: list[str]
    """cases for which the network's answer is not finite"""
    first: dict[str, Volume] | None
    """on rank 0: the first case at low dose, denoised and at full dose"""
    basis: dict[str, Any]
    """what was measured, and how: figures of another basis mean something else"""
    seconds: float
    """that it took"""

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

    The ranks work in rounds of one case each. Before each round all of them call `go_on` with the seconds that the last
    one took; where that says no, the answer is None. `tick` hears of every tile.
    Raises UserError, the same on every rank and naming the case, if a case cannot be denoised or measured.
    """
    begun = time.perf_counter()
    cases = held_out(store, config)
    mine: list[tuple[int, str, Figures | None]] = []
    first, fault, seconds = None, None, 0.0
    for i in range(world.rank, world.rank + len(cases), world.size):
        if not go_on(seconds):
            return None
        if i >= len(cases) or fault is not None:
            continue
        start = time.perf_counter()
        name = store.cases[cases[i]].name
        try:
            with memory_for(world.name):
                figures, images = _measure(model, store, name, config, world.device, tick)
        except UserError as e:
            fault = f"validation on {name}: {e}"  # raised below: the other ranks wait for this one's figures
            continue
        mine.append((i, name, figures))
        first = images if i == 0 else first
        seconds = time.perf_counter() - start
    shares = world.gather((mine, fault))
    if faults := [f for _, f in shares if f is not None]:
        raise UserError(faults[0])
    # In the order of the cases, so that the mean is summed in the same order whatever the number of ranks.
    rows = sorted((row for share, _ in shares for row in share), key=lambda row: row[0])
    failed = [name for _, name, figures in rows if figures is None]
    whole = [figures for _, _, figures in rows if figures is not None] if not failed else []
    means = {key: float(np.mean([row[key] for row in whole])) for key in (whole or [{}])[0]}
    basis = _basis(store, config, len(cases))
    return Validated(means, failed, first, basis, time.perf_counter() - begun)


def _measure(
    model: Denoiser,
    store: Store,
    name: str,
    config: RunConfig,
    device: torch.device,
    tick: Callable[[int, int], None],
) -> tuple[Figures | None, dict[str, Volume] | None]:
    """A case's figures, and its low dose, denoised and full dose; neither if the network's answer is not finite."""
    low, full = store.volume(name, dose_name(config.data.dose)), store.volume(name, FULL_DOSE)
    try:
        hu = denoise_volume(model, low.hu, device=device, bf16=config.precision == "bf16", progress=tick)
    except NotFiniteError:
        return None, None
    protocol = config.validation.protocol
    figures = evaluate_volume(hu, full.hu, protocol)
    figures["low_dose_rmse_hu"] = evaluate_volume(low.hu, full.hu, protocol, measures=["rmse_hu"])["rmse_hu"]
    return figures, {"low dose": low, "denoised": replace(low, hu=hu), "full dose": full}


def _basis(store: Store, config: RunConfig, cases: int) -> dict[str, Any]:
    """`Validated.basis`, for the manifest's JSON. The first `cases` of the split are validated."""
    v = config.validation
    return {"store": store.fingerprint, "split": v.split, "cases": cases, "protocol": v.protocol}
