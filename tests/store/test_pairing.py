from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import shift as shifted

from ldct_dist import config as configs
from ldct_dist.ct.derived import write_simulated
from ldct_dist.ct.dicom import find_series, one_series, read_series
from ldct_dist.ct.noise import sampled_moments
from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError
from ldct_dist.store.conventions import mayo_place, tcia_place
from ldct_dist.store.ingest import ingest
from ldct_dist.store.paircheck import PairCheckConfig, check_images, residual_shift
from ldct_dist.store.pairing import PairingConfig, find_pairs
from ldct_dist.store.reader import Store
from sources import CONFIG, anatomy, write_pair, write_patients
from synthetic_dicom import Options, write_series

SPACING = (2.5, 0.7, 0.7)


def manifest(path, *rows, columns="case,patient,full,low"):
    path.write_text("\n".join([columns, *rows]) + "\n")
    return path


def reasons(source, **settings):
    """Why the pairs of `source` are refused before any pixel is read."""
    pairs, refused = find_pairs(source, PairingConfig(**settings))
    assert not pairs
    return [r.reason for r in refused]


def mayo(root, patient="L067", variant="1mm", options=None):
    options = options or Options(patient=patient)
    full, low = (root / f"{dose}_{variant}/{patient}/{dose}_{variant}" for dose in ("full", "quarter"))
    write_pair(full, low, options)


def tcia(root, patient):
    study = root / "LDCT-and-Projection-data" / patient / "12-23-2021-NA-NA-62464"
    write_pair(
        study / "1.000000-Full Dose Images-1", study / "2.000000-Low Dose Images-2", Options(patient=patient)
    )
    projections = study / "3.000000-Full Dose Projections-3"
    projections.mkdir()
    (projections / "1-00001.dcm").write_bytes(b"raw data of another kind")


def test_a_series_of_any_other_folder_is_one_full_dose_to_simulate_from(tmp_path):
    pairs, refused = find_pairs(write_patients(tmp_path, 2), PairingConfig())
    assert [(p.patient, p.low, p.dose) for p in pairs] == [("P000", None, None), ("P001", None, None)]
    assert not refused


def test_mayo_2016_folders_pair_at_a_quarter(tmp_path):
    mayo(tmp_path, "L067")
    mayo(tmp_path, "L096")
    pairs, refused = find_pairs(tmp_path, PairingConfig())
    assert not refused
    assert [(p.patient, p.dose) for p in pairs] == [("L067", 0.25), ("L096", 0.25)]
    for p in pairs:
        assert p.low is not None
        assert (p.full.paths[0].parts[-4], p.low.paths[0].parts[-4]) == ("full_1mm", "quarter_1mm")


def test_mayo_2016_variants_are_told_apart_by_kernel_and_thickness(tmp_path):
    soft, sharp = Options(patient="L067", kernel="B30f"), Options(patient="L067", kernel="D45f")
    thick = replace(soft, spacing=(3.0, 0.7, 0.7))
    for variant, options in (("1mm", soft), ("1mm_sharp", sharp), ("3mm", thick)):
        mayo(tmp_path, variant=variant, options=options)

    (reason,) = reasons(tmp_path)
    assert reason.startswith("L067, full dose: 3 series to choose from")
    for choice in ("full_1mm (kernel B30f, 2.5 mm)", "full_1mm_sharp (kernel D45f", "(kernel B30f, 3 mm)"):
        assert choice in reason
    assert "set pairing.kernel or pairing.thickness_mm" in reason

    for settings, folder in (
        ({"kernel": "D*"}, "full_1mm_sharp"),
        ({"kernel": "B30*", "thickness_mm": 3.0}, "full_3mm"),
        ({"kernel": "B30*", "thickness_mm": 2.5}, "full_1mm"),
    ):
        ((pair,), refused) = find_pairs(tmp_path, PairingConfig(**settings))
        assert (pair.full.paths[0].parent.name, refused) == (folder, [])
    with pytest.raises(
        UserError, match=r"none of its 6 series matches pairing\.kernel and pairing\.thickness_mm"
    ):
        find_pairs(tmp_path, PairingConfig(kernel="LUNG"))


