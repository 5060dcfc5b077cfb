from __future__ import annotations

import json
import math
import tempfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError
from ldct_dist.store import catalogue, layout
from ldct_dist.store.layout import SHARD_CAP, chunk_shape, dose_name, shard_count
from ldct_dist.store.reader import Store
from ldct_dist.store.summary import rows
from ldct_dist.store.verify import verify
from stores import SPACING, make_store, smooth_volume


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 140), st.integers(1, 140)),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_volume_comes_back_voxel_by_voxel_with_its_geometry(shape, seed):
    random = np.random.default_rng(seed)
    hu = random.integers(-1024, 32768, shape, dtype=np.int16)
    volume = Volume(hu, (2.5, 0.7, 0.8), (-12.5, 3.25, 40.125), ((0, 0, 1), (0, 1, 0), (-1, 0, 0)))
    with tempfile.TemporaryDirectory() as folder:
        layout.create(Path(folder))
        layout.write_case(Path(folder), "one", {1.0: volume}, patient="p", split="train")
        layout.finalise(Path(folder))
        back = Store(folder).volume("one", "1.00")
    assert np.array_equal(back.hu, hu)
    assert (back.spacing, back.origin, back.direction) == (volume.spacing, volume.origin, volume.direction)


def test_a_case_is_two_files_a_dose_and_one_more(tmp_path):
    store = make_store(tmp_path / "ct.zarr", [(70, 140, 130)])
    files = [p for p in (store.path / "cases/case-000").rglob("*") if p.is_file()]
    assert len(files) == 2 * 2 + 1


def test_zarr_itself_opens_a_store(tmp_path):
    store = make_store(tmp_path / "ct.zarr", [(5, 20, 30)])
    group = zarr.open(store.path, mode="r")
    assert [name for name, _ in group["cases"].groups()] == ["case-000"]
    array = group["cases/case-000/1.00"]
    assert (array.dtype, array.fill_value) == (np.int16, -1024)
    assert array.metadata.dimension_names == ("z", "y", "x")
    assert np.array_equal(array[:], smooth_volume((5, 20, 30), seed=0))


def test_every_dose_is_an_ome_zarr_image(tmp_path):
    """The parts of OME-Zarr 0.5 that viewers rely on: https://ngff.openmicroscopy.org/0.5/#multiscale-md"""
    layout.create(tmp_path / "ct.zarr")
    volume = Volume(np.zeros((4, 6, 8), np.int16), (5.0, 0.7, 0.8), origin=(-10.0, -20.0, 30.0))
    layout.write_case(tmp_path / "ct.zarr", "one", {1.0: volume, 0.25: volume}, patient="p", split="train")
    attributes = json.loads((tmp_path / "ct.zarr/cases/one/zarr.json").read_text())["attributes"]
    ome = attributes["ome"]
    assert ome["version"] == "0.5"
    assert [image["datasets"][0]["path"] for image in ome["multiscales"]] == ["1.00", "0.25"]
    for image in ome["multiscales"]:
        assert image["axes"] == [{"name": n, "type": "space", "unit": "millimeter"} for n in "zyx"]
        assert image["datasets"][0]["coordinateTransformations"] == [
            {"type": "scale", "scale": [5.0, 0.7, 0.8]},
            {"type": "translation", "translation": [30.0, -20.0, -10.0]},
        ]


def test_opening_a_store_opens_no_case(tmp_path):
    store = make_store(tmp_path / "ct.zarr", [(3, 8, 8), (4, 8, 8)], ["train", "test"])
    (store.path / "cases").rename(tmp_path / "elsewhere")
    again = Store(store.path)
    assert [(c.name, c.shape, c.split) for c in again.cases] == [
        ("case-000", (3, 8, 8), "train"),
        ("case-001", (4, 8, 8), "test"),
    ]


