"""An evaluation that is killed, or shared out, makes the same report as one that is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ldct_dist.cli import app
from ldct_dist.ct.dose import DoseConfig, simulate_full_dose, simulate_low_dose
from ldct_dist.ct.phantom import body
from ldct_dist.ct.volume import Volume
from ldct_dist.evaluate.classify import Training, classify
from ldct_dist.evaluate.kept import FOLDER
from ldct_dist.evaluate.report.page import CSV, JSON, PAGE
from ldct_dist.models import installed
from ldct_dist.models.registry import ModelConfig, build
from ldct_dist.models.weights import save_weights
from ldct_dist.store import layout
from networks import random_network
from your_own import NAME

PEER = """
import os, signal
from pathlib import Path

here = Path(__file__).parent

def denoise(low):
    with open(here / "calls", "a") as calls:
        calls.write(f"{low.shape[0]}\\n")
    if (here / "kill").exists() and low.shape[0] == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return low.hu + 1
"""
LABELS = "case,slice,label\n" + "".join(f"c{i},{at},{i % 2}\n" for i in range(10) for at in (0, 1))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Eleven cases, all but the first of 6 slices of noise, labels of ten of them, a network and a peer, who counts."""
    folder = tmp_path_factory.mktemp("interrupted")
    layout.create(folder / "ct.zarr")
    scanner, spacing = DoseConfig(photons=3e5, cutoff_per_mm=0.2), (4.0, 2.0, 2.0)
    rng = np.random.default_rng(0)
    full = simulate_full_dose(body((8, 160, 160), spacing, seed=0).hu, spacing, 0, scanner)
    doses = {1.0: full, 0.25: simulate_low_dose(full, 0.25, 1, scanner)}
    layout.write_case(folder / "ct.zarr", "body", doses, patient="p", split="test")
    for i in range(10):
        hu = rng.integers(0, 100, (6, 48, 48), dtype=np.int16)
        doses = {1.0: Volume(hu, spacing), 0.25: Volume(hu + np.int16(9), spacing)}
        layout.write_case(folder / "ct.zarr", f"c{i}", doses, patient=f"p{i}", split="test")
    layout.finalise(folder / "ct.zarr")
    save_weights(folder / "net.safetensors", random_network("unet3d"))
    (folder / "counting.py").write_text(PEER)
    (folder / "labels.csv").write_text(LABELS)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(folder)
        patched.chdir(folder)
        quick = partial(classify, training=Training(epochs=2))
        patched.setattr("ldct_dist.evaluate.evaluation.classify", quick)
        yield folder


def words(out: str, *options: str) -> list[str]:
    command = [
        "evaluate",
        "net=net.safetensors",
        "ct.zarr",
        "--out",
        out,
        "--baselines",
        "",
        "--lesion-mm",
        "12",
    ]
    return [*command, "--peer", "counting=counting:denoise", "--labels", "labels.csv", *options]


def evaluated(out: str, *options: str) -> list[str]:
    """What it prints, line by line."""
    done = CliRunner().invoke(app, words(out, *options))
    assert done.exit_code == 0, done.exception
    return done.output.splitlines()


@pytest.fixture(scope="module")
def unbroken(place):
    evaluated("unbroken")
    return place / "unbroken"


def files(report: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in report.iterdir()}


def calls(place: Path) -> list[str]:
    """The slices of each volume that the peer was given since this was last asked."""
    told = (place / "calls").read_text().splitlines() if (place / "calls").exists() else []
    (place / "calls").unlink(missing_ok=True)
    return told


def test_a_killed_evaluation_goes_on_with_the_cases_that_are_missing(place, unbroken):
    assert set(files(unbroken)) == {PAGE, JSON, CSV}
    calls(place)
    (place / "kill").touch()
    environment = {**os.environ, "PYTHONPATH": str(place)}
    killed = subprocess.run(
        [sys.executable, "-m", "ldct_dist", *words("killed")], env=environment, check=False
    )
    (place / "kill").unlink()
    assert killed.returncode == -signal.SIGKILL
    assert calls(place) == ["8", "6"]
    assert set(files(place / "killed" / FOLDER)) == {"case-body"}
    assert "going on: 1 of 12 were measured before" in evaluated("killed")
    seen = calls(place)
    assert "8" not in seen
    assert seen[:10] == ["6"] * 10  # then the phantom's scans
    assert files(place / "killed") == files(unbroken)


def test_parts_in_any_order_make_the_same_report(place, unbroken):
    for part in ("1/2", "0/2"):
        assert evaluated("shared", "--part", part)[-1].startswith(
            f"part {part}: 6 measured; once all parts are"
        )
    calls(place)
    evaluated("shared")
    assert calls(place) == []
    assert files(place / "shared") == files(unbroken)


def test_the_report_is_there_though_nobody_reads_what_is_printed(place, unbroken, monkeypatch):
    """As after `| head`."""

    def closed(*_) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("ldct_dist.evaluate.run.print_comparison", closed)
    assert CliRunner().invoke(app, words("unread")).exit_code
    assert files(place / "unread") == files(unbroken)


def test_findings_of_other_settings_are_not_used(place):
    """Nor are they in the way: they are replaced."""
    for options, before in ((["--protocol", "full-range"], 0), ([], 0), ([], 3)):
        told = evaluated("other", "--part", "0/4", *options)
        known = [line for line in told if line.startswith("going on")]
        assert known == [f"going on: {before} of 3 were measured before"] * (before > 0)


def test_findings_of_another_version_are_not_used(place, monkeypatch):
    """The report names one version of each package, for all of its figures."""
    evaluated("older", "--part", "0/12")
    monkeypatch.setattr("ldct_dist.evaluate.results.versions", lambda packages: dict.fromkeys(packages, "99"))
    assert [line for line in evaluated("older", "--part", "0/12") if line.startswith("going on")] == []


def test_findings_of_ancode_of_others_of_a_network_are_not_used(place, my_nets):
    save_weights(place / "own.safetensors", build(ModelConfig(name=NAME, options={"width": 4, "depth": 3})))
    command = ["evaluate", "own.safetensors", "ct.zarr", "--out", "own", "--baselines=", "--part=0/12"]

    def known() -> bool:
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.exception
        return "going on: 1 of 1 were measured before" in done.output

    assert [known(), known()] == [False, True]
    with open(my_nets, "a") as f:
        f.write("# another version\n")
    installed.origin.cache_clear()
    assert not known()


def test_findings_that_could_not_be_kept_are_refused_before_any_work(place):
    """Here for want of a folder; as a rule, because another person's start was stopped."""
    (place / "taken").mkdir()
    (place / "taken" / FOLDER).touch()
    calls(place)
    refused = CliRunner().invoke(app, words("taken"))
    assert f"taken/{FOLDER}: cannot be written" in str(refused.exception)
    assert calls(place) == []
