"""Job scripts as text: the recorded ones, and that no value does anything but be a value."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import command
from ldct_dist import submit
from ldct_dist.cluster.command import parse
from ldct_dist.cluster.parts import array_script
from ldct_dist.cluster.sbatch import Script, render
from ldct_dist.cluster.shape import CPUS_PER_PART, CPUS_PER_RANK, gpus_per_node, shaped
from ldct_dist.cluster.site import Site, read_site
from ldct_dist.cluster.submit import dry_run, start
from ldct_dist.config import to_yaml
from ldct_dist.errors import UserError
from runs import losses, write_config
from stores import make_store

RECORDED = Path(__file__).with_name("scripts")
ROOT = Path(__file__).parents[2]
TRAIN = Script(
    name="mayo",
    command=["-m", "submitit.core._submit", "/scratch/runs/mayo/slurm"],
    code=Path("/scratch/runs/mayo/slurm/code/0123456789abcdef"),
    folder=Path("/scratch/runs/mayo/slurm"),
    workdir=Path("/home/me/ct"),
    python="/home/me/.venv/bin/python",
    options={"nodes": "2", "gpus-per-node": "4", "ntasks-per-node": "4", "time": "24:00:00"},
)
ARRAY = Script(
    name="ldct-ingest",
    command=["-m", "ldct_dist", "ingest", "/data/my dicom", "/scratch/ct.zarr", "dose=0.25"],
    code=Path("/scratch/ct.zarr.jobs/code/0123456789abcdef"),
    folder=Path("/scratch/ct.zarr.jobs"),
    workdir=Path("/home/me/ct"),
    python="/home/me/.venv/bin/python",
    options={"mem": "16G"},
    kind="parts",
    parts=8,
)


def variant(script: Script, **changes: object) -> Script:
    return Script(**{**vars(script), **changes})


SCRIPTS = {
    "train": TRAIN,
    "train_site": variant(TRAIN, site=read_site(str(ROOT / "configs/sites/example.yaml"))),
    "train_apptainer": variant(TRAIN, site=read_site(str(ROOT / "configs/sites/apptainer.yaml"))),
    "train_no_requeue": variant(TRAIN, site=Site(requeue=False)),
    "ingest": ARRAY,
    "finalise": variant(ARRAY, command=["-m", "ldct_dist", "finalise", "/scratch/ct.zarr"], kind="single"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_those_recorded(name):
    """After a change that is meant: LDCT_RECORD=1 pytest tests/cluster/test_sbatch.py, and read the diff."""
    path = RECORDED / f"{name}.sbatch"
    if os.environ.get("LDCT_RECORD") == "1":
        path.write_text(render(SCRIPTS[name]))
    assert render(SCRIPTS[name]) == path.read_text()
    subprocess.run(["bash", "-n", path], check=True)


def test_an_unquoted_number_in_a_profile_is_refused_not_read_as_another_or_as_a_flag(tmp_path):
    """mem: 0 was no option at all, mem: 1 one without a value; and a time of 24 h would be one of 86400 min."""
    for line in ("options: {mem: 0}", "options: {mem: 1}", "options: {time: 24:00:00}", "account: 0123"):
        (tmp_path / "site.yaml").write_text(line)
        with pytest.raises(
            UserError, match=r"(options\.\w+|account): YAML reads it as a number; write it in quotes"
        ):
            read_site(str(tmp_path / "site.yaml"))


def test_software_in_a_home_is_found_from_the_job(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    box = {"image": "docker://lab/ldct", "binds": ["$HOME/data:/data"]}
    assert f"source {tmp_path}/ldct/bin/activate" in render(variant(TRAIN, site=Site(venv="~/ldct")))
    in_a_box = render(variant(TRAIN, site=Site.model_validate({"container": box})))
    assert f"--bind={tmp_path}/data:/data " in in_a_box
    assert " docker://lab/ldct " in in_a_box


def test_the_script_to_copy_does_what_a_submitted_one_does():
    """From the first question to Slurm on, word for word: only its folder and its command are other ones."""
    here = Script("x", ["-m", "ldct_dist", "train", "$@"], Path("/code"), Path("/here"), Path("/"), "python")
    submitted = "".join(render(here).partition("insist()")[1:])
    for words, own in (("=/here/", "=$PWD/"), ("'$@'", '"$@"')):
        assert words in submitted
        submitted = submitted.replace(words, own)
    submitted = "".join(line for line in submitted.splitlines(keepends=True) if "SUBMITIT" not in line)
    copied = (ROOT / "slurm" / "train.sbatch").read_text()
    assert "".join(copied.partition("insist()")[1:]) == submitted
    assert f"#SBATCH --cpus-per-task={CPUS_PER_RANK}\n" in copied


@pytest.mark.parametrize("verb", ["ingest", "denoise"])
def test_a_part_has_the_cores_that_the_script_to_copy_has(verb, tmp_path):
    script = array_script(verb, [verb], tmp_path, 2, {}, None)
    cores = f"#SBATCH --cpus-per-task={CPUS_PER_PART}"
    assert f"{cores}\n" in render(script)
    assert cores in (ROOT / "slurm" / f"{verb}.sbatch").read_text()


HOSTILE = "a b'c\"$(touch pwned)`touch pwned`;touch pwned;#%j\\"
STANDIN = """\
#!{python}
import json, os, sys
with open({log!r}, "a") as f:
    f.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