@pytest.mark.parametrize(
    ("full", "low"),
    [("full_dose", "quarter_dose"), ("Full-Dose", "Quarter-Dose"), ("full_dose_3mm", "quarter_dose_3mm")],
)
def test_folders_named_by_dose_alone_pair_as_well(tmp_path, full, low):
    write_pair(tmp_path / full / "L067", tmp_path / low / "L067", Options(patient="L067"))
    ((pair,), refused) = find_pairs(tmp_path, PairingConfig())
    assert pair.low is not None
    assert (pair.full.paths[0].parts[-3], pair.low.paths[0].parts[-3], refused) == (full, low, [])


def test_what_does_not_fit_into_the_layout_of_the_others_is_told_what_to_do(tmp_path):
    write_pair(tmp_path / "full_1mm/L067", tmp_path / "quarter_1mm/L067", Options(patient="L067"))
    write_series(tmp_path / "others/A", anatomy(), Options(patient="A", seed="a"))
    ((pair,), (refused,)) = find_pairs(tmp_path, PairingConfig())
    assert pair.patient == "L067"
    assert "in the layout mayo2016, which others here have, nothing says" in refused.reason
    assert "ingest it from a folder apart, or pair all by a manifest" in refused.reason


def test_a_kernel_that_no_series_has_is_said_whatever_else_is_refused(tmp_path):
    write_series(tmp_path / "a", anatomy(), Options(patient="A", seed="a"))
    write_series(tmp_path / "b", anatomy(), Options(patient="B", seed="b"))[1].unlink()
    with pytest.raises(
        UserError, match=r"none of its 1 series matches .*; there are the kernels \S+, and slices of"
    ):
        find_pairs(tmp_path, PairingConfig(kernel="Zz*"))


@pytest.mark.parametrize("folder", ["low_dose", "L067/reduced-dose-images", "lowdose 1"])
def test_a_folder_that_says_low_dose_is_not_simulated_from_unasked(tmp_path, folder):
    write_series(tmp_path / folder, anatomy(), Options(patient="A"))
    with pytest.raises(UserError, match="says low dose, but the layout is unknown; pair it by a manifest"):
        find_pairs(tmp_path, PairingConfig())
    assert len(find_pairs(tmp_path, PairingConfig(layout="simulate"))[0]) == 1
    assert len(find_pairs(tmp_path / folder, PairingConfig())[0]) == 1  # named itself, it is what is meant


@pytest.mark.parametrize("description", ["UltraLowDose 1.0 B30f", "quarter_1mm"])
def test_a_series_that_calls_itself_low_dose_is_not_simulated_from_unasked(tmp_path, description):
    """Many exports name folders by UIDs or numbers; one such series among thousands is no reason to stop."""
    write_series(tmp_path / "1.2.3", anatomy(), Options(patient="A", seed="a", description=description))
    write_series(tmp_path / "1.2.4", anatomy(), Options(patient="A", seed="b", description="Chest B30f"))
    ((pair,), (refused,)) = find_pairs(tmp_path, PairingConfig())
    assert pair.full.description == "Chest B30f"
    assert "its description says low dose; pair it by a manifest" in refused.reason
    assert len(find_pairs(tmp_path, PairingConfig(layout="simulate"))[0]) == 2


def test_words_that_end_as_low_say_nothing_of_the_dose(tmp_path):
    write_series(tmp_path / "1.2.3", anatomy(), Options(patient="A", description="Flow 5mm"))
    assert len(find_pairs(tmp_path, PairingConfig())[0]) == 1


def test_tcia_pairs_by_descriptions_where_its_folders_are_uids(tmp_path):
    for patient in ("C002", "L004"):
        full, low = (Options(patient=patient, description=f"{dose} Dose Images") for dose in ("Full", "Low"))
        write_pair(tmp_path / patient / "1.2/1.3", tmp_path / patient / "1.2/1.4", full, low_options=low)
    pairs, refused = find_pairs(tmp_path, PairingConfig())
    assert not refused
    assert [(p.patient, p.full.description, p.low and p.low.description, p.dose) for p in pairs] == [
        ("C002", "Full Dose Images", "Low Dose Images", 0.1),
        ("L004", "Full Dose Images", "Low Dose Images", 0.25),
    ]


