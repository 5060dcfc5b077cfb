from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from ldct_dist import cli
from sources import QUICK, anatomy, write_patients
from synthetic_dicom import Options, write_series

SIMULATION = [f"simulation.{key}={value}" for key, value in QUICK.model_dump(exclude_defaults=True).items()]


def test_paths_are_printed_as_they_are(tmp_path, monkeypatch, capsys):
    """Words in brackets are a style to the console, unless it is told otherwise."""
    store = tmp_path / "[test]" / "ct.zarr"
    source = write_patients(tmp_path / "in", 1)
    for words in (
        ["ingest", source, store, "workers=1", *SIMULATION],
        ["finalise", store],
        ["verify", store],
    ):
        monkeypatch.setattr(sys, "argv", ["ldct-dist", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        assert str(store) in capsys.readouterr().out


def test_what_may_not_be_looked_at_cannot_be_verified(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ldct-dist", "verify", str(tmp_path / ("n" * 300))])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "nor a weights file that may be read" in capsys.readouterr().err


def test_a_refused_folder_whose_name_is_not_utf_8_is_told_of(tmp_path, monkeypatch, capsys):
    source = write_patients(tmp_path / "in", 1)
    folder = Path(os.fsdecode(os.fsencode(source) + b"/M\xfcller"))
    write_series(folder, anatomy(1), Options(patient="B", tags={"GantryDetectorTilt": 12}))
    words = ["ingest", source, tmp_path / "ct.zarr", "workers=1", *SIMULATION]
    monkeypatch.setattr(sys, "argv", ["ldct-dist", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "/M\\udcfcller: series" in said
    assert "cases (patients) by split: train" in said


@pytest.mark.parametrize(
    ("patients", "advice"),
    [(("ANONYMOUS", "ANONYMOUS"), "list the cases in a manifest"), (("A", "B"), "name patients")],
)
def test_empty_splits_have_the_advice_that_helps(tmp_path, monkeypatch, capsys, patients, advice):
    """Where all scans have one PatientID, no shares fill the other splits."""
    for i, patient in enumerate(patients):
        write_series(tmp_path / "in" / str(i), anatomy(i), Options(patient=patient, seed=str(i)))
    words = ["ingest", tmp_path / "in", tmp_path / "ct.zarr", "workers=1"]
    monkeypatch.setattr(sys, "argv", ["ldct-dist", *map(str, words), *SIMULATION])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    said = capsys.readouterr()
    assert re.search(r"split (val|test|val and test) will hold no patient", said.err)  # the key is a new one
    assert advice in said.err
    assert re.search(r"(val|test) none", said.out)


def test_a_split_whose_patients_were_all_refused_is_told_of(tmp_path, monkeypatch, capsys):
    source = write_patients(tmp_path / "in", 2)
    paths = write_series(source / "cut", anatomy(2), Options(patient="C", seed="cut"))
    paths[1].write_bytes(paths[1].read_bytes()[:-900])  # which only shows once pixels are read
    words = [
        "ingest",
        source,
        tmp_path / "ct.zarr",
        "workers=1",
        "split_of={C: test, '*': train}",
        *SIMULATION,
    ]
    monkeypatch.setattr(sys, "argv", ["ldct-dist", *map(str, words), "splits={train: 0.9, test: 0.1}"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "train 2 (2), test none" in said.out
    assert "split test holds no patient, since those drawn for it were refused" in said.err


def test_scouts_and_reports_beside_the_scans_are_no_failure(tmp_path, monkeypatch, capsys):
    source = write_patients(tmp_path / "in", 1)
    scout = Options(seed="scout", tags={"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]})
    write_series(source / "scout", anatomy(1), scout)
    write_series(source / "report", anatomy(1), Options(seed="sr", tags={"Modality": "SR"}))
    words = ["ingest", source, tmp_path / "ct.zarr", "workers=1", *SIMULATION]
    monkeypatch.setattr(sys, "argv", ["ldct-dist", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "cases: 1 written, 0 there already, 0 refused, 2 series passed over" in said
    assert [f"passed over: {source}/{name}: series" in said for name in ("report", "scout")] == [True, True]


def test_a_simulated_series_is_not_put_beside_its_source(tmp_path, monkeypatch, capsys):
    source = tmp_path / "in"
    write_series(source, anatomy(1))
    monkeypatch.setattr(sys, "argv", ["ldct-dist", "simulate", str(source), str(source / "low")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "choose a folder outside" in capsys.readouterr().err
    assert not (source / "low").exists()


def test_a_place_that_cannot_take_the_simulated_series_is_refused_before_any_work(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for out, said in (
        ("out", "exists already"),
        ("out/notes.txt/low", "cannot be written (Not a directory)"),
    ):
        words = ["simulate", "no-source", str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", ["ldct-dist", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_a_phantom_without_noise_is_simulated_once_told_of_the_scanner(tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "in", tmp_path / "low"
    write_series(source, anatomy(1, noise=0.0))

    def simulate(*given: str) -> int | None:
        monkeypatch.setattr(sys, "argv", ["ldct-dist", "simulate", str(source), str(out), *given])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    assert simulate() == 2
    assert "set photons=2e5 and cutoff_per_mm=0.8" in capsys.readouterr().err
    assert simulate("photon=2e5") == 2
    assert "photon" in capsys.readouterr().err
    assert not simulate("photons=1e5", "cutoff_per_mm=0.5", "views=16", "columns=32")
    assert len(list(out.iterdir())) == len(list(source.iterdir()))


def test_a_log_of_an_ingest_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    source = write_patients(tmp_path / "in", 2)
    words = ["ingest", source, tmp_path / "ct.zarr", "workers=1", *SIMULATION]
    monkeypatch.setattr(sys, "argv", ["ldct-dist", *map(str, words)])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("cases done")] == [
        "cases done: 1 of 2",
        "cases done: 2 of 2",
    ]
