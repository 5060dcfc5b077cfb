"""One slice's stored values and the HU they stand for.

Formulas: HU = slope * stored + intercept (DICOM PS3.3 C.11.1.1.2, Modality LUT Module); padding is
PixelPaddingValue, up to PixelPaddingRangeLimit where that is given (C.7.5.1.1.2).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pydicom
from pydicom import Dataset, uid
from pydicom.encaps import get_frame
from pydicom.pixels import pixel_array

from ldct_dist.ct.bounds import refuse_bloated, refuse_other_length
from ldct_dist.ct.codestream import refuse_unlike
from ldct_dist.ct.multiframe import NOT_AS_SAID, MultiFrame, ensure_syntax, read_multi_frame
from ldct_dist.ct.stored import PixelForm, Stored
from ldct_dist.ct.values import as_number, pydicom_faults_as_user_errors
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

_HIGHEST_HU = np.iinfo(np.int16).max

_LOSSY = (uid.JPEG2000, uid.HTJ2K, uid.JPEGLSNearLossless, uid.JPEGExtended12Bit)


@dataclass(frozen=True)
class Meaning:
    """What each of the 65536 patterns of 16 bits means in one slice, as tables indexed by the pattern.

    stored: int32, the stored value. hu: int16, AIR_HU for padding and for HU below AIR_HU. padding: bool.
    sound: bool; a slice in which a pattern occurs that is not sound is refused.
    low, high: the range of stored values. pad: the range of values that PixelPaddingValue marks, if any.
    shift: added to a stored value it gives HU, if nothing is left to do then but to clip at AIR_HU, as for most scanners;
    None if more is to be done.
    """

    stored: np.ndarray
    hu: np.ndarray
    padding: np.ndarray
    sound: np.ndarray
    slope: float
    intercept: float
    low: int
    high: int
    pad: tuple[int, int] | None
    signed: bool
    shift: int | None

    def write_hu(self, patterns: np.ndarray, out: np.ndarray) -> None:
        """Write the HU of `patterns`, uint16 and all of them sound, to `out`, int16."""
        if self.shift is None:
            np.take(self.hu, patterns, out=out, mode="clip")  # mode: the one without a copy
        else:  # takes a quarter of the time
            _shifted(patterns, self.signed, self.shift, out)


@dataclass(frozen=True)
class Slice:
    """One slice: the values stored at `source`, and what they mean.

    patterns: (y, x) uint16, the bits as stored. lossy: whether the file's compression may have changed values.
    """

    source: Stored
    patterns: np.ndarray
    meaning: Meaning
    lossy: bool

    @cached_property
    def hu(self) -> np.ndarray:
        """(y, x) int16, AIR_HU where padding or below AIR_HU."""
        hu = np.empty(self.patterns.shape, np.int16)
        self.meaning.write_hu(self.patterns, hu)
        return hu

    @cached_property
    def stored(self) -> np.ndarray:
        """(y, x) int32, the stored values."""
        return self.meaning.stored[self.patterns]

    @cached_property
    def padding(self) -> np.ndarray:
        """(y, x) bool."""
        return self.meaning.padding[self.patterns]


def read_slice(stored: Stored) -> Slice:
    """The slice whose pixels are where `stored` says.

    Raises UserError for a file that changed since, truncated or undecodable pixel data, an encoding CT does not use,
    stored values beyond BitsStored, padding that reads as tissue, and HU beyond int16.
    """
    try:
        meaning = _meaning_of(stored.form)
    except UserError as e:
        raise UserError(f"{stored}: {e}") from e
    with pydicom_faults_as_user_errors(stored):
        patterns = _decoded(stored) if stored.pixels is None else _native(stored, *stored.pixels)
    slice_ = Slice(stored, patterns, meaning, stored.form.syntax in _LOSSY)
    _refuse_unsound(slice_)
    return slice_


def read_dataset(stored: Stored) -> Dataset:
    """The whole dataset of the slice at `stored`. Raises UserError if it cannot be read as DICOM."""
    with pydicom_faults_as_user_errors(stored):
        if stored.frame is not None:
            return _multi_frame(stored.path, stored.changed).frame(stored.frame)
        ds = pydicom.dcmread(stored.path, force=True)
        ensure_syntax(ds)
    return ds


@lru_cache(16)  # frames are asked for one by one, of all files of a series in turn
def _multi_frame(path: Path, changed: int) -> MultiFrame:
    """changed: when, in ns, so that another file at `path` is not taken for it."""
    return read_multi_frame(path)


@lru_cache(16)  # the slices of a series share one
def _meaning_of(form: PixelForm) -> Meaning:
    bits, signed = _sample_format(form)
    slope, intercept = rescale(form.slope, form.intercept)
    return _meaning(bits, signed, slope, intercept, _pad_range(form, signed))


@lru_cache(16)  # series whose headers differ in other respects may share one
def _meaning(bits: int, signed: bool, slope: float, intercept: float, pad: tuple[int, int] | None) -> Meaning:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    stored = _sign_extended(patterns.view(np.int16) if signed else patterns, bits, signed)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    hu = np.rint(stored * slope + intercept)
    tagged = (stored >= pad[0]) & (stored <= pad[1]) if pad else np.zeros(stored.shape, bool)
    padding = tagged | (hu <= FILLER_HU)
    within = tagged | (stored >= low) & (stored <= high)
    sound = within & ~(tagged & (hu > TISSUE_HU)) & (hu <= _HIGHEST_HU)
    clipped = np.where(padding, AIR_HU, np.clip(hu, AIR_HU, _HIGHEST_HU)).astype(np.int16)
    shift = _shift(patterns, signed, stored, clipped, sound)
    return Meaning(stored, clipped, padding, sound, slope, intercept, low, high, pad, signed, shift)


def _shift(
    patterns: np.ndarray, signed: bool, stored: np.ndarray, hu: np.ndarray, sound: np.ndarray
) -> int | None:
    """`Meaning.shift` for these tables."""
    above = np.flatnonzero(sound & (hu > AIR_HU))
    if not len(above):
        return None
    shift = int(hu[above[0]]) - int(stored[above[0]])
    same = _shifted(patterns, signed, shift, np.empty_like(hu)) == hu
    return shift if same[sound].all() else None


def _shifted(patterns: np.ndarray, signed: bool, shift: int, out: np.ndarray) -> np.ndarray:
    kind: type[np.int16] | type[np.uint16] = np.int16 if signed else np.uint16
    range_ = np.iinfo(kind)
    lowest = min(max(AIR_HU - shift, range_.min), range_.max)
    # np.maximum takes six times as long where one side is a scalar
    np.clip(patterns.view(kind), kind(lowest), kind(range_.max), out=out.view(kind))
    return np.add(out, np.array(shift).astype(np.int16), out=out)  # wraps around, as 16 bits do


def rescale(slope: float | None, intercept: float | None) -> tuple[float, float]:
    """Slope and intercept. Raises UserError if they are missing, or impossible for CT."""
    if slope is None or intercept is None or not 1e-4 <= abs(slope) <= 1e4 or abs(intercept) > 1e6:
        raise UserError(
            "no usable RescaleSlope and RescaleIntercept, so its values are not HU; "
            "export the series as original CT images"
        )
    return slope, intercept


def _sample_format(form: PixelForm) -> tuple[int, bool]:
    """(BitsStored, whether values are signed). Raises UserError for formats that CT does not use."""
    allocated, bits, high_bit = map(as_number, (form.bits_allocated, form.bits_stored, form.high_bit))
    representation, samples = as_number(form.representation), as_number(form.samples)
    if allocated != 16 or bits is None or not 1 < bits <= 16 or high_bit != bits - 1:
        raise UserError(
            f"BitsAllocated {form.bits_allocated}, BitsStored {form.bits_stored}, HighBit {form.high_bit}, "
            "but CT stores values in the low bits of 16; export the original CT images"
        )
    if samples != 1 or representation not in (0, 1) or not (form.photometric or "").startswith("MONO"):
        raise UserError("not one grey value a pixel (a screen capture?); export the original CT images")
    return int(bits), representation == 1


def _native(stored: Stored, start: int, length: int) -> np.ndarray:
    """(y, x) uint16, the bits as stored, straight from the file."""
    rows, columns = stored.form.matrix or (0, 0)
    with stored.path.open("rb", buffering=0) as f:
        _refuse_changed(stored, os.fstat(f.fileno()))
        said, row = 2 * rows * columns, 2 * columns
        refuse_other_length(stored, length, said, row)
        refuse_other_length(stored, min(length, stored.size - start), said, row)  # before memory is taken
        pixels = np.empty((rows, columns), "<u2")
        f.seek(start)
        refuse_other_length(stored, f.readinto(pixels.data), said, row)
    return pixels.astype(np.uint16, copy=False)


def _decoded(stored: Stored) -> np.ndarray:
    """(y, x) uint16, the bits as stored, found or decoded by pydicom and its plugins."""
    rows, columns = stored.form.matrix or (0, 0)
    _refuse_changed(stored, stored.path.stat())
    refuse_bloated(stored, stored.size, 2 * rows * columns)
    ds = read_dataset(stored)
    if "PixelData" not in ds:
        raise UserError(f"{stored}: no pixel data, or truncated; export the file again")
    syntax = ds.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        refuse_unlike(stored, get_frame(ds.PixelData, 0, number_of_frames=1), syntax, (rows, columns))
    elif ds["PixelData"].is_undefined_length:
        raise UserError(f"{stored}: {NOT_AS_SAID}")
    else:
        refuse_other_length(stored, len(ds.PixelData), 2 * rows * columns, 2 * columns)
    pixels = pixel_array(
        ds, index=0, raw=True, correct_unused_bits=False, decoding_plugin=_DECODER.get(syntax, "")
    )
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False).view(np.uint16)


def _refuse_changed(stored: Stored, now: os.stat_result) -> None:
    if (now.st_size, now.st_mtime_ns) != (stored.size, stored.changed):
        raise UserError(f"{stored}: changed since the folder was searched; search it again")


def _sign_extended(stored: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Stored values as int32. The sign bit is the highest of BitsStored; some writers leave the unused bits above it
    zero in negative values."""
    stored = stored.astype(np.int32)
    folded = (stored >= 1 << bits - 1) & (stored < 1 << bits)
    return np.where(folded, stored - (1 << bits), stored) if signed else stored


