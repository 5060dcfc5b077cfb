from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless

import ldct_dist
from ldct_dist.checkpoint.manifest import Manifest
from ldct_dist.ct import derived
from ldct_dist.ct.dicom import one_series, read_series
from ldct_dist.ct.volume import Volume
from ldct_dist.denoise.claim import MADE_BY
from ldct_dist.denoise.tiles import denoise_volume
from ldct_dist.denoise.volumes import denoise_series
from ldct_dist.errors import UserError
from ldct_dist.models.registry import ModelConfig, build
from ldct_dist.models.weights import save_weights, weights_hash
from networks import random_network
from synthetic_dicom import Options, phantom, write_phantoms, write_series

DEMO = Path(ldct_dist.__file__).parent / "demo_data"


@pytest.fixture
def identity(tmp_path):
    save_weights(tmp_path / "identity.safetensors", build(ModelConfig(size="xs")))
    return tmp_path / "identity.safetensors"


@pytest.fixture
def denoiser(tmp_path):
    save_weights(tmp_path / "w.safetensors", random_network("unet3d", gain=0.5))
    return tmp_path / "w.safetensors"


def stored(files: list[Path]) -> list[np.ndarray]:
    """Stored values, slice by slice from the feet up."""
    slices = sorted((pydicom.dcmread(f) for f in files), key=lambda ds: ds.ImagePositionPatient[2])
    return [ds.pixel_array for ds in slices]


def assert_unchanged(source: list[Path], derived: list[Path]) -> None:
    assert len(source) == len(derived)
    for a, b in zip(stored(source), stored(derived), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


@pytest.mark.parametrize("case", ["CRLM-CT-1004", "CRLM-CT-1006"])
def test_a_fresh_network_leaves_every_stored_pixel_of_a_patient(case, identity, tmp_path):
    derived = denoise_series(identity, DEMO / case, tmp_path / "out", tile=(64, 256, 256))
    assert_unchanged(list((DEMO / case).glob("*.dcm")), derived)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless])
@pytest.mark.parametrize("signed", [True, False])
def test_a_fresh_network_leaves_every_stored_pixel_in_every_encoding(syntax, signed, identity, tmp_path):
    source = write_series(tmp_path / "in", phantom(), Options(syntax=syntax, signed=signed))
    assert_unchanged(source, denoise_series(identity, tmp_path / "in", tmp_path / "out"))


def test_a_series_is_denoised_and_says_by_what(denoiser, tmp_path):
    write_series(tmp_path / "in", phantom())
    files = denoise_series(denoiser, tmp_path / "in", tmp_path / "out")
    before = read_series(one_series(tmp_path / "in")).hu
    after = read_series(one_series(tmp_path / "out")).hu
    assert np.array_equal(after, denoise_volume(random_network("unet3d", gain=0.5), before))
    assert (after != before).mean() > 0.5
    assert pydicom.dcmread(files[0]).SeriesDescription == "AXIAL 2.5 denoised unet3d-xs"
    said = pydicom.dcmread(files[0]).DerivationDescription
    for part in (ldct_dist.__version__, "unet3d-xs", weights_hash(denoiser)):
        assert part in said


def test_strength_is_said_and_refused_before_any_work(denoiser, tmp_path):
    write_series(tmp_path / "in", phantom())
    files = denoise_series(denoiser, tmp_path / "in", tmp_path / "out", strength=0.85)
    assert "at strength 0.85" in pydicom.dcmread(files[0]).DerivationDescription
    before, after = (read_series(one_series(tmp_path / name)).hu for name in ("in", "out"))
    assert np.array_equal(after, denoise_volume(random_network("unet3d", gain=0.5), before, strength=0.85))
    with pytest.raises(UserError, match=r"strength 1\.5"):
        denoise_series(denoiser, tmp_path / "in", tmp_path / "more", strength=1.5)
    assert not (tmp_path / "more").exists()


def test_several_series_get_a_folder_each(identity, tmp_path):
    files = denoise_series(identity, write_phantoms(tmp_path / "in", "ab"), tmp_path / "out")
    assert {f.parent.name for f in files} == {"series-001", "series-002"}


@pytest.fixture
def three_series(tmp_path):
    return write_phantoms(tmp_path / "in", "abc")