if "srun" in sys.argv[0]:
    os.execvp(sys.argv[sys.argv.index("bash")], sys.argv[sys.argv.index("bash"):])
"""


@pytest.fixture
def slurm(tmp_path):
    """Programs in place of Slurm's, that note what they are called with; the environment of a job with them."""
    (tmp_path / "bin").mkdir()
    for name in ("srun", "scontrol", "sbatch", "squeue", "rank", "apptainer"):
        program = tmp_path / "bin" / name
        program.write_text(STANDIN.format(python=sys.executable, log=str(tmp_path / "calls")))
        program.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "3"}


def calls(tmp_path: Path) -> dict[str, list[str]]:
    return {words[0]: words[1:] for words in map(json.loads, (tmp_path / "calls").read_text().splitlines())}


def test_whatever_values_hold_they_reach_the_rank_as_they_are(slurm, tmp_path):
    container = {"image": HOSTILE, "binds": [HOSTILE], "python": "rank", "command": "apptainer"}
    site = Site.model_validate({"container": container, "gpu_bind": HOSTILE, "env": {"NCCL_IB_HCA": HOSTILE}})
    script = Script(
        name="run",
        command=["-m", HOSTILE],
        code=Path("/code") / HOSTILE.replace("/", ""),
        folder=tmp_path / HOSTILE,
        workdir=Path("/"),
        python="unused",
        options={"comment": HOSTILE},
        site=site,
    )
    done = subprocess.run(
        ["bash", "-c", render(script)], env=slurm, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = calls(tmp_path)
    assert f"--gpu-bind={HOSTILE}" in seen["srun"]
    assert "--cpus-per-task=3" in seen["srun"]
    assert seen["apptainer"][-3:] == ["rank", "-m", HOSTILE]
    assert f"--bind={HOSTILE}" in seen["apptainer"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin", "calls"]


@settings(deadline=None, derandomize=True)
@given(st.text(min_size=1))
def test_an_option_is_one_line_of_the_script_or_refused(value):
    script = variant(TRAIN, options={"comment": value})
    if any(ord(c) < 32 or ord(c) == 127 for c in value):
        with pytest.raises(UserError, match="control character"):
            render(script)
    else:
        assert render(script).count("\n") == render(variant(TRAIN, options={"comment": "x"})).count("\n")


@pytest.mark.parametrize(
    "options", [{"array": "1"}, {"output": "x"}, {"-x": "1"}, {"a b": "1"}, {"A=b": "1"}]
)
def test_options_that_submit_sets_or_sbatch_cannot_have_are_refused(options):
    with pytest.raises(UserError):
        render(variant(TRAIN, options=options))


def test_a_dry_run_prints_the_script_and_writes_nothing(tmp_path):
    config = write_config(tmp_path, tmp_path / "ct.zarr", steps=4, data={"batch": 8})
    done = command("submit", config, "--nodes", "2", "--gpus-per-node", "a100:4", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --ntasks-per-node=4\n" in done.stdout
    assert f"#SBATCH --cpus-per-task={CPUS_PER_RANK}\n" in done.stdout
    assert list(tmp_path.iterdir()) == [config]


@pytest.mark.parametrize(
    ("time", "warning"),
    [("5", 150), ("5:30", 165), ("0:09:00", 270), ("0-0:1", 30), ("10:00", 300), ("1-0", 300), ("0", 300)],
)
def test_a_job_that_is_short_is_warned_half_way_not_as_it_starts(time, warning):
    script = render(variant(TRAIN, options=TRAIN.options | {"time": time}))
    assert f"#SBATCH --signal=USR2@{warning}\n" in script


@pytest.mark.parametrize(
    ("resource", "gpus"),
    [
        ({"gpus-per-node": "4"}, 4),
        ({"gpus-per-node": "a100:2,v100:2"}, 4),
        ({"gres": "gpu:4"}, 4),
        ({"gres": "gpu"}, 1),
        ({"gres": "tmpdir:100G,gpu:a100:2"}, 2),
        ({"gres": "shard:2"}, 0),
        ({}, 0),
    ],
)
def test_a_rank_is_started_for_each_gpu_however_they_are_asked_for(resource, gpus):
    assert gpus_per_node(resource) == gpus
    assert shaped(resource, Site())["ntasks-per-node"] == str(gpus or 1)


def test_what_a_profile_asks_for_counts_as_if_it_were_given(tmp_path):
    (tmp_path / "site.yaml").write_text("options: {gpus-per-node: '4', nodes: '2'}\ncpus_per_task: 6\n")
    config = write_config(tmp_path, tmp_path / "ct.zarr", data={"batch": 8})
    site = str(tmp_path / "site.yaml")
    request = parse([str(config)], site, False)
    assert (request.tasks_per_node, request.tasks) == (4, 8)
    assert "#SBATCH --ntasks-per-node=4\n" in dry_run(request)
    assert "#SBATCH --cpus-per-task=6\n" in dry_run(request)
    assert parse([str(config), "--gpus-per-node=2", "--nodes=1"], site, False).tasks == 2


def test_cores_by_gpu_are_left_to_whoever_asks_so():
    assert "cpus-per-task" not in shaped({"cpus-per-gpu": "6", "gpus-per-node": "2"}, Site())


@pytest.mark.parametrize(
    ("profile", "words", "gone", "kept"),
    [
        ("cpus_per_task: 8", ["--cpus-per-gpu=6", "--gpus-per-node=2"], "cpus-per-task", "cpus-per-gpu=6"),
        ("options: {cpus-per-gpu: '6'}", ["--cpus-per-task=8"], "cpus-per-gpu", "cpus-per-task=8"),
        ("options: {gres: 'gpu:4'}", ["--gpus-per-node=2"], "gres", "ntasks-per-node=2"),
        ("options: {gres: 'gpu:4,tmpdir:9G'}", ["--gpus-per-node=2"], "gres=gpu", "gres=tmpdir:9G"),
        ("options: {gpus-per-node: '4'}", ["--gres=gpu:2"], "gpus-per-node", "ntasks-per-node=2"),
        ("options: {gpus-per-node: '4'}", ["--gres=tmpdir:9G"], "gres=gpu", "gpus-per-node=4"),
        ("options: {mem: '0'}", ["--mem-per-gpu=60G", "--gpus-per-node=2"], "mem=", "mem-per-gpu=60G"),
    ],
)
def test_an_option_replaces_the_profiles_even_if_it_is_spelt_otherwise(tmp_path, profile, words, gone, kept):
    (tmp_path / "site.yaml").write_text(f"{profile}\n")
    config = write_config(tmp_path, tmp_path / "ct.zarr")
    script = dry_run(parse([str(config), *words], str(tmp_path / "site.yaml"), False))
    assert f"#SBATCH --{gone}" not in script
    assert f"#SBATCH --{kept}\n" in script


def test_a_task_of_an_array_may_take_fewer_gpus_than_a_rank_of_the_site(tmp_path):
    (tmp_path / "site.yaml").write_text("options: {gres: 'gpu:4'}\n")
    script = render(
        array_script("denoise", ["denoise"], tmp_path, 2, {"gpus": "1"}, str(tmp_path / "site.yaml"))
    )
    assert "#SBATCH --gpus=1\n" in script
    assert "gres" not in script


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "two"], "--nodes=two: give a number"),
        (["--gpus=8", "--nodes=2"], "--gpus=8: say how many GPUs of a node"),
        (["--gpus-per-task=1"], "--gpus-per-task=1: say how many"),
        (["--gres=gpu:4", "--ntasks-per-node=2"], "2 ranks per node for 4 GPUs"),
        (["--comment", "a\nb"], "control character"),
        (["name=$(touch pwned)"], "name: "),
        (["name=a b"], "name: "),
        (["-N2"], "long names"),
        (["--nodes=3"], "data.batch=4 cannot be shared evenly by 3 ranks"),
        (["data.crop=[8,20,24]"], r"data.crop=\[8, 20, 24\]: unet3d takes crops"),
        (["loss.margin=[4,0,0]"], "loss.margin="),
        (["validation.protocol=abdomin"], "abdomin"),
        (["zero=1"], "are for strategy=deepspeed"),
    ],
)
def test_a_mistake_is_refused_and_nothing_is_written(tmp_path, words, message):
    config = write_config(tmp_path, tmp_path / "ct.zarr", steps=4)
    with pytest.raises(UserError, match=message):
        start(parse([str(config), *words], None, False))
    assert list(tmp_path.iterdir()) == [config]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.dose=0.1"], "lack dose 0.10"),
        (["data.split=tune"], "no case in split 'tune'"),
        (["validation.split=tune"], "no case in split 'tune'"),
        (["data.memory_mib=1"], "data.memory_mib=1 holds too few blocks"),
    ],
)
def test_a_store_that_lacks_what_the_run_needs_is_refused_before_the_job_waits(tmp_path, words, message):
    store = make_store(tmp_path / "ct.zarr", [(10, 40, 40), (8, 32, 40)], ["train", "val"]).path
    before = sorted(tmp_path.rglob("*"))
    config = write_config(tmp_path, store)
    with pytest.raises(UserError, match=message):
        start(parse([str(config), *words], None, False))
    assert sorted(tmp_path.rglob("*")) == sorted([*before, config])
    # Until an ingest that the job waits for is done, the store says nothing.
    assert dry_run(parse([str(config), *words, "--dependency=afterok:7"], None, False))