def test_what_was_made_here_is_not_simulated_from_unasked(tmp_path):
    write_series(tmp_path / "in", anatomy(), Options(patient="A"))
    series = one_series(tmp_path / "in")
    write_simulated(series, read_series(series).hu, tmp_path / "out", 0.25)
    with pytest.raises(
        UserError, match=r"out: series .*: made by ldct_dist, so not a full dose; pair it by a manifest"
    ):
        find_pairs(tmp_path, PairingConfig())
    assert len(find_pairs(tmp_path, PairingConfig(layout="simulate"))[0]) == 2


def test_files_that_lie_flat_in_a_folder_below_the_root_are_no_layout(tmp_path):
    write_series(tmp_path, anatomy(), Options(patient="A"))
    (series,), _ = find_series(tmp_path)
    for folder in ("/data", "/full dose images", "/a/full dose images"):
        flat = replace(
            series, slices=tuple(s._replace(path=Path(folder, s.path.name)) for s in series.slices)
        )
        assert tcia_place(flat) is None
        assert mayo_place(flat) is None


def test_a_quarter_dose_alone_is_not_taken_for_a_full_one(tmp_path):
    write_series(tmp_path / "quarter_1mm/L067", anatomy(), Options(patient="L067"))
    (reason,) = reasons(tmp_path)
    assert reason.startswith("L067, full dose: no usable series")


def test_tcia_folders_pair_at_the_dose_of_the_body_part(tmp_path):
    for patient in ("C002", "L004", "N012"):
        tcia(tmp_path, patient)
    pairs, refused = find_pairs(tmp_path, PairingConfig())
    assert [(p.patient, p.dose) for p in pairs] == [("C002", 0.10), ("L004", 0.25), ("N012", 0.25)]
    assert not refused
    assert [p.patient for p in find_pairs(tmp_path, PairingConfig(dose=0.1))[0]] == ["C002"]


def test_tcia_pairs_are_stored_under_their_own_dose(tmp_path, threads):
    for patient in ("C002", "L004"):
        tcia(tmp_path / "in", patient)
    ingest(tmp_path / "in", tmp_path / "ct.zarr", CONFIG)
    assert sorted(c.doses for c in Store(tmp_path / "ct.zarr").cases) == [("1.00", "0.10"), ("1.00", "0.25")]


