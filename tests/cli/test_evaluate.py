"""What `ldct-dist evaluate` refuses before any work."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from ldct_dist.cli import app
from ldct_dist.models.weights import save_weights
from networks import random_network
from stores import make_store


@pytest.fixture
def unevaluated(tmp_path):
    """The words of a command, whose store has a case that is held out, and none to tune filters on."""
    save_weights(tmp_path / "net.safetensors", random_network("unet3d"))
    make_store(tmp_path / "ct.zarr", [(8, 40, 40)], ["test"])
    return ["evaluate", str(tmp_path / "net.safetensors"), str(tmp_path / "ct.zarr")]


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(unevaluated, tmp_path):
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, [*unevaluated, "--out", str(tmp_path / "file" / "report")])
    assert "report: cannot be written (Not a directory)" in str(done.exception)
    assert done.output == ""


def test_a_report_is_no_part_of_the_store(unevaluated, tmp_path):
    done = CliRunner().invoke(app, [*unevaluated, "--out", str(tmp_path / "ct.zarr" / "report")])
    assert "report: is in" in str(done.exception)
    assert not (tmp_path / "ct.zarr" / "report").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lesion-hu", "nan"], "lesion_hu: Input should be a finite number"),
        (["--lesion-hu", "1e9"], "lesion_hu: Input should be less than"),
        (["--lesion-mm", "inf"], "lesion_mm: Input should be a finite number"),
        (["--lesion-mm", "-6"], "lesion_mm: Input should be greater than 0"),
        (["--dose", "nan"], "dose: Input should be"),
        (["--cases-shown", "-1"], "Invalid value for '--cases-shown'"),
        (["--split", "nope"], "no case in split 'nope'"),
        (["--labels", "nope.csv"], "nope.csv: no such file"),
        ([], "every case is in split 'test'.*do without them: --baselines ''"),
    ],
)
def test_what_is_refused_leaves_no_folder_and_says_what_to_do(unevaluated, options, words, tmp_path):
    done = CliRunner().invoke(app, [*unevaluated, "--out", str(tmp_path / "report"), *options])
    assert done.exit_code != 0
    assert re.search(words, f"{done.output} {done.exception}"), done.output
    assert not (tmp_path / "report").exists()