def test_a_folder_that_is_no_store_is_refused_before_the_job_waits(tmp_path):
    config = write_config(tmp_path, tmp_path / "ct.zarr", steps=4)
    assert dry_run(parse([str(config)], None, False))  # nodes may see a store that this machine does not
    (tmp_path / "ct.zarr").mkdir()
    with pytest.raises(UserError, match=r"ct\.zarr: not a store"):
        dry_run(parse([str(config)], None, False))


@pytest.mark.parametrize("word", ["%j", "%t", "%A", "%a"])
@pytest.mark.parametrize("cluster", ["slurm", "local", "debug"])
def test_a_run_folder_that_submitit_would_look_for_elsewhere_is_refused(tmp_path, word, cluster):
    """It puts numbers in place of these, so its files would lie beside the run's folder, where other ranks find none."""
    config = write_config(tmp_path, tmp_path / "ct.zarr", steps=4)
    request = parse([str(config), f"runs={tmp_path}/100{word}"], None, False)
    with pytest.raises(
        UserError, match=rf"^run folder {tmp_path}/100{word}/run: .* {word}; choose another with runs="
    ):
        start(request, cluster)
    with pytest.raises(UserError, match=word):
        dry_run(request)
    assert list(tmp_path.iterdir()) == [config]


def test_in_the_background_a_run_may_lie_anywhere_else(tmp_path, monkeypatch):
    """Behind a relative path and a link, too."""
    make_store(tmp_path / "ct.zarr", [(10, 40, 40), (8, 32, 40)], ["train", "val"])
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    folder = "~ a b'c\"$(touch pwned)`touch pwned`;#\\ Zoë 5%"
    job = submit(
        write_config(tmp_path, "ct.zarr", steps=1, runs=f"link/{folder}"), cluster="local", ntasks_per_node=1
    )
    assert job.results() == [0]
    run = tmp_path / "real" / folder / "run"
    assert len(losses(run)) == 1
    assert job.paths.stdout == run / "slurm" / f"{job.job_id}_0_log.out"
    assert "done: 1 steps" in job.stdout()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ct.zarr", "link", "real", "run.yaml"]


