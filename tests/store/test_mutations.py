"""Real DICOM, harmed in every way an export can harm it: a case that is right, or one line.

LDCT_MUTATIONS sets how many are tried of each of two series; the tests' own number is for a quick look. A trial is
its number alone, so one that fails fails again.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.dataelem import RawDataElement
from pydicom.tag import BaseTag, Tag
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32

from ldct_dist.ct.dicom import Series, find_series, read_series
from ldct_dist.ct.values import number
from ldct_dist.errors import UserError
from ldct_dist.store import layout
from ldct_dist.store.ingest import ingest
from ldct_dist.store.reader import Store
from ldct_dist.store.verify import verify
from sources import CONFIG

DEMO = Path(__file__).parents[2] / "ldct_dist" / "demo_data"
TRIALS = int(os.environ.get("LDCT_MUTATIONS", "40"))
SIDE, SLICES = 48, 4
RAW = [
    b"",
    b"\0",
    b"nan",
    b"inf ",
    b"-1e999",
    b"1e308 ",
    b"0 ",
    b"-5",
    b"abc ",
    b"\x1b[31m\n",
    b"1\\2\\3 ",
    b"9" * 70,
]
RAW += ["Zoë/../..".encode(), b"\xff\xfe\xfd\xfc", b"\0\0\0\0\0\0\xf8\x7f"]
VRS = ["LO", "DS", "IS", "UN", "US", "FD", "SQ", "UI", "PN", "CS", "OW"]
NAMES = ["a b", "Zoë-Bärbel", "x\ny", "...", "--help", "$(touch hacked)", "%s", "é" * 60, "CON", " "]

Mutation = Callable[[Path, random.Random], None]


@pytest.fixture(scope="module", params=["native", "jpeg-ls"])
def real(request, tmp_path_factory):
    """A few slices of a real series with all of its header; cut to a corner where that is stored natively."""
    folder = tmp_path_factory.mktemp("real")
    for path in sorted((DEMO / "CRLM-CT-1006").glob("*.dcm"))[10 : 10 + SLICES]:
        ds = dcmread(path)
        if request.param == "native":
            ds.decompress()
            pixels = ds.pixel_array[100 : 100 + SIDE, 100 : 100 + SIDE]
            ds.Rows = ds.Columns = SIDE
            ds.PixelData = pixels.tobytes()
        ds.save_as(folder / path.name)
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def cut(folder: Path, draw: random.Random) -> None:
    path = draw.choice(files(folder))
    raw = path.read_bytes()
    path.write_bytes(raw[: draw.randrange(len(raw))])


def flip(folder: Path, draw: random.Random) -> None:
    """In the header mostly, where a byte means the most."""
    path = draw.choice(files(folder))
    raw = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 1, 8, 200])):
        raw[draw.randrange(draw.choice([400, 4000, len(raw)])) % len(raw)] = draw.randrange(256)
    path.write_bytes(raw)


def change_header(folder: Path, draw: random.Random) -> None:
    """Remove an element, or give it any bytes under any VR, in one slice or in all."""
    ds = dcmread(files(folder)[0])
    tag = draw.choice(
        sorted({*ds.keys(), *map(Tag, ("GantryDetectorTilt", "PixelPaddingValue", "NumberOfFrames"))})
    )
    element = b"" if draw.random() < 0.3 else encoded(tag, draw.choice(VRS), draw.choice(RAW))
    for path in files(folder) if draw.random() < 0.5 else [draw.choice(files(folder))]:
        start, end = place(dcmread(path), tag)
        whole = path.read_bytes()
        path.write_bytes(whole[:start] + element + whole[end:])


def encoded(tag: BaseTag, vr: str, value: bytes) -> bytes:
    """An element in explicit little endian; pydicom would not write an absurd one."""
    head = struct.pack("<HH2s", tag.group, tag.element, vr.encode())
    return head + struct.pack("<xxL" if vr in EXPLICIT_VR_LENGTH_32 else "<H", len(value)) + value


def place(ds: Dataset, tag: BaseTag) -> tuple[int, int]:
    """Where in its file (explicit little endian) an element of `ds` begins and ends, or would stand."""
    after = next(element for element in ds.elements() if element.tag >= tag)
    value_at = after.value_tell if isinstance(after, RawDataElement) else after.file_tell
    start = value_at - (12 if after.VR in EXPLICIT_VR_LENGTH_32 else 8)
    if after.tag > tag:
        return start, start
    following = next((element.tag for element in ds.elements() if element.tag > tag), None)
    return start, place(ds, following)[0] if following else Path(ds.filename).stat().st_size


def repeat(folder: Path, draw: random.Random) -> None:
    path = draw.choice(files(folder))
    shutil.copy(path, path.with_name(f"{draw.choice(['copy of ', 'z'])}{path.name}"))


def drop(folder: Path, draw: random.Random) -> None:
    for path in draw.sample(files(folder), draw.randrange(1, SLICES - 1)):
        path.unlink()


def mix_patients(folder: Path, draw: random.Random) -> None:
    path = draw.choice(files(folder))
    ds = dcmread(path)
    ds.PatientID = ds.PatientName = "Another^One"
    if draw.random() < 0.5:
        ds.SeriesInstanceUID += ".1"
    ds.save_as(path)


def rename(folder: Path, draw: random.Random) -> None:
    inner = folder / draw.choice(NAMES) / draw.choice(NAMES)
    inner.mkdir(parents=True)
    for path in [p for p in files(folder) if p.parent == folder]:
        path.rename(inner / (draw.choice(["", "..", "-", "\t"]) + path.name))


def add_rubbish(folder: Path, draw: random.Random) -> None:
    (folder / draw.choice(["a.dcm", "README.txt", "DICOMDIR", "b.IMA"])).write_bytes(
        draw.randbytes(draw.randrange(900))
    )
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "around").symlink_to(folder)


MUTATIONS: list[Mutation] = [mix_patients, change_header, repeat, drop, rename, add_rubbish, cut, flip]
"""In an order in which each finds files that it can still read."""


@pytest.mark.parametrize("trial", range(TRIALS))
def test_harmed_dicom_is_a_right_case_or_one_line(real, tmp_path, threads, trial):
    draw = random.Random(trial)
    source, out = tmp_path / "source", tmp_path / "ct.zarr"
    shutil.copytree(real, source)
    chosen = draw.sample(MUTATIONS, draw.choice([1, 2, 3]))
    for mutation in sorted(chosen, key=MUTATIONS.index):
        mutation(source, draw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # a store's files are closed with its last reference
        lines = outcome(source, out)
    assert all(line.isprintable() and "Traceback" not in line for line in lines)
    assert lines or cases(out)
    assert cases(out) or set(chosen) != {rename}
    beside = {p.name for p in tmp_path.iterdir()}
    assert beside <= {"source", "ct.zarr", ".ct.zarr.lock", "ct.zarr.key", "ct.zarr.rejected.csv"}
    if cases(out):
        assert verify(out) == []
        store = Store(out)
        stored = {store.volume(case.name, "1.00").hu.tobytes() for case in store.cases}
        expected = {hu.tobytes() for hu in sound_volumes(source)}
        assert stored <= expected or any(map(tells_padding, find_series(source)[0]))


def outcome(source: Path, out: Path) -> list[str]:
    """The lines that an ingest of `source` gives."""
    try:
        report = ingest(source, out, CONFIG)
        return [refusal.reason for refusal in [*report.rejected, *report.passed_over]]
    except UserError as e:
        return [str(e)]


def cases(out: Path) -> list[str]:
    """Whole cases; that there are no others is a part of the claim."""
    if not (out / layout.CASES).exists():
        return []
    names = [p.name for p in (out / layout.CASES).iterdir() if p.is_dir()]
    assert sorted(names) == layout.list_cases(out)
    return names


def tells_padding(series: Series) -> bool:
    """Whether a mutation made some values padding, which `sound_volumes` does not follow."""
    return any("PixelPaddingValue" in dcmread(path, force=True) for path in series.paths)


def plain(ds: Dataset) -> Dataset:
    """`ds` with what describes its pixels as it should be, without which pydicom decodes nothing."""
    ds.pop("NumberOfFrames", None)
    if "TransferSyntaxUID" not in ds.file_meta:
        # As in old exports: then it is what the elements are written in.
        implicit, _ = ds.original_encoding
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    for keyword in ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
        ds.add_new(keyword, "US", int(number(ds, keyword)))
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    return ds


def sound_volumes(source: Path) -> list[np.ndarray]:
    """What pydicom alone makes of each series that we find: slope and intercept, sorted by position."""
    found = []
    for series in find_series(source)[0]:
        try:
            read_series(series)
        except UserError:
            continue
        slices = [plain(dcmread(path, force=True)) for path in series.paths]
        stored = np.stack([ds.pixel_array for ds in slices]).astype(float)
        slope = np.array([number(ds, "RescaleSlope") for ds in slices])[:, None, None]
        intercept = np.array([number(ds, "RescaleIntercept") for ds in slices])[:, None, None]
        hu = np.rint(stored * slope + intercept)
        found.append(np.where(hu <= -2000, -1024, hu.clip(-1024, 32767)).astype(np.int16))
    return found
