from __future__ import annotations

import csv
import errno
import os
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from enhanced_ct import write_enhanced
from ldct_dist.ct.dicom import one_series
from ldct_dist.ct.dose import simulate_low_dose
from ldct_dist.ct.dose_config import DoseConfig, seed_of
from ldct_dist.errors import UserError
from ldct_dist.store import layout
from ldct_dist.store.ingest import finalise, ingest
from ldct_dist.store.parts import writing
from ldct_dist.store.reader import Store
from ldct_dist.store.verify import verify
from sources import CONFIG, SHAPE, anatomy, content, write_pair, write_patients
from synthetic_dicom import Options, write_series


def test_every_series_becomes_a_verified_case_with_its_simulated_low_dose(source, out, threads):
    surveys, told = [], []
    report = ingest(source, out, CONFIG, announce=surveys.append, progress=told.append)
    assert (len(report.written), report.skipped, report.rejected) == (3, [], [])
    assert sorted(told) == sorted(report.written)
    assert (surveys[0].cases, surveys[0].files) == (
        3,
        sum(p.is_file() for p in (out / "cases").glob("*/**/*")),
    )
    store = Store(out)
    full = {store.volume(c.name, "1.00").hu.tobytes() for c in store.cases}
    assert full == {anatomy(i).tobytes() for i in range(3)}
    for case in store.cases:
        low, high = store.volume(case.name, "0.25"), store.volume(case.name, "1.00")
        assert (low.spacing, low.origin) == (high.spacing, high.origin)
        assert 1 < np.std(low.hu.astype(float) - high.hu) < 500
    assert verify(out) == []


def test_a_case_says_how_its_low_dose_was_made(tmp_path, out, threads):
    """With the config in the record, the simulation can be had again, bit for bit."""
    write_series(tmp_path / "in", anatomy(0, (4, 96, 96), noise=12.0), Options())
    simulation = DoseConfig(views=32, columns=64)
    ingest(tmp_path / "in", out, CONFIG.model_copy(update={"simulation": simulation}))
    store = Store(out)
    record = store.record(store.cases[0].name)
    assert record.low_dose is not None
    assert record.low_dose["made"] == "simulated"
    config = DoseConfig(**record.low_dose["config"])
    assert (config.views, config.columns) == (32, 64)
    assert config.photons is not None
    assert config.cutoff_per_mm is not None
    seed = seed_of(one_series(tmp_path / "in").series_uid, 0)
    again = simulate_low_dose(store.volume(record.name, "1.00"), 0.25, seed, config)
    assert np.array_equal(again.hu, store.volume(record.name, "0.25").hu)
    assert verify(out) == []


def test_a_pair_says_that_its_low_dose_was_acquired(tmp_path, out, threads):
    write_pair(tmp_path / "in/full_dose/L067", tmp_path / "in/quarter_dose/L067", Options(patient="L067"))
    ingest(tmp_path / "in", out, CONFIG)
    (case,) = Store(out).cases
    assert Store(out).record(case.name).low_dose == {"made": "acquired"}


def test_the_measured_noise_is_that_of_the_full_dose(tmp_path, out, threads):
    write_series(tmp_path / "in", anatomy(0, (6, 96, 96), noise=12.0), Options())
    ingest(tmp_path / "in", out, CONFIG)
    assert Store(out).cases[0].noise_hu == pytest.approx(12, rel=0.15)


def test_an_enhanced_ct_becomes_the_case_that_its_slices_would_become(tmp_path, threads):
    config = CONFIG.model_copy(update={"key": tmp_path / "key"})
    for name in ("single", "whole"):
        files = write_series(tmp_path / name, anatomy(), Options(patient="P"))
        if name == "whole":
            write_enhanced(files, tmp_path / name / "IM0", source_mm=0.0)  # single frames say none
        report = ingest(tmp_path / name, tmp_path / f"{name}.zarr", config)
    single, whole = (content(tmp_path / f"{name}.zarr") for name in ("single", "whole"))
    # These name the files that a case is made of, and their age.
    records = {"zarr.json", "catalogue.parquet", f"cases/{report.written[0]}/zarr.json"}
    assert {place for place in single | whole if single.get(place) != whole.get(place)} == records


