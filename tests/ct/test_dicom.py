"""Series found, sorted and read: what a user's folder may look like, and the HU that must come out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.fileset import FileSet
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from ldct_dist.ct.dicom import find_series, read_series
from ldct_dist.ct.volume import AIR_HU, Acquisition
from ldct_dist.errors import UserError
from synthetic_dicom import Options, only, phantom, write_series

SYNTAXES = {
    "explicit": ExplicitVRLittleEndian,
    "implicit": ImplicitVRLittleEndian,
    "big-endian": ExplicitVRBigEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
    "rle": RLELossless,
    "j2k": JPEG2000Lossless,
    "jpeg-ls": JPEGLSLossless,
    "jpeg-lossless": JPEGLossless,
    "jpeg-lossless-sv1": JPEGLosslessSV1,
}


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES.keys())
def test_every_transfer_syntax_gives_exact_hu(tmp_path, syntax, bits, signed):
    hu = phantom((2, 32, 40))
    write_series(tmp_path, hu, Options(syntax=syntax, bits_stored=bits, signed=signed))
    np.testing.assert_array_equal(read_series(only(tmp_path)).hu, hu)


@settings(deadline=None, max_examples=15, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    order=st.permutations(range(5)),
    depth=st.lists(st.integers(0, 3), min_size=5, max_size=5),
    suffix=st.sampled_from([".dcm", "", ".IMA", ".1.2.3"]),
)
def test_file_names_order_and_nesting_do_not_matter(tmp_path_factory, order, depth, suffix):
    hu = phantom()
    names = ["/".join([*"abc"[: depth[i]], f"{order[i]:02d}{suffix}"]) for i in range(5)]
    folder = tmp_path_factory.mktemp("nested")
    write_series(folder, hu, names=names)
    series = only(folder)
    assert [str(p.relative_to(folder)) for p in series.paths] == names
    np.testing.assert_array_equal(read_series(series).hu, hu)


def test_geometry_and_facts(tmp_path):
    write_series(tmp_path, phantom(), Options(spacing=(2.5, 0.6, 0.8), patient="P1", kernel="B30f"))
    series = only(tmp_path)
    volume = read_series(series)
    assert volume.spacing == pytest.approx((2.5, 0.6, 0.8))
    assert volume.origin == (-100.0, -120.0, 40.0)
    assert volume.direction == ((0, 0, 1), (0, 1, 0), (1, 0, 0))
    assert volume.acquisition == Acquisition("ACME", "Ring 16", "B30f", 120.0, 82.0, 2.5)
    assert series.patient_id == "P1"
    assert series.shape == volume.shape == (5, 40, 48)
    assert series.positions == pytest.approx((40, 42.5, 45, 47.5, 50))


@pytest.mark.parametrize(
    "orientation",
    [(1, 0, 0, 0, 1, 0), (-1, 0, 0, 0, -1, 0), (-1, 0, 0, 0, 1, 0), (1, 0, 0, 0, -1, 0)],
    ids=["supine", "prone", "mirrored", "upside-down"],
)
@pytest.mark.parametrize("feet_first", [False, True])
def test_slices_are_counted_towards_the_head(tmp_path, orientation, feet_first):
    """Whichever end the scan began at, and also where the cross product of rows and columns looks down."""
    hu = phantom()
    numbers = {"InstanceNumber": lambda i: 5 - i if feet_first else i + 1}
    names = [f"{5 - i if feet_first else i}.dcm" for i in range(5)]
    write_series(tmp_path, hu, Options(orientation=orientation, tags=numbers), names)
    volume = read_series(only(tmp_path))
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.direction[0] == (0, 0, 1)
    assert volume.origin[2] == 40.0


def test_oblique_slices_are_stacked_along_their_normal(tmp_path):
    c, s = np.cos(0.3), np.sin(0.3)
    normal = np.array([0, -s, c])
    tags = {"ImagePositionPatient": lambda i: [round(float(v), 4) for v in 3 * i * normal]}
    hu = phantom()
    write_series(tmp_path, hu, Options(orientation=(1, 0, 0, 0, c, s), tags=tags))
    volume = read_series(only(tmp_path))
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.spacing[0] == pytest.approx(3, abs=1e-4)
    assert volume.direction[0] == pytest.approx(tuple(normal), abs=1e-6)


def test_slope_and_intercept_are_the_slice_s_own(tmp_path):
    hu = phantom() // 4 * 4
    options = Options(slopes=(1.0, 0.5, 2.0, 0.25, 4.0), intercepts=(-1024.0, 0.0, -1000.0, -8.0, -1024.0))
    write_series(tmp_path, hu, options)
    np.testing.assert_array_equal(read_series(only(tmp_path)).hu, hu)


@pytest.mark.parametrize("tagged", [True, False], ids=["PixelPaddingValue", "untagged"])
def test_padding_becomes_air(tmp_path, tagged):
    hu = phantom()
    corner = np.zeros(hu.shape, bool)
    corner[:, :6, :6] = True
    write_series(tmp_path, hu, Options(padding=(corner, -2000, tagged)))
    np.testing.assert_array_equal(read_series(only(tmp_path)).hu, np.where(corner, AIR_HU, hu))


@pytest.mark.parametrize("said", [-2000, 63536], ids=["as-SS", "as-US"])
def test_padding_value_means_its_bits(tmp_path, said):
    """Writers confuse US and SS: 63536 marks the stored value -2000."""
    hu, mask = phantom(), np.zeros((5, 40, 48), bool)
    mask[:, 0] = True
    paths = write_series(tmp_path, hu, Options(padding=(mask, -2000, False)))
    for path in paths:
        ds = dcmread(path)
        ds.add_new("PixelPaddingValue", "SS" if said < 0 else "US", said)
        ds.save_as(path)
    assert (read_series(only(tmp_path)).hu[mask] == AIR_HU).all()


def test_padding_range_and_values_below_air(tmp_path):
    hu = phantom()
    hu[:, 5, 5], hu[:, 6, 6] = -1500, -1100
    stored_limit = -1200 + 1024
    tags = {"PixelPaddingValue": -1600 + 1024, "PixelPaddingRangeLimit": stored_limit}
    write_series(tmp_path, hu, Options(tags=tags))
    np.testing.assert_array_equal(read_series(only(tmp_path)).hu, np.maximum(hu, AIR_HU))


def test_negative_values_without_their_high_bits_are_sign_extended(tmp_path):
    """12-bit signed values whose unused top four bits were left zero: 0xC18 is -1000."""
    hu = np.full((2, 32, 32), -1000, np.int16)
    for path in write_series(tmp_path, hu, Options(bits_stored=12, intercepts=0.0)):
        ds = dcmread(path)
        ds.PixelData = (np.frombuffer(ds.PixelData, "<u2") & 0x0FFF).tobytes()
        ds.save_as(path)
    np.testing.assert_array_equal(read_series(only(tmp_path)).hu, hu)


def test_half_hu_are_rounded(tmp_path):
    paths = write_series(tmp_path, np.zeros((2, 32, 32)), Options(intercepts=0.25))
    assert paths
    assert (read_series(only(tmp_path)).hu == 0).all()


def test_several_series_and_strangers_in_one_folder(tmp_path, tmp_path_factory):
    soft, sharp = phantom(seed=1), phantom(seed=2)
    write_series(tmp_path, soft, Options(seed="soft", kernel="B"), [f"{2 * i}" for i in range(5)])
    write_series(tmp_path, sharp, Options(seed="sharp", kernel="L"), [f"{2 * i + 1}" for i in range(5)])
    (tmp_path / "notes.txt").write_text("no DICOM")
    (tmp_path / "empty").touch()
    (tmp_path / "raw.bin").write_bytes(bytes(range(256)) * 4)
    medium = FileSet()
    medium.add(tmp_path / "0")
    medium.write(tmp_path_factory.mktemp("medium"))
    medium._stage["t"].cleanup()  # pydicom leaves it to the garbage collector, which warns in any later test
    shutil.copy(Path(medium.path) / "DICOMDIR", tmp_path / "renamed")
    found, refused = find_series(tmp_path)
    assert refused == []
    assert {s.acquisition.kernel for s in found} == {"B", "L"}
    for series in found:
        expected = soft if series.acquisition.kernel == "B" else sharp
        np.testing.assert_array_equal(read_series(series).hu, expected)


def test_what_macos_lays_beside_each_file_is_passed_over(tmp_path):
    for path in write_series(tmp_path, phantom()):
        beside = path.with_name(f"._{path.name}")
        beside.write_bytes(bytes.fromhex("0005160700020000") + b"Mac OS X        " + b"\0" * 60)
    assert only(tmp_path).shape == (5, 40, 48)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_a_meta_header_without_transfer_syntax(tmp_path, syntax):
    hu = phantom()
    for path in write_series(tmp_path, hu, Options(syntax=syntax)):
        data = path.read_bytes()
        start = data.index(b"\2\0\x10\0UI")
        end = start + 8 + int.from_bytes(data[start + 6 : start + 8], "little")
        length = int.from_bytes(data[140:144], "little") - (end - start)
        path.write_bytes(data[:140] + length.to_bytes(4, "little") + data[144:start] + data[end:])
    np.testing.assert_array_equal(read_series(only(tmp_path)).hu, hu)


def test_files_without_preamble_are_read(tmp_path):
    """Exports of the nineties hold the bare dataset."""
    hu = phantom()
    for path in write_series(tmp_path, hu, Options(syntax=ImplicitVRLittleEndian)):
        ds = dcmread(path)
        del ds.file_meta
        ds.preamble = None
        ds.save_as(path, enforce_file_format=False, implicit_vr=True, little_endian=True)
        assert path.read_bytes()[:2] == b"\x08\x00"
    np.testing.assert_array_equal(read_series(only(tmp_path)).hu, hu)


def test_linked_folders_are_followed_once(tmp_path):
    write_series(tmp_path / "real", phantom())
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "top")
    assert only(tmp_path / "top").shape == (5, 40, 48)


def test_copies_in_hidden_folders_are_passed_over(tmp_path):
    root = tmp_path / ".cache" / "export"  # what is given itself may lie in one
    write_series(root / "scan", phantom())
    write_series(root / ".Trash-1000" / "files" / "scan", phantom())
    write_series(root / "scan" / ".snapshot" / "hourly.0", phantom())
    assert only(root).shape == (5, 40, 48)


def test_exact_copies_of_slices_are_passed_over(tmp_path):
    """Exports often hold a folder twice. A file that differs in a byte is refused as a duplicate: tests/ct/test_refusals.py."""
    write_series(tmp_path / "in", phantom())
    shutil.copytree(tmp_path / "in", tmp_path / "in/copy of it")
    shutil.copy(tmp_path / "in/slice-001.dcm", tmp_path / "in/0001")
    assert np.array_equal(read_series(only(tmp_path)).hu, phantom())


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_series(tmp_path / "nowhere")


def test_a_file_that_changed_after_the_search_is_noticed(tmp_path):
    write_series(tmp_path, phantom())
    series = only(tmp_path)
    write_series(tmp_path, phantom((5, 32, 32)))
    with pytest.raises(UserError, match="changed since the folder was searched"):
        read_series(series)


def test_files_are_not_looked_at_one_by_one_before_their_headers_are_read(tmp_path, monkeypatch):
    """On a shared file system a look takes up to a millisecond, and a source may have millions of files."""
    written = write_series(tmp_path, phantom())
    looked_at: list[str] = []
    look = os.stat

    def counted(path, **how):
        looked_at.append(os.fspath(path))
        return look(path, **how)

    monkeypatch.setattr(os, "stat", counted)
    read: list[Path] = []
    find_series(tmp_path, lambda paths: read.extend(paths) or [])
    assert read == sorted(written)
    assert not set(map(str, written)) & set(looked_at)
