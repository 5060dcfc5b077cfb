import re

import numpy as np
import pytest
from typer.testing import CliRunner

from ldct_dist.cli import app
from ldct_dist.ct.dose import DoseConfig, simulate_full_dose, simulate_low_dose
from ldct_dist.ct.phantom import body
from ldct_dist.ct.volume import Volume
from ldct_dist.evaluate.examination import measure
from ldct_dist.evaluate.study import StudyConfig
from ldct_dist.models.weights import save_weights
from ldct_dist.store import layout
from ldct_dist.store.privacy import key_id, load_key, patient_hash
from ldct_dist.store.reader import Store
from networks import random_network


@pytest.fixture
def command(tmp_path):
    """`evaluate` on two cases of patient a, whose low doses are off by 10 and 20 HU, and one of b, off by 40."""
    layout.create(tmp_path / "ct.zarr")
    rng = np.random.default_rng(0)
    for name, patient, off in (("a1", "a", 10), ("a2", "a", 20), ("b1", "b", 40)):
        hu = rng.integers(0, 100, (8, 48, 48), dtype=np.int16)
        full, low = (Volume(each, (3.0, 1.0, 1.0)) for each in (hu, hu + np.int16(off)))
        layout.write_case(tmp_path / "ct.zarr", name, {1.0: full, 0.25: low}, patient=patient, split="test")
    layout.finalise(tmp_path / "ct.zarr")
    save_weights(tmp_path / "net.safetensors", random_network("unet3d"))
    return ["evaluate", str(tmp_path / "net.safetensors"), str(tmp_path / "ct.zarr")]


def test_a_dose_that_is_not_there_is_told_with_whose_it_is_and_what_to_give(command):
    wanted = CliRunner().invoke(app, [*command, "--protocol", "chest"])
    assert "not 0.10, at which protocol chest compares; give one that it has: --dose 0.25" in str(
        wanted.exception
    )
    given = CliRunner().invoke(app, [*command, "--dose", "0.5"])
    assert "has doses 1.00, 0.25, not 0.50; give one" in str(given.exception)
    assert wanted.output == given.output == ""


def test_an_unknown_filter_is_refused_before_any_is_tuned(command, tmp_path):
    full = Volume(np.zeros((8, 48, 48), np.int16), (3.0, 1.0, 1.0))
    to_tune_on = {1.0: full, 0.25: full}
    layout.write_case(tmp_path / "ct.zarr", "c1", to_tune_on, patient="c", split="train")
    layout.finalise(tmp_path / "ct.zarr")
    out = ["--out", str(tmp_path / "report"), "--baselines", "gaussian,median"]
    done = CliRunner().invoke(app, [*command, *out])
    assert str(done.exception).startswith("baseline 'median': there is no such filter; choose from gaussian,")
    assert done.output == ""


@pytest.mark.parametrize("name", ["low dose", "full dose"])
def test_weights_are_not_called_as_an_image_is_that_they_are_compared_with(command, name):
    """The network would take its place: its figures stood in the tables as the low dose's."""
    verb, weights, store = command
    refused = CliRunner().invoke(app, [verb, f"{name}={weights}", store])
    assert f"{name}: an image of every case is called so in the tables" in str(refused.exception)


@pytest.mark.parametrize("shape", [(8, 48, 48), (4, 20, 20)])
def test_a_case_that_was_ingested_again_meanwhile_is_refused(command, tmp_path, shape):
    """Or the report would name the fingerprint of other voxels. It is not called damaged, as one of another shape was."""
    other = Volume(np.zeros(shape, np.int16), (3.0, 1.0, 1.0))
    layout.write_case(tmp_path / "ct.zarr", "a2", {1.0: other, 0.25: other}, patient="a", split="test")
    refused = CliRunner().invoke(app, command)
    assert "case a2 was ingested again since this started, or by an ingest that has not finished" in str(
        refused.exception
    )
    layout.finalise(tmp_path / "ct.zarr")
    assert CliRunner().invoke(app, command).exit_code == 0


