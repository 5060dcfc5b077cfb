"""Configs: what is read, and what is refused in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ldct_dist.config import read
from ldct_dist.errors import UserError
from ldct_dist.store.ingest import IngestConfig
from ldct_dist.train.config import RunConfig

GIVEN = ("name=run", "store=ct.zarr", "steps=8")
DEEP = "(nested far deeper than any setting is; correct it|not readable as YAML: .* maximum nesting depth)"
"""as this package says it, and as PyYAML does from 6.0.4 on"""
COUNTS = (
    *("steps", "data.batch", "data.threads", "data.memory_mib", "micro_batch", "threads", "guard.patience"),
    *("checkpoint.every", "checkpoint.keep_every", "validation.every", "validation.max_cases", "log.every"),
)
NUMBERS = (
    *("optim.lr", "optim.weight_decay", "optim.clip_norm", "optim.ema", "optim.final_lr", "loss.eps_hu"),
    *("guard.spike", "time_limit_s", "grace_s", "hang_s", "data.dose", "data.reuse", "data.min_body"),
)


@pytest.mark.parametrize(
    "override",
    [
        *(f"{key}={value}" for key in COUNTS for value in (0, -1)),
        *(f"{key}={value}" for key in NUMBERS for value in ("nan", "inf", -1)),
        *(f"optim.betas=[{value},0.9]" for value in ("nan", 1, -0.1)),
        *("seed=-1", "seed=99999999999999999999", "checkpoint.keep_last=-1", "guard.rollbacks=-1"),
        *("hang_s=1e10", "threads=100000"),
    ],
)
def test_a_number_that_no_run_can_have_is_refused_by_its_key(override):
    with pytest.raises(UserError, match=override.partition("=")[0].replace(".", r"\.")):
        read(RunConfig, None, [*GIVEN, override])


def test_a_key_within_a_list_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {crop: [32, 96, 96]}")
    with pytest.raises(UserError, match=r"data\.crop\.0=48 does not fit it .* give lists whole"):
        read(RunConfig, path, [*GIVEN, "data.crop.0=48"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stepz=3", "override stepz=3: stepz: no such setting; did you mean steps?"),
        ("optim.lrr=3", "override optim.lrr=3: optim.lrr: no such setting; did you mean optim.lr?"),
        ("dsoe=1", "override dsoe=1: dsoe: no such setting; did you mean data.dose?"),
        ("modle.size=m", "override modle.size=m: modle: no such setting; did you mean model?"),
        ("lr=3", "override lr=3: lr: no such setting; did you mean optim.lr?"),
        (
            "data.crop=8",
            "override data.crop=8: data.crop: give all its values as a list, such as [32, 96, 96]",
        ),
        ("data.crop=[8,48]", "override data.crop=[8,48]: data.crop.2: give all its values as a list"),
        ("data.crop=[8,9,9,9]", "override data.crop=[8,9,9,9]: data.crop: give all its values as a list"),
        ("loss.margin=3", "override loss.margin=3: loss.margin: give all its values as a list"),
        ("store=", "override store=: store: it has no value"),
        ("name=../evil", "override name=../evil: name: give up to 100 letters, digits, dots, hyphens"),
        ("name=a/b", "override name=a/b: name: give up to 100 letters, digits, dots, hyphens"),
        (
            "data.augment.lesions=24",
            "override data.augment.lesions=24: data.augment.lesions: has settings of its own, such as data.augment.lesions.count",
        ),
        (
            "data.augment.dose_mix=[2,1]",
            "override data.augment.dose_mix=[2,1]: data.augment.dose_mix: a range goes from small to large, not from 2 to 1",
        ),
        ("optim={lr:3}", "override optim={lr:3}: optim.lr:3: no such setting; did you mean optim.lr?"),
        ("optim={lr: 3", "override name=run store=ct.zarr steps=8 optim={lr: 3: not readable as YAML"),
        ("optim.lr=x", "override optim.lr=x: optim.lr: Input should be a valid number"),
    ],
)
def test_a_wrong_override_is_called_one_and_put_right(tmp_path, override, words):
    path = tmp_path / "run.yaml"
    path.write_text("data: {dose: 0.25}")
    with pytest.raises(UserError, match=f"^{re.escape(words)}"):
        read(RunConfig, path, [*GIVEN, override])


def test_a_mistake_in_the_file_is_the_files(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {dsoe: 0.25}")
    with pytest.raises(UserError, match=rf"override steps=x: steps: .*; {path}: data\.dsoe: .*data\.dose\?"):
        read(RunConfig, path, ["name=run", "store=ct.zarr", "steps=x"])


@pytest.mark.parametrize(
    ("store", "words"),
    [
        ("${SCRATCH}/ct.zarr", "store: Interpolation key 'SCRATCH' not found; .* write \\$NAME$"),
        ("${SCRATCH/ct.zarr", r"store: .*; is a \$\{ without its \}\?$"),
    ],
)
def test_what_is_wrong_with_braces_is_one_line_with_the_key(tmp_path, store, words):
    path = tmp_path / "run.yaml"
    path.write_text(f"name: run\nsteps: 8\nstore: {store}\n")
    with pytest.raises(UserError, match=f"^{path}: {words}"):
        read(RunConfig, path)


def test_a_setting_goes_before_another_sections_of_its_name():
    with pytest.raises(UserError, match=r"doze: no such setting; did you mean dose\?"):
        read(IngestConfig, None, ["doze=0.25"])


def test_a_colon_without_its_space_is_said():
    with pytest.raises(UserError, match=r"splits\.train:1: a space is missing after the colon"):
        read(IngestConfig, None, ["splits={train:1}"])


def test_a_home_and_variables_in_paths_are_looked_up_here_but_a_nodes_are_left(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    overrides = (
        *("store=$SCRATCH/ct.zarr", "runs=~/runs", "init_from=${oc.env:SCRATCH}/w.safetensors"),
        *("data.stage=$SLURM_TMPDIR", "deepspeed.nvme_path=$SLURM_TMPDIR"),
    )
    config = read(RunConfig, None, [*GIVEN, *overrides])
    assert config.store == Path("/scratch/me/ct.zarr")
    assert config.runs == Path("/home/me/runs")
    assert config.init_from == Path("/scratch/me/w.safetensors")
    assert config.data.stage == config.deepspeed.nvme_path == "$SLURM_TMPDIR"


@pytest.mark.parametrize(
    ("path", "words"),
    [("$NOT_SET/runs", r"\$NOT_SET is not set here"), ("~nobody-here/runs", "no such user")],
)
def test_what_is_not_known_here_makes_no_folder_of_that_name(monkeypatch, path, words):
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(UserError, match=f"runs: .*{words}"):
        read(RunConfig, None, [*GIVEN, f"runs={path}"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: " + "[" * 3000 + "]" * 3000, DEEP),
        ("a: " + "{a: " * 3000 + "1" + "}" * 3000, DEEP),
        ("seed: " + "9" * 6000, "not readable as YAML"),
    ],
    ids=["lists", "mappings", "digits"],
)
def test_rubbish_that_yaml_cannot_take_is_one_line(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{path}: {words}"):
        read(RunConfig, path)
    with pytest.raises(UserError, match=words):
        read(RunConfig, None, [text.replace(": ", "=", 1)])


def test_a_path_that_no_config_could_name_is_refused_before_anything_is_written(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/\udcff")
    with pytest.raises(
        UserError, match=r"runs: \$SCRATCH/runs: not UTF-8, in which configs are written; rename"
    ):
        read(RunConfig, None, [*GIVEN, "runs=$SCRATCH/runs"])
    with pytest.raises(UserError, match="not readable as YAML"):
        read(RunConfig, None, [*GIVEN, "runs=/scratch/\udcff"])
