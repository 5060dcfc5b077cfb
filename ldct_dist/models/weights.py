"""Weights files, which people pass around: one safetensors file, never pickle, that says which network it is for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import ldct_dist
from ldct_dist.errors import UserError
from ldct_dist.files import file_sha256, replacing
from ldct_dist.models.registry import Denoiser, ModelConfig, build

KIND = "ldct_dist denoiser"
SEAL = "sha256"


def weights_facts(config: ModelConfig, **facts: str) -> dict[str, str]:
    """The file's metadata: the config to build the network from, the version, and further `facts`."""
    maker = {} if config.origin is None else {"network": config.origin}
    return {
        "kind": KIND,
        "model": config.model_dump_json(),
        "version": ldct_dist.__version__,
        **maker,
        **facts,
    }


def sealed(facts: dict[str, str], tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """`facts` with a sha256 of themselves and of the tensors, by which damage to the file is found."""
    return {**facts, SEAL: _digest(facts, tensors)}


def save_weights(path: Path, model: Denoiser, **facts: str) -> None:
    """Write the network's weights, completely or not at all. Raises UserError where they cannot be written."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=sealed(weights_facts(model.config, **facts), tensors))
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: cannot be written ({e}); choose another folder or make room") from e


def load_weights(path: Path, device: torch.device | str = "cpu") -> Denoiser:
    """The network that the file is for, with its weights, in evaluation mode.

    Raises UserError if the file is missing, damaged, or not made by `save_weights` or a checkpoint.
    """
    with _opened(path) as f:
        facts = f.metadata() or {}
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  no dict
    seal = facts.pop(SEAL, None)
    if facts.get("kind") == KIND and seal != _digest(facts, tensors):
        raise UserError(f"{path}: damaged, it does not match its own sha256; copy it again")
    with _fitting(path, facts) as config:
        model = build(config)
        model.load_state_dict(tensors)
    return model.to(device).eval()


def origin_of(path: Path) -> str | None:
    """The code that weights of another package's network would be used with here (`ModelConfig.origin`); else None.

    Raises UserError as `load_weights` does, but looks at no tensor.
    """
    with _opened(path) as f:
        facts = f.metadata() or {}
    with _fitting(path, facts) as config:
        return config.origin


def verify_weights(path: Path) -> list[str]:
    """What is wrong with the file, in one line; empty if every byte is as it was written."""
    try:
        load_weights(path)
    except UserError as e:
        return [str(e)]
    return []


@contextmanager
def _fitting(path: Path, facts: dict[str, str]) -> Iterator[ModelConfig]:
    """The config of the network that the file is for. Raises UserError if there is none, or if it does not fit the block."""
    if facts.get("kind") != KIND:
        raise UserError(
            f"{path}: safetensors, but no denoiser of this package; give a run's weights.safetensors"
        )
    try:
        yield ModelConfig.model_validate_json(facts["model"])
    except (KeyError, ValidationError, UserError, RuntimeError) as e:
        made = f"written by version {facts.get('version')}"
        if "network" in facts:
            raise UserError(
                f"{path}: {made} for a network of {facts['network']}, it does not fit what is installed here "
                f"({_reason(e)}); install that package"
            ) from e
        raise UserError(
            f"{path}: {made}, it does not fit the networks of version {ldct_dist.__version__} ({_reason(e)}); use the "
            "version that wrote it"
        ) from e


def _reason(e: Exception) -> str:
    return (
        e.errors()[0]["msg"].removeprefix("Value error, ") if isinstance(e, ValidationError) else str(e)[:200]
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if Path(path).is_dir():
        raise UserError(
            f"{path}: a folder; give the weights.safetensors in it, a run's are in checkpoints/<step>/"
        )
    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such weights file; a run's are in checkpoints/<step>/") from e
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not readable as safetensors ({e}); copy it again") from e


def _digest(facts: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_hash(path: Path) -> str:
    """The beginning of the sha256 of a weights file, by which denoised images name the network that made them."""
    return file_sha256(path)[:16]
