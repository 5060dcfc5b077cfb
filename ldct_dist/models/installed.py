"""Networks and losses of other packages, which offer them as entry points.

A weights file names its network, and people pass weights around: so a name leads only to code that somebody has installed
here, never to a path that the file might bring along.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from inspect import isclass, isfunction, signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ldct_dist.errors import UserError, lacks_memory
from ldct_dist.files import file_sha256

NETWORKS, LOSSES = "ldct_dist.networks", "ldct_dist.losses"
"""groups of entry points"""
_SECTIONS = {NETWORKS: "model", LOSSES: "loss"}  # of a run's config


def names(group: str) -> list[str]:
    """Of all that is installed of the group, sorted."""
    return sorted(set(entry_points(group=group).names))


def known(group: str, name: str, own: Collection[str]) -> str:
    """The name itself. Raises ValueError if it is neither one of this package's `own` nor installed."""
    if name not in own and name not in names(group):
        raise ValueError(f"there is no {name}, but {', '.join([*own, *names(group)])}")
    return name


def make(group: str, name: str, options: Mapping[str, Any]) -> Any:
    """What the entry point's function, or class, gives for these arguments.

    Raises UserError if it is not there, does not take the arguments, or refuses them by a ValueError or RuntimeError. What
    else goes wrong in the other package is left as it is, for whoever writes it.
    """
    function, given = _load(group, name), f"{_SECTIONS[group]}.options={dict(options)}"
    try:
        signature(function).bind(**options)
    except (TypeError, ValueError) as e:
        raise UserError(f"{given}: {name} takes others ({e})") from e
    with told(f"{given}: {name} cannot be made with them", ValueError, RuntimeError):
        return function(**options)


@contextmanager
def told(what: str, *faults: type[Exception]) -> Iterator[None]:
    """Raises UserError, of `what` and the first line, where another package's code raises one of `faults`; memory that runs
    out is left to whoever knows a remedy."""
    try:
        yield
    except faults as e:
        if lacks_memory(e):
            raise
        raise UserError(f"{what}: {(str(e) or type(e).__name__).splitlines()[0]}") from e


def make_network(name: str, options: Mapping[str, Any]) -> Any:
    """Raises UserError as `make` does, and for what `Denoiser` cannot hold or this package cannot train."""
    network = make(NETWORKS, name, options)
    if fault := _fault(network):
        raise UserError(f"model.name={name}: {fault}")
    return network


def _fault(network: Any) -> str | None:
    """Why it cannot be trained, as far as that can be seen from outside: all that is trained, saved, averaged and shared out
    over ranks are parameters, by their names."""
    if not isinstance(network, nn.Module):
        return f"gives {type(network).__name__}, and no torch.nn.Module"
    # As torch.compile's wrapper has it; to ask for that type would take a second's import.
    if hasattr(network, "_orig_mod"):
        return "is compiled already: give the network as it is, and set compile=true"
    for key, least in (("radius", 0), ("stride", 1)):
        given = getattr(network, key, None)
        if not (
            isinstance(given, tuple) and len(given) == 3 and all(type(n) is int and n >= least for n in given)
        ):
            return f"its {key} is {given}; it has to be a tuple of three whole numbers of voxels, (z, y, x)"
    tensors = [key for key, _ in network.named_buffers()]
    tensors += [
        f"{where}.{key}".removeprefix(".")
        for where, module in network.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    ]
    if tensors:
        return f"{tensors[0]} is a tensor that nothing saves: do without running statistics, make fixed filters in forward"
    names_of: dict[nn.Parameter, str] = {}
    for key, p in network.named_parameters(remove_duplicate=False):
        if p in names_of:
            return f"{names_of[p]} and {key} are one weight: keep it, or its module, in one place and use it twice in forward"
        names_of[p] = key
        if is_lazy(p) or p.dtype != torch.get_default_dtype() or not p.requires_grad:
            return (
                f"{key} cannot be trained as it is: weights have a shape, are float32 and require gradients"
            )
    if not names_of:
        return "it has no weights"
    if (last := getattr(network, "last", None)) is not None:
        own = dict(last.named_parameters(recurse=False)) if isinstance(last, nn.Module) else {}
        if not {"weight", "bias"} <= own.keys():
            return f"its last has {', '.join(own) or 'no weights'}; it has to have weight and bias, which start at zero"
    return None


@lru_cache
def origin(group: str, name: str) -> str:
    """Which code it is: its package with the version, and the beginning of a sha256 of sources.

    These are all of the package that the entry point names, and of the one that the class or function comes from; as they
    were when this process first asked.
    """
    entry, function = _entry(group, name), _load(group, name)
    package = f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else name
    # Other objects, such as partial functions, do not say where they come from.
    says = isclass(function) or isfunction(function)
    modules = {entry.module, function.__module__ if says else entry.module}
    files = [file for module in sorted(modules) for file in _sources(module)]
    digest = hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()
    return f"{package}, source sha256 {digest[:16]}"


def _sources(module: str) -> list[Path]:
    """The Python files of the package that an imported module is in, or the module's own, if it is in none."""
    top = sys.modules.get(module.partition(".")[0])
    folders = [Path(folder) for folder in getattr(top, "__path__", [])]
    inside = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    alone = getattr(top, "__file__", None)
    return inside or ([Path(alone)] if alone is not None else [])


def _entry(group: str, name: str) -> EntryPoint:
    found = entry_points(group=group, name=name)
    if not found:
        raise UserError(f"{_SECTIONS[group]}.name={name}: not installed; install the package that has it")
    if len(found) > 1:
        packages = ", ".join(sorted(entry.dist.name for entry in found if entry.dist is not None))
        raise UserError(
            f"{_SECTIONS[group]}.name={name}: several packages have one ({packages}); uninstall all but one"
        )
    return next(iter(found))


def _load(group: str, name: str) -> Callable[..., Any]:
    entry = _entry(group, name)
    try:
        return entry.load()
    except (ImportError, AttributeError) as e:
        raise UserError(f"{_SECTIONS[group]}.name={name}: its package has no {entry.value}: {e}") from e