def test_a_manifest_says_case_patient_dose_and_split(tmp_path, threads):
    write_pair(tmp_path / "a/full", tmp_path / "a/low", Options(patient="A"))
    write_series(tmp_path / "b", anatomy(1), Options(patient="B"))
    table = manifest(
        tmp_path / "pairs.csv",
        "one,anna,a/full,a/low,0.1,test",
        "two,bert,b,,,",
        columns="case,patient,full,low,dose,split",
    )
    report = ingest(table, tmp_path / "ct.zarr", CONFIG.model_copy(update={"split_of": {"bert": "val"}}))
    assert not report.rejected
    store = Store(tmp_path / "ct.zarr")
    assert [(c.name, c.split, c.doses) for c in store.cases] == [
        ("one", "test", ("1.00", "0.10")),
        ("two", "val", ("1.00", "0.25")),
    ]
    assert np.array_equal(store.volume("one", "1.00").hu, anatomy())


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("x,anna,nowhere,a/low,,", "nowhere: no such folder"),
        ("x,anna,empty,a/low,,", "empty: no usable series"),
        ("x,anna,a,a/low,,", r"2 series to choose from, .*a/full \(kernel STANDARD, 2.5 mm\); .*a/low"),
        ("x,anna,a/full,a/full,,", r"the same series \(SeriesInstanceUID\); give two, or"),
        ("x,anna,a/full,a/low,25,", "dose '25'; write a fraction"),
        ("x,,a/full,a/low,,", "no patient"),
        ("../x,anna,a/full,a/low,,", r"case '\.\./x'; use 1 to 64 letters"),
        ("x,anna,a/full,a/low", "not as many fields"),
        ("A,anna,a/full,a/low,,", "case A names the patient"),
        ("anna,Anna,a/full,a/low,,", "case anna names the patient"),
        ("scan-of-Anna-1,anna,a/full,a/low,,", "case scan-of-Anna-1 names the patient"),
        ("zarr.json,anna,a/full,a/low,,", r"case 'zarr\.json'; use 1 to 64 letters"),
        ("good,anna,a/full,a/low,,", "case good is listed twice"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_and_stops_no_other(tmp_path, row, said):
    write_pair(tmp_path / "a/full", tmp_path / "a/low", Options(patient="A"))
    (tmp_path / "empty").mkdir()
    table = manifest(
        tmp_path / "pairs.csv", "good,anna,a/full,a/low,,", row, columns="case,patient,full,low,dose,split"
    )
    pairs, (refusal,) = find_pairs(table, PairingConfig())
    assert [p.name for p in pairs] == ["good"]
    with pytest.raises(UserError, match=said):
        raise UserError(refusal.reason)
    assert "\n" not in refusal.reason


def test_with_pairing_dose_set_a_row_without_a_dose_is_reported(tmp_path):
    write_pair(tmp_path / "a/full", tmp_path / "a/low", Options(patient="A"))
    write_series(tmp_path / "b", anatomy(1), Options(patient="B"))
    rows = [f"{case},anna,a/full,a/low,{dose}" for case, dose in (("x", "0.25"), ("y", "0.1"), ("z", ""))]
    table = manifest(tmp_path / "p.csv", *rows, "simulated,bert,b,,", columns="case,patient,full,low,dose")
    pairs, (refusal,) = find_pairs(table, PairingConfig(dose=0.25))
    assert [p.name for p in pairs] == ["x", "simulated"]
    assert refusal.reason == f"{table}, line 4: no dose, which pairing.dose needs; fill it in"


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("case,patient,full", "no column 'low'"),
        ("case,patient,full,low,Split", "unknown column 'Split'"),
        ("case;patient;full;low", "separated by commas"),
    ],
)
def test_a_manifest_without_its_columns_is_refused(tmp_path, columns, said):
    with pytest.raises(UserError, match=said):
        find_pairs(manifest(tmp_path / "pairs.csv", columns=columns), PairingConfig())


def test_empty_rows_of_a_spreadsheet_are_none(tmp_path):
    write_series(tmp_path / "b", anatomy(), Options(patient="B"))
    pairs, refused = find_pairs(
        manifest(tmp_path / "pairs.csv", "two,bert,b,", ",,,", ",,,"), PairingConfig()
    )
    assert ([p.name for p in pairs], refused) == (["two"], [])


def test_a_manifest_does_not_take_a_series_that_may_lack_a_slice(tmp_path):
    """A file that cannot be read may be its last one; a series beside it that is refused is not its own."""
    last = write_series(tmp_path / "b", anatomy(), Options(patient="B"))[-1]
    tilted = Options(patient="B", seed="tilted", tags={"GantryDetectorTilt": 12})
    write_series(tmp_path / "b" / "tilted", anatomy(), tilted)
    table = manifest(tmp_path / "pairs.csv", "two,bert,b,")
    assert [p.full.shape for p in find_pairs(table, PairingConfig())[0]] == [anatomy().shape]
    last.write_bytes(last.read_bytes()[:100])
    assert [last.name in reason for reason in reasons(table)] == [True]


def test_a_layout_that_the_source_has_not_is_said(tmp_path):
    with pytest.raises(UserError, match="takes the CSV itself"):
        find_pairs(tmp_path, PairingConfig(layout="manifest"))
    with pytest.raises(UserError, match=r"a file, but pairing\.layout=tcia"):
        find_pairs(manifest(tmp_path / "pairs.csv"), PairingConfig(layout="tcia"))
    with pytest.raises(UserError, match="no DICOM files below it"):
        find_pairs(tmp_path, PairingConfig())
    path, *_ = write_series(tmp_path, anatomy())
    with pytest.raises(UserError, match=r"slice-000\.dcm: a DICOM file; give the folder"):
        find_pairs(path, PairingConfig())
    with pytest.raises(UserError, match="pairing: layout: Input should be 'auto', 'manifest'"):
        configs.validate(PairingConfig, {"layout": "nifti"}, "pairing")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"origin": (-100.0, -120.0, 41.5)}, r"slice positions differ by up to 1\.50 mm \(limit 0\.1 mm"),
        ({"origin": (-97.0, -116.0, 40.0)}, r"voxels lie up to 5\.00 mm apart"),
        (
            {"spacing": (2.5, 0.7, 0.75)},
            r"2\.5 x 0\.7 x 0\.7 mm at full and 2\.5 x 0\.7 x 0\.75 mm at low dose",
        ),
        ({"spacing": (2.6, 0.7, 0.7)}, r"slice positions differ by up to 0\.50 mm"),
    ],
)
def test_pairs_on_different_grids_are_refused_with_the_distance(tmp_path, changed, said):
    options = Options(patient="A")
    write_pair(tmp_path / "full", tmp_path / "low", options, low_options=replace(options, **changed))
    table = manifest(tmp_path / "pairs.csv", "x,anna,full,low")
    (reason,) = reasons(table)
    with pytest.raises(UserError, match=said):
        raise UserError(reason)