def told(command: list[str]) -> str:
    """What it prints, in one line."""
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_the_terminal_shows_means_over_patients_as_the_report_does(command):
    words = told(command)
    assert "3 cases of 2 patients in test, means over patients, against full dose: abdomen, window" in words
    assert float(re.search(r"low dose\s*│\s*([\d.]+)", words)[1]) == (15 + 40) / 2


@pytest.fixture
def labelled(tmp_path):
    """`evaluate` with a report, on a case of each of ten patients, and where its labels are."""
    layout.create(tmp_path / "ct.zarr")
    hu = np.random.default_rng(0).integers(0, 100, (1, 16, 16), dtype=np.int16)
    low, full = (Volume(hu + off, (3.0, 1.0, 1.0)) for off in (np.int16(9), np.int16(0)))
    key = load_key(tmp_path / "ct.zarr.key")
    for i in range(11):
        layout.write_case(
            tmp_path / "ct.zarr",
            f"c{i}",
            {1.0: full, 0.25: low},
            patient=patient_hash(key, f"MRN-{i}"),
            split="test",
            key_id=key_id(key),
        )
    layout.finalise(tmp_path / "ct.zarr")
    save_weights(tmp_path / "net.safetensors", random_network("unet3d"))
    words = ["evaluate", str(tmp_path / "net.safetensors"), str(tmp_path / "ct.zarr"), "--baselines", ""]
    words += ["--out", str(tmp_path / "report"), "--labels", str(tmp_path / "labels.csv")]
    return words, tmp_path / "labels.csv"


def test_labels_without_a_case_and_cases_without_a_label_are_told(labelled, tmp_path):
    """The names of the first in the terminal alone: such as a patient's, for which ingest has refused a manifest's case."""
    command, labels = labelled
    labels.write_text("case,label\nMeier-3,1\n" + "".join(f"c{i},{i % 2}\n" for i in range(10)))
    words = told(command)
    assert "not measured: labels without a case in ct.zarr: 1" in words
    assert "labels without a case: Meier-3" in words
    assert not any(b"Meier" in path.read_bytes() for path in (tmp_path / "report").iterdir())
    assert "not measured: classification of cases without a label: c10" in words
    assert "classified: 10 images of 10 patients" in words


@pytest.mark.parametrize(
    ("given", "needed"), [(["--key", "k"], "add --labels"), (["--labels", "l.csv"], "add --out")]
)
def test_an_option_that_needs_another_one_is_refused_without_it(command, given, needed):
    assert needed in str(CliRunner().invoke(app, [*command, *given]).exception)


def test_labels_of_patients_are_those_of_their_cases(labelled, tmp_path):
    """As a hospital has them, by PatientID: whose a case of a store is, only the store's key can tell."""
    command, labels = labelled
    labels.write_text("patient,label\nMRN-77,1\n" + "".join(f"MRN-{i},{i % 2}\n" for i in range(11)))
    words = told(command)
    assert "classified: 11 images of 11 patients" in words
    assert "labels without a case: patient 1 of the labels" in words
    assert not any(b"MRN" in path.read_bytes() for path in (tmp_path / "report").iterdir())
    key = tmp_path / "ct.zarr.key"
    elsewhere = key.rename(tmp_path / "ours.key")
    for words, place in (([], key), (["--key", where := str(tmp_path / ("n" * 300) / "key")], where)):
        refused = CliRunner().invoke(app, [*command, *words]).exception
        assert f"need the store's key, and {place} is not there, or may not be read" in str(refused)
    assert not key.exists()
    assert "classified: 11 images of 11 patients" in told([*command, "--key", str(elsewhere)])
    load_key(another := tmp_path / "theirs.key")
    refused = CliRunner().invoke(app, [*command, "--key", str(another)]).exception
    assert f"{another} is not the key of" in str(refused)


def test_a_label_of_a_slice_that_is_not_there_is_refused_before_any_work(labelled):
    command, labels = labelled
    labels.write_text("case,slice,label\nc9,1,1\n" + "".join(f"c{i},0,{i % 2}\n" for i in range(11)))
    done = CliRunner().invoke(app, command)
    assert "labels: case c9 has slices 0 to 0, not 1" in str(done.exception)
    assert done.output == ""


