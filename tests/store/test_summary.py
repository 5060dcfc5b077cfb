from __future__ import annotations

import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ldct_dist.cli import app
from ldct_dist.ct.dose_config import DoseConfig
from ldct_dist.ct.volume import Volume
from ldct_dist.store import layout
from ldct_dist.store.reader import Store
from ldct_dist.store.summary import listing, rows, summary
from stores import smooth_volume

CASES = [("val", 6, 5.0, 12.25), ("train", 4, 2.5, 8.0), ("train", 9, 5.0, None), ("train", 9, 5.0, 10.0)]
PHOTONS = (2e5, 1.2e5, 3e5)
LOW_DOSES = [None, *({"made": "simulated", "config": DoseConfig(photons=n).model_dump()} for n in PHOTONS)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Four cases of three patients, the first without a low dose, the third too noisy to say how much."""
    path = tmp_path_factory.mktemp("summary") / "ct.zarr"
    layout.create(path)
    for i, (split, slices, mm, noise) in enumerate(CASES):
        volume = Volume(smooth_volume((slices, 20, 24), seed=i), (mm, 0.7, 0.7))
        doses = {1.0: volume, 0.25: volume} if i else {1.0: volume}
        patient = f"patient-{min(i, 2)}"
        layout.write_case(
            path,
            f"case-{i:012x}",
            doses,
            patient=patient,
            split=split,
            noise_hu=noise,
            low_dose=LOW_DOSES[i],
        )
    layout.finalise(path)
    return Store(path)


def printed(table):
    """The lines of a table in a terminal of 80 columns."""
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    return console.file.getvalue().splitlines()


def test_a_summary_has_a_column_for_all_and_one_a_split(store):
    lines = {line.split("  ")[0].strip(): line.split() for line in printed(summary(rows(store)))}
    assert lines["cases"][1:] == ["4", "3", "1"]
    assert lines["patients"][1:] == ["3", "2", "1"]
    assert lines["doses"][1:] == ["1.00,", "0.25", "(3)", "1.00,", "0.25", "1.00"]
    assert lines["low dose"][2:] == ["simulated", "simulated", "none"]
    assert lines["simulated beam"][2:] == ["fan", "fan", "-"]
    assert lines["photons a ray, 1e6"][4:] == ["0.12", "-", "0.3", "0.12", "-", "0.3", "-"]
    assert lines["slices"][1:] == ["28", "22", "6"]
    assert lines["slices a case"][3:] == ["4", "-", "9", "4", "-", "9", "6"]
    assert lines["rows, columns"][2:] == ["20", "-", "24"] * 3
    assert lines["slice spacing, mm"][3:] == ["2.5", "-", "5", "2.5", "-", "5", "5"]
    assert lines["noise, HU"][2:] == ["8.0", "-", "12.2", "8.0", "-", "10.0", "12.2"]
    assert lines["noise, median"][2:] == ["10.0", "9.0", "12.2"]


def test_a_summary_tells_acquired_from_unknown(store):
    cases = rows(store)[:2]
    cases[0] |= {"low_dose": {"made": "acquired"}}
    cases[1] |= {"low_dose": None}
    lines = {line.split("  ")[0].strip(): line.split() for line in printed(summary(cases))}
    assert lines["low dose"][2:] == ["unknown", "(1),", "acquired", "(1)"] * 2
    assert lines["simulated beam"][2:] == ["-", "-"]


def test_size_and_compression_are_those_of_the_shard_files(store):
    (row,) = (row for row in rows(store) if row["split"] == "val")
    shard = store.path / "cases" / row["name"] / "1.00/c/0/0/0"
    assert row["bytes"] == shard.stat().st_size
    assert row["voxel_bytes"] == 2 * 6 * 20 * 24
    (line,) = (line for line in printed(summary([row])) if "compression" in line)
    assert line.split()[1] == f"{2 * 6 * 20 * 24 / shard.stat().st_size:.2f}"


def test_a_listing_has_a_line_a_case_which_fits_a_terminal(store):
    lines = printed(listing(rows(store)))[3:-1]
    assert [line.split()[0] for line in lines] == [f"case-{i:012x}" for i in (1, 2, 3, 0)]
    assert lines[1].split()[1:10] == ["train", "9", "20", "24", "5", "0.7", "0.7", "1.00", "0.25"]
    assert lines[1].split()[10] == "-"


def test_the_command_tells_of_thousands_of_cases_on_one_screen(store):
    short = CliRunner().invoke(app, ["info", str(store.path)])
    assert short.exit_code == 0
    assert store.fingerprint[:16] in short.stdout
    assert "case-0" not in short.stdout
    assert len(short.stdout.splitlines()) < 24
    assert "case-000000000003" in CliRunner().invoke(app, ["info", str(store.path), "--cases"]).stdout
