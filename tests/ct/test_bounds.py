"""Files that ask for more memory than they can have use for are refused before any is taken."""

from __future__ import annotations

import tracemalloc

import pytest
from pydicom import dcmread
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from ldct_dist.ct.dicom import find_series, read_series
from ldct_dist.errors import UserError
from synthetic_dicom import Options, phantom, write_series

SYNTAXES = [
    *(ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian),
    *(RLELossless, JPEG2000Lossless, JPEGLSLossless, JPEGLosslessSV1),
]
MOST = 64 << 20  # bytes


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_absurd_rows_and_columns_are_one_line_and_take_no_memory(tmp_path, syntax):
    for path in write_series(tmp_path, phantom((3, 40, 48)), Options(syntax=syntax)):
        ds = dcmread(path)
        ds.Rows = ds.Columns = 65535
        ds.save_as(path)
    (series,), _ = find_series(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"slice-000\.dcm: .*; export the file again"):
            read_series(series)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()


def test_a_small_deflated_file_that_becomes_a_huge_one_is_refused_before_it_does(tmp_path):
    bomb = Options(syntax=DeflatedExplicitVRLittleEndian, tags={"EncapsulatedDocument": bytes(2 * MOST)})
    write_series(tmp_path, phantom((1, 40, 48)), bomb)
    tracemalloc.start()
    try:
        _, (refused,) = find_series(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()
    assert "slice-000.dcm: " in str(refused)
    assert "or more of memory, which no CT slice does; export the file again or remove it" in str(refused)