def test_a_second_ingest_writes_nothing(source, out, threads):
    first = ingest(source, out, CONFIG)
    before = content(out)
    again = ingest(source, out, CONFIG)
    assert (again.written, sorted(again.skipped)) == ([], sorted(first.written))
    assert content(out) == before


def test_a_changed_source_is_ingested_again_and_nothing_else(source, out, threads):
    ingest(source, out, CONFIG)
    changed = source / "p1/slice-002.dcm"
    ds = dcmread(changed)
    ds.PixelData = bytes(len(ds.PixelData))  # the same size: -1024 HU all over
    ds.save_as(changed)
    report = ingest(source, out, CONFIG)
    assert (len(report.written), len(report.skipped)) == (1, 2)
    assert (Store(out).volume(report.written[0], "1.00").hu[2] == -1024).all()
    assert verify(out) == []


def test_other_settings_are_another_case(source, out, threads):
    ingest(source, out, CONFIG)
    report = ingest(source, out, CONFIG.model_copy(update={"seed": 1}))
    assert len(report.written) == 3


def test_another_simulated_dose_does_not_replace_the_one_that_a_run_may_be_training_on(source, out, threads):
    ingest(source, out, CONFIG)
    before = content(out)
    with pytest.raises(UserError, match=r"low dose is 0\.25, simulated, and dose=0\.5 would replace it"):
        ingest(source, out, CONFIG.model_copy(update={"dose": 0.5}))
    assert content(out) == before
    assert Store(out).cases  # as finished as it was
    surveys = []
    ingest(source, out, CONFIG.model_copy(update={"seed": 1}), announce=surveys.append)
    assert (surveys[0].cases, surveys[0].replaced) == (3, 3)


def test_another_split_makes_no_case_again(source, out, tmp_path, threads):
    """And leaves the store that an ingest with this split from the first would have made."""
    config = CONFIG.model_copy(update={"key": tmp_path / "key", "split_of": {"*": "train"}})
    ingest(source, out, config)
    arrays = {path: path.stat().st_ino for path in (out / "cases").glob("*/*/**/*")}
    changed = config.model_copy(update={"split_of": {"P001": "test", "*": "train"}})
    report = ingest(source, out, changed)
    assert (report.written, len(report.skipped), len(report.moved)) == ([], 3, 1)
    assert sorted(Store(out).splits) == ["test", "train", "train"]
    assert {path: path.stat().st_ino for path in (out / "cases").glob("*/*/**/*")} == arrays
    assert verify(out) == []
    ingest(source, tmp_path / "new.zarr", changed)
    assert content(out) == content(tmp_path / "new.zarr")
    assert not ingest(source, out, changed).moved


def test_the_noise_does_not_depend_on_the_secret(source, tmp_path, threads):
    for name in ("a", "b"):
        ingest(source, tmp_path / name, CONFIG)
    voxels = [
        {s.read(c.name, "0.25", tuple(map(slice, [0, 0, 0], SHAPE))).tobytes() for c in s.cases}
        for s in (Store(tmp_path / "a"), Store(tmp_path / "b"))
    ]
    assert voxels[0] == voxels[1]


def test_the_parts_of_an_array_job_make_the_store_that_one_ingest_makes(source, tmp_path, threads):
    config = CONFIG.model_copy(update={"key": tmp_path / "key"})
    ingest(source, tmp_path / "one", config)
    for i in (1, 0):
        ingest(source, tmp_path / "parts", config, part=(i, 2))
    with pytest.raises(UserError, match="did not finish"):
        Store(tmp_path / "parts")
    assert finalise(tmp_path / "parts") == 3
    assert content(tmp_path / "parts") == content(tmp_path / "one")


