"""The files of a checkpoint. No strategy has its own: each reads what another wrote, at any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping

from ldct_dist.checkpoint.load import WEIGHTS
from ldct_dist.checkpoint.pieces import Part, Stored
from ldct_dist.models.registry import ModelConfig
from ldct_dist.models.weights import weights_facts

RAW_WEIGHTS = "weights-raw.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's running means. Its count of steps is the strategy's own."""
STATE_BYTES = 16
"""of a checkpoint, a parameter: the weights, their average and both moments, in fp32"""


def parts_of(
    average: Mapping[str, Stored],
    raw: Mapping[str, Stored],
    moments: Mapping[str, Stored],
    model: ModelConfig,
    step: int,
    files: int,
) -> dict[str, Part]:
    """Weights as people use them, and the optimizer's state in so many files, of which none is empty.

    average, raw: by parameter. moments: by parameter/moment.
    """
    facts = weights_facts(model, step=str(step))
    parts = {WEIGHTS: Part(dict(average), facts), RAW_WEIGHTS: Part(dict(raw), facts)}
    names = sorted(moments)
    files = min(files, len(names))
    for i in range(files):
        share = {name: moments[name] for name in names[i::files]}
        parts[f"optimizer-{i + 1:05d}-of-{files:05d}.safetensors"] = Part(share)
    return parts
