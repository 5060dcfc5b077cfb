"""One slice's stored values and the HU they stand for.

Formulas: HU = slope * stored + intercept (DICOM PS3.3 C.11.1.1.2, Modality LUT Module); padding is
PixelPaddingValue, up to PixelPaddingRangeLimit where that is given (C.7.5.1.1.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom import Dataset, uid
from pydicom.encaps import get_frame
from pydicom.pixels import pixel_array

from ldct_dist.ct.headers import number, pydicom_faults_as_user_errors, text
from ldct_dist.ct.volume import AIR_HU
from ldct_dist.errors import UserError

FILLER_HU = -2000
"""Reconstructed air scatters around -1000 HU, so a value this low was filled in, tagged as padding or not:
GE fills the corners outside the field of view with -3024 HU."""

TISSUE_HU = -900
"""A PixelPaddingValue above this HU would also mark lung and soft tissue."""

# One decoder a syntax, so that the same file gives the same values on every machine.
_DECODER = {
    **dict.fromkeys((uid.JPEG2000Lossless, uid.JPEG2000), "pylibjpeg"),
    **dict.fromkeys((uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K), "pylibjpeg"),
    **dict.fromkeys((uid.JPEGLSLossless, uid.JPEGLSNearLossless), "pyjpegls"),
    **dict.fromkeys((uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGExtended12Bit), "gdcm"),
    uid.RLELossless: "pydicom",
}

_LOSSY = (uid.JPEG2000, uid.HTJ2K, uid.JPEGLSNearLossless, uid.JPEGExtended12Bit)


@dataclass(frozen=True)
class Slice:
    """One slice: what is stored in the file at `path` and what it means.

    stored: (y, x) int32, the stored values. hu: (y, x) int16, AIR_HU where padding or below AIR_HU.
    padding: (y, x) bool. low, high: the stored range. pad: the range PixelPaddingValue takes, if any.
    lossy: whether the file's compression may have changed values.
    """

    path: Path
    stored: np.ndarray
    hu: np.ndarray
    padding: np.ndarray
    slope: float
    intercept: float
    low: int
    high: int
    pad: tuple[int, int] | None
    lossy: bool


def read_slice(path: Path) -> tuple[Dataset, Slice]:
    """The whole dataset at `path` and its slice.

    Raises UserError for truncated or undecodable pixel data, an encoding CT does not use, stored values
    beyond BitsStored, padding that reads as tissue, and HU beyond int16.
    """
    with pydicom_faults_as_user_errors(path):
        ds = pydicom.dcmread(path, force=True)
        if "TransferSyntaxUID" not in ds.file_meta:  # a file without preamble and meta header
            implicit, _ = ds.original_encoding
            ds.file_meta.TransferSyntaxUID = (
                uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
            )
    bits, signed = _sample_format(path, ds)
    stored = _sign_extended(_decode(path, ds), bits, signed)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    slope, intercept = rescale(path, number(ds, "RescaleSlope"), number(ds, "RescaleIntercept"))
    pad = _pad_range(ds, signed)
    tagged = (stored >= pad[0]) & (stored <= pad[1]) if pad else np.zeros(stored.shape, bool)
    hu = np.rint(stored * slope + intercept)
    padding = tagged | (hu <= FILLER_HU)
    _refuse_unsound(path, stored[~tagged], hu, tagged, (low, high))
    hu = np.where(padding, AIR_HU, np.maximum(hu, AIR_HU)).astype(np.int16)
    lossy = ds.file_meta.TransferSyntaxUID in _LOSSY
    return ds, Slice(path, stored, hu, padding, slope, intercept, low, high, pad, lossy)


def rescale(where: object, slope: float | None, intercept: float | None) -> tuple[float, float]:
    """Slope and intercept; UserError, naming `where`, when they are absent or no CT's."""
    if slope is None or intercept is None or not 1e-4 <= abs(slope) <= 1e4 or abs(intercept) > 1e6:
        raise UserError(
            f"{where}: no usable RescaleSlope and RescaleIntercept, so its values are not HU; "
            "export the series as original CT images"
        )
    return slope, intercept


