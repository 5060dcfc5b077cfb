"""A run from its start to its folder, with the command line as users call it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch

from commands import command
from forked import fork
from ldct_dist import config as configs
from ldct_dist.cluster.local import LocalRanks
from ldct_dist.data.loader import Loader
from ldct_dist.data.plan import Plan
from ldct_dist.models.losses import build_loss, mask_from_box
from ldct_dist.models.registry import Denoiser, outline
from ldct_dist.models.weights import load_weights
from ldct_dist.store.reader import Store
from ldct_dist.train.config import RunConfig
from ldct_dist.train.ending import Ending
from ldct_dist.train.trainer import Trainer, train
from on_gpu import on_gpu
from runs import board, equal, final_state, losses, starts, unsharded, write_config
from stores import make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    shapes = [(10, 40, 40), (6, 48, 40), (12, 32, 32), (9, 40, 48), (8, 32, 40)]
    return make_store(tmp_path_factory.mktemp("train") / "ct.zarr", shapes, ["train"] * 4 + ["val"]).path


@pytest.fixture(scope="module")
def unbroken(store, tmp_path_factory):
    """A run of two ranks that nothing disturbed."""
    config = write_config(tmp_path_factory.mktemp("unbroken"), store)
    assert fork(config) == [0, 0]
    return config.parent / "runs" / "run"


def reported(run: Path) -> tuple[list[int], list[int]]:
    """Steps of which TensorBoard shows a loss, and a validation."""
    shown = board(run)
    tags = ("train/loss", "validation/rmse_hu (abdomen)")
    losses, validations = ([e.step for e in shown.Scalars(tag)] for tag in tags)
    return losses, validations


def test_a_run_folder_explains_itself(unbroken):
    names = {p.name for p in unbroken.iterdir()}
    assert names == {
        "config.yaml",
        "environment.json",
        "checkpoints",
        "generations",
        "losses.jsonl",
        "tensorboard",
    }
    assert [line["step"] for line in losses(unbroken)] == list(range(1, 9))
    newest = max((unbroken / "checkpoints").iterdir())
    assert newest.name == "step-00000008"
    assert load_weights(newest / "weights.safetensors").config.size == "xs"
    assert reported(unbroken) == ([4, 8], [4, 8])
    shown = board(unbroken)
    assert shown.Images("validation/low dose, denoised, full dose, difference")


def test_the_command_line_killed_and_called_again_ends_bitwise_where_the_unbroken_run_does(
    store, unbroken, tmp_path
):
    config = write_config(tmp_path, store)
    run = tmp_path / "runs" / "run"
    with LocalRanks(["train", str(config)], 2, tmp_path / "log") as running:
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / "step-00000003").exists():
            assert running.poll() is None, "training ended before it was to be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        running.signal(signal.SIGKILL)
        running.wait()
    with LocalRanks(["train", str(config)], 2, tmp_path / "log") as running:
        assert running.wait() == 0
    assert starts(run)[0]["from_step"] == 0
    assert starts(run)[1]["from_step"] in (3, 4, 6)
    assert losses(run) == losses(unbroken)
    assert equal(final_state(run), final_state(unbroken))


def test_a_finished_run_started_again_does_nothing(unbroken, store):
    before = {p: p.stat().st_mtime_ns for p in (unbroken / "checkpoints").rglob("*")}
    config = unbroken.parent.parent / "run.yaml"
    assert fork(config) == [0, 0]
    assert {p: p.stat().st_mtime_ns for p in (unbroken / "checkpoints").rglob("*")} == before
    log = config.with_suffix(".log").read_text()
    assert log.count("done: 8 steps, weights in") == 2
    assert f"next: ldct-dist denoise or evaluate, which take the best ones of {unbroken}" in log
    assert reported(unbroken) == ([4, 8], [4, 8])


def test_gradients_accumulated_over_micro_batches_are_those_of_the_whole(store, unbroken, tmp_path):
    config = write_config(tmp_path, store)
    assert fork(config, "micro_batch=1") == [0, 0]
    got = losses(tmp_path / "runs" / "run")
    assert [line["loss"] for line in got] == pytest.approx([w["loss"] for w in losses(unbroken)], rel=1e-4)
    assert got[0]["grad_norm"] == pytest.approx(losses(unbroken)[0]["grad_norm"], rel=1e-4)
    assert unsharded(final_state(tmp_path / "runs" / "run")).keys() == unsharded(final_state(unbroken)).keys()


def test_the_loss_weighs_voxels_of_lesions_as_the_config_says(store, tmp_path):
    """A network's first answer is its input: the first loss is that of the low dose."""
    for weight in (1, 50):
        changes = [
            f"name=weight-{weight}",
            f"data.augment.lesions.weight={weight}",
            "data.augment.lesions.count=20",
        ]
        config = configs.read(RunConfig, write_config(tmp_path, store, steps=1), changes)
        assert train(config) is Ending.DONE
        with Loader(Plan(Store(store), config.data, config.seed)) as loader:
            batch = loader.batch(0)
        mask = mask_from_box(
            batch.box,
            batch.low.shape[2:],
            config.loss.margin_for(outline(config.model).radius, config.data.crop),
        )
        expected = build_loss(config.loss)(batch.low, batch.full, mask * batch.weights).mean()
        plain = build_loss(config.loss)(batch.low, batch.full, mask).mean()
        assert losses(config.runs / config.name)[0]["loss"] == pytest.approx(expected.item(), rel=1e-6)
        assert (abs(expected - plain) > 0.01) == (weight > 1)


