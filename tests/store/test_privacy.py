from __future__ import annotations

import os
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread
from pydicom.datadict import DicomDictionary

from enhanced_ct import write_enhanced
from ldct_dist.ct.headers import read_header
from ldct_dist.ct.stored import Stored
from ldct_dist.ct.volume import Acquisition
from ldct_dist.errors import UserError
from ldct_dist.store import privacy
from ldct_dist.store.ingest import ingest
from ldct_dist.store.reader import Store
from sources import CONFIG, anatomy, content
from synthetic_dicom import Options, write_series

MARKERS = (
    *(
        "Zwiebelmann",
        "Ottokar",
        "ZX-4711-Q",
        "19370203",
        "Krankenhaus",
        "Doktorova",
        "Wadenwickel",
        "Geheimrat",
    ),
    *("Sanatoriumstrasse", "QX-8812", "RX-55501"),
)


def write_marked(folder: Path) -> list[Path]:
    """A series that says MARKERS wherever an export may say something about a patient."""
    tags = {
        "PatientName": "Zwiebelmann^Ottokar",
        "PatientID": "ZX-4711-Q",
        "PatientBirthDate": "19370203",
        "OtherPatientIDs": ["QQ-1", "QX-8812"],
        "AccessionNumber": "RX-55501",
        "InstitutionName": "Krankenhaus",
        "InstitutionAddress": "Sanatoriumstrasse 1",
        "ReferringPhysicianName": "Doktorova^Anna",
        "StudyDescription": "Wadenwickel",
        "SeriesDescription": "Wadenwickel",
        "ConvolutionKernel": "Ottokar B30",
        "Manufacturer": "ACME (for Mr Zwiebelmann)",
        "ManufacturerModelName": "Ring <16> of the Geheimrat",
    }
    files = write_series(folder, anatomy(), Options(tags=tags))
    for path in files:
        ds = dcmread(path)
        ds.private_block(0x0029, "ldct_dist test", create=True).add_new(1, "LO", "Geheimrat")
        ds.save_as(path)
    return files


def test_no_byte_of_a_store_tells_who_the_patient_is(tmp_path, threads):
    source = tmp_path / "Zwiebelmann Ottokar"
    uids = {
        str(dcmread(p)[k].value)
        for p in write_marked(source)
        for k in ("SeriesInstanceUID", "StudyInstanceUID")
    }
    ingest(source, tmp_path / "ct.zarr", CONFIG)
    files = [p for p in (tmp_path / "ct.zarr").rglob("*") if p.is_file()]
    assert len(files) > 6
    told = [text for text in (*MARKERS, *uids) if any(tells(path, text) for path in files)]
    assert told == []


