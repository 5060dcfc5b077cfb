"""Make the demo's CT series from the original ones: python tools/make_demo_data.py SOURCE OUT

SOURCE holds CRLM-CT-1004, CRLM-CT-1006 and LICENSE of the Colorectal-Liver-Metastases collection (The
Cancer Imaging Archive). Each slice is halved to 256 x 256 by averaging 2 x 2 pixels and stored losslessly.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless

from ldct_dist.ct.derived import derived_uid, mark_derived, presentable, set_pixels
from ldct_dist.ct.dicom import find_series, read_slices
from ldct_dist.ct.pixels import Slice

CASES = ("CRLM-CT-1004", "CRLM-CT-1006")
DESCRIPTION = "reduced to 256 x 256 by 2 x 2 mean"
CODECS = {JPEGLSLossless: "pyjpegls", JPEG2000Lossless: "pylibjpeg"}
LIMIT_BYTES = 15_000_000


def main(source: Path, out: Path) -> None:
    for case in CASES:
        candidates = {syntax: _halve_series(source / case, syntax) for syntax in CODECS}
        sizes = {syntax: sum(len(ds.PixelData) for ds in made) for syntax, made in candidates.items()}
        best = min(sizes, key=sizes.__getitem__)
        print(case, {syntax.name: size for syntax, size in sizes.items()})
        (out / case).mkdir(parents=True)
        for i, ds in enumerate(candidates[best], start=1):
            ds.save_as(out / case / f"{i:03d}.dcm", enforce_file_format=True)
    # The collection's own licence file mixes in single bytes of Windows-1252.
    (out / "LICENSE").write_text((source / "LICENSE").read_bytes().decode("cp1252"), encoding="utf-8")
    total = sum(path.stat().st_size for path in out.rglob("*.dcm"))
    assert total <= LIMIT_BYTES, f"{total} bytes of demo data, more than {LIMIT_BYTES}"
    print(f"{total / 1e6:.1f} MB in {out}")


def _halve_series(folder: Path, syntax: str) -> list[Dataset]:
    (series,), _ = find_series(folder)
    series_uid = derived_uid(series.series_uid, DESCRIPTION)
    return [_halve(ds, slice_, series_uid, syntax) for ds, slice_ in read_slices(series)]


def _halve(source: Dataset, slice_: Slice, series_uid: str, syntax: str) -> Dataset:
    ds = presentable(source)
    mark_derived(ds, series_uid, derived_uid(series_uid, slice_.path.name), DESCRIPTION, label=DESCRIPTION)
    if "AdditionalPatientHistory" in ds:
        del ds.AdditionalPatientHistory  # free text on a patient, of no use here
    del ds.SourceImageSequence[0].SpatialLocationsPreserved  # true of the patient, not pixel by pixel
    rows, columns = slice_.stored.shape[0] // 2, slice_.stored.shape[1] // 2
    ds.Rows, ds.Columns = rows, columns
    between_rows, between_columns = map(float, ds.PixelSpacing)
    ds.PixelSpacing = [2 * between_rows, 2 * between_columns]
    # The centre of a merged pixel lies half an old pixel further along rows and columns.
    along_row, along_column = np.reshape(np.array(ds.ImageOrientationPatient, float), (2, 3))
    shift = (between_columns * along_row + between_rows * along_column) / 2
    ds.ImagePositionPatient = [round(float(p), 6) for p in np.array(ds.ImagePositionPatient, float) + shift]
    set_pixels(ds, slice_, _halve_pixels(slice_))
    ds.compress(syntax, encoding_plugin=CODECS[syntax], generate_instance_uid=False)
    return ds


def _halve_pixels(slice_: Slice) -> np.ndarray:
    """2 x 2 mean of the stored values (a straight line away from HU); one padding pixel of four is enough
    to make padding, for a mean with it would be a value that nothing in the patient has."""

    def fours(a: np.ndarray) -> np.ndarray:
        return (
            a.reshape(a.shape[0] // 2, 2, a.shape[1] // 2, 2).swapaxes(1, 2).reshape(-1, a.shape[1] // 2, 4)
        )

    mean = np.rint(fours(slice_.stored).mean(axis=-1)).astype(np.int32)
    padding = fours(slice_.padding).any(axis=-1)
    filler = slice_.stored[slice_.padding].min(initial=0)
    return np.where(padding, filler, mean)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
