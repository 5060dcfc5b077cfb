"""Preflight checks: whether config, store and machine go together, found out before a run writes anything."""

from __future__ import annotations

import os
import platform
import shutil

import numpy as np
import torch

from ldct_dist.data.loader import Loader
from ldct_dist.data.plan import Plan, lanes_of
from ldct_dist.errors import UserError, few
from ldct_dist.evaluate.protocols import protocol_named
from ldct_dist.models.locality import refuse_misstated
from ldct_dist.models.losses import refuse_unfit, share_counted
from ldct_dist.models.registry import Denoiser, outline
from ldct_dist.store.reader import Store
from ldct_dist.train.checkpoints import first_weights
from ldct_dist.train.config import RunConfig
from ldct_dist.train.run import RunFolder, flat
from ldct_dist.train.strategy.engine import refuse_contradictions, refuse_deepspeed
from ldct_dist.world import World

_MUCH_PADDING = 0.25  # of a crop: sides are rounded up to multiples of a stride, so a little is usual

OWN = {"store", "runs", "init_from", "threads"}
"""settings that may differ from node to node: where files are there, and how many cores it has"""


def refuse_conflicts(
    config: RunConfig, model: Denoiser, store: Store, folder: RunFolder, world: World
) -> None:
    """Raises UserError where these do not go together. Writes nothing."""
    refuse_mistakes(config, model, world.size)
    if config.validates:
        store.split(config.validation.split)
    refuse_deepspeed(config, world)
    if world.is_main and config.init_from is not None and not folder.has_saved:
        first_weights(config)
    if config.compile:
        refuse_without_compiler(world.device)
    if config.precision == "bf16":
        refuse_slow_bf16(world.device, config.channels_last)
    if world.is_main and config.origins:
        # Under ZeRO 3 the network may be larger than a GPU.
        refuse_unfit_code(config, world.device if config.zero < 3 else torch.device("cpu"))


def refuse_unfit_code(config: RunConfig, device: torch.device) -> None:
    """Raises UserError where another package's network or loss, tried on the device, is not what it has to be."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what passes at the first start passes at the next
        if config.model.origin is not None:
            refuse_misstated(config.model, config.channels_last, device)
        if config.loss.origin is not None:
            refuse_unfit(config.loss, config.data.crop, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def refuse_mistakes(config: RunConfig, model: Denoiser, ranks: int) -> None:
    """Raises UserError for what so many ranks could not train on any machine, as the config alone tells."""
    lanes_of(0, ranks, config.data.batch)
    refuse_crop(config, model)
    protocol_named(config.validation.protocol)
    refuse_contradictions(config)


def refuse_early(config: RunConfig, ranks: int, waits: bool) -> None:
    """Raises UserError for what the ranks of a job would refuse, before it waits in a queue.

    waits: for another job, which may be the one that makes the store. Nodes may see a store that this machine does not.
    """
    refuse_mistakes(config, outline(config.model), ranks)
    if waits or not os.path.exists(config.store):  # Path.exists would raise PermissionError
        return
    store = Store(config.store)
    Loader(Plan(store, config.data, config.seed), 0, ranks).close()
    if config.validates:
        store.split(config.validation.split)


def refuse_without_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile would find no compiler.

    It needs g++ for code that runs on a CPU; on a GPU, Triton needs a C compiler for what launches its kernels.
    """
    named = ["g++"] if device.type == "cpu" else [os.environ.get("CC", "gcc"), "gcc", "clang"]
    if not any(map(shutil.which, named)):
        raise UserError(
            f"compile=true needs {' or '.join(dict.fromkeys(named))} on {platform.node()}: install one or load its module, "
            "or set compile=false"
        )


def refuse_slow_bf16(device: torch.device, channels_last: bool) -> None:
    """Raises UserError for a GPU from before Ampere, which emulates bf16, and for a layout in which PyTorch does without
    cuDNN 9.8 to 9.14, since its 3-D convolutions are wrong there, and takes several times the time and memory
    (ConvParams::use_cudnn in aten/src/ATen/native/Convolution.cpp)."""
    if device.type != "cuda":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"precision=bf16: {torch.cuda.get_device_name(device)} on {platform.node()} only emulates it, slowly; set "
            "precision=fp32, or ask for newer GPUs"
        )
    cudnn = torch.backends.cudnn.version() or 0
    if not channels_last and 90800 <= cudnn < 91500:
        raise UserError(
            f"channels_last=false with precision=bf16: PyTorch does without cuDNN {cudnn} for it on {platform.node()}, "
            "slowly; set channels_last=true, or install cuDNN 9.15 or newer"
        )


