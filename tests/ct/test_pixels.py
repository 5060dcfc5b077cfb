"""What the 16 bits of a pixel mean, and where they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import RLELossless

from ldct_dist.ct.dicom import read_series
from ldct_dist.ct.pixels import _meaning
from ldct_dist.errors import UserError
from synthetic_dicom import only, phantom, write_series

intercepts = st.sampled_from([0.0, -1024.0, -1000.0, -8192.0, 24.0, 32767.0, -32768.0, 40000.0, -1024.5])
pads = st.none() | st.tuples(st.integers(-32768, 65535), st.integers(0, 300)).map(
    lambda pad: (pad[0], pad[0] + pad[1])
)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    bits=st.integers(2, 16),
    signed=st.booleans(),
    slope=st.sampled_from([1.0, -1.0, 0.5, 2.0]),
    intercept=intercepts | st.integers(-70000, 70000).map(float),
    pad=pads,
)
def test_sound_patterns_become_the_hu_of_the_table(bits, signed, slope, intercept, pad):
    meaning = _meaning(bits, signed, slope, intercept, pad)
    patterns = np.flatnonzero(meaning.sound).astype(np.uint16)
    hu = np.empty(patterns.shape, np.int16)
    meaning.write_hu(patterns, hu)
    assert np.array_equal(hu, meaning.hu[patterns])


@pytest.mark.parametrize(
    ("bits", "signed", "intercept", "pad"),
    [(12, False, -1024.0, None), (16, True, -1024.0, (-2000, -2000)), (16, True, 0.0, (-3024, -3024))],
)
def test_as_scanners_store_it_no_table_is_needed(bits, signed, intercept, pad):
    assert _meaning(bits, signed, 1.0, intercept, pad).shift == intercept


def test_pixels_of_another_matrix_are_not_taken_for_it_because_some_are_lost(tmp_path):
    """Rows says too few, and of what is too many the end was cut off."""
    path = write_series(tmp_path, phantom())[0]
    for other in write_series(tmp_path, phantom()):
        ds = dcmread(other)
        ds.Rows -= 2
        ds.save_as(other)
    path.write_bytes(path.read_bytes()[: -3 * 48])
    with pytest.raises(UserError, match=r"slice-000\.dcm: more pixel data than Rows and Columns say;"):
        read_series(only(tmp_path))


def test_native_pixels_in_a_fragment(tmp_path):
    """With the fragment's own header, they would all be four voxels further on."""
    for path in write_series(tmp_path, phantom()):
        ds = dcmread(path)
        ds.PixelData = encapsulate([ds.PixelData])
        ds.file_meta.TransferSyntaxUID = RLELossless
        ds.save_as(path)
        path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.5\0", b"1.2.840.10008.1.2.1\0"))
    with pytest.raises(
        UserError, match=r"slice-000\.dcm: its pixel data is not what its transfer syntax says;"
    ):
        read_series(only(tmp_path))
