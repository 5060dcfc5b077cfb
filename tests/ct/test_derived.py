"""The derived series: untouched voxels bit for bit, honest headers, and all of it or nothing on disk."""

from __future__ import annotations

import os
from pathlib import Path

import gdcm
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import (
    JPEG2000,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
)

import ldct_dist
from ldct_dist.ct.derived import write_derived, write_simulated
from ldct_dist.ct.dicom import Series, read_series
from ldct_dist.ct.volume import AIR_HU
from ldct_dist.errors import UserError
from synthetic_dicom import Options, only, phantom, write_series

DEMO = Path(ldct_dist.__file__).parent / "demo_data"
CORNER = np.zeros((5, 40, 48), bool)
CORNER[:, :9, :9] = True


def stored(paths) -> np.ndarray:
    return np.stack([dcmread(path).pixel_array for path in paths])


def assert_identity_changes_no_stored_value(series: Series, out: Path) -> None:
    written = write_derived(series, read_series(series).hu, out, "identity")
    np.testing.assert_array_equal(stored(written), stored(series.paths))
    assert stored(written).dtype == stored(series.paths).dtype


@pytest.mark.parametrize("case", ["CRLM-CT-1004", "CRLM-CT-1006"])
def test_identity_on_real_series(tmp_path, case):
    """Both hold -3024 HU outside the field of view; only one says so by PixelPaddingValue."""
    series = only(DEMO / case)
    volume = read_series(series)
    assert volume.hu.min() == AIR_HU
    assert stored(series.paths).min() - 1024 == -3024
    assert_identity_changes_no_stored_value(series, tmp_path / "out")


KINDS = {
    "unsigned": Options(signed=False, bits_stored=12),
    "implicit": Options(syntax=ImplicitVRLittleEndian),
    "big-endian": Options(syntax=ExplicitVRBigEndian),
    "j2k": Options(syntax=JPEG2000Lossless),
    "jpeg-ls": Options(syntax=JPEGLSLossless, padding=(CORNER, -2000, True)),
    "jpeg-lossless": Options(syntax=JPEGLosslessSV1, signed=False),
    "half slope": Options(slopes=0.5),
    "slope 3": Options(slopes=3.0),
    "negative slope": Options(slopes=-1.0, intercepts=10.0),
    "per slice": Options(
        slopes=(1.0, 0.5, 2.0, 0.25, 4.0), intercepts=(-1024.0, 0.0, -1000.0, -8.0, -1024.0)
    ),
    "fractional intercept": Options(intercepts=-1000.25),
    "tagged padding": Options(padding=(CORNER, -2000, True)),
    "untagged padding": Options(padding=(CORNER, -2000, False)),
    "padding in the corner of the range": Options(padding=(CORNER, -32768, True)),
    "unsigned padding": Options(signed=False, padding=(CORNER, 0, True)),
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_identity_changes_no_stored_value(tmp_path, options):
    write_series(tmp_path / "in", phantom(), options)
    assert_identity_changes_no_stored_value(only(tmp_path / "in"), tmp_path / "out")


def test_values_below_air_are_kept_where_nothing_changed(tmp_path):
    """Noise in air may reach below -1024 HU: the Volume clips it, the file keeps it."""
    hu = phantom()
    hu[:, 1] = -1100
    write_series(tmp_path / "in", hu)
    series = only(tmp_path / "in")
    wanted = read_series(series).hu.copy()
    wanted[:, 1, :9] = -1010
    back = stored(write_derived(series, wanted, tmp_path / "out", "air")) - 1024
    assert (back[:, 1, 9:] == -1100).all()
    assert (back[:, 1, :9] == -1010).all()


@settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    signed=st.booleans(),
    bits=st.sampled_from([12, 13, 16]),
    slope=st.sampled_from([1.0, 0.5, 2.0]),
    pad=st.sampled_from([None, 0, 5, 1]),
    syntax=st.sampled_from([ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless]),
    seed=st.integers(0, 99),
)
@example(signed=True, bits=16, slope=3.0, pad=None, syntax=ExplicitVRLittleEndian, seed=0)
def test_what_is_written_is_what_is_read(tmp_path_factory, signed, bits, slope, pad, syntax, seed):
    """Any HU come back within half a step of the stored type, as far as that reaches; padding stays."""
    folder = tmp_path_factory.mktemp("round")
    corner = CORNER[:2, :32, :32]
    padding = None if pad is None else (corner, pad - (2048 if signed else 0), True)
    hu = phantom((2, 32, 32)).clip(-1000, 900)
    intercept = 0.0 if signed else -1024.0
    slope = max(slope, 1.0) if bits == 12 else slope
    write_series(
        folder / "in",
        hu,
        Options(
            signed=signed,
            bits_stored=bits,
            slopes=slope,
            intercepts=intercept,
            padding=padding,
            syntax=syntax,
        ),
    )
    series = only(folder / "in")
    wanted = np.random.default_rng(seed).integers(-32768, 30000, hu.shape).astype(np.int16)
    written = write_derived(series, wanted, folder / "out", "noise")
    back = read_series(only(folder / "out")).hu
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    reach = np.clip(wanted, max(AIR_HU, low * slope + intercept), high * slope + intercept)
    inside = ~corner if padding else np.ones(hu.shape, bool)
    # HU are whole numbers. One more step where the value fell on PixelPaddingValue.
    assert np.abs(back - reach)[inside].max() <= (max(slope, 1) / 2 if pad is None else slope + 1)
    if padding:
        assert (back[corner] == AIR_HU).all()
        assert (stored(written)[corner] == padding[1]).all()
        assert (stored(written)[~corner] != padding[1]).all()


