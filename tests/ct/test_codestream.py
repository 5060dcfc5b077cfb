"""What a compressed slice says of itself is compared with its header before a decoder takes memory for it."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from openjpeg.utils import encode_array
from pydicom import dcmread
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import HTJ2KLossless, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, JPEGLSNearLossless

from ldct_dist.ct.dicom import find_series, read_series
from ldct_dist.errors import UserError
from synthetic_dicom import Options, phantom, write_series

SHAPE = (2, 40, 48)
MOST = 64 << 20  # bytes


def changed(folder, syntax, change, said=None):
    """A series in `folder` whose codestreams were changed by `change`, its transfer syntax said to be `said`."""
    for path in write_series(folder, phantom(SHAPE), Options(syntax=syntax)):
        ds = dcmread(path)
        ds.PixelData = encapsulate([change(get_frame(ds.PixelData, 0, number_of_frames=1))])
        ds.file_meta.TransferSyntaxUID = said or syntax
        ds.save_as(path)
    (series,), _ = find_series(folder)
    return series


def jpeg_2000(rows, columns):
    sizes = struct.pack(">4I", columns, rows, 0, 0) + struct.pack(">2I", columns, rows)
    return lambda stream: stream[:8] + sizes + stream[32:]


def jpeg(rows, columns):
    """Also JPEG-LS: its start-of-frame segment is the same."""

    def claim(stream):
        start = next(at for at in map(stream.find, (b"\xff\xf7", b"\xff\xc3")) if at > 0)
        return stream[: start + 5] + struct.pack(">2H", rows, columns) + stream[start + 9 :]

    return claim


CLAIMS = {
    "j2k": (JPEG2000Lossless, jpeg_2000, None),
    "htj2k": (JPEG2000Lossless, jpeg_2000, HTJ2KLossless),
    "jpeg-ls": (JPEGLSLossless, jpeg, None),
    "jpeg-lossless": (JPEGLosslessSV1, jpeg, None),
    "jpeg-ls-near": (JPEGLSLossless, jpeg, JPEGLSNearLossless),
}


@pytest.mark.parametrize(("syntax", "claim", "said"), CLAIMS.values(), ids=CLAIMS)
@pytest.mark.parametrize(("rows", "columns"), [(8192, 8192), (40, 65535), (65535, 48), (48, 40), (40, 47)])
def test_a_codestream_of_another_size_is_one_line_and_takes_no_memory(
    tmp_path, syntax, claim, said, rows, columns
):
    series = changed(tmp_path, syntax, claim(rows, columns), said)
    line = rf"slice-000\.dcm: .* claim {rows} x {columns} x 1 values, its header 40 x 48 x 1 .*; export the file again$"
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=line):
            read_series(series)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("gone", [b"\xff\xc3", b"\xff\xc4", b"\xff\xda"], ids=["SOF", "DHT", "SOS"])
@pytest.mark.parametrize("left", [b"\xbf", b"\xff\xe0"], ids=["no marker", "another"])
def test_a_jpeg_without_what_its_decoder_needs(tmp_path, gone, left):
    """GDCM would end the process, with all that it was working on."""
    by = (left + gone[1:])[:2]
    series = changed(tmp_path, JPEGLosslessSV1, lambda stream: stream.replace(gone, by, 1))
    with pytest.raises(
        UserError, match=r"slice-000\.dcm: not readable as DICOM .*; export it again or remove it$"
    ):
        read_series(series)


def test_a_jpeg_of_more_bits_than_ct_has(tmp_path):
    def bits_24(stream):
        at = stream.find(b"\xff\xc3") + 4
        return stream[:at] + b"\x18" + stream[at + 1 :]

    with pytest.raises(UserError, match="JPEG stream of 24 bits a value"):
        read_series(changed(tmp_path, JPEGLosslessSV1, bits_24))


def test_fill_bytes_before_a_marker_are_passed_over(tmp_path):
    hu = read_series(changed(tmp_path / "as it was", JPEGLosslessSV1, lambda stream: stream)).hu
    filled = changed(
        tmp_path / "filled", JPEGLosslessSV1, lambda s: s.replace(b"\xff\xc4", b"\xff\xff\xc4", 1)
    )
    np.testing.assert_array_equal(read_series(filled).hu, hu)


def test_colour_behind_a_grey_header_is_one_line(tmp_path):
    colour = encode_array(np.zeros((*SHAPE[1:], 3), np.uint16), photometric_interpretation=1)
    series = changed(tmp_path, JPEG2000Lossless, lambda _: bytes(colour))
    with pytest.raises(UserError, match=r"claim 40 x 48 x 3 values, its header 40 x 48 x 1 "):
        read_series(series)


def test_an_image_that_begins_elsewhere_on_its_grid_counts_from_the_origin(tmp_path):
    """The decoder takes memory for all of the grid."""
    rows, columns = SHAPE[1:]
    left = 8192
    grid = struct.pack(">8I", left + columns, rows, left, 0, columns, rows, left, 0)
    series = changed(tmp_path, JPEG2000Lossless, lambda stream: stream[:8] + grid + stream[40:])
    with pytest.raises(UserError, match=r"claim 40 x 8240 x 1 values"):
        read_series(series)


def test_a_jp2_header_before_the_codestream_is_passed_over(tmp_path):
    """DICOM forbids it (PS3.5 A.4.4), some writers do it, and OpenJPEG decodes it."""
    stored = iter(phantom(SHAPE) + 1024)
    series = changed(tmp_path, JPEG2000Lossless, lambda _: encode_array(next(stored), 16, codec_format=1))
    np.testing.assert_array_equal(read_series(series).hu, phantom(SHAPE))


def test_what_is_no_jpeg_2000_is_one_line(tmp_path):
    series = changed(tmp_path, JPEG2000Lossless, lambda stream: b"\0" * len(stream) + b"\xff\xd9")
    with pytest.raises(UserError, match=r"slice-000\.dcm: not readable as DICOM \(no JPEG 2000 codestream\)"):
        read_series(series)
