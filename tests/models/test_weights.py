from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ldct_dist.errors import UserError
from ldct_dist.models.registry import ModelConfig, build
from ldct_dist.models.weights import (
    load_weights,
    save_weights,
    sealed,
    verify_weights,
    weights_facts,
    weights_hash,
)
from networks import random_network


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w.safetensors"


def test_weights_travel_with_their_network(path):
    model = random_network("nafnet3d", thick_slices=True).to(memory_format=torch.channels_last_3d)
    save_weights(path, model, step="7")
    loaded = load_weights(path)
    assert loaded.config == model.config
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with safe_open(path, framework="pt") as f:
        assert f.metadata()["step"] == "7"


def test_the_hash_tells_weights_apart(path):
    model = random_network("unet3d")
    save_weights(path, model)
    first = weights_hash(path)
    assert weights_hash(path) == first
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    save_weights(path, model)
    assert weights_hash(path) != first


def test_any_changed_byte_of_a_copied_file_is_found(path):
    save_weights(path, random_network("redcnn3d"), step="7")
    whole, draw = path.read_bytes(), random.Random(0)
    header = int.from_bytes(whole[:8], "little")
    assert verify_weights(path) == []
    for place in [*range(8), *draw.sample(range(8, 8 + header), 60), *draw.sample(range(len(whole)), 60)]:
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        assert len(verify_weights(path)) == 1, place


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def pickle(path):
    torch.save(build(ModelConfig(size="xs")).state_dict(), path)


def folder(path):
    path.unlink()
    path.mkdir()


def foreign(path):
    save_file({"w": torch.zeros(3)}, path)


def other_size(path):
    rewrite(path, json.dumps({"name": "unet3d", "size": "s"}))


def future_network(path):
    rewrite(path, json.dumps({"name": "mamba3d", "size": "s"}))


def future_size(path):
    rewrite(path, json.dumps({"name": "unet3d", "size": "xxxl"}))


def garbled_config(path):
    rewrite(path, "{")


def rewrite(path, model: str):
    tensors = dict(build(ModelConfig(size="xs")).named_parameters())
    facts = weights_facts(ModelConfig()) | {"model": model}
    save_file(tensors, path, metadata=sealed(facts, tensors))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "not readable as safetensors"),
        (empty, "not readable as safetensors"),
        (pickle, "not readable as safetensors"),
        (folder, "a folder; give the weights.safetensors in it"),
        (foreign, "no denoiser of this package"),
        (other_size, "does not fit the networks of version"),
        (future_network, "does not fit the networks of version"),
        (future_size, "does not fit the networks of version"),
        (garbled_config, "does not fit the networks of version"),
    ],
)
def test_what_cannot_be_used_is_one_line_that_names_the_file(path, harm, message):
    save_weights(path, build(ModelConfig(size="xs")))
    harm(path)
    with pytest.raises(UserError, match=message) as raised:
        load_weights(path)
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 600


def test_no_file_and_no_folder_are_one_line(path):
    with pytest.raises(UserError, match="no such weights file"):
        load_weights(path)
    with pytest.raises(UserError, match="cannot be written"):
        save_weights(path / "below" / "w.safetensors", build(ModelConfig(size="xs")))
