"""A sweep's runs and names, what is refused before anything starts, and what TensorBoard makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler

from commands import command, commands_on_path
from ldct_dist.checkpoint.manifest import Manifest
from ldct_dist.cluster.array import submit_array
from ldct_dist.cluster.record import job_of
from ldct_dist.cluster.sweep import Point, dotted, plan, run_here
from ldct_dist.config import to_yaml
from ldct_dist.errors import UserError
from runs import write_config
from stores import make_store
from your_own import NAME


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path, tmp_path / "ct.zarr", steps=4, log={"images": False})


def test_every_combination_is_a_run_whose_name_follows_from_its_values(config, tmp_path):
    sweep = plan(config, ["lr=1e-4,3e-4", "model=unet3d-xs,nafnet3d-xs", "steps=9"])
    assert [p.config.name for p in sweep.points] == [
        "lr-0.0001_model-unet3d-xs",
        "lr-0.0001_model-nafnet3d-xs",
        "lr-0.0003_model-unet3d-xs",
        "lr-0.0003_model-nafnet3d-xs",
    ]
    last = sweep.points[-1]
    assert (last.config.optim.lr, last.config.model.name, last.config.steps) == (3e-4, "nafnet3d", 9)
    assert last.place == {"lr": 3e-4, "model": "nafnet3d-xs"}
    assert last.folder == tmp_path / "runs" / "run-sweep" / last.config.name
    assert list(tmp_path.iterdir()) == [config]  # a plan writes nothing


@pytest.mark.usefixtures("my_nets")
def test_networks_of_other_packages_and_their_options_are_axes_too(tmp_path):
    config = write_config(tmp_path, tmp_path / "ct.zarr", model={"size": "m"})
    sweep = plan(config, [f"model=unet3d-s,{NAME}"])
    assert [p.config.model.label for p in sweep.points] == ["unet3d-s", NAME]
    assert [p.config.name for p in sweep.points] == ["model-unet3d-s", f"model-{NAME}"]
    sweep = plan(config, [f"model={NAME}", "model.options.width=4,8"])
    assert [p.config.model.options for p in sweep.points] == [{"width": 4}, {"width": 8}]
    assert [p.config.name for p in sweep.points] == ["width-4", "width-8"]


def test_a_value_has_one_name_however_it_is_written(config):
    names = [
        [p.config.name for p in plan(config, [axis]).points]
        for axis in ("lr=1e-4,3e-4", "optim.lr=0.0001,.0003")
    ]
    assert names[0] == names[1]
    assert [p.config.name for p in plan(config, ["lr=1e30,1e-30"]).points] == ["lr-1e30", "lr-1e-30"]


def test_commas_within_brackets_belong_to_the_value(config):
    sweep = plan(config, ["crop=[8,24,24],[8,16,16]"])
    assert [p.config.data.crop for p in sweep.points] == [(8, 24, 24), (8, 16, 16)]
    assert [p.config.name for p in sweep.points] == ["crop-8-24-24", "crop-8-16-16"]


def test_short_keys_are_taken_only_where_they_say_one_thing():
    assert dotted("lr") == "optim.lr"
    assert dotted("seed") == "seed"
    assert dotted("batch") == "data.batch"
    with pytest.raises(UserError, match=r"which one, .*checkpoint\.every"):
        dotted("every")
    with pytest.raises(UserError, match=r"name one of optim\.name"):
        dotted("optim")


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (["lr=1e-4"], "several values"),
        (["lr"], "key=value"),
        (["lr=1e-4,0.0001"], "twice"),
        (["lr=1e-4,much"], "optim.lr"),
        (["lrr=1e-4,3e-4"], r"no such setting; did you mean optim\.lr\?"),
        (["model=unet3d-s,unet3d-q"], "comes in xs"),
        (["model=unet3d,nafnet3d"], "its size"),
    ],
)
def test_a_mistake_in_any_run_is_said_before_the_first_starts(config, tmp_path, axes, words):
    with pytest.raises(UserError, match=words):
        plan(config, axes)
    assert list(tmp_path.iterdir()) == [config]


def hparams_view(logdir: Path) -> dict[str, dict[str, float]]:
    """TensorBoard's HParams table as its own backend makes it: metrics by tag, by the run's data.split."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    context = Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(logdir))))
    request = api_pb2.ListSessionGroupsRequest(slice_size=100, allowed_statuses=[0, 1, 2, 3])
    groups = Handler(RequestContext(), context, "", request).run().session_groups
    return {
        g.hparams["data.split"].string_value: {m.name.tag: m.value for m in g.metric_values} for g in groups
    }


