"""A store in the hands of tools that know nothing of this package."""

from __future__ import annotations

import json

import ngff_zarr
import numpy as np
import pytest
import zarr

from ldct_dist.ct.volume import AIR_HU, Volume
from ldct_dist.store import layout
from stores import smooth_volume

SPACING, ORIGIN = (3.0, 0.75, 0.5), (-120.0, -180.5, 40.0)  # mm: (z, y, x), and x, y, z of the first voxel


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("ecosystem") / "ct.zarr"
    layout.create(path)
    full = smooth_volume((12, 20, 24), seed=0)
    doses = {1.0: Volume(full, SPACING, ORIGIN), 0.25: Volume(full + np.int16(7), SPACING, ORIGIN)}
    layout.write_case(path, "case", doses, patient="p", split="train")
    layout.finalise(path)
    return path


def test_plain_zarr_finds_its_way_from_the_root(store):
    root = zarr.open(store, mode="r")
    assert isinstance(root, zarr.Group)
    assert [name for name, _ in root["cases"].groups()] == ["case"]
    array = root["cases/case/0.25"]
    assert (array.dtype, array.fill_value) == (np.int16, AIR_HU)
    assert array.metadata.dimension_names == ("z", "y", "x")
    assert np.array_equal(array[:], smooth_volume((12, 20, 24), seed=0) + 7)


def test_an_ome_zarr_reader_sees_axes_spacing_origin_and_units(store):
    (image,) = ngff_zarr.from_ngff_zarr(str(store / "cases/case"), validate=True, version="0.5").images
    assert tuple(image.dims) == ("z", "y", "x")
    assert image.axes_units == dict.fromkeys("zyx", "millimeter")
    assert image.scale == dict(zip("zyx", SPACING, strict=True))
    assert image.translation == dict(zip("xyz", ORIGIN, strict=True))
    assert np.array_equal(image.data.compute(), smooth_volume((12, 20, 24), seed=0))  # the first is full dose


def test_every_dose_is_an_image_of_its_own(store):
    ome = json.loads((store / "cases/case/zarr.json").read_bytes())["attributes"]["ome"]
    assert ome["version"] == "0.5"
    assert [image["name"] for image in ome["multiscales"]] == ["1.00", "0.25"]
    assert [[d["path"] for d in image["datasets"]] for image in ome["multiscales"]] == [["1.00"], ["0.25"]]