def test_a_series_without_a_description_is_described_by_the_label(tmp_path):
    write_series(tmp_path / "in", phantom(), Options(tags={"SeriesDescription": None}))
    series = only(tmp_path / "in")
    path = write_derived(series, read_series(series).hu, tmp_path / "out", "made", label="denoised")[0]
    assert dcmread(path).SeriesDescription == "denoised"


def test_padding_stays_padding_whatever_the_network_says(tmp_path):
    for name, tagged in (("tagged", True), ("untagged", False)):
        write_series(tmp_path / name, phantom(), Options(padding=(CORNER, -2000, tagged)))
        hu = np.full(CORNER.shape, 40, np.int16)
        written = stored(write_derived(only(tmp_path / name), hu, tmp_path / f"{name}-out", "flat"))
        assert (written[CORNER] == -2000).all()
        assert (written[~CORNER] == 40 + 1024).all()


@pytest.fixture
def source(tmp_path) -> Series:
    paths = write_series(tmp_path / "in", phantom(), Options(padding=(CORNER, -2000, True)))
    for path in paths:
        ds = dcmread(path)
        ds.SpecificCharacterSet = "ISO_IR 192"
        ds.PatientName = "山田^太郎"
        ds.BurnedInAnnotation = "NO"
        ds.SeriesDate = ds.InstanceCreationDate = "20200102"
        ds.IconImageSequence = [Dataset()]
        ds.private_block(0x0019, "ACME", create=True).add_new(1, "LO", "raw noise 12.3")
        ds.DerivationDescription = "corrected"
        ds.save_as(path)
    return only(tmp_path / "in")


def test_header_of_the_derived_series(tmp_path, source):
    hu = read_series(source).hu.copy()
    hu[2] += 7
    written = write_derived(source, hu, tmp_path / "out", "ldct_dist unet3d-s", label="denoised unet3d-s")
    for before, after in zip(map(dcmread, source.paths), map(dcmread, written), strict=True):
        for keyword in (
            *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate"),
            *("AccessionNumber", "StudyID", "FrameOfReferenceUID", "SOPClassUID", "Modality", "Manufacturer"),
            *(
                "ImagePositionPatient",
                "ImageOrientationPatient",
                "PixelSpacing",
                "SliceThickness",
                "KVP",
                "Exposure",
            ),
            *("RescaleSlope", "RescaleIntercept", "PixelPaddingValue", "InstanceNumber", "ConvolutionKernel"),
            *("BitsStored", "PixelRepresentation", "Rows", "Columns", "PatientPosition", "AcquisitionNumber"),
        ):
            assert after[keyword] == before[keyword], keyword
        assert after.ImageType == ["DERIVED", "SECONDARY", "AXIAL"]
        assert after.DerivationDescription == "corrected; ldct_dist unet3d-s"
        assert after.SeriesDescription == "AXIAL 2.5 denoised unet3d-s"
        assert after.SeriesNumber != before.SeriesNumber
        assert after.RescaleType == "HU"
        (reference,) = after.SourceImageSequence
        assert reference.ReferencedSOPInstanceUID == before.SOPInstanceUID
        assert reference.ReferencedSOPClassUID == before.SOPClassUID
        assert reference.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
        for keyword in ("IconImageSequence", "SeriesDate", "ContentDate", "InstanceCreationDate"):
            assert keyword not in after
        assert not [e for e in after.iterall() if e.tag.is_private]
        assert after.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
        assert after.file_meta.MediaStorageSOPInstanceUID == after.SOPInstanceUID
        assert after["PixelData"].VR == "OW"
        assert after["SmallestImagePixelValue"].VR == after["PixelPaddingValue"].VR == "SS"
        assert after.SmallestImagePixelValue == after.pixel_array.min()
        assert after.LargestImagePixelValue == after.pixel_array.max()