def _sample_format(path: Path, ds: Dataset) -> tuple[int, bool]:
    allocated, bits, high_bit = (number(ds, k) for k in ("BitsAllocated", "BitsStored", "HighBit"))
    representation, samples = number(ds, "PixelRepresentation"), number(ds, "SamplesPerPixel")
    if allocated != 16 or bits is None or not 1 < bits <= 16 or high_bit != bits - 1:
        raise UserError(
            f"{path}: BitsAllocated {text(ds, 'BitsAllocated')}, BitsStored {text(ds, 'BitsStored')}, HighBit "
            f"{text(ds, 'HighBit')}, but CT uses 16 bits, the low ones first; export the original CT images"
        )
    if (
        samples != 1
        or representation not in (0, 1)
        or not str(text(ds, "PhotometricInterpretation")).startswith("MONO")
    ):
        raise UserError(
            f"{path}: not one grey value a pixel (a screen capture?); export the original CT images"
        )
    return int(bits), representation == 1


def _decode(path: Path, ds: Dataset) -> np.ndarray:
    if "PixelData" not in ds:
        raise UserError(f"{path}: no pixel data, or truncated; export the file again")
    syntax = ds.file_meta.TransferSyntaxUID
    with pydicom_faults_as_user_errors(path):
        if syntax.is_encapsulated and syntax != uid.RLELossless and not _ends(ds):
            raise UserError(f"{path}: truncated pixel data; export the file again")
        if not syntax.is_encapsulated and len(ds.PixelData) >= 2 * (ds.Rows + 1) * ds.Columns:
            # A few bytes of padding are common; a whole row too many means another matrix.
            raise UserError(f"{path}: more pixel data than Rows and Columns say; export the file again")
        pixels = pixel_array(
            ds, index=0, raw=True, correct_unused_bits=False, decoding_plugin=_DECODER.get(syntax, "")
        )
    return pixels.astype(np.int32)


def _ends(ds: Dataset) -> bool:
    """Codecs quietly fill in what a cut-off stream lacks, but the whole JPEG family ends in EOI or EOC."""
    return get_frame(ds.PixelData, 0, number_of_frames=1).rstrip(b"\0").endswith(b"\xff\xd9")


def _sign_extended(stored: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Some writers leave the unused high bits of negative values zero; the sign bit is BitsStored's top bit."""
    if not signed:
        return stored
    folded = (stored >= 1 << bits - 1) & (stored < 1 << bits)
    return np.where(folded, stored - (1 << bits), stored).astype(np.int32)


def _pad_range(ds: Dataset, signed: bool) -> tuple[int, int] | None:
    value, limit = number(ds, "PixelPaddingValue"), number(ds, "PixelPaddingRangeLimit")
    if value is None:
        return None
    ends = sorted(_as_stored(v, signed) for v in (value, value if limit is None else limit))
    return ends[0], ends[1]


def _as_stored(value: float, signed: bool) -> int:
    """Writers confuse US and SS here: -2000 and 63536 are the same 16 bits."""
    value = int(value) & 0xFFFF
    return value - 0x10000 if signed and value > 0x7FFF else value


def _refuse_unsound(
    path: Path, real: np.ndarray, hu: np.ndarray, tagged: np.ndarray, limits: tuple[int, int]
) -> None:
    if real.size and (real.min() < limits[0] or real.max() > limits[1]):
        raise UserError(
            f"{path}: stored values {real.min()} to {real.max()} lie beyond BitsStored "
            f"({limits[0]} to {limits[1]}); correct the header or export the file again"
        )
    if tagged.any() and hu[tagged].max() > TISSUE_HU:
        raise UserError(
            f"{path}: PixelPaddingValue marks {hu[tagged].max():g} HU, which tissue has too; "
            "remove or correct that tag"
        )
    if hu.max() > np.iinfo(np.int16).max:
        raise UserError(
            f"{path}: {hu.max():g} HU does not fit 16 bits; check RescaleSlope and RescaleIntercept"
        )