def test_what_one_case_lacks_and_another_has_is_measured(tmp_path):
    """The first is air: neither noise power nor a phantom comes of it."""
    scanner = DoseConfig(photons=3e5, cutoff_per_mm=0.2)
    spacing = (4.0, 2.0, 2.0)
    full = simulate_full_dose(body((8, 160, 160), spacing, seed=0).hu, spacing, 0, scanner)
    low = simulate_low_dose(full, 0.25, 1, scanner)
    air = Volume(np.full((2, 48, 48), -1000, np.int16), (4.0, 3.0, 3.0))
    config = StudyConfig(lesion_mm=12)
    told = {}
    for name, cases in {"air": [(air, air)], "both": [(air, air), (full, low)]}.items():
        layout.create(tmp_path / name)
        for i, pair in enumerate(cases):
            doses = dict(zip((1.0, 0.25), pair, strict=True))
            layout.write_case(tmp_path / name, f"c{i}", doses, patient=f"p{i}", split="test")
        layout.finalise(tmp_path / name)
        told[name] = measure(Store(tmp_path / name), config, {"low dose": lambda low: low.hu})
    assert (told["both"].nps_case, told["both"].phantom_case) == ("c1", "c1")
    absent = {"noise power: no case has 4 flat", "phantom: simulated dose: too little soft tissue"}
    # without the advice to set what is a setting of ingest alone
    assert "phantom: simulated dose: too little soft tissue to measure the scan's noise" in told["air"].notes
    for name, expected in (("air", absent), ("both", set())):
        assert {a for a in absent if any(note.startswith(a) for note in told[name].notes)} == expected
    assert not any("flat regions" in note for note in told["both"].notes)


def test_what_many_cases_lack_is_told_once(tmp_path):
    layout.create(tmp_path / "ct")
    air = Volume(np.full((1, 32, 32), -1000, np.int16), (4.0, 3.0, 3.0))
    for i in range(6):
        layout.write_case(tmp_path / "ct", f"c{i}", {1.0: air, 0.25: air}, patient=f"p{i}", split="test")
    layout.finalise(tmp_path / "ct")
    found = measure(Store(tmp_path / "ct"), StudyConfig(), {name: lambda low: low.hu for name in "ab"})
    (told,) = (note for note in found.notes if "to measure noise" in note)
    assert told == "too little soft tissue to measure noise: 6 of 6 cases, c0, c1, c2, c3, and 2 more"


def test_what_is_not_measured_says_on_which_cases(tmp_path):
    """Or it would be read as said of all."""
    layout.create(tmp_path / "ct")
    for name, hu in (("air", -1000), ("padding", -1024)):
        volume = Volume(np.full((1, 48, 48), hu, np.int16), (4.0, 3.0, 3.0))
        layout.write_case(tmp_path / "ct", name, {1.0: volume, 0.25: volume}, patient=name, split="test")
    layout.finalise(tmp_path / "ct")
    found = measure(Store(tmp_path / "ct"), StudyConfig(), {"low dose": lambda low: low.hu})
    (told,) = (note for note in found.notes if note.startswith("abdomen: evaluate: no voxel to count"))
    assert told.endswith("the full dose is all padding: 1 of 2 cases, padding")


def test_the_terminal_shows_a_dash_where_nothing_was_measured(tmp_path):
    """Slices of 5 voxels have no SSIM; equal images, no finite PSNR."""
    layout.create(tmp_path / "ct.zarr")
    hu = np.full((4, 5, 5), 40, np.int16)
    full = Volume(hu, (3.0, 1.0, 1.0))
    layout.write_case(tmp_path / "ct.zarr", "c", {1.0: full, 0.25: full}, patient="p", split="test")
    layout.finalise(tmp_path / "ct.zarr")
    save_weights(tmp_path / "net.safetensors", random_network("unet3d"))
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path / "net.safetensors"), str(tmp_path / "ct.zarr")])
    assert done.exit_code == 0, done.output
    assert re.search(r"low dose\s*│\s*0.00\s*│\s*inf\s*│\s*–", done.output)
    assert "nan" not in done.output