def test_uids_are_new_unique_and_the_same_when_run_again(tmp_path, source):
    hu = read_series(source).hu
    runs = {
        "first": write_derived(source, hu, tmp_path / "first", "a"),
        "again": write_derived(source, hu, tmp_path / "again", "a"),
        "other network": write_derived(source, hu, tmp_path / "other", "b"),
        "other pixels": write_derived(source, hu + np.int16(1), tmp_path / "pixels", "a"),
    }
    series = {name: {dcmread(p).SeriesInstanceUID for p in paths} for name, paths in runs.items()}
    assert all(len(uids) == 1 for uids in series.values())
    assert series["first"] == series["again"]
    assert len(set.union(*series.values(), {source.series_uid})) == 4
    instances = [
        dcmread(p).SOPInstanceUID for n in ("first", "other network", "other pixels") for p in runs[n]
    ]
    instances += [dcmread(p).SOPInstanceUID for p in source.paths]
    assert len(set(instances)) == len(instances) == 20
    assert all(len(uid) <= 64 for uid in instances)
    assert [p.read_bytes() for p in runs["first"]] == [p.read_bytes() for p in runs["again"]]


def test_another_reader_sees_the_same(tmp_path, source):
    written = write_derived(source, read_series(source).hu, tmp_path / "out", "check")
    for path, before in zip(written, stored(source.paths), strict=True):
        reader = gdcm.ImageReader()
        reader.SetFileName(str(path))
        assert reader.Read()
        pixels = reader.GetImage().GetBuffer().encode("utf-8", "surrogateescape")
        np.testing.assert_array_equal(np.frombuffer(pixels, "<i2").reshape(before.shape), before)


def test_confused_padding_tag_is_written_right(tmp_path):
    for path in write_series(tmp_path / "in", phantom(), Options(padding=(CORNER, -2000, False))):
        ds = dcmread(path)
        ds.add_new("PixelPaddingValue", "US", 63536)
        ds.save_as(path)
    series = only(tmp_path / "in")
    for path in write_derived(series, read_series(series).hu, tmp_path / "out", "fixed"):
        assert dcmread(path)["PixelPaddingValue"].VR == "SS"
        assert dcmread(path).PixelPaddingValue == -2000


def test_a_long_name_keeps_its_beginning_and_says_what_became_of_the_series(tmp_path):
    """By it, a radiologist tells phases and kernels apart, and the derived series from its source."""
    write_series(
        tmp_path / "in", phantom(), Options(description="Abdomen portal venous 1.0 B30f " + "d" * 33)
    )
    series = only(tmp_path / "in")
    made = "Denoised by ldct_dist 0.1.0, unet3d-s, weights sha256 0123456789abcdef"
    ds = dcmread(
        write_derived(series, read_series(series).hu, tmp_path / "out", made, label="denoised unet3d-s")[0]
    )
    assert ds.SeriesDescription == "Abdomen portal venous 1.0 B30f " + "d" * 15 + " denoised unet3d-s"
    assert len(ds.SeriesDescription) == 64
    assert ds.DerivationDescription == made


@pytest.mark.parametrize("description", ["", "a\nb", "Rauschärmer", "a\\b", "x" * 1025])
def test_descriptions_that_dicom_cannot_hold(tmp_path, source, description):
    with pytest.raises(UserError, match="description"):
        write_derived(source, read_series(source).hu, tmp_path / "out", description)
    with pytest.raises(UserError, match="label"):
        write_derived(source, read_series(source).hu, tmp_path / "out", "made", label=description)
    assert not (tmp_path / "out").exists()


