"""The network and the loss of docs/your_own.md, trained and used like those that come with the package."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plants import given_otherwise, lacks_what_its_loss_reads

from commands import command
from forked import fork
from ldct_dist.config import read
from ldct_dist.denoise.tiles import denoise_volume
from ldct_dist.models.weights import load_weights
from ldct_dist.store.reader import Store
from ldct_dist.train.config import RunConfig
from ldct_dist.train.preflight import refuse_unfit_code
from on_gpu import on_gpu
from runs import equal, final_state, losses, write_config
from stores import make_store
from your_own import NAME

MODEL = {"name": NAME, "size": "s", "options": {"width": 4, "depth": 3}}
LOSS = {"name": "edges", "options": {"share": 0.25}}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    shapes = [(10, 40, 40), (6, 48, 40), (12, 32, 32), (8, 32, 40)]
    return make_store(tmp_path_factory.mktemp("own") / "ct.zarr", shapes, ["train"] * 3 + ["val"]).path


def test_it_trains_resumes_and_denoises_in_tiles_as_whole(store, tmp_path, my_nets):
    # One learning rate throughout, which does not depend on how many steps a start is given.
    steady = {"warmup": 0, "final_lr": 1.0}
    config, runs = write_config(tmp_path, store, model=MODEL, loss=LOSS, optim=steady), tmp_path / "runs"
    assert fork(config, "name=whole") == [0, 0]
    assert fork(config, "name=parts", "steps=3") == [0, 0]
    with open(my_nets, "a") as f:
        f.write("# another version\n")
    assert fork(config, "name=parts") == [0, 0]
    said = config.with_suffix(".log").read_text()
    for setting in ("model.name", "loss.name"):
        assert f"note: the code of {setting} has changed: my-nets 0.1, " in said
    run = runs / "parts"
    assert equal(final_state(run), final_state(runs / "whole"))
    first, second = (start["code_of_others"] for start in json.loads((run / "environment.json").read_text()))
    assert first.keys() == second.keys() == {"model.name", "loss.name"}
    assert first != second

    weights = max((run / "checkpoints").iterdir()) / "weights.safetensors"
    low = Store(store).volume("case-003", "0.25").hu
    model = load_weights(weights)
    answer = denoise_volume(model, low)
    assert (answer != low).any()
    assert np.array_equal(denoise_volume(model, low, tile=(4, 16, 16)), answer)


def test_zero_shares_it_out_as_ddp_holds_it(store, tmp_path, my_nets):
    config, runs = write_config(tmp_path, store, model=MODEL, loss=LOSS), tmp_path / "runs"
    assert fork(config, "name=ddp") == [0, 0]
    assert fork(config, "name=zero", "strategy=deepspeed", "zero=3") == [0, 0]
    a, b = (losses(runs / name) for name in ("ddp", "zero"))
    assert [line["loss"] for line in b] == pytest.approx([line["loss"] for line in a], rel=1e-5)


def test_a_plan_knows_it_and_a_start_refuses_what_it_misstates(store, tmp_path, my_nets):
    config = write_config(tmp_path, store, model=MODEL, loss=LOSS)
    planned = command("plan", config)
    assert (planned.returncode, planned.stdout.split()[0]) == (0, NAME), planned.stderr
    my_nets.write_text(my_nets.read_text().replace("(depth, depth, depth)", "(depth, depth, depth - 2)"))
    assert told(config).startswith(
        f"error: model.name={NAME}: it sees further along x than its radius (3, 3, 1)"
    )
    assert not (tmp_path / "runs").exists()


def told(config: Path, **given: Any) -> str:
    """The one line with which both ranks of a start end."""
    assert fork(config, **given) == [2, 2]
    log = config.with_suffix(".log")
    (line,) = [line for line in log.read_text().splitlines() if "rror" in line]
    log.unlink()
    return line


@pytest.mark.usefixtures("my_nets")
def test_what_is_wrong_on_one_rank_ends_both_with_one_line(store, tmp_path):
    config = write_config(tmp_path, store, model={"name": NAME, "size": "s"}, loss=LOSS)
    other = partial(given_otherwise, ["model.options.width=4"])
    assert "was given other settings than rank 0: model.options" in told(config, plant=other)
    assert "rank 1 on " in told(config, plant=lacks_what_its_loss_reads)
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("my_nets")
def test_on_a_gpu_they_are_checked_there(tmp_path):
    on_gpu(_checked_there, write_config(tmp_path, tmp_path / "ct.zarr", model=MODEL, loss=LOSS))


def _checked_there(config: str) -> None:
    refuse_unfit_code(read(RunConfig, Path(config)), torch.device("cuda:0"))
