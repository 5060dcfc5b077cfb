from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from commands import commands_on_path
from ldct_dist import cli
from ldct_dist.cluster import parts
from ldct_dist.cluster.command import parse
from ldct_dist.cluster.submit import _executor_here
from ldct_dist.models.registry import ModelConfig, build
from ldct_dist.models.weights import save_weights
from runs import write_config

VERBS = {
    "submit": ["submit", "run.yaml"],
    "sweep": ["sweep", "run.yaml", "lr=1e-4,3e-4"],
    "ingest": ["submit", "ingest", "in", "my ct.zarr", "dose=0.25"],
    "denoise": ["submit", "denoise", "w.safetensors", "in", "out", "--strength=0.8"],
    "doctor": ["doctor", "run.yaml", "--nodes=2"],
}
HERE = {
    "ingest": "ldct-dist ingest in 'my ct.zarr' dose=0.25",
    "denoise": "ldct-dist denoise w.safetensors in out --strength=0.8 --part=0/1",
}
KEPT = {
    "submit": "runs/run",
    "sweep": "runs/run-sweep",
    "ingest": "my ct.zarr.jobs",
    "denoise": "out.jobs",
}
UNREACHABLE = """\
echo 'error: fetch_config: DNS SRV lookup failed' >&2
echo "$(basename "$0"): fatal: Could not establish a configuration source" >&2
exit 1
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with what the verbs are given, and a Slurm whose commands find no controller."""
    slurm = dict.fromkeys(("sbatch", "srun", "squeue", "sacct"), UNREACHABLE)
    monkeypatch.setenv("PATH", commands_on_path(tmp_path / "bin", **slurm))
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, tmp_path / "ct.zarr")
    (tmp_path / "in" / "case").mkdir(parents=True)
    save_weights(tmp_path / "w.safetensors", build(ModelConfig(size="xs")))
    return tmp_path


