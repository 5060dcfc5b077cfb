"""Cases of a patient stand in one split, and whom the user holds out is held out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ldct_dist.errors import UserError
from ldct_dist.store.ingest import IngestConfig, ingest
from ldct_dist.store.pairing import Pair
from ldct_dist.store.reader import Store
from ldct_dist.store.splits import split_of_each
from ldct_dist.store.summary import by_split
from sources import CONFIG, anatomy
from synthetic_dicom import Options, write_series


def held_out(**split_of: str) -> IngestConfig:
    return CONFIG.model_copy(update={"split_of": split_of})


def test_a_patient_in_two_splits_stops_the_ingest_before_it_writes(tmp_path, out):
    for i in range(2):
        write_series(tmp_path / str(i), anatomy(i), Options(seed=str(i)))
    table = tmp_path / "pairs.csv"
    table.write_text("case,patient,full,low,split\na,anna,0,,train\nb,anna,1,,test\n")
    with pytest.raises(UserError, match=r"2 cases of one patient or study would be in more .* \(a, b\)"):
        ingest(table, out, CONFIG)
    table.write_text("case,patient,full,low,split\na,anna,0,,train\nb,bert,1,,test\n")
    with pytest.raises(UserError, match=r"2 cases of one patient or study would be in more .* \(a, b\)"):
        ingest(table, out, CONFIG)  # two names, but one study
    table.write_text("case,patient,full,low,split\na,anna,0,,trian\n")
    with pytest.raises(UserError, match="split 'trian' is not one of train, val, test"):
        ingest(table, out, CONFIG)
    assert not out.exists()


def test_all_series_of_a_patient_go_into_one_split(tmp_path, out, threads):
    for i in range(12):
        write_series(tmp_path / "in" / str(i), anatomy(i), Options(patient=f"P{i % 4}", seed=str(i)))
    ingest(tmp_path / "in", out, CONFIG.model_copy(update={"splits": {"train": 0.5, "test": 0.5}}))
    assert len({(c.patient, c.split) for c in Store(out).cases}) == 4


def test_patients_are_drawn_by_the_shares_each_whatever_others_there_are():
    pairs = [Pair(SimpleNamespace(study_uid=f"1.2.{i}"), f"P{i}") for i in range(1000)]
    shares = {"train": 0.7, "none": 0.0, "val": 0.2, "test": 0.1}
    drawn = split_of_each(pairs, bytes(32), shares, {})
    counts = [drawn.count(split) for split in shares]
    assert counts == pytest.approx([700, 0, 200, 100], rel=0.2)
    assert split_of_each(pairs[::-3], bytes(32), shares, {}) == drawn[::-3]


@pytest.mark.parametrize("key", [bytes([i]) * 32 for i in range(40)])
def test_small_cohorts_have_every_split_and_keep_it_as_they_grow(key):
    """Drawn each for himself, ten patients would leave a tenth empty in one of three cohorts; Mayo 2016 has ten."""
    shares = {"train": 0.8, "none": 0.0, "val": 0.1, "test": 0.1}
    before: dict[str, str] = {}
    for number in range(3, 30):
        pairs = [Pair(SimpleNamespace(study_uid=f"1.2.{i}"), f"P{i}") for i in range(number)]
        now = dict(zip((p.patient for p in pairs), split_of_each(pairs, key, shares, {}), strict=True))
        assert set(now.values()) == {"train", "val", "test"}
        if number > 8:
            moved = {patient for patient, split in before.items() if now[patient] != split}
            assert not moved & {patient for patient, split in before.items() if split == "train"}
        before = now


def test_whom_the_user_names_is_not_moved_to_fill_a_split():
    pairs = [Pair(SimpleNamespace(study_uid=f"1.2.{i}"), f"P{i}") for i in range(10)]
    shares = {"train": 0.998, "val": 0.001, "test": 0.001}  # nobody falls into the small ones
    named = {"P[0-7]": "train", "P8": "test"}
    assert split_of_each(pairs, bytes(32), shares, named) == [*["train"] * 8, "test", "val"]
    named = {"P[0-6]": "train", "P[78]": "val"}
    assert split_of_each(pairs, bytes(32), shares, named) == [*["train"] * 7, "val", "val", "test"]
    assert split_of_each(pairs, bytes(32), shares, {"*": "train"}) == ["train"] * 10


def test_shares_that_are_no_whole_are_refused(source, out):
    with pytest.raises(UserError, match=r"add up to 0\.9"):
        ingest(source, out, IngestConfig(splits={"train": 0.8, "test": 0.1}))
    with pytest.raises(UserError, match=r"-0\.2.*none may be below 0"):
        ingest(source, out, IngestConfig(splits={"train": 1.2, "test": -0.2}))


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ({"P001": "test", "001": "val"}, r"'001' applies to no patient: the patients are P000, P001, P002;"),
        ({"P*": "train", "P001": "test"}, "'P001' applies to no patient: an earlier pattern"),
    ],
)
def test_a_pattern_that_decides_nothing_stops_the_ingest_before_it_writes(
    source, out, patterns, said, threads
):
    with pytest.raises(UserError, match=said):
        ingest(source, out, held_out(**patterns))
    assert [path.name for path in out.parent.iterdir()] == ["in"]


def test_a_pattern_may_be_about_another_part(source, out, threads):
    for i in range(3):
        ingest(source, out, held_out(P001="test"), part=(i, 3))


def test_a_pattern_that_gives_way_to_the_manifest_is_said(tmp_path, out, threads):
    write_series(tmp_path / "a", anatomy(), Options())
    table = tmp_path / "pairs.csv"
    table.write_text("case,patient,full,low,split\na,anna,a,,train\n")
    with pytest.raises(UserError, match="'anna' applies to no patient: an earlier pattern, or the manifest"):
        ingest(table, out, held_out(anna="test"))


def test_a_pattern_of_one_who_was_refused_says_why(source, out, threads):
    next((source / "p1").iterdir()).unlink()
    (source / "p1/slice-002.dcm").unlink()
    with pytest.raises(UserError, match=r"'P001' applies to no patient: .*the first for: .*missing slice"):
        ingest(source, out, held_out(P001="test"))


def test_a_split_that_there_is_not_is_refused_before_headers_are_read(source, out):
    with pytest.raises(UserError, match="split 'tset' is not one of train, val, test"):
        ingest(source, out, held_out(P001="tset"))


def test_splits_without_patients_are_told_before_the_work_and_after_it(source, out, threads):
    surveys = []
    config = CONFIG.model_copy(
        update={"split_of": {"*": "train"}, "splits": {"train": 0.9, "test": 0.1, "extra": 0}}
    )
    ingest(source, out, config, announce=surveys.append)
    assert surveys[0].empty == ("test",)
    assert by_split(Store(out), ["train", "test"]) == "cases (patients) by split: train 3 (3), test none"
    with pytest.raises(
        UserError, match=r"no case in split 'test'; .* train; .*splits=.*split_of='{PATIENT: test}'"
    ):
        Store(out).split("test")