def _pad_range(form: PixelForm, signed: bool) -> tuple[int, int] | None:
    value, limit = as_number(form.pad_value), as_number(form.pad_limit)
    if value is None:
        return None
    ends = sorted(_as_stored(v, signed) for v in (value, value if limit is None else limit))
    return ends[0], ends[1]


def _as_stored(value: float, signed: bool) -> int:
    """A padding value as a stored one. Writers confuse US and SS here: -2000 and 63536 are the same 16 bits."""
    value = int(value) & 0xFFFF
    return value - 0x10000 if signed and value > 0x7FFF else value


def _refuse_unsound(slice_: Slice) -> None:
    """Raises UserError, with the reason, if a pattern occurs in the slice that is not sound."""
    source, meaning, patterns = slice_.source, slice_.meaning, slice_.patterns
    if meaning.sound[patterns.min() : int(patterns.max()) + 1].all() or meaning.sound[patterns].all():
        return
    present = meaning.stored[np.bincount(patterns.ravel(), minlength=1 << 16).nonzero()]
    low, high, pad = meaning.low, meaning.high, meaning.pad
    tagged = (present >= pad[0]) & (present <= pad[1]) if pad else np.zeros(present.shape, bool)
    real, hu = present[~tagged], np.rint(present * meaning.slope + meaning.intercept)
    if real.size and (real.min() < low or real.max() > high):
        raise UserError(
            f"{source}: stored values {real.min()} to {real.max()} lie beyond BitsStored "
            f"({low} to {high}); correct the header or export the file again"
        )
    if tagged.any() and hu[tagged].max() > TISSUE_HU:
        raise UserError(
            f"{source}: PixelPaddingValue marks {hu[tagged].max():g} HU, which tissue has too; "
            "remove or correct that tag"
        )
    if hu.max() > _HIGHEST_HU:
        raise UserError(
            f"{source}: {hu.max():g} HU does not fit 16 bits; check RescaleSlope and RescaleIntercept"
        )