def test_finalise_names_the_parts_that_are_missing(source, out, threads):
    ingest(source, out, CONFIG, part=(2, 3))
    with pytest.raises(UserError, match=r"2 part\(s\) of its ingest are not done: run --part 0/3, 1/3 first"):
        finalise(out)
    ingest(source, out, CONFIG, part=(0, 2))  # thought better of: an array of two tasks
    with pytest.raises(UserError, match=r"1 part\(s\) .* run --part 1/2 first"):
        finalise(out)
    ingest(source, out, CONFIG, part=(1, 2))
    assert finalise(out) == 3
    assert finalise(out) == 3
    assert not out.with_name("ct.zarr.parts").exists()


def test_parts_of_a_source_that_changed_between_them_are_not_made_into_a_store(source, out, threads):
    """Of three cases, the first part takes the first and the third, the second part the second. Were the first one gone by
    then, the second part would take the third, and the second case would be in none."""
    ingest(source, out, CONFIG, part=(0, 2))
    away = next(path for path in sorted(source.iterdir()))
    away.rename(source.parent / "away")
    ingest(source, out, CONFIG, part=(1, 2))
    with pytest.raises(UserError, match=r"the source changed between the parts .*: run all parts again"):
        finalise(out)
    for part in ((0, 2), (1, 2)):
        ingest(source, out, CONFIG, part=part)
    assert finalise(out) == 3  # what left the source stays


