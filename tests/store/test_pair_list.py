from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from ldct_dist.ct.dicom import Series
from ldct_dist.ct.stored import PixelForm, Stored
from ldct_dist.ct.volume import Acquisition
from ldct_dist.store.pair_list import read_list, write_list
from ldct_dist.store.pairing import Pair, Refusal


def test_no_damage_to_a_list_changes_what_is_read_from_it(tmp_path):
    found = [Pair(series(), "P", None, "case", 0.25, "train")], [Refusal("here", "why")]
    path = tmp_path / "list"
    write_list(path, {}, found)
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i])
        assert read_list(path, {}) is None
        for bit in (1, 128):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :])
            assert read_list(path, {}) in (None, found)


def series(path: str = "/in/a.dcm") -> Series:
    form = PixelForm("1.2", (36, 40), *("16", "12", "11", "0", "1", "MONOCHROME2", None, None), 1.0, -1024.0)
    stored = Stored(Path(path), 99, 1_700_000_000_000_000_001, (52, 47), form)
    axes = (0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)
    facts = Acquisition(kernel="B30", kvp=120.0)
    about = ("1.2.3", None, "P", "AXIAL", None, facts)
    return Series((stored,), *about, (1, 36, 40), (0.1,), (0.7, 0.6, 0.6), (0.0, 0.0, 0.1), axes)


names = st.binary(min_size=1, max_size=9).map(lambda raw: os.fsdecode(raw.replace(b"\0", b"0")))
"""as a file system has them: not always UTF-8"""
numbers = st.floats(allow_nan=False, allow_infinity=False).map(lambda x: x + 0.0)
"""-0.0 is the same slope or intercept as 0.0"""
texts = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
vectors = st.tuples(numbers, numbers, numbers)
forms = st.builds(
    PixelForm,
    *(st.text(max_size=9), st.none() | st.tuples(st.integers(), st.integers())),
    *[texts] * 8,
    *[st.none() | numbers] * 2,
)
slices = st.builds(
    Stored,
    names.map(Path),
    st.integers(),
    st.integers(),
    st.none() | st.tuples(st.integers(), st.integers()),
    st.shared(forms) | forms,
    st.none() | st.integers(),
)
all_series = st.builds(
    Series,
    slices=st.lists(slices, max_size=4).map(tuple),
    series_uid=st.text(max_size=9),
    study_uid=texts,
    patient_id=names,
    description=texts,
    derivation=texts,
    acquisition=st.builds(Acquisition, *[texts] * 3, *[st.none() | numbers] * 4),
    shape=st.tuples(*[st.integers()] * 3),
    positions=st.lists(numbers, max_size=4).map(tuple),
    spacing=vectors,
    origin=vectors,
    direction=st.tuples(vectors, vectors, vectors),
)
pairs = st.builds(Pair, all_series, names, st.none() | all_series, texts, st.none() | numbers, texts)


@given(found=st.tuples(st.lists(pairs, max_size=3), st.lists(st.builds(Refusal, names, names), max_size=3)))
@settings(max_examples=60, deadline=None)
def test_what_is_listed_is_what_was_found(found, tmp_path_factory):
    """To the last bit, names that are not UTF-8 included."""
    path = tmp_path_factory.mktemp("list") / "list"
    write_list(path, {"array": "42"}, found)
    listed = read_list(path, {"array": "42"})
    assert listed == found
    assert repr(listed) == repr(found)  # 1 and 1.0 are equal, too
