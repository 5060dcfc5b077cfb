"""Networks of other packages, which offer them as entry points of the group `ldct_dist.networks`.

A weights file names its network, and people pass weights around: so a name leads only to code that somebody has installed
here, never to a path that the file might bring along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from inspect import getsourcefile, signature
from pathlib import Path
from typing import Any

from torch import nn

from ldct_dist.errors import UserError
from ldct_dist.files import file_sha256

GROUP = "ldct_dist.networks"


def names() -> list[str]:
    """Of all networks that are installed, sorted."""
    return sorted(entry_points(group=GROUP).names)


def make(name: str, options: Mapping[str, Any]) -> Any:
    """The network, made with these arguments.

    Raises UserError if it is not there, refuses the arguments by a TypeError of its signature or a ValueError, or is nothing
    that can be trained here. What else goes wrong in the other package is left as it is, for whoever writes it.
    """
    factory = _load(name)
    try:
        signature(factory).bind(**options)
    except TypeError as e:
        raise UserError(f"model.options={dict(options)}: {name} takes others ({e})") from e
    try:
        network = factory(**options)
    except ValueError as e:
        raise UserError(f"model.options={dict(options)}: {name} refuses them: {e}") from e
    _refuse_unfit(name, network)
    return network


def origin(name: str) -> str:
    """Which code the network is: its package with the version, and the beginning of the sha256 of its source file."""
    distribution = _entry(name).dist
    package = f"{distribution.name} {distribution.version}" if distribution is not None else name
    file = getsourcefile(_load(name))
    return f"{package}, source sha256 {file_sha256(Path(file))[:16]}" if file is not None else package


def _entry(name: str) -> EntryPoint:
    found = entry_points(group=GROUP, name=name)
    if not found:
        raise UserError(f"model.name={name}: no such network is installed; install the package that has it")
    return next(iter(found))


def _load(name: str) -> Callable[..., Any]:
    entry = _entry(name)
    try:
        return entry.load()
    except (ImportError, AttributeError) as e:
        raise UserError(f"model.name={name}: its package has no {entry.value}: {e}") from e


def _refuse_unfit(name: str, network: Any) -> None:
    """Raises UserError unless `network` is what `Denoiser` says a network is, as far as it can be seen from outside."""
    if not isinstance(network, nn.Module):
        raise UserError(f"model.name={name}: gives {type(network).__name__}, and no torch.nn.Module")
    for key, least in (("radius", 0), ("stride", 1)):
        given = getattr(network, key, None)
        if not (
            isinstance(given, tuple) and len(given) == 3 and all(type(n) is int and n >= least for n in given)
        ):
            raise UserError(
                f"model.name={name}: its {key} is {given}; it has to be a tuple of three whole numbers of voxels, (z, y, x)"
            )
    # All that is trained, saved, averaged and shared out over ranks are parameters.
    if kept := [key for key, _ in network.named_buffers()]:
        raise UserError(
            f"model.name={name}: {kept[0]} is a buffer, which nothing saves: do without running statistics, and make fixed "
            "filters in forward"
        )
    still = [key for key, p in network.named_parameters() if not (p.requires_grad and p.is_floating_point())]
    if still or not any(True for _ in network.parameters()):
        raise UserError(f"model.name={name}: {still[0] if still else 'nothing'} in it can be trained")
