"""Weights that people pass around: one safetensors file that says which network it is for. Never pickle."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import ldct_dist
from ldct_dist import config as configs
from ldct_dist.errors import UserError
from ldct_dist.models.registry import Denoiser, ModelConfig, build

KIND = "ldct_dist denoiser"


def weights_facts(config: ModelConfig, **facts: str) -> dict[str, str]:
    """The file's header: what is needed to build the network, and what is good to know of it."""
    return {"kind": KIND, "model": config.model_dump_json(), "version": ldct_dist.__version__, **facts}


def save_weights(path: Path, model: Denoiser, **facts: str) -> None:
    """Write the network's weights, whole or not at all."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, temporary, metadata=weights_facts(model.config, **facts))
    with open(temporary, "rb") as f:
        os.fsync(f.fileno())
    temporary.replace(path)


def load_weights(path: Path, device: torch.device | str = "cpu") -> Denoiser:
    """The network that the file is for, with its weights, in evaluation mode.

    Raises UserError if the file is missing, damaged, or not made by `save_weights` or a checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as f:
            facts = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  not a dict
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such weights file") from e
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not readable as safetensors ({e}); copy it again") from e
    if facts.get("kind") != KIND:
        raise UserError(f"{path}: safetensors, but not a denoiser of this package")
    model = build(configs.validate(ModelConfig, json.loads(facts["model"]), str(path)))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as e:
        raise UserError(f"{path}: its tensors do not fit {model.config}; was it cut or mixed up?") from e
    return model.to(device).eval()


def weights_hash(path: Path) -> str:
    """Short sha256 of a weights file: how a denoised image names what made it."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]
