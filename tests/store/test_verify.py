from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from ldct_dist.cli import app
from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError
from ldct_dist.store import layout
from ldct_dist.store.record import case_metadata, group_metadata, read_record, sha256
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
    (fault,) = verify(store.path)
    assert fault.startswith("case-001/1.00: its voxels are not those that were ingested")


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


def test_a_record_of_a_later_version_is_not_called_damaged(store):
    """As by a job that still runs the code that it was submitted with: to delete the case would be the wrong advice."""
    path = store.path / "cases/case-000/zarr.json"
    body = json.loads(path.read_text())["attributes"]["ldct_dist"]
    del body["seal"]
    later = {**body, "gantry": 1}
    later["seal"] = sha256(json.dumps(later).encode())
    path.write_bytes(group_metadata({"ome": {}, "ldct_dist": later}))
    with pytest.raises(
        UserError, match=r"case-000 was ingested by a newer .* its gantry; update the package"
    ):
        store.volume("case-000", "1.00")
    path.write_text(path.read_text().replace('"gantry": 1', '"gantry": 2'))
    with pytest.raises(UserError, match="the record of case case-000 is damaged"):
        store.volume("case-000", "1.00")


def files_of(store):
    return [str(p.relative_to(store.path)) for p in store.path.rglob("*") if p.is_file()]


def flip_a_bit(path):
    """One at random; the bytes that were there."""
    whole = path.read_bytes()
    raw = bytearray(whole)
    raw[RANDOM.randrange(len(raw))] ^= 1 << RANDOM.randrange(8)
    path.write_bytes(raw)
    return whole


KINDS_OF_FILE = {
    "zarr.json": r"ct\.zarr|^zarr\.json",
    "catalogue.parquet": r"catalogue\.parquet is damaged",
    "cases/zarr.json": r"^cases/zarr\.json",
    "cases/case-001/zarr.json": r"record of case case-001",
    "cases/case-001/0.25/zarr.json": r"^case-001/0\.25",
    "cases/case-001/0.25/c/0/0/0": r"^case-001/0\.25",
}


def test_these_are_all_kinds_of_file(store):
    kinds = {re.sub(r"case-00\d", "case-001", file).replace("1.00", "0.25") for file in files_of(store)}
    assert kinds == set(KINDS_OF_FILE)


@pytest.mark.parametrize("file", KINDS_OF_FILE)
def test_a_flipped_bit_in_any_file_is_found_and_its_place_named(store, file):
    for _ in range(16):
        whole = flip_a_bit(store.path / file)
        faults = verify(store.path)
        assert faults, "not found"
        assert all(re.search(KINDS_OF_FILE[file], fault) for fault in faults)
        (store.path / file).write_bytes(whole)
    assert verify(store.path) == []


@pytest.mark.parametrize("file", ["zarr.json", "catalogue.parquet"])
def test_without_a_catalogue_the_cases_are_still_looked_at(store, file):
    (store.path / file).unlink()
    flip_a_bit(store.path / "cases/case-000/1.00/c/0/0/0")
    assert [fault[:13] for fault in verify(store.path)[1:]] == ["case-000/1.00"]


def test_a_store_that_lost_all_cases_is_not_whole(store):
    shutil.rmtree(store.path / "cases")
    assert len(verify(store.path)) == 3


def test_the_command_ends_with_1_if_there_are_faults_and_with_0_if_not(store):
    assert CliRunner().invoke(app, ["verify", str(store.path)]).exit_code == 0
    flip_a_bit(store.path / "catalogue.parquet")
    flip_a_bit(store.path / "cases/case-001/0.25/c/0/0/0")
    found = CliRunner().invoke(app, ["verify", str(store.path)])
    assert found.exit_code == 1
    assert "catalogue.parquet is damaged" in found.stdout
    assert "case-001/0.25: damaged (checksum of" in found.stdout


def test_progress_counts_the_cases(store):
    heard = []
    verify(store.path, lambda done, total: heard.append((done, total)))
    assert heard == [(1, 2), (2, 2)]


def test_a_case_that_the_catalogue_lacks_is_found(store):
    volume = Volume(np.zeros((3, 8, 8), np.int16), SPACING)
    layout.write_case(store.path, "late", {1.0: volume}, patient="p", split="train")
    assert verify(store.path) == ["late: there, but not in the catalogue; run ldct-dist ingest again"]


def test_what_is_no_store_cannot_be_verified(tmp_path):
    with pytest.raises(UserError, match="not a store"):
        verify(tmp_path)
