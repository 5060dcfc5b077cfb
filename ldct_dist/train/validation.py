"""Validation on whole held-out volumes, shared out over the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldct_dist.denoise.tiles import denoise_volume
from ldct_dist.evaluate.metrics import evaluate_volume
from ldct_dist.evaluate.protocols import protocol
from ldct_dist.models.registry import Denoiser
from ldct_dist.store.layout import FULL_DOSE
from ldct_dist.store.reader import Store
from ldct_dist.train.config import ValidationConfig
from ldct_dist.world import World


@dataclass(frozen=True)
class Validated:
    """Mean figures over the cases; and for the first case its low, denoised and full HU, on rank 0."""

    figures: dict[str, float]
    first: dict[str, np.ndarray] | None
    spacing: tuple[float, float, float]


def validate(
    model: Denoiser, store: Store, dose: str, config: ValidationConfig, world: World, bf16: bool
) -> Validated:
    """Denoise the cases of the validation split and measure them; the same figures on every rank."""
    measure = protocol(config.protocol)
    cases = [store.cases[int(i)] for i in store.split(config.split)[: config.max_cases]]
    mine, first = [], None
    for i, case in enumerate(cases):
        if i % world.size != world.rank:
            continue
        low = store.volume(case.name, dose).hu
        full = store.volume(case.name, FULL_DOSE).hu
        denoised = denoise_volume(model, low, device=world.device, bf16=bf16)
        mine.append((i, evaluate_volume(denoised, full, measure)))
        if i == 0:
            first = {"low": low, "denoised": denoised, "full": full}
    # by case number, so that the mean adds up in the same order for every number of ranks
    rows = [row for _, row in sorted((r for share in world.gather(mine) for r in share), key=lambda r: r[0])]
    figures = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    return Validated(figures, first, cases[0].spacing)
