"""A processed volume written back as a derived DICOM series that an archive accepts beside its source.

What a derived image must say: DICOM PS3.3 C.7.6.1.1.2 (Image Type), C.12.4 (General Reference: derivation
description and source images), C.7.5.2 (contributing equipment).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from io import BytesIO
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.datadict import dictionary_VR
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

import ldct_dist
from ldct_dist.ct.dicom import Series, read_slices
from ldct_dist.ct.pixels import Slice
from ldct_dist.ct.values import number, pydicom_faults_as_user_errors, text
from ldct_dist.ct.volume import AIR_HU
from ldct_dist.errors import UserError
from ldct_dist.files import left_unfinished, refuse_taken, sync_tree, unfinished

STALE = (
    *("InstanceCreationDate", "InstanceCreationTime", "InstanceCreatorUID"),
    *("SeriesDate", "SeriesTime", "ContentDate", "ContentTime"),
    *("SmallestPixelValueInSeries", "LargestPixelValueInSeries", "IconImageSequence"),
    *("DerivationCodeSequence", "DigitalSignaturesSequence", "MACParametersSequence"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths", "DataSetTrailingPadding"),
)
"""Elements that are true of the source's pixels, file or time of writing, but not of the derived ones. The present time
does not take their place: the same input must give the same files."""

PROPORTIONAL = (
    *("XRayTubeCurrent", "XRayTubeCurrentInmA", "XRayTubeCurrentInuA"),
    *("Exposure", "ExposureInmAs", "ExposureInuAs", "CTDIvol"),
)
"""Elements that are proportional to the dose, which scanners lower by the current, not by the voltage."""

LONGEST_TEXT, LONGEST_NAME, LONGEST_LABEL = 1024, 64, 32  # characters; the first two: of DICOM's ST and LO


def write_simulated(series: Series, hu: np.ndarray, out: Path | str, dose: float) -> list[Path]:
    """Write `hu`, `series` as it would look at the fraction `dose` of its dose: see `write_derived`."""
    return write_derived(
        series,
        hu,
        out,
        f"Simulated at {dose:g} of the dose by ldct_dist {ldct_dist.__version__} (projection domain)",
        label=f"simulated {100 * dose:g} % dose",
        dose=dose,
    )


def write_derived(
    series: Series,
    hu: np.ndarray,
    out: Path | str,
    description: str,
    *,
    label: str = "derived",
    dose: float = 1.0,
) -> list[Path]:
    """Write `hu`, (z, y, x) int16 in the order of `read_series(series)`, as DICOM files in the folder `out`.

    A voxel whose HU is the source's keeps its stored value bit for bit, and padding stays the source's
    padding whatever `hu` says there. Other voxels are clipped to AIR_HU from below and to the stored
    range, never becoming PixelPaddingValue. Patient, study, frame of reference, geometry and rescale are
    the source's. `description` says how the series was made, in full, and `label` in a word or two, which
    SeriesDescription has after the source's own: plain ASCII. `dose`: the fraction of the source's dose that
    the images show; tube current, exposure and CTDIvol are scaled by it.

    Returns the files in slice order. `out` appears complete or not at all. Raises UserError when it
    exists and is not empty, cannot be written, or when `hu`, `description` or `label` does not fit.
    """
    out = Path(out).absolute()
    said = {"description": (description, LONGEST_TEXT), "label": (label, LONGEST_LABEL)}
    series_uid = derived_uid(series.series_uid, description, hashlib.sha256(hu.tobytes()).hexdigest())
    partial = unfinished(out)
    names = [f"{i:04d}.dcm" for i in range(1, len(hu) + 1)]
    try:
        _check(series, hu, out, said)
        for left in left_unfinished(out):
            shutil.rmtree(left)  # of a start that was killed
        partial.mkdir(parents=True)
        slices = zip(names, read_slices(series), hu, strict=True)
        for i, (name, (ds, slice_), slice_hu) in enumerate(slices, start=1):
            instance_uid = derived_uid(series_uid, name)
            with pydicom_faults_as_user_errors(slice_.source):
                derived = presentable(ds)
                if slice_.source.frame is not None:
                    # A frame has no number, or one that frames of other files may have, too.
                    derived.InstanceNumber = i
                if dose != 1:
                    scale_dose(derived, dose)
                mark_derived(derived, series_uid, instance_uid, description, label, slice_.source.frame)
                set_pixels(derived, slice_, _stored(slice_, slice_hu))
                encoded = _encoded(derived)
            (partial / name).write_bytes(encoded)
        sync_tree(partial)
        os.replace(partial, out)
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror}); choose another folder or make room") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [out / name for name in names]


def _check(series: Series, hu: np.ndarray, out: Path, said: dict[str, tuple[str, int]]) -> None:
    """Raises UserError where `write_derived` does, before anything is written. said: name to (text, longest length)."""
    if hu.shape != series.shape or hu.dtype != np.int16:
        raise UserError(
            f"{series.name}: its volume is int16 {series.shape}, this one is {hu.dtype} {hu.shape}; "
            "give HU in the order of read_series"
        )
    for what, (words, longest) in said.items():
        if not (words.isascii() and words.isprintable() and 0 < len(words) <= longest):
            raise UserError(f"{what} {words[:40]!r}: write 1 to {longest} plain ASCII characters in one line")
        if "\\" in words:
            raise UserError(f"{what} {words[:40]!r}: remove the backslash, which in DICOM separates values")
    refuse_taken(out)


def derived_uid(*sources: str) -> str:
    """A UID that is a function of `sources` (UUID version 5 under 2.25, PS3.5 B.2).

    So running the same job again gives the same series, which an archive recognises, and another network or other pixels
    give another series.
    """
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, '|'.join(sources)).int}"


def _encoded(ds: Dataset) -> bytes:
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True, implicit_vr=False, little_endian=True)
    return buffer.getvalue()


def _stored(source: Slice, hu: np.ndarray) -> np.ndarray:
    """The stored values for `hu`: the source's own wherever its HU are unchanged."""
    meaning, pad = source.meaning, source.meaning.pad
    wanted = np.rint((np.maximum(hu, AIR_HU) - meaning.intercept) / meaning.slope)
    wanted = np.clip(wanted, meaning.low, meaning.high).astype(np.int32)
    if pad:
        above, below = pad[1] + 1, pad[0] - 1
        collides = (wanted >= pad[0]) & (wanted <= pad[1])
        wanted[collides] = above if above <= meaning.high else below
    return np.where((hu == source.hu) | source.padding, source.stored, wanted)