FREE_TEXT = ("AE", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT")
GEOMETRY = ("RescaleType",)
"""Text that a reader must find as it is."""


def tell(ds: Dataset, name: str) -> int:
    """Write `name` into every element that may hold free text, an item and a private element; how many there are."""
    named = 0
    for tag, (vr, _, _, retired, keyword) in DicomDictionary.items():
        if vr in FREE_TEXT and keyword and keyword not in GEOMETRY and not retired and tag >> 16 > 2:
            ds.add_new(tag, vr, name)
            named += 1
    item = Dataset()
    item.PatientName = item.InstitutionName = name
    ds.ReferencedPatientSequence = [item]
    ds.private_block(0x0029, name, create=True).add_new(1, "UT", name)
    return named


@pytest.mark.parametrize("enhanced", [False, True], ids=["single frames", "multi-frame"])
def test_no_text_element_of_any_kind_reaches_a_store(tmp_path, threads, enhanced):
    """Every element of DICOM that may hold free text holds the patient's name, and so do items and private ones."""
    source = tmp_path / "Zwiebel"
    files = write_series(source, anatomy(), Options(patient="ZWIEBEL"))
    for path in [write_enhanced(files, source / "IM0")] if enhanced else files:
        ds = dcmread(path)
        assert tell(ds, "Zwiebel") > 600
        for item in (
            *ds.get("SharedFunctionalGroupsSequence", ()),
            *ds.get("PerFrameFunctionalGroupsSequence", ()),
        ):
            for group in list(item):
                tell(group.value[0], "Zwiebel")
        ds.save_as(path)
    report = ingest(source, tmp_path / "ct.zarr", CONFIG)
    assert len(report.written) == 1
    assert [p for p in (tmp_path / "ct.zarr").rglob("*") if p.is_file() and tells(p, "Zwiebel")] == []
    assert not any(
        "zwiebel" in str(p.relative_to(tmp_path)).lower() for p in (tmp_path / "ct.zarr").rglob("*")
    )


def stored(file: Path) -> Stored:
    return read_header(file)[0].stored


def test_a_name_in_a_functional_group_alone_is_known(tmp_path, threads):
    """Series converted to one file have there what they had in each."""
    item = Dataset()
    item.OtherPatientNames = item.OperatorsName = "Zwiebelmann^Ottokar"

    def named(whole: Dataset) -> None:
        whole.SharedFunctionalGroupsSequence[0].UnassignedSharedConvertedAttributesSequence = [item]

    files = write_series(tmp_path / "in", anatomy(), Options(patient="P", kernel="OTTOKAR B30"))
    path = write_enhanced(files, tmp_path / "in" / "IM0", change=named)
    assert privacy.names_patient("ottokar_1", stored(path), ())
    ingest(tmp_path / "in", tmp_path / "ct.zarr", CONFIG)
    store = Store(tmp_path / "ct.zarr")
    assert store.volume(store.cases[0].name, "1.00").acquisition.kernel is None


def tells(path: Path, text: str) -> bool:
    raw = path.read_bytes().lower()
    return text.lower() in path.name.lower() or any(
        text.lower().encode(code) in raw for code in ("utf-8", "utf-16-le")
    )


def test_facts_that_identify_nobody_stay_in_the_store(tmp_path, threads):
    tags = {"Manufacturer": "GE MEDICAL SYSTEMS", "ConvolutionKernel": ["I41f", "2"]}
    write_series(tmp_path / "in", anatomy(), Options(tags=tags))
    ingest(tmp_path / "in", tmp_path / "ct.zarr", CONFIG)
    store = Store(tmp_path / "ct.zarr")
    acquisition = store.volume(store.cases[0].name, "1.00").acquisition
    assert (acquisition.manufacturer, acquisition.model) == ("GE MEDICAL SYSTE", "Ring 16")
    assert (acquisition.kernel, acquisition.kvp) == ("I41f-2", 120.0)


def test_patient_keys_are_one_a_patient_and_need_the_secret(tmp_path, threads):
    for i, patient in enumerate(["A", "A", "B"]):
        write_series(tmp_path / "in" / str(i), anatomy(i), Options(patient=patient, seed=str(i)))
    settings = [CONFIG.model_copy(update={"key": tmp_path / name}) for name in ("one.key", "other.key")]
    keys = []
    for i, config in enumerate(settings):
        ingest(tmp_path / "in", tmp_path / f"{i}.zarr", config)
        keys.append(sorted(c.patient for c in Store(tmp_path / f"{i}.zarr").cases))
        key = privacy.load_key(config.key)
        assert keys[-1] == sorted(privacy.patient_hash(key, patient) for patient in "AAB")
    assert [len(set(k)) for k in keys] == [2, 2]
    assert not set(keys[0]) & set(keys[1])


def test_the_key_is_made_once_for_its_owner_alone_and_outside_the_store(tmp_path):
    path = privacy.default_key_path(tmp_path / "ct.zarr")
    assert path == tmp_path / "ct.zarr.key"
    with ThreadPool(8) as pool:
        keys = set(pool.map(privacy.load_key, [path] * 32))
    assert len(keys) == 1
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["ct.zarr.key"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("hello", "not readable as a key .*; give the right file by key="),
        ("abcd", "2 bytes, but a key has 32"),
    ],
)
def test_a_file_that_is_no_key_is_refused(tmp_path, content, said):
    (tmp_path / "key").write_text(content)
    with pytest.raises(UserError, match=said):
        privacy.load_key(tmp_path / "key")