def test_a_sweep_trains_what_is_not_done_past_what_fails_and_shows_in_one_hparams_view(tmp_path):
    make_store(tmp_path / "ct.zarr", [(10, 40, 40), (8, 32, 40)], ["train", "val"])
    config, folder, said = (
        write_config(tmp_path, tmp_path / "ct.zarr", steps=4, log={"images": False}),
        tmp_path / "runs" / "run-sweep",
        [],
    )
    sweep = plan(config, ["data.split=nowhere,train"])
    assert run_here(sweep, config, ranks=1, say=said.append) == 1
    assert said == [
        "split-nowhere (1/2): training",
        "split-nowhere (1/2): ended with exit code 2",
        "split-train (2/2): training",
        f"1 of 2 runs done -> {folder}",
    ]
    view = hparams_view(folder)
    assert view.keys() == {"nowhere", "train"}
    assert view["train"]["train/loss"] > 0
    assert view["train"]["validation/rmse_hu (abdomen)"] > 0
    losses, said[:] = (folder / "split-train" / "losses.jsonl").read_text(), []
    assert run_here(sweep, config, ranks=1, say=said.append) == 1
    assert said[2] == "split-train (2/2): done already"
    assert (folder / "split-train" / "losses.jsonl").read_text() == losses


def test_a_local_sweep_without_its_store_starts_no_run(config, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.zarr: not a store"):
        run_here(plan(config, ["seed=1,2", "store=nowhere.zarr"]), config, ranks=1)
    assert list(tmp_path.iterdir()) == [config]


SBATCH = """\
echo "$@" >> {calls}
echo 7
"""


def test_an_array_holds_the_runs_that_are_neither_done_nor_queued(config, tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    squeue = "echo '7|7_0|PENDING|Resources|0|N/A|'; echo '7|7_1|CANCELLED|None|0|N/A|'"
    path = commands_on_path(tmp_path / "bin", sbatch=SBATCH.format(calls=calls), srun="", squeue=squeue)
    monkeypatch.setenv("PATH", path)
    sweep, said = plan(config, ["seed=1,2"]), []
    assert submit_array(sweep, {"gpus-per-node": "4"}, None, said.append) == "7"
    job = sweep.folder / "slurm" / "job.sbatch"
    script = job.read_text()
    assert "#SBATCH --array=0-1\n" in script
    assert f"#SBATCH --output={sweep.folder}/slurm/%A_%a.log\n" in script
    assert "#SBATCH --ntasks-per-node=4" in script
    named = [line for line in script.splitlines() if "sweep-task" in line]
    assert [words.split("/")[-3] for words in named[0].split()[-2:]] == ["seed-1", "seed-2"]
    assert job_of(sweep.points[1].folder) == "7_1"

    assert submit_array(sweep, {}, None, said.append) == "7"
    assert said == ["seed-1: in the queue already, job 7_0"]
    assert "#SBATCH --array=0-0\n" in job.read_text()
    assert calls.read_text().splitlines() == 2 * [f"--parsable {job}"]
    assert job_of(sweep.points[1].folder) == "7_0"  # the only task of the second array


def finish(point: Point) -> None:
    """Leave what a run leaves that has come to its end."""
    saved = point.folder / "checkpoints" / f"step-{point.config.steps:08d}"
    saved.mkdir(parents=True)
    Manifest(1, point.config.steps, {}, {}).write(saved)
    (point.folder / "config.yaml").write_text(to_yaml(point.config))


def test_runs_are_done_when_they_have_the_steps_that_are_asked_for_now(config, tmp_path, monkeypatch):
    path = commands_on_path(tmp_path / "bin", sbatch="echo 7", srun="", squeue="")
    monkeypatch.setenv("PATH", path)
    for point in plan(config, ["seed=1,2", "steps=4"]).points:
        finish(point)
    said: list[str] = []
    assert submit_array(plan(config, ["seed=1,2", "steps=4"]), {}, None, said.append) is None
    assert said == ["seed-1: done already", "seed-2: done already"]
    monkeypatch.setenv("PATH", str(tmp_path))  # without Slurm
    assert submit_array(plan(config, ["seed=1,2", "steps=4"]), {}, None, said.append) is None
    monkeypatch.setenv("PATH", path)
    assert submit_array(plan(config, ["seed=1,2", "steps=9"]), {}, None, said.append) == "7"


def test_a_dry_run_prints_the_script_of_what_is_not_done_and_writes_nothing(config, tmp_path):
    """Without Slurm, too."""
    axes = ["seed=1,2,3", "--gpus-per-node=4", "--dry-run"]
    first, *others = plan(config, axes[:1]).points
    finish(first)
    before = sorted(tmp_path.rglob("*"))
    done = command("sweep", config, *axes)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("#!/bin/bash\n#SBATCH --array=0-1\n")
    assert "#SBATCH --ntasks-per-node=4\n" in done.stdout
    assert [f"/seed-{n}/" in done.stdout for n in (1, 2, 3)] == [False, True, True]
    for words in (["--no-requeue"], ["batch=6"], ["crop=[8,24,24],[8,20,24]"]):
        refused = command("sweep", config, *axes, *words)
        assert (refused.returncode, refused.stdout) == (2, "")
    assert sorted(tmp_path.rglob("*")) == before
    for point in others:
        finish(point)
    assert command("sweep", config, *axes).stdout == "nothing is left to do\n"


def test_a_run_that_a_sweep_is_to_gain_is_not_left_where_sbatch_refuses(config, tmp_path, monkeypatch):
    squeue = "echo '7|7_0|CANCELLED|None|0|N/A|'; echo '7|7_1|CANCELLED|None|0|N/A|'"
    path = commands_on_path(tmp_path / "bin", sbatch="echo 7", srun="", squeue=squeue)
    monkeypatch.setenv("PATH", path)
    sweep = plan(config, ["seed=1,2"])
    submit_array(sweep, {}, None)
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'error: no such partition' >&2\nexit 1\n")
    with pytest.raises(UserError, match="no such partition"):
        submit_array(plan(config, ["seed=1,2,3"]), {}, None)
    assert sorted(folder.name for folder in sweep.folder.glob("seed-*")) == ["seed-1", "seed-2"]
    assert [job_of(point.folder) for point in sweep.points] == ["7_0", "7_1"]


def test_runs_that_were_trained_with_other_settings_are_not_passed_over_as_done(config):
    finish(plan(config, ["seed=1,2"]).points[1])
    with pytest.raises(UserError, match=r"seed-2 holds another run: data\.batch was 4, now 2"):
        plan(config, ["seed=1,2", "batch=2"])


def test_where_no_folder_can_be_it_is_one_line(config, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for place in (tmp_path / "loop", config):
        sweep = plan(config, ["lr=1e-4,3e-4", f"runs={place}"])
        with pytest.raises(UserError, match=rf"{place}/run-sweep/lr-0.0001/.*: cannot be read \(.*\); "):
            submit_array(sweep, {"time": "10"}, None)


def test_a_sweep_that_slurm_would_refuse_leaves_nothing_behind(config, tmp_path):
    sweep = plan(config, ["seed=1,2"])
    for options, words in (({"no-requeue": True}, "requeuing"), ({"array": "0-9"}, "submit sets this")):
        with pytest.raises(UserError, match=words):
            submit_array(sweep, options, None)
    assert list(tmp_path.iterdir()) == [config]
