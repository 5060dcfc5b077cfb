"""Ingest, denoising and evaluation as array jobs: a task that is killed runs again, and what comes after waits for all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jobs_of import field, over, wait

from ldct_dist import config as configs
from ldct_dist.ct.volume import Volume
from ldct_dist.denoise.claim import MADE_BY
from ldct_dist.evaluate.kept import FOLDER
from ldct_dist.evaluate.report.page import JSON
from ldct_dist.models.registry import ModelConfig, build
from ldct_dist.models.weights import save_weights
from ldct_dist.store import layout
from ldct_dist.store.ingest import IngestConfig, ingest
from ldct_dist.store.reader import Store
from stores import smooth_volume
from synthetic_dicom import Options, write_series

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slurm
CASES = 3
SETTINGS = ("workers=1", "simulation.photons=1e5", "simulation.cutoff_per_mm=0.5")


@pytest.fixture(scope="module")
def dicom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dicom")
    for i in range(CASES):
        hu = np.clip(smooth_volume((4, 64, 64), seed=i), -1000, 1000)
        write_series(folder / f"case-{i}", hu, Options(patient=f"P{i}", seed=str(i)))
    return folder


def submitted(cluster, folder: Path, *words: str | Path) -> list[str]:
    """Numbers of the jobs that a submission says it made."""
    command = [sys.executable, "-m", "ldct_dist", "submit", *map(str, words)]
    done = subprocess.run(
        command, cwd=folder, env=cluster.user(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [line.split()[1] for line in done.stdout.splitlines() if line.startswith("job ")]


def process(*words: str) -> int | None:
    """The process whose command line holds all these words."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile
            continue
        if all(word.encode() in line for word in words):
            return int(folder.name)
    return None


def test_a_part_of_an_ingest_is_killed_and_the_store_is_as_if_it_had_not(cluster, dicom, tmp_path):
    store = tmp_path / "my store.zarr"
    array, end = submitted(cluster, tmp_path, "ingest", dicom, store, *SETTINGS, "--parts", CASES)
    part = str(store), "--part", f"1/{CASES}"
    wait(lambda: process(*part), "a part runs")
    os.kill(process(*part), signal.SIGKILL)
    wait(lambda: over(cluster, end), "the end")
    logs = "".join(path.read_text() for path in Path(f"{store}.jobs").glob("*.log"))
    assert field(cluster, end, "JobState") == "COMPLETED", logs
    assert [field(cluster, f"{array}_{i}", "Restarts") for i in range(CASES)] == ["0", "1", "0"]
    whole = tmp_path / "whole.zarr"
    whole.with_name("whole.zarr.key").write_bytes(store.with_name("my store.zarr.key").read_bytes())
    ingest(dicom, whole, configs.read(IngestConfig, None, SETTINGS))
    assert Store(store).fingerprint == Store(whole).fingerprint


def test_a_cohort_is_denoised_by_parts_each_case_whole(cluster, dicom, tmp_path):
    save_weights(tmp_path / "w.safetensors", build(ModelConfig(size="xs")))
    out = tmp_path / "out"
    (array,) = submitted(cluster, tmp_path, "denoise", tmp_path / "w.safetensors", dicom, out, "--parts", 2)
    wait(lambda: all(over(cluster, f"{array}_{i}") for i in range(2)), "both parts")
    assert sorted(p.name for p in out.iterdir()) == [MADE_BY, *(f"case-{i}" for i in range(CASES))]
    assert all(len(list(case.iterdir())) == 4 for case in out.glob("case-*"))


def test_a_part_of_an_evaluation_is_killed_and_the_report_is_complete(cluster, tmp_path):
    store, out = tmp_path / "ct.zarr", tmp_path / "my report"
    layout.create(store)
    hu = np.random.default_rng(0).integers(0, 100, (4, 48, 48), dtype=np.int16)
    full, low = (Volume(each, (3.0, 1.0, 1.0)) for each in (hu, hu + np.int16(9)))
    for name in ("a", "b", "c"):
        layout.write_case(store, name, {1.0: full, 0.25: low}, patient=name, split="test")
    layout.finalise(store)
    save_weights(tmp_path / "w.safetensors", build(ModelConfig(size="xs")))
    words = f"net={tmp_path / 'w.safetensors'}", store, "--out", out, "--baselines", ""
    array, end = submitted(cluster, tmp_path, "evaluate", *words, "--parts", 2)
    part = str(store), "--part", "1/2"
    wait(lambda: process(*part), "a part runs")
    os.kill(process(*part), signal.SIGKILL)
    wait(lambda: over(cluster, end), "the report")
    logs = {path.name: path.read_text() for path in Path(f"{out}.jobs").glob("*.log")}
    assert field(cluster, end, "JobState") == "COMPLETED", logs
    assert [field(cluster, f"{array}_{i}", "Restarts") for i in range(2)] == ["0", "1"]
    assert any("going on: 4 of 4 were measured before" in log for log in logs.values()), logs
    assert [row["case"] for row in json.loads((out / JSON).read_text())["cases"]] == [
        "a",
        "a",
        "b",
        "b",
        "c",
        "c",
    ]
    assert not (out / FOLDER).exists()


def by_hand(cluster, folder: Path, script: str, numbers: dict[str, str], *arguments: str | Path) -> str:
    """Submit one of the scripts to copy, with this software, these numbers of parts, and a node's share of it."""
    text = (ROOT / "slurm" / script).read_text()
    for before, after in {"source .venv/bin/activate": f"PATH={sys.prefix}/bin:$PATH", **numbers}.items():
        assert before in text
        text = text.replace(before, after)
    (folder / script).write_text(text)
    size = ["--gpus=0", "--cpus-per-task=1", "--mem=0"]
    return cluster.run(
        "sbatch", "--parsable", f"--chdir={folder}", *size, folder / script, *arguments
    ).strip()


def test_the_scripts_to_copy_ingest_and_denoise(cluster, dicom, tmp_path):
    store, out = tmp_path / "ct.zarr", tmp_path / "out"
    array = by_hand(cluster, tmp_path, "ingest.sbatch", {"0-7": "0-1", "/8": "/2"}, dicom, store, *SETTINGS)
    python = f"{sys.executable} -m ldct_dist"
    cluster.run(
        *("sbatch", "--wait", f"--dependency=afterany:{array}", f"--chdir={tmp_path}"),
        f"--wrap={python} finalise {store}",
    )
    assert len(Store(store).cases) == CASES
    logs = "".join((tmp_path / f"ldct-ingest-{array}_{i}.log").read_text() for i in range(2))
    assert (logs.count("reading headers: "), logs.count("headers: as read by another task")) == (1, 1), logs
    save_weights(tmp_path / "w.safetensors", build(ModelConfig(size="xs")))
    numbers = {"0-15": "0-1", "/16": "/2"}
    array = by_hand(cluster, tmp_path, "denoise.sbatch", numbers, tmp_path / "w.safetensors", dicom, out)
    ended = ("COMPLETED", "FAILED")
    wait(lambda: all(field(cluster, f"{array}_{i}", "JobState") in ended for i in range(2)), "both parts")
    assert sorted(p.name for p in out.iterdir()) == [MADE_BY, *(f"case-{i}" for i in range(CASES))]