def test_the_fingerprint_changes_with_a_voxel_and_with_a_split(tmp_path):
    def fingerprint(name: str, value: int, split: str) -> str:
        hu = np.zeros((3, 8, 8), np.int16)
        hu[1, 2, 3] = value
        layout.create(tmp_path / name)
        layout.write_case(tmp_path / name, "one", {1.0: Volume(hu, SPACING)}, patient="p", split=split)
        layout.finalise(tmp_path / name)
        return Store(tmp_path / name).fingerprint

    assert fingerprint("a", 7, "train") == fingerprint("b", 7, "train")
    assert len({fingerprint("c", 7, "train"), fingerprint("d", 8, "train"), fingerprint("e", 7, "test")}) == 3


def test_a_store_of_before_the_low_dose_was_told_still_opens(tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        columns = [field for field in catalogue._SCHEMA if field.name != "low_dose"]
        before.setattr(catalogue, "_SCHEMA", pa.schema(columns))
        path = make_store(tmp_path / "ct.zarr", [(3, 8, 8)]).path
    assert "low_dose" not in (path / "cases/case-000/zarr.json").read_text()
    store = Store(path)
    assert store.record("case-000").low_dose is None
    assert rows(store)[0]["low_dose"] is None
    assert verify(path) == []


def test_a_case_written_again_replaces_the_old_one_whole(tmp_path):
    layout.create(tmp_path)
    for value, shape in ((1, (70, 20, 20)), (2, (3, 8, 8))):
        volume = Volume(np.full(shape, value, np.int16), SPACING)
        layout.write_case(tmp_path, "one", {1.0: volume}, patient="p", split="train")
    layout.finalise(tmp_path)
    assert np.array_equal(Store(tmp_path).volume("one", "1.00").hu, np.full((3, 8, 8), 2))
    assert sorted(p.name for p in (tmp_path / "cases").iterdir()) == ["one", "zarr.json"]


def test_a_failing_write_leaves_the_old_case_and_nothing_else(tmp_path, monkeypatch):
    store = make_store(tmp_path / "ct.zarr", [(3, 8, 8)])
    monkeypatch.setattr(layout, "sync_tree", lambda root: (_ for _ in ()).throw(OSError(28, "No space left")))
    volume = Volume(np.zeros((3, 8, 8), np.int16), SPACING)
    with pytest.raises(OSError, match="No space left"):
        layout.write_case(store.path, "case-000", {1.0: volume}, patient="p", split="train")
    assert np.array_equal(store.volume("case-000", "1.00").hu, smooth_volume((3, 8, 8), seed=0))
    assert sorted(p.name for p in (store.path / "cases").iterdir()) == ["case-000", "zarr.json"]


def test_patients_hashed_with_two_keys_make_no_catalogue(tmp_path):
    """As by tasks of an array whose key= was on a disk of each node. Who is whose is unknown then."""
    layout.create(tmp_path)
    volume = Volume(np.zeros((3, 8, 8), np.int16), SPACING)
    for name, key in (("a", "mine"), ("b", "theirs"), ("c", "mine"), ("d", None)):
        layout.write_case(tmp_path, name, {1.0: volume}, patient=name, split="train", key_id=key)
    with pytest.raises(UserError, match=r"1 case\(s\) were ingested with another key than the others \(b\)"):
        layout.finalise(tmp_path)


def test_one_patient_in_two_splits_makes_no_catalogue(tmp_path):
    layout.create(tmp_path)
    volume = Volume(np.zeros((3, 8, 8), np.int16), SPACING)
    for name, split in (("a", "train"), ("b", "test")):
        layout.write_case(tmp_path, name, {1.0: volume}, patient="same", split=split)
    with pytest.raises(UserError, match=r"1 patient\(s\) are in more than one split \(a, b\)"):
        layout.finalise(tmp_path)
    assert not (tmp_path / "catalogue.parquet").exists()


def edit(store: Path, text: str) -> None:
    (store / "zarr.json").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda s: (s / "zarr.json").unlink(), "not a store"),
        (
            lambda s: edit(s, '{"zarr_format": 3, "node_type": "group", "attributes": {}}'),
            "not a store that ldct-dist ingest made",
        ),
        (lambda s: edit(s, "{"), "not a store that ldct-dist ingest made"),
        (
            lambda s: edit(s, '{"attributes": {"ldct_dist": {"version": 3}}}'),
            "store format 3, this ldct_dist reads 2; update the package",
        ),
        (
            lambda s: edit(s, '{"attributes": {"ldct_dist": {"version": 1}}}'),
            "store format 1, this ldct_dist reads 2; ingest its source again, into a new folder",
        ),
        (lambda s: (s / "catalogue.parquet").unlink(), "did not finish: run it again"),
        (lambda s: (s / "catalogue.parquet").write_bytes(b"PAR1"), "catalogue.parquet is damaged"),
        (lambda s: (s / "zarr.json").write_bytes(layout.root_metadata()), "did not finish: run it again"),
    ],
)
def test_what_is_not_a_whole_store_of_this_format_is_said(tmp_path, spoil, said):
    store = make_store(tmp_path / "ct.zarr", [(3, 8, 8)])
    spoil(store.path)
    with pytest.raises(UserError, match=said):
        Store(store.path)