def test_fine_tuning_starts_from_the_weights_and_is_called_that(store, unbroken, tmp_path):
    config = write_config(tmp_path, store)
    weights = max((unbroken / "checkpoints").iterdir()) / "weights.safetensors"
    # With so small a learning rate and no average, one step leaves the weights where they were.
    options = ("steps=1", "validation.every=9", "optim.lr=1e-12", "optim.ema=0")
    assert fork(config, f"init_from={weights}", *options, ranks=1) == [0]
    log = config.with_suffix(".log").read_text()
    assert "not a resume" in log
    assert "resumed" not in log
    tuned = load_weights(tmp_path / "runs" / "run" / "checkpoints" / "step-00000001" / "weights.safetensors")
    for got, given in zip(tuned.parameters(), load_weights(weights).parameters(), strict=True):
        assert torch.allclose(got, given, atol=1e-9)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", "optim.lrr"),
        ("store=/dev", "not a store"),
        ("data.split=nowhere", "no case in split 'nowhere'"),
        ("model.size=q", "comes in xs, s"),
        ("name=../escape", "name"),
        ("data.crop=[8,20,24]", "multiple"),
        ("validation.protocol=none", "none"),
        ("data.memory_mib=1", "too few blocks"),
        ("init_from=/nowhere/weights.safetensors", "no such weights file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_leaves_no_trace(store, tmp_path, override, words):
    config = write_config(tmp_path, store)
    assert fork(config, override, ranks=1) == [2]
    (line,) = config.with_suffix(".log").read_text().splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.log", "run.yaml"]


def test_a_rank_makes_one_network_at_a_first_start_and_none_as_it_goes_on(store, tmp_path, monkeypatch):
    """One beside that which it trains: on a node, eight of a billion parameters are 32 GB."""
    made, build = [], Denoiser.__init__

    def built(self, config):
        build(self, config)
        made.append(next(self.parameters()).device.type)

    monkeypatch.setattr(Denoiser, "__init__", built)
    config = write_config(tmp_path, store, steps=1, validation={"every": 9})
    for expected in (["meta", "cpu"], ["meta"]):
        made.clear()
        assert train(configs.read(RunConfig, config)) is Ending.DONE
        assert made == expected


def test_a_missing_config_is_one_line(tmp_path):
    refused = command("train", tmp_path / "no.yaml")
    assert refused.returncode == 2
    assert "no such config file" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="compile=true needs g++ on a CPU")
