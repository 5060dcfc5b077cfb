"""Networks and losses of other packages, which offer them as entry points.

A weights file names its network, and people pass weights around: so a name leads only to code that somebody has installed
here, never to a path that the file might bring along.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from importlib.metadata import EntryPoint, entry_points
from inspect import getsourcefile, signature
from pathlib import Path
from typing import Any

from torch import nn

from ldct_dist.errors import UserError
from ldct_dist.files import file_sha256

NETWORKS, LOSSES = "ldct_dist.networks", "ldct_dist.losses"
"""groups of entry points"""
_SECTIONS = {NETWORKS: "model", LOSSES: "loss"}  # of a run's config


def names(group: str) -> list[str]:
    """Of all that is installed of the group, sorted."""
    return sorted(entry_points(group=group).names)


def known(group: str, name: str, own: Collection[str]) -> str:
    """The name itself. Raises ValueError if it is neither one of this package's `own` nor installed."""
    if name not in own and name not in names(group):
        raise ValueError(f"there is no {name}, but {', '.join([*own, *names(group)])}")
    return name


def make(group: str, name: str, options: Mapping[str, Any]) -> Any:
    """What the entry point's function, or class, gives for these arguments.

    Raises UserError if it is not there, does not take the arguments, or refuses them by a ValueError. What else goes wrong
    in the other package is left as it is, for whoever writes it.
    """
    function, given = _load(group, name), f"{_SECTIONS[group]}.options={dict(options)}"
    try:
        signature(function).bind(**options)
    except TypeError as e:
        raise UserError(f"{given}: {name} takes others ({e})") from e
    try:
        return function(**options)
    except ValueError as e:
        raise UserError(f"{given}: {name} refuses them: {e}") from e


def make_network(name: str, options: Mapping[str, Any]) -> Any:
    """Raises UserError as `make` does, and for what `Denoiser` cannot hold or this package cannot train."""
    network = make(NETWORKS, name, options)
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
    if buffers := [key for key, _ in network.named_buffers()]:
        raise UserError(
            f"model.name={name}: {buffers[0]} is a buffer, which nothing saves: do without running statistics, and make "
            "fixed filters in forward"
        )
    parameters = dict(network.named_parameters())
    still = [key for key, p in parameters.items() if not (p.requires_grad and p.is_floating_point())]
    if still or not parameters:
        raise UserError(f"model.name={name}: {still[0] if still else 'nothing'} in it can be trained")
    return network


def origin(group: str, name: str) -> str:
    """Which code it is: its package with the version, and the beginning of the sha256 of its source file."""
    distribution = _entry(group, name).dist
    package = f"{distribution.name} {distribution.version}" if distribution is not None else name
    file = getsourcefile(_load(group, name))
    return f"{package}, source sha256 {file_sha256(Path(file))[:16]}" if file is not None else package


def _entry(group: str, name: str) -> EntryPoint:
    found = entry_points(group=group, name=name)
    if not found:
        raise UserError(f"{_SECTIONS[group]}.name={name}: not installed; install the package that has it")
    return next(iter(found))


def _load(group: str, name: str) -> Callable[..., Any]:
    entry = _entry(group, name)
    try:
        return entry.load()
    except (ImportError, AttributeError) as e:
        raise UserError(f"{_SECTIONS[group]}.name={name}: its package has no {entry.value}: {e}") from e
