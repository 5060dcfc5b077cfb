"""Compressed frames: found by any kind of table, and never at another frame's place."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from enhanced_ct import write_enhanced
from ldct_dist.ct.dicom import read_series
from synthetic_dicom import Options, only, phantom, refusal, write_series


@pytest.mark.parametrize("offsets", ["basic", "extended", "none"])
def test_compressed_frames_are_found_by_any_table_and_by_none(tmp_path, offsets):
    paths = write_series(tmp_path, phantom(), Options(syntax=JPEG2000Lossless))
    write_enhanced(paths, tmp_path / "IM0", offsets=offsets)
    np.testing.assert_array_equal(read_series(only(tmp_path)).hu, phantom())


def without(*indices: int) -> Callable[[Dataset], None]:
    """Frames fewer in the header than there are pixels of."""

    def change(whole: Dataset) -> None:
        groups = whole.PerFrameFunctionalGroupsSequence
        whole.PerFrameFunctionalGroupsSequence = [g for i, g in enumerate(groups) if i not in indices]
        whole.NumberOfFrames = len(whole.PerFrameFunctionalGroupsSequence)

    return change


def offsets_of(**changes: int) -> Callable[[Dataset], None]:
    """Another extended offset table: the i-th offset is what `offset{i}` says."""

    def change(whole: Dataset) -> None:
        table = list(struct.unpack("<5Q", whole.ExtendedOffsetTable))
        for name, value in changes.items():
            table[int(name[-1])] = value
        whole.ExtendedOffsetTable = struct.pack("<5Q", *table)

    return change


@pytest.mark.parametrize(
    "syntax", [JPEG2000Lossless, RLELossless, JPEGLSLossless], ids=["j2k", "rle", "jpeg-ls"]
)
@pytest.mark.parametrize("offsets", ["basic", "extended", "none"])
@pytest.mark.parametrize("change", [without(0), without(4)], ids=["the first", "the last"])
def test_pixels_of_more_frames_than_there_are(tmp_path, syntax, offsets, change):
    """Taken in their order, they would be at another frame's place."""
    paths = write_series(tmp_path, phantom(), Options(syntax=syntax))
    write_enhanced(paths, tmp_path / "IM0", offsets=offsets, change=change)
    assert "do not make 4 frames" in refusal(tmp_path)


@pytest.mark.parametrize("wrong", [{"offset4": 1 << 40}, {"offset2": 0}, {"offset1": 9}, {"offset0": 4}])
def test_offsets_that_lead_to_no_frame(tmp_path, wrong):
    paths = write_series(tmp_path, phantom(), Options(syntax=JPEG2000Lossless))
    write_enhanced(paths, tmp_path / "IM0", offsets="extended", change=offsets_of(**wrong))
    assert "do not make 5 frames" in refusal(tmp_path)


@pytest.mark.parametrize("table", [True, False], ids=["offsets", "no offsets"])
def test_frames_in_several_fragments(tmp_path, table):
    def in_pieces(whole: Dataset) -> None:
        frames = generate_frames(whole.PixelData, number_of_frames=5)
        whole.PixelData = encapsulate(list(frames), fragments_per_frame=3, has_bot=table)

    paths = write_series(tmp_path, phantom(), Options(syntax=JPEGLSLossless))
    write_enhanced(paths, tmp_path / "IM0", change=in_pieces)
    np.testing.assert_array_equal(read_series(only(tmp_path)).hu, phantom())


def test_an_offset_left_out_makes_no_frame_of_two(tmp_path):
    """A decoder would take the first of the two, and never say so."""

    def left_out(whole: Dataset) -> None:
        without(4)(whole)
        count, size, *table = struct.unpack_from("<LL5L", whole.PixelData)
        rest = whole.PixelData[8 + size :]
        whole.PixelData = struct.pack("<LL4L", count, 16, *table[:4]) + rest

    paths = write_series(tmp_path, phantom(), Options(syntax=JPEG2000Lossless))
    write_enhanced(paths, tmp_path / "IM0", change=left_out)
    assert "5 pieces of compressed pixels and 4 offsets do not make 4 frames" in refusal(tmp_path)


def test_native_pixels_in_fragments(tmp_path):
    paths = write_series(tmp_path, phantom(), Options(syntax=RLELossless))
    path = write_enhanced(paths, tmp_path / "IM0")
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.5\0", b"1.2.840.10008.1.2.1\0"))
    assert "not what its transfer syntax says" in refusal(tmp_path)


def test_rle_frames_have_one_fragment_each(tmp_path):
    """Its decoder would take the first for all."""

    def in_pieces(whole: Dataset) -> None:
        frames = generate_frames(whole.PixelData, number_of_frames=5)
        whole.PixelData = encapsulate(list(frames), fragments_per_frame=2)

    paths = write_series(tmp_path, phantom(), Options(syntax=RLELossless))
    write_enhanced(paths, tmp_path / "IM0", change=in_pieces)
    assert "10 pieces of compressed pixels and 5 offsets do not make 5 frames" in refusal(tmp_path)


@pytest.mark.parametrize("offsets", ["basic", "extended", "none"])
def test_compressed_pixels_that_are_cut_off(tmp_path, offsets):
    paths = write_series(tmp_path, phantom(), Options(syntax=JPEG2000Lossless))
    path = write_enhanced(paths, tmp_path / "IM0", offsets=offsets)
    path.write_bytes(path.read_bytes()[:-40])
    assert "truncated or damaged pixel data" in refusal(tmp_path)


def test_a_last_image_without_its_end(tmp_path):
    def unended(whole: Dataset) -> None:
        *frames, last = generate_frames(whole.PixelData, number_of_frames=5)
        half = len(last) // 4 * 2
        pieces = [*frames, last[:half], last[half:].rstrip(b"\0")[:-2]]
        whole.PixelData = encapsulate(pieces, has_bot=False)

    paths = write_series(tmp_path, phantom(), Options(syntax=JPEGLSLossless))
    write_enhanced(paths, tmp_path / "IM0", change=unended)
    assert "6 pieces of compressed pixels and 0 offsets do not make 5 frames" in refusal(tmp_path)


def test_an_end_across_fragments_makes_no_frame_of_two(tmp_path):
    """With one fragment too many at the end, all would be a frame further on."""

    def split(whole: Dataset) -> None:
        first, *frames = generate_frames(whole.PixelData, number_of_frames=5)
        end = first.rindex(b"\xff\xd9") + 1
        whole.PixelData = encapsulate([first[:end], first[end:], *frames, frames[-1]], has_bot=False)

    paths = write_series(tmp_path, phantom(), Options(syntax=JPEGLSLossless))
    write_enhanced(paths, tmp_path / "IM0", change=split)
    assert "7 pieces of compressed pixels and 0 offsets do not make 5 frames" in refusal(tmp_path)


@pytest.mark.parametrize("offsets", [0, 5])
def test_compressed_pixels_without_any(tmp_path, offsets):
    def nothing(whole: Dataset) -> None:
        whole.PixelData = struct.pack("<HHL", 0xFFFE, 0xE000, 4 * offsets) + bytes(4 * offsets)

    paths = write_series(tmp_path, phantom(), Options(syntax=JPEG2000Lossless))
    write_enhanced(paths, tmp_path / "IM0", change=nothing)
    assert f"0 pieces of compressed pixels and {offsets} offsets do not make 5" in refusal(tmp_path)
