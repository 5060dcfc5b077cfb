"""From DICOM through store and network to DICOM: a network that changes nothing changes no stored value."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from pydicom import dcmread
from pydicom.pixels import pixel_array
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless

from ldct_dist.ct.derived import write_derived
from ldct_dist.ct.dicom import find_series
from ldct_dist.demo import DATA
from ldct_dist.denoise.tiles import denoise_volume
from ldct_dist.models.registry import ModelConfig, build
from ldct_dist.store import workers
from ldct_dist.store.ingest import ingest
from ldct_dist.store.reader import Store
from sources import CONFIG
from synthetic_dicom import Options, phantom, write_series

CORNERS = np.zeros((5, 40, 48), bool)
CORNERS[:, :6, :6] = True
SYNTHETIC = {
    "unsigned": Options(signed=False, bits_stored=12, syntax=ExplicitVRLittleEndian),
    "implicit": Options(padding=(CORNERS, -2000, True), syntax=ImplicitVRLittleEndian),
    "compressed": Options(padding=(CORNERS, -3024, False), intercepts=0.0, syntax=JPEG2000Lossless),
}


@pytest.fixture(scope="module")
def identity():
    return build(ModelConfig(name="unet3d", size="xs", thick_slices=True))


def stored(path) -> np.ndarray:
    return pixel_array(path, raw=True)


@pytest.mark.parametrize("what", ["CRLM-CT-1004", "CRLM-CT-1006", *SYNTHETIC])
def test_an_identity_network_leaves_every_stored_value_bit_for_bit(tmp_path, monkeypatch, identity, what):
    source = DATA / what
    if what in SYNTHETIC:
        source = tmp_path / "source"
        write_series(source, phantom(), SYNTHETIC[what])
    monkeypatch.setattr(workers, "pool", ThreadPoolExecutor)
    ingest(source, tmp_path / "ct.zarr", CONFIG)
    store = Store(tmp_path / "ct.zarr")
    (series,), _ = find_series(source)
    (case,) = store.cases
    full = store.volume(case.name, "1.00")

    with torch.inference_mode():
        hu = denoise_volume(identity, full.hu, tile=(64, 256, 256))
    written = write_derived(series, hu, tmp_path / "derived", "identity")

    assert full.hu.std() > 50
    assert len(written) == len(series.paths) == case.shape[0]
    for before, after in zip(series.paths, written, strict=True):
        assert np.array_equal(stored(before), stored(after))
        a, b = dcmread(before, stop_before_pixels=True), dcmread(after, stop_before_pixels=True)
        for keyword in (
            "RescaleSlope",
            "RescaleIntercept",
            "ImagePositionPatient",
            "PixelSpacing",
            "PatientID",
        ):
            assert a[keyword].value == b[keyword].value
        assert a.SOPInstanceUID != b.SOPInstanceUID