def test_a_simulated_dose_is_the_dose_that_the_header_tells(tmp_path):
    """Whole numbers where DICOM wants them, in sequences too; what would round to 0 is left out."""
    nested = Dataset()
    nested.ExposureInmAs, nested.XRayTubeCurrentInmA, nested.CTDIvol = 150.5, 188.0, 10.6
    tags = {"XRayTubeCurrent": 2, "XRayTubeCurrentInuA": 188000.0, "ExposureInuAs": 80000, "CTDIvol": 10.6}
    tags |= {"ExposureTime": 1000, "CTExposureSequence": [nested]}
    write_series(tmp_path / "in", phantom(), Options(tags=tags))
    series = only(tmp_path / "in")
    written = write_simulated(series, read_series(series).hu, tmp_path / "out", 0.2)
    for i, ds in enumerate(map(dcmread, written)):
        assert ds.Exposure == round((80 + i) / 5)
        assert (ds.XRayTubeCurrentInuA, ds.ExposureInuAs) == (37600, 16000)
        assert ds.CTDIvol == pytest.approx(2.12)
        (exposed,) = ds.CTExposureSequence
        assert exposed.ExposureInmAs == pytest.approx(30.1)
        assert exposed.XRayTubeCurrentInmA == pytest.approx(37.6)
        assert exposed.CTDIvol == pytest.approx(2.12)
        assert "XRayTubeCurrent" not in ds
        assert (ds.KVP, ds.ExposureTime) == (120, 1000)
        assert ds.SeriesDescription == "AXIAL 2.5 simulated 20 % dose"
    low = only(tmp_path / "out").acquisition
    assert low.exposure_mas == pytest.approx(series.acquisition.exposure_mas / 5, abs=0.5)


def test_a_dose_in_another_vr_than_dicom_gives_it_is_scaled_too(tmp_path):
    for path in write_series(tmp_path / "in", phantom()):
        ds = dcmread(path)
        ds.add_new("Exposure", "DS", "80.5")
        ds.save_as(path)
    series = only(tmp_path / "in")
    ds = dcmread(write_simulated(series, read_series(series).hu, tmp_path / "out", 0.5)[0])
    assert (ds["Exposure"].VR, ds.Exposure) == ("IS", 40)


@pytest.mark.parametrize(("said", "expected"), [(None, "01"), ("00", "00"), ("01", "01")])
def test_lossy_compression_of_the_source_stays_said(tmp_path, said, expected):
    for path in write_series(tmp_path / "in", phantom((2, 64, 64))):
        ds = dcmread(path)
        ds.compress(JPEG2000, j2k_cr=[5], generate_instance_uid=False)
        ds.LossyImageCompression = said
        if said is None:
            del ds.LossyImageCompression
        ds.save_as(path)
    series = only(tmp_path / "in")
    for path in write_derived(series, read_series(series).hu, tmp_path / "out", "x"):
        assert dcmread(path).LossyImageCompression == expected


def test_volume_of_another_shape(tmp_path, source):
    with pytest.raises(UserError, match=r"int16 \(5, 40, 48\), this one is int16 \(4, 40, 48\)"):
        write_derived(source, read_series(source).hu[1:], tmp_path / "out", "short")


def test_existing_output_is_never_touched(tmp_path, source):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_derived(source, read_series(source).hu, tmp_path / "out", "again")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_an_empty_output_folder_is_filled(tmp_path, source):
    (tmp_path / "out").mkdir()
    assert len(write_derived(source, read_series(source).hu, tmp_path / "out", "fill")) == 5


def test_nothing_is_left_behind_by_a_failure(tmp_path, source):
    hu = read_series(source).hu
    last = source.paths[-1]
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(UserError, match=last.name):
        write_derived(source, hu, tmp_path / "new" / "out", "broken")
    assert list((tmp_path / "new").iterdir()) == []


def test_output_where_nothing_can_be(tmp_path, source):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out", tmp_path / ("n" * 300)):  # at the second, one may not even look
        with pytest.raises(UserError, match="cannot be written"):
            write_derived(source, read_series(source).hu, out, "no")


def test_a_series_that_has_its_name_has_its_bytes(tmp_path, source, monkeypatch):
    """Also after a power cut: each file is on disk before the folder is renamed."""
    on_disk, fsync, rename = set(), os.fsync, os.replace

    def noted(fd: int) -> None:
        fsync(fd)
        on_disk.add(os.fstat(fd).st_ino)

    def renamed(source: Path, target: Path) -> None:
        assert {path.stat().st_ino for path in (source, *source.iterdir())} <= on_disk
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", renamed)
    files = write_derived(source, read_series(source).hu, tmp_path / "out", "as it was")
    assert len(files) == len(source.slices)