@pytest.mark.parametrize("part", [(0, 1), (1, 2)])
def test_finalise_makes_no_store_of_an_ingest_that_was_cut_off(source, out, threads, part):
    """Nor of an array of which no task came to its end."""

    def interrupt(case: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(source, out, CONFIG, part=part, progress=interrupt)
    assert layout.list_cases(out)
    with pytest.raises(UserError, match=r"did not finish: run it again|run --part 0/2, 1/2 first"):
        finalise(out)
    ingest(source, out, CONFIG)
    assert finalise(out) == 3


def test_two_ingests_do_not_write_one_store_at_once(source, out, threads):
    with writing(out, (0, 1)), pytest.raises(UserError, match="another ingest is writing it; wait"):
        ingest(source, out, CONFIG)
    with writing(out, (0, 2)):
        ingest(source, out, CONFIG, part=(1, 2))
        with pytest.raises(UserError, match="another ingest is writing it"):
            ingest(source, out, CONFIG)
    assert ingest(source, out, CONFIG).skipped


def test_refused_series_are_listed_and_stop_no_other(source, out, threads):
    write_series(source / "gap", anatomy(), Options(patient="G"))
    (source / "gap/slice-003.dcm").unlink()
    write_series(source / "cut", anatomy(), Options(patient="C"))
    whole = (source / "cut/slice-004.dcm").read_bytes()
    (source / "cut/slice-004.dcm").write_bytes(whole[:-900])
    report = ingest(source, out, CONFIG)
    assert (len(report.written), report.rejected_csv) == (3, out.with_name("ct.zarr.rejected.csv"))
    assert report.rejected_csv.stat().st_mode & 0o777 == 0o600  # folders are often called by patients
    with open(report.rejected_csv, newline="") as f:
        rows = list(csv.DictReader(f))
    assert ["1 missing slice(s)" in rows[0]["reason"], "slice-004.dcm" in rows[1]["reason"]] == [True, True]
    assert rows[1]["where"] == str(source / "cut")
    assert len(Store(out).cases) == 3

    for broken in ("gap", "cut"):
        for path in (source / broken).iterdir():
            path.unlink()
    assert ingest(source, out, CONFIG).rejected_csv is None
    assert not out.with_name("ct.zarr.rejected.csv").exists()


def test_what_is_no_volume_by_its_nature_is_listed_but_not_refused(source, out, threads):
    """A scout is in every clinical export: a failure that is always there would hide those that are not."""
    scout = Options(patient="P001", seed="scout", tags={"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]})
    write_series(source / "a scout", anatomy(), scout)
    write_series(source / "gap", anatomy(), Options(patient="G"))
    (source / "gap/slice-003.dcm").unlink()
    for parts in (1, 2):  # the second time from the list that the first task writes for all
        reports = [ingest(source, out, CONFIG, part=(part, parts)) for part in range(parts)]
        assert [len(r.rejected) for r in reports] == [1, 0][:parts]
        assert [len(r.passed_over) for r in reports] == [1, 0][:parts]
        with open(reports[0].rejected_csv, newline="") as f:
            rows = list(csv.DictReader(f))
        assert [(row["outcome"], "localizer" in row["reason"]) for row in rows] == [
            ("refused", False),
            ("passed over", True),
        ]


def test_lists_of_refusals_are_those_of_the_last_ingest(source, out, threads):
    write_series(source / "gap", anatomy(), Options(patient="G"))
    (source / "gap/slice-003.dcm").unlink()
    kept = out.with_name("ct.zarr.rejected-seen.csv")
    kept.write_text("a user's own")

    def listed(*parts: tuple[int, int]) -> set[str]:
        for part in parts:
            ingest(source, out, CONFIG, part=part)
        return {path.name for path in out.parent.glob("*.csv")} - {kept.name}

    assert listed((0, 2), (1, 2)) == {"ct.zarr.rejected-0-of-2.csv"}
    assert listed((0, 1)) == {"ct.zarr.rejected.csv"}
    assert listed((1, 2)) == set()
    for path in (source / "gap").iterdir():
        path.unlink()
    assert listed((0, 2), (1, 2)) == set()
    assert kept.exists()


def test_a_source_of_which_nothing_can_be_used_says_the_first_reason(tmp_path, out, threads):
    write_series(tmp_path / "in", anatomy(), Options(tags={"Modality": "MR"}))
    with pytest.raises(UserError, match=r"no series could be ingested; the first reason: .*not CT"):
        ingest(tmp_path / "in", out, CONFIG)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "ct.zarr.rejected.csv"}
    for name in ("nowhere", "n" * 300):  # at the second, the system refuses to look
        with pytest.raises(UserError, match="does not exist or may not be read"):
            ingest(tmp_path / name, out, CONFIG)


def test_what_is_no_store_is_left_alone(source, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="notes: exists and is not a store"):
        ingest(source, tmp_path / "notes", CONFIG)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["in", "in/deep/ct.zarr", "in/../in/ct.zarr"])
def test_the_store_does_not_go_into_its_source(source, tmp_path, place):
    before = sorted(source.rglob("*"))
    with pytest.raises(UserError, match="is the source or is in it"):
        ingest(source, tmp_path / place, CONFIG)
    assert sorted(source.rglob("*")) == before


def test_a_place_that_cannot_be_written_is_said(source, tmp_path, threads):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"file/ct\.zarr: cannot be written \(.*\); make room or choose another"
    ):
        ingest(source, tmp_path / "file/ct.zarr", CONFIG)


def test_a_full_disk_is_one_line_and_whole_cases_stay(source, out, threads, monkeypatch):
    synced = []

    def sync(root: Path) -> None:
        synced.append(root)
        if len(synced) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(layout, "sync_tree", sync)
    with pytest.raises(
        UserError, match=r"ct\.zarr: cannot be written \(No space left on device\); make room"
    ):
        ingest(source, out, CONFIG.model_copy(update={"workers": 1}))
    assert len(layout.list_cases(out)) == 1
    assert not list((out / "cases").glob(f"{layout.TEMPORARY}*"))


def test_a_refused_folder_whose_name_is_not_utf_8_is_listed_by_its_bytes(tmp_path, threads):
    """As archives from other systems leave it; the ingest of all others ends well."""
    source = write_patients(tmp_path / "in", 1)
    folder = Path(os.fsdecode(os.fsencode(source) + b"/M\xfcller"))
    write_series(folder, anatomy(1), Options(patient="B", tags={"GantryDetectorTilt": 12}))
    report = ingest(source, tmp_path / "ct.zarr", CONFIG)
    assert report.rejected_csv is not None
    assert b"/M\xfcller: series" in report.rejected_csv.read_bytes()
    assert len(Store(tmp_path / "ct.zarr").cases) == 1