def test_a_file_or_what_cannot_be_read_is_not_called_a_group(tmp_path):
    (tmp_path / "pairs.csv").touch()
    with pytest.raises(UserError, match=r"pairs\.csv: not a store"):
        Store(tmp_path / "pairs.csv")
    with pytest.raises(UserError, match=r"cannot be read \(File name too long\)"):
        Store(tmp_path / ("n" * 300))


def test_a_store_is_not_made_on_top_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match="exists and is not a store"):
        layout.create(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("written", range(3))
def test_a_store_whose_making_was_killed_is_made_on_the_next_start(tmp_path, monkeypatch, written):
    """At each file that is put in place: before it, and so after the one before."""
    replace, calls = Path.replace, []

    def killed(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) > written:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        if written < 2:
            with pytest.raises(KeyboardInterrupt):
                layout.create(tmp_path / "ct.zarr")
        else:
            layout.create(tmp_path / "ct.zarr")
    layout.create(tmp_path / "ct.zarr")
    layout.finalise(tmp_path / "ct.zarr")
    files = {
        str(p.relative_to(tmp_path / "ct.zarr")) for p in (tmp_path / "ct.zarr").rglob("*") if p.is_file()
    }
    assert files == {"zarr.json", "cases/zarr.json", "catalogue.parquet"}
    assert len(Store(tmp_path / "ct.zarr").cases) == 0


def test_the_parts_of_an_array_job_may_make_the_store_at_the_same_time(tmp_path):
    for i in range(20):
        with ThreadPool(8) as pool:
            pool.map(layout.create, [tmp_path / str(i)] * 8)
        assert sorted(p.name for p in (tmp_path / str(i)).iterdir()) == ["cases", "zarr.json"]


def test_unknown_cases_doses_and_splits_are_said(tmp_path):
    store = make_store(tmp_path / "ct.zarr", [(3, 8, 8)])
    with pytest.raises(UserError, match="no case 'other'"):
        store.volume("other", "1.00")
    with pytest.raises(UserError, match=r"has doses 1\.00, 0\.25, not 0\.10"):
        store.volume("case-000", "0.10")
    with pytest.raises(UserError, match="no case in split 'test'; its splits are: train"):
        store.split("test")


@pytest.mark.parametrize(
    ("dose", "name"), [(1.0, "1.00"), (0.25, "0.25"), (0.1, "0.10"), (0.125, "0.125"), (1 / 3, "0.3333")]
)
def test_doses_that_differ_have_names_that_differ(dose, name):
    assert dose_name(dose) == name


@settings(deadline=None, derandomize=True, max_examples=30)
@given(shape=st.tuples(*[st.integers(1, 3000)] * 3))
def test_the_shards_of_an_array_hold_all_its_chunks_under_the_cap(shape):
    chunk = chunk_shape(shape)
    padded = [-(-n // c) * c for n, c in zip(shape, chunk, strict=True)]
    count = shard_count(shape)
    assert count == 1 or 2 * math.prod(padded) > SHARD_CAP
    assert 2 * math.prod(padded) <= count * SHARD_CAP
