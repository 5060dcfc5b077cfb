"""Validation on whole held-out volumes, shared out over the ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ldct_dist.ct.volume import Volume
from ldct_dist.denoise.tiles import denoise_volume
from ldct_dist.errors import UserError
from ldct_dist.evaluate.metrics import evaluate_volume
from ldct_dist.evaluate.protocols import protocol_named
from ldct_dist.models.registry import Denoiser
from ldct_dist.store.layout import FULL_DOSE
from ldct_dist.store.reader import Store
from ldct_dist.train.config import ValidationConfig
from ldct_dist.world import World


@dataclass(frozen=True)
class Validated:
    """Mean figures over the cases; and the first case's low dose, denoised and full dose, on rank 0."""

    figures: dict[str, float]
    first: dict[str, Volume] | None


def validate(
    model: Denoiser, store: Store, dose: str, config: ValidationConfig, world: World, bf16: bool
) -> Validated:
    """Denoise the cases of the validation split and measure them; the same figures on every rank.

    All ranks end if one of them finds a damaged case: the first with a UserError that names it.
    """
    protocol = protocol_named(config.protocol)
    mine, first, fault = [], None, None
    for i, case in enumerate(store.split(config.split)[: config.max_cases]):
        if i % world.size != world.rank:
            continue
        name = store.cases[int(case)].name
        try:
            low, full = store.volume(name, dose), store.volume(name, FULL_DOSE)
        except UserError as e:
            fault = str(e)  # for all ranks to hear: the others wait for this one's figures
            break
        denoised = replace(low, hu=denoise_volume(model, low.hu, device=world.device, bf16=bf16))
        mine.append((i, evaluate_volume(denoised.hu, full.hu, protocol)))
        if i == 0:
            first = {"low dose": low, "denoised": denoised, "full dose": full}
    shares = world.gather((mine, fault))
    if faults := [f for _, f in shares if f is not None]:
        world.refuse(faults[0])
    # by case number, so that the mean adds up in the same order for every number of ranks
    rows = [row for _, row in sorted((r for share, _ in shares for r in share), key=lambda r: r[0])]
    return Validated({key: float(np.mean([row[key] for row in rows])) for key in rows[0]}, first)
