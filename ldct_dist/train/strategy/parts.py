"""The files of a checkpoint, the same for all strategies: each loads what another saved, at any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping

from ldct_dist.checkpoint.load import WEIGHTS
from ldct_dist.checkpoint.pieces import Part, Stored
from ldct_dist.models.registry import ModelConfig
from ldct_dist.models.weights import weights_facts

RAW_WEIGHTS = "weights-raw.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's running means. Its count of steps is in the manifest, as `updates`."""
STATE_BYTES = 16
"""bytes of a checkpoint for each parameter: the weights, their average and both moments, in fp32"""


def parts_of(
    average: Mapping[str, Stored],
    raw: Mapping[str, Stored],
    moments: Mapping[str, Stored],
    model: ModelConfig,
    step: int,
    files: int,
) -> dict[str, Part]:
    """The averaged weights, which people use, the raw ones, and the optimizer's state in up to `files` files.

    average, raw: by the parameter's name. moments: by PARAMETER/MOMENT. None of the files is empty.
    """
    facts = weights_facts(model, step=str(step))
    parts = {WEIGHTS: Part(dict(average), facts), RAW_WEIGHTS: Part(dict(raw), facts)}
    names = sorted(moments)
    files = min(files, len(names))
    for i in range(files):
        share = {name: moments[name] for name in names[i::files]}
        parts[f"optimizer-{i + 1:05d}-of-{files:05d}.safetensors"] = Part(share)
    return parts