def test_pairs_of_different_size_are_refused_with_both(tmp_path):
    write_pair(tmp_path / "full", tmp_path / "low", Options(patient="A"), low_hu=anatomy()[:5])
    (reason,) = reasons(manifest(tmp_path / "pairs.csv", "x,anna,full,low"))
    assert reason == "x: grids differ: 6 x 36 x 40 voxels at full dose, 5 x 36 x 40 at low dose"


def body(noise=5.0, seed=0):
    return anatomy(seed, (12, 64, 64), noise).astype(np.float32)


def volume(hu):
    return Volume(np.rint(hu).clip(-1024).astype(np.int16), SPACING)


def noisy(hu, std=25.0):
    return hu + np.random.default_rng(5).normal(0, std, hu.shape)


@pytest.mark.parametrize("moved", [(0, 0, 0), (0, 1, 0), (0, 0.5, -2), (0, -1.25, 3)])
def test_the_residual_shift_is_found_to_a_fraction_of_a_voxel(moved):
    low = noisy(shifted(body(), moved, order=1, mode="nearest"))
    assert residual_shift(volume(body()), volume(low)) == pytest.approx(moved, abs=0.2)


def check(full, low, limits):
    check_images(full, low, sampled_moments(full), limits)


def test_pairs_whose_images_differ_are_refused_with_the_number():
    full, limits = volume(body()), PairCheckConfig()
    check(full, volume(noisy(body())), limits)
    with pytest.raises(UserError, match=r"shifted by \(-?0\.\d\d, 2\.\d\d, -?0\.\d\d\) voxels"):
        check(full, volume(noisy(shifted(body(), (0, 2.1, 0), order=1, mode="nearest"))), limits)
    with pytest.raises(
        UserError, match=r"soft tissue differs by \+(19|20|21)\.\d HU at low dose \(limit 5 HU"
    ):
        check(full, volume(noisy(body()) + 20), limits)
    with pytest.raises(
        UserError, match=r"less noisy \(\d+\.\d HU\) than the full dose \(\d+\.\d HU\): swapped\?"
    ):
        check(volume(noisy(body())), full, limits)
    check(full, volume(noisy(body()) + 20), PairCheckConfig(offset_hu=30))


def test_a_mismatched_pair_is_listed_and_the_others_are_ingested(tmp_path, threads):
    shape = (6, 64, 64)
    for name, offset in (("good", 0), ("off", 40)):
        options = Options(patient=f"P{offset}")
        low = np.rint(noisy(anatomy(0, shape)) + offset).clip(-1024).astype(np.int16)
        write_series(tmp_path / name / "full", anatomy(0, shape), replace(options, seed="full"))
        write_series(tmp_path / name / "low", low, replace(options, seed="low"))
    table = manifest(tmp_path / "pairs.csv", "off,p1,off/full,off/low", "fine,p2,good/full,good/low")
    report = ingest(table, tmp_path / "ct.zarr", CONFIG)
    assert report.written == ["fine"]
    with open(tmp_path / "ct.zarr.rejected.csv", newline="") as f:
        (row,) = csv.DictReader(f)
    assert row["where"] == "off"
    assert row["reason"].startswith(("off: soft tissue differs by +39.", "off: soft tissue differs by +40."))