def test_compiled_it_learns_the_same(store, unbroken, tmp_path):
    config = write_config(tmp_path, store)
    assert fork(config, "compile=true", "validation.every=9", "checkpoint.every=9", ranks=1) == [0]
    for line, plain in zip(losses(tmp_path / "runs" / "run"), losses(unbroken), strict=True):
        assert line["loss"] == pytest.approx(plain["loss"], rel=1e-4)


def test_on_a_login_node_torch_is_not_asked_where_cudas_compiler_is():
    """It would print a warning, with every command, where there is one but no GPU."""
    code = "import ldct_dist.train.trainer, sys; sys.exit('torch.utils.cpp_extension' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_help_tells_every_exit_code():
    told = command("train", "--help").stdout
    assert all(f"{ending:d} " in told for ending in Ending)


def test_an_absurd_learning_rate_is_survived(store, tmp_path):
    """The network overflows, and steps whose loss is no number are skipped; the log stays JSON."""
    config = write_config(tmp_path, store)
    assert fork(config, "optim.lr=1e30", "optim.warmup=0", "validation.every=9") == [0, 0]
    run = tmp_path / "runs" / "run"
    assert any(not line["applied"] for line in losses(run))
    assert any(line["loss"] is None for line in losses(run))
    assert (run / "checkpoints" / "step-00000008" / "MANIFEST.json").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_trains_as_a_cpu_does_and_goes_on_after_a_stop(store, tmp_path, precision):
    on_gpu(_same_training, store, tmp_path, precision)


def _same_training(store, folder, precision):
    runs = {}
    for name in ("cpu", "unbroken", "stopped"):
        (place := Path(folder) / name).mkdir()
        config = configs.read(RunConfig, write_config(place, Path(store), precision=precision))
        with pytest.MonkeyPatch.context() as patch:
            if name == "cpu":
                patch.setattr(torch.cuda, "is_available", lambda: False)
            if name == "stopped":
                patch.setattr(Trainer, "train_step", _stopping(Trainer.train_step, at=5))
            assert train(config) is (Ending.RESUMABLE if name == "stopped" else Ending.DONE)
        runs[name] = place / "runs" / "run"
    assert train(config) is Ending.DONE
    assert [start["from_step"] for start in starts(runs["stopped"])] == [0, 5]
    # a GPU's own rounding: TF32 has ten bits
    near = 1e-4 if torch.cuda.get_device_name() == "simulated" else 5e-2
    stopped, unbroken, cpu = map(losses, (runs["stopped"], runs["unbroken"], runs["cpu"]))
    for mine, theirs, expected in zip(stopped, unbroken, cpu, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=near / 10)
        assert mine["loss"] == pytest.approx(expected["loss"], rel=near)


def test_a_step_waits_once_for_the_gpu(store, tmp_path):
    """Each wait leaves the GPU without work until the next operations have reached it."""
    on_gpu(_one_wait_a_step, store, tmp_path)


def _one_wait_a_step(store, folder):
    waits, step, main = [], Trainer.train_step, threading.current_thread()

    def heard(warning, *_):
        if "synchronizing" in str(warning) and threading.current_thread() is main:
            waits[-1].append("".join(traceback.format_stack()))

    def listened_to(trainer, *batch):
        waits.append([])
        torch.cuda.set_sync_debug_mode("warn")
        try:
            return step(trainer, *batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    options = {"steps": 4, "precision": "bf16", "micro_batch": 2}
    config = configs.read(RunConfig, write_config(Path(folder), Path(store), **options))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("always")
        patch.setattr(warnings, "showwarning", heard)
        patch.setattr(Trainer, "train_step", listened_to)
        assert train(config) is Ending.DONE
    assert [len(stacks) for stacks in waits] == [1] * 4, "\n".join(waits[-1])


def _stopping(step, at):
    """A train step during which a scheduler asks to stop, once `at` have been made."""

    def stepped(trainer, *batch):
        if trainer.state.step == at - 1:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer, *batch)

    return stepped
