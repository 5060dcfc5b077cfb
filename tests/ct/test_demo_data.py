"""What ships for the demo: real, small, de-identified, honest about what was done to it, and attributed."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.uid import JPEGLSLossless

import ldct_dist
from ldct_dist.ct.dicom import find_series

DEMO = Path(ldct_dist.__file__).parent / "demo_data"
SHAPES = {"CRLM-CT-1004": ((41, 256, 256), 2 * 0.796875), "CRLM-CT-1006": ((51, 256, 256), 2 * 0.804688)}


def test_both_series_are_found_and_nothing_else():
    found, refused = find_series(DEMO)
    assert refused == []
    assert {s.patient_id: (s.shape, s.spacing) for s in found} == {
        case: (shape, (5.0, pixel, pixel)) for case, (shape, pixel) in SHAPES.items()
    }


@pytest.mark.parametrize("case", SHAPES)
def test_every_file_says_what_it_is(case):
    paths = list((DEMO / case).iterdir())
    headers = [dcmread(path, stop_before_pixels=True) for path in paths]
    assert len({h.SOPInstanceUID for h in headers}) == len(paths)
    for header in headers:
        assert header.file_meta.TransferSyntaxUID == JPEGLSLossless
        assert header.ImageType[0] == "DERIVED"
        assert "2 x 2 mean" in header.DerivationDescription
        assert header.SourceImageSequence[0].ReferencedSOPInstanceUID.startswith("1.3.6.1.4.1.14519.")
        assert header.PatientIdentityRemoved == "YES"
        assert len(header.DeidentificationMethodCodeSequence) == 7


def test_size_and_attribution():
    assert sum(path.stat().st_size for path in DEMO.rglob("*.dcm")) < 15_000_000
    for name in ("LICENSE", "ATTRIBUTION.md"):
        said = (DEMO / name).read_text(encoding="utf-8")
        assert "10.7937/QXK2-QG03" in said
        assert "creativecommons.org/licenses/by/4.0" in said