def test_who_may_not_read_a_stores_key_is_told_to_ask_its_owner_not_to_make_another(tmp_path):
    """A patient with two hashes may stand in two splits, and nothing would tell."""
    (tmp_path / "key").mkdir()  # root may read anything else
    with pytest.raises(UserError, match=r"cannot be read \(.*\); ask its owner for access"):
        privacy.load_key(tmp_path / "key")


def test_a_key_whose_folder_may_not_be_looked_into_is_told_of_and_not_the_store(
    source, out, tmp_path, threads
):
    """As a colleague's own: the advice was to make room for the store."""
    ingest(source, out, CONFIG)
    hidden = tmp_path / ("n" * 300) / "key"
    with pytest.raises(
        UserError, match=rf"its key is not at {hidden}, or may not be read there; put it back"
    ):
        ingest(source, out, CONFIG.model_copy(update={"key": hidden}))


def test_a_store_takes_no_more_cases_by_another_key(source, out, tmp_path, threads):
    """As where the store was moved without its key: a patient with two hashes would stand there as two."""
    key = privacy.default_key_path(out)
    ingest(source, out, CONFIG)
    before = content(out)
    mine = key.rename(tmp_path / "mine.key")
    with pytest.raises(
        UserError, match=rf"its key is not at {key}, or .*; put it back, or say where it is by key="
    ):
        ingest(source, out, CONFIG)
    assert not key.exists()
    privacy.load_key(tmp_path / "theirs.key")
    with pytest.raises(UserError, match=r"theirs\.key is not its key; give the right file"):
        ingest(source, out, CONFIG.model_copy(update={"key": tmp_path / "theirs.key"}))
    assert content(out) == before
    assert len(ingest(source, out, CONFIG.model_copy(update={"key": mine})).skipped) == 3


def test_a_folder_whose_name_is_not_utf_8_has_a_hash_too():
    assert privacy.keyed_hash(b"k", os.fsdecode(b"M\xfcller")) == privacy.keyed_hash(b"k", b"M\xfcller")


def test_the_hash_keeps_its_items_apart():
    assert privacy.keyed_hash(b"k", "ab", "c") != privacy.keyed_hash(b"k", "a", "bc")


@pytest.mark.parametrize(
    ("case", "names"),
    [
        *(("scan-001", False), ("Wadenwickel-1", False), ("c", False), ("case-4711", False)),
        *(("ZX4711Q", True), ("zx-4711-q.2", True), ("OTTOKAR_1", True), ("row-label-2", True), ("ab", True)),
        *(("rx55501", True), ("scan-RX-55501", True), ("qx_8812", True), ("scan-19370203", True)),
    ],
)
def test_a_case_does_not_carry_its_patients_name_or_id(tmp_path, case, names):
    file = write_marked(tmp_path)[0]
    assert privacy.names_patient(case, stored(file), ("Row Label", "ZX-4711-Q", "ab", "c-1")) is names


def test_a_name_is_found_in_files_without_preamble_too(tmp_path):
    """Exports of the nineties hold the bare dataset."""
    file = write_series(tmp_path, anatomy(), Options(tags={"PatientName": "Zwiebelmann^Ottokar"}))[0]
    file.write_bytes(file.read_bytes()[132:])
    assert privacy.names_patient("OTTOKAR_1", stored(file), ())
    assert "zwiebelmann" in privacy.identifying_words(stored(file), "P1")


def test_identifying_words_are_those_of_every_naming_tag_and_of_the_manifest(tmp_path):
    words = privacy.identifying_words(stored(write_marked(tmp_path)[0]), "Row-Label")
    assert {"zwiebelmann", "ottokar", "4711", "19370203", "krankenhaus", "doktorova", "label"} <= words
    assert privacy.scrubbed(Acquisition(kernel="B30 LABEL"), words).kernel is None
