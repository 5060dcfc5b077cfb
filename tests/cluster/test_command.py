"""What `submit` reads from its words: a run, or the parts of an ingest or of a cohort, refused before they wait."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from commands import command, commands_on_path
from ldct_dist.cli import app
from ldct_dist.cluster.command import MOST_PARTS, announce, parse, parse_parts, split
from ldct_dist.cluster.parts import submit_parts
from ldct_dist.cluster.sbatch import render
from ldct_dist.ct.volume import Volume
from ldct_dist.denoise.claim import claim
from ldct_dist.denoise.volumes import SeriesDenoiser
from ldct_dist.errors import UserError
from ldct_dist.models.registry import ModelConfig, build
from ldct_dist.models.weights import save_weights
from ldct_dist.store import layout
from runs import write_config


def test_words_of_the_command_line_are_told_apart():
    words = [
        "c.yaml",
        "optim.lr=1",
        "--nodes",
        "2",
        "--gres=gpu:4",
        "--exclusive",
        "seed=3",
        "--comment",
        "a b",
    ]
    assert split(words) == (
        ["c.yaml", "optim.lr=1", "seed=3"],
        {"nodes": "2", "gres": "gpu:4", "exclusive": True, "comment": "a b"},
    )


def test_a_flag_of_sbatch_takes_no_word_for_its_value():
    """An evaluation would go without the weights, and say nothing."""
    words = ["evaluate", "--exclusive", "runs/mayo", "--requeue", "ct.zarr", "--partition", "gpu"]
    assert split(words) == (
        ["evaluate", "runs/mayo", "ct.zarr"],
        {"exclusive": True, "requeue": True, "partition": "gpu"},
    )


def test_the_commands_that_a_submission_names_can_be_pasted_into_a_shell(tmp_path):
    folder = tmp_path / "CT studies"
    folder.mkdir()
    request = parse([str(write_config(folder, folder / "ct.zarr"))], None, False)
    told = [line.split(maxsplit=1)[1] for line in announce(request, SimpleNamespace(job_id=7), "slurm")]
    status, board = (shlex.split(line) for line in told if line.startswith(("ldct-dist", "tensorboard")))
    assert status == ["ldct-dist", "status", str(request.run)]
    assert board == ["tensorboard", "--logdir", str(folder / "runs")]


def test_what_a_run_reads_and_is_not_there_is_told_at_its_submission(tmp_path):
    config = write_config(tmp_path, tmp_path / "ct.zarr", init_from=str(tmp_path / "w.safetensors"))
    request, job = parse([str(config)], None, False), SimpleNamespace(job_id=7)
    missing = [line.split()[1] for line in announce(request, job, "slurm") if line.startswith("note")]
    assert missing == [str(tmp_path / "ct.zarr"), str(tmp_path / "w.safetensors")]
    for path in (request.config.store, request.config.init_from):
        path.mkdir()
    assert not any(line.startswith("note") for line in announce(request, job, "slurm"))


def test_every_part_of_a_cohort_is_given_the_weights_of_its_submission(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", commands_on_path(tmp_path / "bin", sbatch="echo 7", srun="", squeue=""))
    for case in ("a", "b"):
        (tmp_path / "in" / case).mkdir(parents=True)
    weights, out = tmp_path / "w.safetensors", tmp_path / "out"
    save_weights(weights, build(ModelConfig(size="xs")))
    array = parse_parts(
        ["denoise", "--bf16", str(weights), str(tmp_path / "in"), str(out), "--strength=0.85"], None, None
    )
    assert not array.script.folder.exists()
    then = weights.read_bytes()
    assert submit_parts(array) == ["7"]
    weights.write_bytes(b"of a later step")
    (line,) = [
        line for line in (tmp_path / "out.jobs/array.sbatch").read_text().splitlines() if " denoise " in line
    ]
    given = line.partition(" denoise ")[2].split()
    assert Path(given[0]).read_bytes() == then
    assert given[1:] == [
        str(tmp_path / "in"),
        str(out),
        "--bf16",
        "--strength=0.85",
        "--part",
        '"$SLURM_ARRAY_TASK_ID/2"',
    ]


def test_a_large_cohort_is_no_larger_an_array_than_slurm_takes(tmp_path):
    for i in range(MOST_PARTS + 1):
        (tmp_path / "in" / str(i)).mkdir(parents=True)
    save_weights(tmp_path / "w.safetensors", build(ModelConfig(size="xs")))
    words = ["denoise", *(str(tmp_path / name) for name in ("w.safetensors", "in", "out"))]
    script = render(parse_parts(words, None, None).script)
    assert f"#SBATCH --array=0-{MOST_PARTS - 1}\n" in script
    assert f'--part "$SLURM_ARRAY_TASK_ID/{MOST_PARTS}"' in script
    assert parse_parts(words, None, 999).script.parts == 999
    for asked in (words, ["ingest", "a", "b"]):
        with pytest.raises(UserError, match="--parts 0: at least one"):
            parse_parts(asked, None, 0)


def test_an_array_may_be_told_how_many_of_its_tasks_run_at_once(tmp_path):
    (tmp_path / "in").mkdir()
    done = command("submit", "ingest", tmp_path / "in", tmp_path / "x.zarr", "--at-once=2", "--dry-run")
    assert "#SBATCH --array=0-7%2\n" in done.stdout
    with pytest.raises(UserError, match="--at-once 0: at least one"):
        parse_parts(["ingest", "a", "b"], None, None, at_once=0)


def test_a_cohort_without_weights_is_refused_before_it_is_submitted(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="not a weights file, a checkpoint, or a run"):
        parse_parts(
            ["denoise", str(tmp_path / "run"), str(tmp_path / "in"), str(tmp_path / "out")], None, None
        )


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["nowhere", "x.zarr"], "nowhere: does not exist or may not be read"),
        (["in", "in/x.zarr"], "put the store outside"),
        (["in", "x.zarr", "dos=0.25"], "dos: no such setting"),
        (["in", "x.zarr", "splits={train: 2}"], "must add up to 1"),
    ],
)
def test_what_every_part_of_an_ingest_would_refuse_is_refused_before_it_is_submitted(
    words, fault, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=fault):
        parse_parts(["ingest", *words], None, None)


def test_what_every_part_of_a_cohort_would_refuse_is_refused_before_it_is_submitted(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    weights, out = tmp_path / "w.safetensors", tmp_path / "out"
    save_weights(weights, build(ModelConfig(size="xs")))
    words = ["denoise", str(weights), str(tmp_path / "in"), str(out)]
    for strength in ("2", "much"):
        with pytest.raises(UserError, match="give a share above 0 and up to 1"):
            parse_parts([*words, f"--strength={strength}"], None, None)
    claim(out, SeriesDenoiser.load(weights).name)
    assert parse_parts(words, None, None).script.parts == 1
    with pytest.raises(
        UserError, match=r"by unet3d-xs, weights sha256 \w+, at strength 0\.5; choose another"
    ):
        parse_parts([*words, "--strength=0.5"], None, None)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="copy it again"):
        parse_parts(words, None, None)


def test_a_cohort_that_would_be_denoised_into_itself_is_refused_before_it_is_submitted(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    save_weights(tmp_path / "w.safetensors", build(ModelConfig(size="xs")))
    words = ["denoise", *(str(tmp_path / name) for name in ("w.safetensors", "in", "in/out"))]
    with pytest.raises(UserError, match="choose a folder outside it"):
        parse_parts(words, None, None)


def test_an_evaluation_is_submitted_with_its_own_options_and_weights_of_that_moment(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", commands_on_path(tmp_path / "bin", sbatch="echo 7", srun="", squeue=""))
    monkeypatch.chdir(tmp_path)
    hu = np.zeros((2, 16, 16), np.int16)
    layout.create(Path("ct.zarr"))
    for name in ("a", "b"):
        doses = dict.fromkeys((1.0, 0.25), Volume(hu, (3.0, 1.0, 1.0)))
        layout.write_case(Path("ct.zarr"), name, doses, patient=name, split="test")
    layout.finalise(Path("ct.zarr"))
    for name, seed in (("one", 0), ("two", 1)):
        torch.manual_seed(seed)
        save_weights(Path(f"{name}.safetensors"), build(ModelConfig(size="xs")))
    Path("peers.py").write_text("def blur(low):\n    return low.hu\n")
    monkeypatch.syspath_prepend(tmp_path)
    then = Path("one.safetensors").read_bytes()
    own = ["--out", "report", "--baselines=", "--bf16", "--peer", "p=peers:blur", "--peer", "q=peers:blur"]
    words = ["evaluate", "first=one.safetensors", "two.safetensors", "ct.zarr", *own]
    submitted = CliRunner().invoke(app, ["submit", *words, "--gpus", "1", "--exclusive", "--time=4:00:00"])
    assert submitted.exit_code == 0, submitted.exception
    Path("one.safetensors").write_bytes(b"of a later step")
    array, end = (Path("report.jobs", script).read_text() for script in ("array.sbatch", "end.sbatch"))
    assert "#SBATCH --array=0-2\n" in array  # two cases and the phantom
    for script in (array, end):
        assert {"#SBATCH --gpus=1", "#SBATCH --exclusive", "#SBATCH --time=4:00:00"} <= set(
            script.splitlines()
        )
    (line,) = [line for line in array.splitlines() if " evaluate " in line]
    given = shlex.split(line.partition(" evaluate ")[2])
    assert given[2:] == ["ct.zarr", *own, "--part", "$SLURM_ARRAY_TASK_ID/3"]
    names, copies = zip(*(word.split("=") for word in given[:2]), strict=True)
    assert names == ("first", "two.safetensors")
    assert Path(copies[0]).read_bytes() == then
    (line,) = [line for line in end.splitlines() if " evaluate " in line]
    assert shlex.split(line.partition(" evaluate ")[2]) == given[:-2]


@pytest.mark.parametrize(
    ("own", "fault"),
    [
        ([], "add --out FOLDER"),
        (["--cases-shown", "0", "--out"], "Option '--out' requires an argument"),
        (["--out", "report", "--part", "0/2"], "leave out --part and --check"),
        (["--out", "report", "--protocol", "knee"], "knee"),
        (["--out", "report", "--split", "val"], "no case in split 'val'"),
        (["--out", "report", "--labels", "none.csv"], "none.csv: no such file"),
    ],
)
def test_what_every_part_of_an_evaluation_would_refuse_is_refused_before_it_is_submitted(
    own, fault, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    layout.create(Path("ct.zarr"))
    doses = dict.fromkeys((1.0, 0.25), Volume(np.zeros((2, 16, 16), np.int16), (3.0, 1.0, 1.0)))
    layout.write_case(Path("ct.zarr"), "a", doses, patient="a", split="test")
    layout.finalise(Path("ct.zarr"))
    save_weights(Path("w.safetensors"), build(ModelConfig(size="xs")))
    refused = CliRunner().invoke(
        app, ["submit", "evaluate", "w.safetensors", "ct.zarr", "--baselines=", *own]
    )
    assert fault in f"{refused.exception} {refused.output}"
    assert {path.name for path in tmp_path.iterdir()} == {"ct.zarr", "w.safetensors"}
