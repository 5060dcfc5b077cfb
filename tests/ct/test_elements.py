"""Headers that are walked mean what pydicom takes them to mean, or are left to pydicom."""

from __future__ import annotations

import random
import warnings
from io import BytesIO
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
)

from ldct_dist.ct import elements, headers
from ldct_dist.ct.elements import HEAD, Head, read_head
from synthetic_dicom import Options, phantom, write_series

DEMO = Path(__file__).parents[2] / "ldct_dist" / "demo_data"
NESTED = Dataset()
NESTED.SeriesInstanceUID, NESTED.PatientID = "1.2.3", "not this one"
NESTED.ReferencedImageSequence = [Dataset(), Dataset()]
NESTED.is_undefined_length_sequence_item = True
TAGS = {
    "RequestAttributesSequence": Sequence([NESTED, NESTED]),
    "PatientComments": "Zoë",
    "AccessionNumber": "",
}
TAGS |= {"SpecificCharacterSet": "ISO_IR 192", "PixelPaddingValue": -2000, "SeriesDescription": "Schädel é"}


def written(folder: Path, syntax: str, undefined_lengths: bool = True) -> bytes:
    (path, *_) = write_series(folder, phantom(), Options(syntax=syntax, tags=TAGS))
    ds = dcmread(path)
    ds["RequestAttributesSequence"].is_undefined_length = undefined_lengths
    ds.save_as(path)
    return path.read_bytes()


def walked(content: bytes) -> Head | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_head(content[:HEAD], headers._WANTED)


def texts(head: Head) -> dict[str, str | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return headers._texts(head)


def by_pydicom(path: Path, content: bytes) -> Head:
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return headers._head_by_pydicom(path)


@pytest.mark.parametrize("undefined_lengths", [True, False])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless])
def test_regular_files_are_walked_and_mean_what_pydicom_says(tmp_path, syntax, undefined_lengths):
    content = written(tmp_path, syntax, undefined_lengths)
    head = walked(content)
    assert texts(head) == texts(by_pydicom(tmp_path / "again", content))
    assert texts(head)["SeriesDescription"] == "Schädel é"
    pixels = dcmread(BytesIO(content)).PixelData
    if syntax == JPEG2000Lossless:
        assert head.pixels is None
    else:
        start, length = head.pixels
        assert content[start : start + length] == pixels


@pytest.mark.parametrize("syntax", [ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_other_encodings_are_left_to_pydicom(tmp_path, syntax):
    assert walked(written(tmp_path, syntax)) is None


def test_real_files_are_walked(tmp_path):
    for path in sorted(DEMO.rglob("*.dcm"))[::20]:
        content = path.read_bytes()
        assert texts(walked(content)) == texts(by_pydicom(tmp_path / "again", content))


def test_the_slices_of_a_series_are_walked_once_for_all_of_the_same_layout(tmp_path, monkeypatch):
    walks, walk = [], elements._walk
    monkeypatch.setattr(elements, "_recent", ())
    monkeypatch.setattr(elements, "_walk", lambda *given: walks.append(given) or walk(*given))
    paths = write_series(tmp_path / "series", phantom(), Options(tags=TAGS))
    for path in paths:
        content = path.read_bytes()
        assert texts(walked(content)) == texts(by_pydicom(tmp_path / "again", content))
    assert len(walks) < len(paths) / 2


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_harmed_headers_mean_what_pydicom_says_or_are_left_to_it(tmp_path, syntax):
    good, draw = written(tmp_path, syntax), random.Random(0)
    header_ends = walked(good).pixels[0]
    same = 0
    for _ in range(400):
        raw = bytearray(good)
        for _ in range(draw.choice([1, 1, 2, 8])):
            raw[draw.randrange(128, header_ends)] = draw.choice([0, 1, 0x20, 0xFE, 0xFF, draw.randrange(256)])
        try:
            head = walked(bytes(raw))
        except Exception as mine:  # noqa: BLE001
            with pytest.raises(type(mine)):
                by_pydicom(tmp_path / "harmed", bytes(raw))
            continue
        if head is not None:
            assert texts(head) == texts(by_pydicom(tmp_path / "harmed", bytes(raw)))
            same += 1
    assert same > 100