def refuse_disagreement(config: RunConfig, store: Store, world: World) -> None:
    """End all ranks unless they were given the same config and store.

    Each rank reads both for itself. If they are being changed, or a node sees an outdated version, a rank would
    otherwise train something else than the others, and nobody would notice.
    """
    mine = flat(config.model_dump(mode="json", exclude=OWN))
    mine |= {"store's fingerprint": store.fingerprint, **world.on_each(lambda: _code_of_others(config))}
    (_, first), *others = world.gather((world.name, mine))
    for name, given in others:
        keys = dict.fromkeys((*first, *given))
        unlike = [
            f"{key} {given.get(key)}, not {first.get(key)}"
            for key in keys
            if given.get(key) != first.get(key)
        ]
        if unlike:
            world.refuse(
                f"{name} was given other settings than rank 0: {few(unlike)}; start all ranks with one config and "
                "one store, once every node sees both as they are"
            )


def _code_of_others(config: RunConfig) -> dict[str, str]:
    return {f"code of {key}": origin for key, origin in config.origins.items()}


def introduction(config: RunConfig, model: Denoiser, store: Store, world: World) -> str:
    """What is about to be trained, on what. A first step may take minutes, and nobody should have to guess what it is at."""
    parameters = sum(p.numel() for p in model.parameters())
    cases = len(store.split(config.data.split))
    on_gpu = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"training {config.model.label} ({parameters / 1e6:,.3g} M parameters); cases: {cases:,} ({config.data.split}), "
        f"ranks: {world.size} ({device}), figures every {config.log.every} steps"
    )


def note_on_padding(config: RunConfig, store: Store) -> str | None:
    """How much of a crop lies outside every volume; None if that is little."""
    crop, longest = np.array(config.data.crop), _longest(config, store)
    padded = 1 - np.minimum(crop, longest).prod() / crop.prod()
    if padded < _MUCH_PADDING:
        return None
    return (
        f"note: at least {100 * padded:.0f} % of every crop is padding, which takes as long as voxels do: data.crop="
        f"{crop.tolist()}, and no volume is larger than {longest.tolist()} (z, y, x)"
    )


def note_on_margin(config: RunConfig, model: Denoiser, store: Store) -> str | None:
    """How much of a crop the loss counts, for a user who has not set loss.margin; None if it is set, or if all counts."""
    if config.loss.margin is not None:
        return None
    longest = _longest(config, store)
    margins = config.loss.margin_for(model.radius, config.data.crop)
    # Crops as long as the volumes have no inner faces.
    z, y, x = (m if n > c else 0 for m, n, c in zip(margins, longest, config.data.crop, strict=True))
    margin = (z, y, x)
    if not any(margin):
        return None
    return (
        f"note: {100 * share_counted(margin, config.data.crop):.0f} % of a crop's voxels count in the loss. It leaves out "
        f"{margin} voxels (z, y, x) next to faces where the crop was cut out of its volume: {config.model.name} sees "
        f"{model.radius} voxels to each side. Larger crops, or a smaller loss.margin, make more of them count"
    )


def _longest(config: RunConfig, store: Store) -> np.ndarray:
    """(3,) the most voxels that a volume to train on has along z, y and x."""
    return store.triples("shape")[store.split(config.data.split)].max(axis=0)


def refuse_crop(config: RunConfig, model: Denoiser) -> None:
    """Raises UserError if the network does not take crops of this size, or if the loss would count none of their voxels."""
    if any(c % s for c, s in zip(config.data.crop, model.stride, strict=True)):
        raise UserError(
            f"data.crop={list(config.data.crop)}: {config.model.name} takes crops whose sides are multiples of "
            f"{list(model.stride)} (z, y, x)"
        )
    config.loss.margin_for(model.radius, config.data.crop)
