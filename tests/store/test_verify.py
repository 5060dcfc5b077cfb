from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError
from ldct_dist.store import layout
from ldct_dist.store.record import case_metadata, read_record
from ldct_dist.store.verify import verify
from stores import SPACING, make_store

RANDOM = random.Random(0)


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "ct.zarr", [(12, 20, 20), (6, 20, 20)])


def test_a_whole_store_has_no_faults(store):
    assert verify(store.path) == []


def test_an_array_that_is_sound_but_another_is_found(store):
    shutil.copytree(
        store.path / "cases/case-001/0.25", store.path / "cases/case-001/1.00", dirs_exist_ok=True
    )
    assert verify(store.path) == ["case-001/1.00: its voxels are not those that were ingested"]


def test_lost_cases_and_damaged_records_are_all_listed(store):
    shutil.rmtree(store.path / "cases/case-000")
    (store.path / "cases/case-001/zarr.json").write_text("{}")
    assert [("no case 'case-000'" in f, "record of case case-001" in f) for f in verify(store.path)] == [
        (True, False),
        (False, True),
    ]


def test_a_record_that_the_catalogue_contradicts_is_found(store):
    path = store.path / "cases/case-000"
    (path / "zarr.json").write_bytes(case_metadata(replace(read_record(path), split="test")))
    (fault,) = verify(store.path)
    assert fault.startswith("case-000: its record and the catalogue disagree")


@pytest.mark.parametrize("key", ["spacing", "direction", "voxels", "patient"])
def test_a_record_that_was_edited_is_neither_read_nor_taken_into_a_catalogue(store, key):
    path = store.path / "cases/case-000/zarr.json"
    tree = json.loads(path.read_text())
    tree["attributes"]["ldct_dist"][key] = tree["attributes"]["ldct_dist"][key][::-1]
    path.write_text(json.dumps(tree))
    for use in (lambda: store.volume("case-000", "1.00"), lambda: layout.finalise(store.path)):
        with pytest.raises(UserError, match="the record of case case-000 is damaged"):
            use()


def flip_a_bit(path):
    """One at random; the bytes that were there."""
    whole = path.read_bytes()
    raw = bytearray(whole)
    raw[RANDOM.randrange(len(raw))] ^= 1 << RANDOM.randrange(8)
    path.write_bytes(raw)
    return whole


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("zarr.json", ""),
        ("catalogue.parquet", "catalogue.parquet is damaged"),
        ("cases/zarr.json", "cases/zarr.json"),
        ("cases/case-001/zarr.json", "case case-001"),
        ("cases/case-001/0.25/zarr.json", "case-001.*0.25"),
        ("cases/case-001/0.25/c/0/0/0", "case case-001 at dose 0.25"),
    ],
)
def test_a_flipped_bit_in_any_file_is_found_and_its_place_named(store, file, named):
    for _ in range(40):
        whole = flip_a_bit(store.path / file)
        try:
            faults = verify(store.path)
        except UserError as e:
            faults = [str(e)]
        assert faults, "not found"
        assert all(re.search(named, fault) for fault in faults)
        (store.path / file).write_bytes(whole)
    assert verify(store.path) == []


def test_a_case_that_the_catalogue_lacks_is_found(store):
    volume = Volume(np.zeros((3, 8, 8), np.int16), SPACING)
    layout.write_case(store.path, "late", {1.0: volume}, patient="p", split="train")
    assert verify(store.path) == ["late: there, but not in the catalogue"]


def test_what_is_no_store_cannot_be_verified(tmp_path):
    with pytest.raises(UserError, match="not a store"):
        verify(tmp_path)
