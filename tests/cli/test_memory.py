"""A volume that is too large for the memory there is costs one line, not a traceback, and no other case."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from ldct_dist.models.registry import ModelConfig, build
from ldct_dist.models.weights import save_weights
from stores import make_store
from synthetic_dicom import Options, phantom, write_series

MIB = 160  # beyond what the imports take
LIMITED = """
import json, resource, sys
import ldct_dist.ct.derived, ldct_dist.ct.dose, ldct_dist.denoise.cohort, ldct_dist.evaluate.run
from ldct_dist import cli
pages = int(open("/proc/self/statm").read().split()[0])
most = pages * resource.getpagesize() + (int(sys.argv[1]) << 20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
for arguments in json.loads(sys.argv[2]):
    sys.argv = ["ldct-dist", *arguments]
    try:
        cli.main()
    except SystemExit as e:
        print("exit code", e.code or 0, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """(what it said, its exit code) of each verb, one after the other in one process, and the folder of their files."""
    folder = tmp_path_factory.mktemp("memory")
    save_weights(folder / "weights.safetensors", build(ModelConfig(name="redcnn3d", size="s")))
    shapes = {"a": (4, 32, 32), "large": (16, 512, 512), "z": (4, 32, 32)}
    for name, shape in shapes.items():
        write_series(folder / "cohort" / name, phantom(shape), Options(seed=name))
    make_store(folder / "ct.zarr", [shapes["large"], shapes["a"]], ["test", "train"])
    verbs = {
        "denoise": ["weights.safetensors", "cohort/large", "denoised"],
        "denoise --part": ["weights.safetensors", "cohort", "denoised-cohort", "--part", "0/1"],
        "evaluate": ["weights.safetensors", "ct.zarr"],
        "simulate": ["cohort/large", "quarter"],
    }
    given = json.dumps([[name.split()[0], *arguments] for name, arguments in verbs.items()])
    said = subprocess.run(
        [sys.executable, "-c", LIMITED, str(MIB), given],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"},
        check=True,
    ).stdout
    return dict(zip(verbs, re.findall(r"(.*?)exit code (\d+)\n", said, re.DOTALL), strict=True)), folder


@pytest.mark.parametrize(
    ("verb", "what"),
    [("denoise", "cohort/large: series .*"), ("evaluate", "case-case-000"), ("simulate", "simulate")],
)
def test_a_volume_too_large_for_memory_is_one_line_and_2(ended, verb, what):
    said, code = ended[0][verb]
    line = rf"error: {what}: memory ran out \(.*\); give it more memory \(under Slurm: --mem\)"
    assert re.fullmatch(line, said.splitlines()[-1])
    assert "Traceback" not in said
    assert code == "2"


def test_of_a_cohort_it_costs_that_case_alone(ended):
    verbs, folder = ended
    said, code = verbs["denoise --part"]
    assert "cases: 2 denoised, 0 there already" in said
    assert re.search(r"refused: large: cohort/large: series .*: memory ran out \(", said)
    assert "Traceback" not in said
    assert code == "1"
    assert sorted(path.name for path in (folder / "denoised-cohort").glob("[!.]*")) == ["a", "z"]


def test_nothing_half_written_is_left(ended):
    folder = ended[1]
    assert sorted(os.listdir(folder)) == ["cohort", "ct.zarr", "denoised-cohort", "weights.safetensors"]
    assert sorted(os.listdir(folder / "denoised-cohort")) == [".denoised-by", "a", "z"]
