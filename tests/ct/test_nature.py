"""Images that are no slices of a scan in HU, by what their headers call them."""

from __future__ import annotations

import pytest

from synthetic_dicom import Options, phantom, refusal, write_series

NATURES = {
    "localizer": ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
    "MIP": ({"ImageType": ["DERIVED", "SECONDARY", "OTHER", "CT_SOM5 MIP"]}, "maximum or minimum intensity"),
    "MinIP": (
        {"ImageType": ["DERIVED", "SECONDARY", "REFORMATTED", "MINIP"]},
        "maximum or minimum intensity",
    ),
    "maximum": ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "MAXIMUM"]}, "maximum or minimum intensity"),
    "rendering": (
        {"ImageType": ["DERIVED", "SECONDARY", "SURFACE_RENDER"]},
        "a rendering or a curved reformat",
    ),
    "curved": ({"ImageType": ["DERIVED", "SECONDARY", "CURVED_MPR"]}, "a rendering or a curved reformat"),
    "subtraction": (
        {"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "SUBTRACTION"]},
        "calculated from images",
    ),
    "perfusion": ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "MTT"]}, "calculated from images"),
    "z score": ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "Z_SCORE"]}, "calculated from images"),
    "iodine": (
        {"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "MAT_FRACTIONAL"], "RescaleType": None},
        "a map of a material, not of HU",
    ),
    "density": ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "ELECTRON_DENSITY"]}, "not of HU"),
}


@pytest.mark.parametrize(("tags", "words"), NATURES.values(), ids=NATURES.keys())
def test_what_is_no_volume_is_called_by_its_name(tmp_path, tags, words):
    write_series(tmp_path, phantom(), Options(tags=tags))
    line = refusal(tmp_path)
    assert words in line
    assert ";" in line, "the line says what to do"