@pytest.fixture
def killed(identity, three_series, tmp_path, monkeypatch):
    """The output of a start that was killed while it wrote its second series."""

    class Killed(BaseException):
        pass

    def kill(partial: Path, target: Path) -> None:
        if target.name == "series-002":
            raise Killed
        os.rename(partial, target)

    with monkeypatch.context() as dying:
        dying.setattr(derived.os, "replace", kill)
        dying.setattr(derived.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            denoise_series(identity, three_series, tmp_path / "out")
    assert len(list((tmp_path / "out").glob(".writing-series-002-*"))) == 1
    return tmp_path / "out"


def test_the_same_command_goes_on_with_the_series_that_are_missing(identity, three_series, killed):
    before = {path: path.stat().st_mtime_ns for path in (killed / "series-001").iterdir()}
    notices: list[str] = []
    files = denoise_series(identity, three_series, killed, notice=notices.append)
    assert [line.rpartition("/")[2] for line in notices] == [
        "series-001: there already",
        "series-002: denoised, 2 of 3",
        "series-003: denoised, 3 of 3",
    ]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sorted(path.name for path in killed.iterdir()) == [
        MADE_BY,
        *("series-001", "series-002", "series-003"),
    ]
    assert sorted(files) == sorted(killed.rglob("*.dcm"))
    assert len(files) == 3 * len(phantom())


def test_what_other_weights_or_of_other_series_was_made_is_not_gone_on_with(
    identity, denoiser, three_series, killed
):
    with pytest.raises(UserError, match="this would be by unet3d-xs, weights sha256"):
        denoise_series(denoiser, three_series, killed)
    write_series(three_series / "aa", phantom(), Options(seed="aa"))  # now the second of four
    with pytest.raises(UserError, match=r"from 3 series .* this would be by .* from 4 series"):
        denoise_series(identity, three_series, killed)
    for name in ("aa", "b", "c"):
        shutil.rmtree(three_series / name)
    with pytest.raises(UserError, match="exists already"):
        denoise_series(identity, three_series, killed)
    assert [path.name for path in killed.glob("series-*")] == ["series-001"]


@pytest.mark.parametrize("several", [False, True])
def test_an_output_that_cannot_be_written_is_refused_before_any_work(identity, several, tmp_path):
    for seed in ("a", "b") if several else ("a",):
        write_series(tmp_path / "in" / seed, phantom(), Options(seed=seed))
    (tmp_path / "file").touch()
    tiles: list[int] = []
    with pytest.raises(UserError, match="Not a directory"):
        denoise_series(
            identity, tmp_path / "in", tmp_path / "file" / "out", progress=lambda done, _: tiles.append(done)
        )
    assert tiles == []


def test_names_may_be_text_and_a_run_stands_for_its_weights(denoiser, tmp_path, monkeypatch):
    write_series(tmp_path / "in", phantom())
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    denoiser.rename(checkpoint / "weights.safetensors")
    Manifest(generation=0, step=1, files={}, state={}).write(checkpoint)
    monkeypatch.chdir(tmp_path)
    assert len(denoise_series("run", "in", "out")) == len(phantom())


@pytest.mark.parametrize("given", ["volume", "2-D", "float"])
def test_what_is_no_array_of_whole_hu_is_one_line(given, tmp_path):
    volume = phantom()
    hu = {"volume": Volume(volume, (1.0, 1.0, 1.0)), "2-D": volume[0], "float": volume.astype(float)}[given]
    with pytest.raises(UserError, match=r"takes int16 HU \(z, y, x\), not .*; for a Volume, give its hu"):
        denoise_volume(build(ModelConfig(size="xs")), hu)


def test_an_output_that_exists_is_refused_before_any_work(identity, tmp_path):
    write_series(tmp_path / "in", phantom())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        denoise_series(tmp_path / "no-weights", tmp_path / "in", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_an_output_in_the_source_is_refused_as_the_next_start_would_denoise_it_too(identity, tmp_path):
    write_series(tmp_path / "in", phantom())
    (tmp_path / "link").symlink_to(tmp_path / "in")
    before = sorted((tmp_path / "in").iterdir())
    for out in (tmp_path / "in" / "out", tmp_path / "link" / "out"):
        with pytest.raises(UserError, match="read with it the next time; choose a folder outside"):
            denoise_series(identity, tmp_path / "in", out)
    assert sorted((tmp_path / "in").iterdir()) == before


def test_an_output_that_cannot_be_looked_at_is_refused_before_any_work(tmp_path):
    with pytest.raises(UserError, match=r"cannot be written \(File name too long\); choose"):
        denoise_series("no-weights", "no-source", tmp_path / ("x" * 300))


def test_a_series_that_cannot_be_used_stops_all_and_is_named(identity, tmp_path):
    write_series(tmp_path / "in" / "good", phantom())
    write_series(tmp_path / "in" / "holed", phantom(), Options(seed="holed"))[2].unlink()
    with pytest.raises(UserError, match=r"holed.*\(1 other series are usable: move it out of"):
        denoise_series(identity, tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scout_beside_the_series_is_passed_over_and_named(identity, tmp_path):
    write_series(tmp_path / "in" / "axial", phantom())
    scout = Options(seed="scout", tags={"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]})
    write_series(tmp_path / "in" / "scout", phantom(), scout)
    write_series(tmp_path / "in" / "report", phantom(), Options(seed="sr", tags={"Modality": "SR"}))
    notices: list[str] = []
    files = denoise_series(identity, tmp_path / "in", tmp_path / "out", notice=notices.append)
    assert len(files) == len(phantom())
    assert ["not CT (Modality SR)" in notices[0], "is a localizer" in notices[1]] == [True, True]


def test_one_stray_image_in_a_series_does_not_hide_the_series(identity, tmp_path):
    write_series(tmp_path / "in" / "good", phantom())
    stray = write_series(tmp_path / "in" / "mixed", phantom(), Options(seed="mixed"))[2]
    ds = pydicom.dcmread(stray)
    ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    ds.save_as(stray)
    with pytest.raises(UserError, match=r"slice-002.dcm is a localizer.*\(1 other series are usable"):
        denoise_series(identity, tmp_path / "in", tmp_path / "out")


def test_a_folder_without_ct_is_one_line(identity, tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="no CT series"):
        denoise_series(identity, tmp_path / "in", tmp_path / "out")