def test_a_link_to_itself_is_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    config = write_config(tmp_path, tmp_path / "ct.zarr", steps=4, runs=str(tmp_path / "loop" / "runs"))
    with pytest.raises(
        UserError, match=r"loop/runs/run/.*: cannot be read \(Too many levels of symbolic links\); "
    ):
        submit(config, cluster="local")


def test_a_site_or_a_cluster_that_is_not_there_is_refused(tmp_path):
    config = write_config(tmp_path, tmp_path / "ct.zarr", steps=4)
    with pytest.raises(UserError, match=r"no configs/sites/nowhere\.yaml here"):
        submit(config, site="nowhere")
    with pytest.raises(UserError, match="one of slurm, local, debug"):
        submit(config, cluster="pbs")
    assert list(tmp_path.iterdir()) == [config]


def test_a_run_that_was_another_is_refused_before_it_waits_in_the_queue(tmp_path):
    config = write_config(tmp_path, tmp_path / "ct.zarr")
    before = parse([str(config)], None, False)
    (before.run / "checkpoints" / "step-00000003").mkdir(parents=True)
    (before.run / "config.yaml").write_text(to_yaml(before.config))
    with pytest.raises(UserError, match=r"holds another run: data\.batch was 4, now 2"):
        start(parse([str(config), "data.batch=2"], None, False))
    assert not before.folder.exists()


def test_here_and_now_it_is_the_same_run(tmp_path, capfd):
    make_store(tmp_path / "ct.zarr", [(10, 40, 40), (8, 32, 40)], ["train", "val"])
    job = submit(write_config(tmp_path, tmp_path / "ct.zarr", steps=4), cluster="debug")
    assert job.results() == [0]
    assert "done: 4 steps" in capfd.readouterr().out
