"""Series that are one file each, whose names say what folders' names say of others."""

from __future__ import annotations

import pytest

from enhanced_ct import write_enhanced
from ldct_dist.errors import UserError
from ldct_dist.store.pairing import PairingConfig, find_pairs
from sources import write_pair
from synthetic_dicom import Options


def write_files(folder, full, low, patient="L067"):
    """A pair as two files of enhanced CT."""
    write_pair(folder / "a", folder / "b", Options(patient=patient))
    for source, name in (("a", full), ("b", low)):
        write_enhanced(sorted((folder / source).iterdir()), folder / name)
        (folder / source).rmdir()


@pytest.mark.parametrize(
    ("full", "low"),
    [
        ("full_1mm/{}.dcm", "quarter_1mm/{}.dcm"),
        ("full_1mm/{}/IM1", "quarter_1mm/{}/IM1"),
        ("{}/full_1mm/IM1", "{}/quarter_1mm/IM1"),
        ("{}/full_1mm/IM1.dcm", "{}/quarter_1mm/IM1.dcm"),
        ("{}/full_1mm.dcm", "{}/quarter_1mm.dcm"),
        ("{}/full_1mm", "{}/quarter_1mm"),
        ("{}/STUDY/1.0-Full Dose Images-1/1-1.dcm", "{}/STUDY/2.0-Low Dose Images-2/1-1.dcm"),
    ],
)
def test_files_pair_by_the_same_words(tmp_path, full, low):
    patients = "L067.1", "L067.2"
    for patient in patients:
        write_files(tmp_path, full.format(patient), low.format(patient), patient)
    pairs, refused = find_pairs(tmp_path, PairingConfig())
    assert refused == []
    assert sorted(pair.patient for pair in pairs) == list(patients)
    for pair in pairs:
        assert [s and s.place for s in (pair.full, pair.low)] == [
            tmp_path / name.format(pair.patient) for name in (full, low)
        ]


def test_without_a_patient_in_the_header_the_folder_above_says_who_it_is(tmp_path):
    write_files(tmp_path, "L067/full_1mm/IM1", "L067/quarter_1mm/IM1", patient="")
    ((pair,), refused) = find_pairs(tmp_path, PairingConfig())
    assert (pair.patient, refused) == ("L067", [])


def test_a_file_that_says_low_dose_is_not_simulated_from_unasked(tmp_path):
    write_files(tmp_path, "L067_full_1mm.dcm", "L067_quarter_1mm.dcm")
    with pytest.raises(
        UserError, match="file says low dose, but the layout is unknown; pair it by a manifest"
    ):
        find_pairs(tmp_path, PairingConfig())


def test_a_manifest_may_name_files(tmp_path):
    write_files(tmp_path, "L067_full_1mm.dcm", "L067_quarter_1mm.dcm")
    path = tmp_path / "pairs.csv"
    path.write_text("case,patient,full,low\na,L067,L067_full_1mm.dcm,L067_quarter_1mm.dcm\n")
    ((pair,), refused) = find_pairs(path, PairingConfig())
    assert refused == []
    assert (pair.full.place.name, pair.low.place.name) == ("L067_full_1mm.dcm", "L067_quarter_1mm.dcm")