def presentable(ds: Dataset) -> Dataset:
    """`ds` without elements that must not get into a derived image.

    Left out are private elements (their meaning is unknown here, and some hold a copy of the old pixels), group lengths,
    and values that pydicom cannot convert, which no archive would accept.
    """
    kept = Dataset()
    for raw in ds.elements():
        if raw.tag.is_private or raw.tag.element == 0:
            continue
        try:
            element = ds[raw.tag]
            for item in element.value if element.VR == "SQ" else ():
                item.remove_private_tags()  # which converts everything inside, too
            kept.add(element)
        except Exception:  # noqa: BLE001 - what fails to convert is exactly what is left out
            continue
    return kept


def scale_dose(ds: Dataset, dose: float) -> None:
    """Multiply what is PROPORTIONAL to the dose by `dose`, in sequences too.

    Elements without a number are removed, and so are whole numbers that would become 0.
    """
    for element in list(ds):
        if element.VR == "SQ":
            for item in element.value:
                scale_dose(item, dose)
        elif element.keyword in PROPORTIONAL:
            scaled = (number(ds, element.keyword) or 0.0) * dose
            del ds[element.tag]  # so that the new one gets the right VR, if the source's was wrong
            # Rounded in DS as well, which has room for 16 characters only.
            if value := scaled if dictionary_VR(element.tag) == "FD" else round(scaled):
                setattr(ds, element.keyword, value)


def mark_derived(
    ds: Dataset,
    series_uid: str,
    instance_uid: str,
    description: str,
    label: str,
    frame: int | None = None,
) -> None:
    """Turn the header of an image into that of one derived from it, as `description` and `label` say (ASCII).

    frame: as in Stored, if the image is a frame of a multi-frame one.
    """
    new = Dataset()  # a new one, so that each element gets the right VR, if the source's was wrong
    new.SOPClassUID, new.SOPInstanceUID, new.SeriesInstanceUID = CTImageStorage, instance_uid, series_uid
    new.ImageType = ["DERIVED", "SECONDARY", *((text(ds, "ImageType") or "").split("\\")[2:] or ["AXIAL"])]
    # The source's text may name phase and kernel. It is cut at its end to make room for the label.
    own = (text(ds, "SeriesDescription") or "")[: LONGEST_NAME - len(label) - 1].strip()
    new.SeriesDescription = f"{own} {label}".strip()
    new.SeriesNumber = int(number(ds, "SeriesNumber") or 0) % 1_000_000 + 1000
    history = [text(ds, "DerivationDescription"), description]
    new.DerivationDescription = "; ".join(filter(None, history))[-LONGEST_TEXT:]
    new.SourceImageSequence = [_source_image(ds.SOPClassUID, ds.SOPInstanceUID, frame)]
    new.RescaleType = "HU"  # without it, only the values of an original image count as HU
    equipment = Dataset()
    equipment.PurposeOfReferenceCodeSequence = [_code("109103", "Modifying Equipment")]
    equipment.Manufacturer = "ldct_dist"
    equipment.ContributionDescription = description
    new.ContributingEquipmentSequence = [*ds.get("ContributingEquipmentSequence", []), equipment]
    for keyword in STALE:
        if keyword in ds:
            del ds[keyword]
    ds.update(new)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian


def _source_image(sop_class: str, sop_instance: str, frame: int | None) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = sop_class
    item.ReferencedSOPInstanceUID = sop_instance
    if frame is not None:
        item.ReferencedFrameNumber = frame + 1
    item.PurposeOfReferenceCodeSequence = [_code("121322", "Source image for image processing operation")]
    item.SpatialLocationsPreserved = "YES"
    return item


def _code(value: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, "DCM", meaning
    return code


def set_pixels(ds: Dataset, source: Slice, stored: np.ndarray) -> None:
    """Put `stored` (y, x), values of the stored type of `source`, into `ds`, native, with what describes them."""
    signed, pad = source.meaning.low < 0, source.meaning.pad
    vr = "SS" if signed else "US"
    pixels = stored.astype("<i2" if signed else "<u2")
    ds.add_new("PixelData", "OW", pixels.tobytes())
    if source.lossy and "LossyImageCompression" not in ds:
        ds.LossyImageCompression = "01"  # a source that was lossy once stays so
    described = {"SmallestImagePixelValue": int(pixels.min()), "LargestImagePixelValue": int(pixels.max())}
    if pad:
        described |= {"PixelPaddingValue": pad[0], "PixelPaddingRangeLimit": pad[1]}
    for keyword, value in described.items():
        if keyword in ds:
            ds.add_new(keyword, vr, value)
