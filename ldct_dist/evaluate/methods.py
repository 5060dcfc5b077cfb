"""The methods that are compared: anything that makes a denoised volume of a low-dose one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from inspect import getmodule
from pathlib import Path

import numpy as np
import torch

from ldct_dist.ct.volume import Volume
from ldct_dist.denoise.tiles import denoise_volume
from ldct_dist.errors import UserError
from ldct_dist.evaluate.baselines import baseline_named, tune
from ldct_dist.files import file_sha256
from ldct_dist.models.weights import load_weights

Method = Callable[[Volume], np.ndarray]
"""A low-dose Volume in, HU (z, y, x) on the same grid out, of any number type."""

LOW = "low dose"
FULL = "full dose"


def network(weights: Path, bf16: bool = False, strength: float = 1.0) -> Method:
    """The network in a weights file, on a GPU where there is one, in fp32 or bf16; strength: see `denoise_volume`.

    Raises UserError as `load_weights` does.
    """
    model = load_weights(weights, "cuda" if torch.cuda.is_available() else "cpu")
    return lambda low: denoise_volume(model, low.hu, bf16=bf16, strength=strength)


def tuned_baselines(names: Sequence[str], pairs: Sequence[tuple[Volume, Volume]]) -> dict[str, Method]:
    """The named filters, each tuned on these pairs of low and full dose, which should not be evaluated themselves.

    The methods' names hold the tuned values, to two digits: with more, machines that round otherwise would have filters of
    their own, and tuning is not as exact as that. Raises UserError for an unknown name.
    """
    chosen = {name: baseline_named(name) for name in names}

    def method(name: str) -> tuple[str, Method]:
        value = f"{tune(name, pairs):.2g}"
        label = f"{name} ({value} {chosen[name].unit})"
        return label, lambda volume: chosen[name].filter(volume, float(value)).hu

    return dict(method(name) for name in chosen)


def peer(spec: str) -> tuple[str, Method]:
    """(name, method) of somebody else's function, given as name=module:function. Raises UserError if there is none."""
    name, equals, path = spec.partition("=")
    module, colon, function = path.partition(":")
    if not (name and equals and colon):
        raise UserError(
            f"--peer {spec}: write it as name=module:function, such as redcnn=my_networks:denoise"
        )
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError) as e:
        raise UserError(f"--peer {spec}: {e}; is the module on PYTHONPATH?") from e
    return name, found


def source_hash(method: Method) -> str | None:
    """sha256 of the file that a peer is in; None where it has none, such as a function in C."""
    module = getmodule(method)
    file = getattr(module, "__file__", None)
    return file_sha256(Path(file)) if file else None


def peers_beside(networks: Iterable[str], specs: Sequence[str]) -> dict[str, Method]:
    """The peers that `specs` describe, by name. Raises UserError as `peer` does, and where two methods have one name."""
    taken = {LOW, FULL, *networks}
    peers: dict[str, Method] = {}
    for spec in specs:
        name, method = peer(spec)
        if name in taken:
            raise UserError(
                f"--peer {spec}: another image is called {name} in the tables; choose another name"
            )
        taken.add(name)
        peers[name] = method
    return peers


def apply(name: str, method: Method, low: Volume) -> np.ndarray:
    """int16 HU that the method makes of `low`. Raises UserError if they are not finite, or not on the same grid."""
    hu = np.asarray(method(low))
    if hu.shape != low.shape:
        raise UserError(f"{name}: gives {hu.shape} for a volume of {low.shape}; return HU on the same grid")
    if not np.isfinite(hu).all():
        raise UserError(f"{name}: gives values that are not finite")
    return np.rint(hu).clip(-32768, 32767).astype(np.int16)
