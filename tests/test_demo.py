"""What the demo may delete, and where it may ingest: the rest of it is what the other tests are about."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from ldct_dist import demo
from ldct_dist.cli import app
from ldct_dist.errors import UserError
from ldct_dist.evaluate.compare import COLUMNS, Comparison
from runs import write_config

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"


@pytest.fixture
def steps(monkeypatch):
    """Calls of the demo's first step, which here is also its last."""
    called: list[Path] = []

    def stop(config, key, console):
        called.append(key)
        raise UserError("stopped here")

    monkeypatch.setattr(demo, "_ingest", stop)
    return called


def run(*overrides: str, config: Path = CONFIG) -> str:
    with pytest.raises(UserError) as refused:
        demo.run(config, overrides, Console(quiet=True))
    return str(refused.value)


def test_a_run_that_is_not_the_demos_is_not_touched(tmp_path, steps):
    folder = tmp_path / "runs" / "run"
    (folder / "checkpoints").mkdir(parents=True)
    config = write_config(tmp_path, folder / "ct.zarr")
    assert "not made by the demo" in run(config=config)
    assert (folder / "checkpoints").is_dir()
    assert steps == []


def test_a_store_that_is_not_the_demos_is_not_added_to(tmp_path, steps):
    config = write_config(tmp_path, tmp_path / "ct.zarr")
    assert f"give store={tmp_path}/runs/run/ct.zarr" in run(config=config)
    assert list(tmp_path.iterdir()) == [config]
    assert steps == []


def test_a_demo_that_is_started_elsewhere_says_from_where(tmp_path, monkeypatch, steps):
    monkeypatch.chdir(tmp_path)
    refused = CliRunner().invoke(app, ["demo"])
    assert "configs/demo.yaml: no such config file here; start the demo from" in str(refused.exception)
    assert steps == []


def test_the_demo_makes_its_own_folder_anew_whatever_it_is_called(tmp_path, steps):
    for _ in range(2):
        assert run(f"runs={tmp_path}", "name=mine") == "stopped here"
        assert [path.name for path in (tmp_path / "mine").iterdir()] == ["demo.key"]
        (tmp_path / "mine" / "left over").touch()
    assert steps == [tmp_path / "mine" / "demo.key"] * 2


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (8, 2)])
def test_processes_of_the_demo_do_not_share_a_gpu(monkeypatch, gpus, ranks):
    """Two of them would be refused, and so would the first command of whoever has one GPU."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: gpus)
        assert ranks == importlib.reload(demo).RANKS
    importlib.reload(demo)


def test_every_figure_that_the_demo_prints_is_in_its_result(tmp_path):
    images = ("low dose", "denoised", "gaussian")
    figures = {image: {key: 10 * i + k for k, key in enumerate(COLUMNS)} for i, image in enumerate(images)}
    comparison = Comparison("patient", "abdomen", figures)
    demo._write_result(tmp_path, comparison, {"images": {}}, resumed_at=750, seconds=1.0)
    result = json.loads((tmp_path / "result.json").read_text())
    assert [
        result[f"{m}_{image}"] for image in ("low", "denoised", "gaussian") for m in ("rmse", "psnr", "ssim")
    ] == [*(0, 1, 2, 10, 11, 12, 20, 21, 22)]
