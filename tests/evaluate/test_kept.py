"""Findings are kept exactly, and only those of the same evaluation are found again."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ldct_dist import files
from ldct_dist.errors import UserError
from ldct_dist.evaluate.kept import Kept

OF = {"store": "ab", "config": {"dose": 0.25}}


def test_what_was_kept_is_found_as_keep_returned_it(tmp_path):
    findings = {
        "figures": {"psnr_db": math.inf, "vif": math.nan, "rmse_hu": 0.1 + 0.2},
        "nps": np.arange(6.0).reshape(2, 3) / 7,
        "count": np.int64(3),
        "samples": {"low dose": np.float32([[0.1]])},
        "lacks": None,
        "shape": (1, 2),
    }
    told = Kept(tmp_path / "f", OF).keep("case-a", findings)
    found = Kept(tmp_path / "f", OF).find("case-a")
    for each in (told, found):
        assert math.isnan(each["figures"].pop("vif"))
        assert each["figures"] == {"psnr_db": math.inf, "rmse_hu": 0.1 + 0.2}
        assert (each["count"], each["lacks"], each["shape"]) == (3, None, [1, 2])
        np.testing.assert_array_equal(each["nps"], findings["nps"])
        np.testing.assert_array_equal(each["samples"]["low dose"], findings["samples"]["low dose"])


@settings(deadline=None)  # a disk may take its time
@given(
    st.sampled_from([np.float64, np.float32, np.int16]).flatmap(
        lambda kind: arrays(kind, st.tuples(st.integers(0, 3), st.integers(0, 3)))
    )
)
def test_arrays_are_kept_bit_for_bit(tmp_path_factory, array):
    found = Kept(tmp_path_factory.mktemp("kept"), OF).keep("a", {"array": array})["array"]
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_findings_of_anything_else_and_damaged_ones_are_not_found(tmp_path):
    kept = Kept(tmp_path, OF)
    kept.keep("case-a", {"rows": [17]})
    assert kept.find("case-b") is None
    assert Kept(tmp_path, dict(reversed(OF.items()))).find("case-a") == {"rows": [17]}
    assert Kept(tmp_path, {**OF, "store": "cd"}).find("case-a") is None
    file = tmp_path / "case-a"
    whole = file.read_bytes()
    for damaged in (
        whole[:-5],
        b"",
        b"[" * 100_000,
        b"[]",
        b"{}",
        b"\xff",
        whole.replace(b"[17]", b"[19]"),
    ):
        file.write_bytes(damaged)
        assert kept.find("case-a") is None
    file.write_bytes(whole)
    assert kept.find("case-a") == {"rows": [17]}
    kept.forget()
    assert not tmp_path.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"file: cannot be written \(File exists\); make room, .* goes on with what"
    ):
        Kept(tmp_path / "file", OF).keep("a", {})


def test_a_start_goes_on_when_another_has_made_its_report_and_deleted_the_folder(tmp_path, monkeypatch):
    kept, replace = Kept(tmp_path / "f", OF), files.replace

    def amid(path, text):
        Kept(tmp_path / "f", OF).forget()
        replace(path, text)

    monkeypatch.setattr(files, "replace", amid)
    assert kept.keep("case-a", {"rows": []}) == {"rows": []}
    monkeypatch.undo()
    kept.keep("case-b", {"rows": []})
    assert (kept.find("case-a"), kept.find("case-b")) == (None, {"rows": []})
