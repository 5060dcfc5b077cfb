"""Train 3-D CNN denoisers for low-dose CT on any number of SLURM nodes.

The public names; each is imported when it is first asked for, so that `import ldct_dist` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "UserError": "errors",
    "Volume": "ct.volume",
    "find_series": "ct.dicom",
    "read_series": "ct.dicom",
    "write_derived": "ct.derived",
    "simulate_low_dose": "ct.dose",
    "Store": "store.reader",
    "ingest": "store.ingest",
    "DataConfig": "data.plan",
    "Plan": "data.plan",
    "Loader": "data.loader",
    "mask_from_box": "models.losses",
    "load_weights": "models.weights",
    "denoise_series": "denoise.volumes",
    "denoise_volume": "denoise.tiles",
    "evaluate_volume": "evaluate.metrics",
    "RunConfig": "train.config",
    "submit": "cluster.submit",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ldct_dist' has no attribute {name!r}")
    return getattr(import_module(f"ldct_dist.{_HOME[name]}"), name)