def refused(folder: Path, monkeypatch, capfd, *words: str) -> str:
    """The one line in which these words are refused, which leaves every file as it was."""
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["ldct-dist", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    (line,) = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert sorted(folder.rglob("*")) == before
    return line


@pytest.mark.parametrize("cluster", ["local", "debug"])
@pytest.mark.parametrize("verb", HERE)
def test_an_array_on_this_machine_is_refused_with_the_command_to_give(
    folder, monkeypatch, capfd, verb, cluster
):
    line = refused(folder, monkeypatch, capfd, *VERBS[verb], "--cluster", cluster)
    assert line.startswith(f"error: --cluster {cluster}: ")
    assert line.endswith(f"; on this machine: {HERE[verb]}")


@pytest.mark.parametrize(
    ("verb", "option"),
    [
        ("submit", "--parts=4"),
        ("submit", "--at-once=2"),
        ("ingest", "--allow-new-data"),
        ("denoise", "--allow-new-data"),
    ],
)
def test_an_option_of_another_kind_of_job_is_refused(folder, monkeypatch, capfd, verb, option):
    line = refused(folder, monkeypatch, capfd, *VERBS[verb], option)
    assert line.startswith("error: --")
    assert option.partition("=")[0] in line


@pytest.mark.parametrize("gpus", [None, "2,3"])
@pytest.mark.parametrize("options", [[], ["--gpus-per-node=2"]])
def test_a_run_in_the_background_here_sees_the_gpus_that_its_command_does(folder, monkeypatch, gpus, options):
    if gpus is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    request = parse(["run.yaml", *options], site=None, allow_new_data=False)
    job = _executor_here(request, "local").submit(os.getenv, "CUDA_VISIBLE_DEVICES")
    assert set(job.results()) == {gpus}


@pytest.mark.parametrize("verb", VERBS)
def test_where_slurm_cannot_be_reached_one_line_says_what_to_do_and_nothing_is_written(
    folder, monkeypatch, capfd, verb
):
    line = refused(folder, monkeypatch, capfd, *VERBS[verb])
    instead = {"submit": "with --cluster local", "sweep": "with --cluster local", "doctor": "without --nodes"}
    assert (
        f"on a login node, or {(instead | {v: f'on this machine by {HERE[v]}' for v in HERE})[verb]}" in line
    )
    assert line.endswith("(squeue: fatal: Could not establish a configuration source)")


@pytest.mark.parametrize("verb", VERBS)
def test_so_does_it_where_there_is_no_slurm(folder, monkeypatch, capfd, verb):
    monkeypatch.setenv("PATH", str(folder / "in"))
    line = refused(folder, monkeypatch, capfd, *VERBS[verb])
    assert "on a login node, or " in line
    assert line.endswith("(sbatch is not on the PATH of this machine)")


@pytest.mark.parametrize("verb", KEPT)
def test_what_sbatch_refuses_leaves_nothing_new_behind(folder, monkeypatch, capfd, verb):
    (folder / "bin" / "squeue").write_text("#!/bin/sh\n")
    sbatch, kept = folder / "bin" / "sbatch", folder / KEPT[verb]
    refusing = "#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n"
    sbatch.write_text(refusing)
    line = refused(folder, monkeypatch, capfd, *VERBS[verb], "--partition=x")
    assert line.endswith("error: invalid partition specified: x")
    sbatch.write_text(f"#!/bin/sh\necho {'Submitted batch job ' if verb == 'submit' else ''}7\n")
    monkeypatch.setattr(sys, "argv", ["ldct-dist", *VERBS[verb]])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    capfd.readouterr()
    there = {path for path in kept.rglob("*") if path.is_file()}
    sbatch.write_text(refusing)
    monkeypatch.setattr(sys, "argv", ["ldct-dist", *VERBS[verb], "--partition=x"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert there
    assert all(path.is_file() for path in there)  # what an earlier submission left stays


def test_what_an_earlier_submission_left_stays_where_slurm_cannot_be_reached(folder, monkeypatch, capfd):
    kept = folder / "runs" / "run" / "slurm" / "job.json"
    kept.parent.mkdir(parents=True)
    kept.write_text('{"job": "7"}')
    assert "on a login node, or with --cluster local" in refused(folder, monkeypatch, capfd, *VERBS["submit"])
    line = refused(folder, monkeypatch, capfd, *VERBS["submit"], "--cluster=local")
    assert line.startswith("error: an earlier job of this run may still exist")
    assert (
        "from a login node, or, if you know that there is no such job, go on with `ldct-dist train`" in line
    )
    assert kept.read_text() == '{"job": "7"}'


@pytest.mark.parametrize("option", ["--nodes=0", "--tasks=0", "--write-mib=0"])
def test_a_doctor_of_nothing_is_refused(monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["ldct-dist", "doctor", option])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert option.partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("ingest", "{source} {store} [KEY=VALUE]..."),
        ("submit", "[OPTIONS] {CONFIG|ingest|denoise|evaluate|KEY=VALUE|--SBATCH-OPTION=VALUE}..."),
        ("sweep", "{config} {KEY=VALUE,...|--SBATCH-OPTION=VALUE}..."),
        ("doctor", "[OPTIONS] [CONFIG|--SRUN-OPTION=VALUE]..."),
    ],
)
def test_usage_says_once_what_may_be_given_again_and_again(monkeypatch, capsys, verb, words):
    monkeypatch.setattr(sys, "argv", ["ldct-dist", verb, "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    usage = capsys.readouterr().out.partition("╭")[0]
    assert words.replace(" ", "") in "".join(usage.split())  # lines may be broken anywhere


def test_each_job_of_an_array_says_what_it_does(folder, monkeypatch, capsys):
    monkeypatch.setattr(parts, "submit_parts", lambda array: ["7", "8"])
    (folder / "dicom").mkdir()
    words = ["submit", "ingest", "dicom", "ct.zarr", "--parts", "3"]
    monkeypatch.setattr(sys, "argv", ["ldct-dist", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    array, end, _ = capsys.readouterr().out.splitlines()
    assert array == "job      7  array of 3 tasks"
    assert end.startswith("job      8  after the array: ldct-dist finalise ")
