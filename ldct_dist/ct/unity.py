"""Whether the slices of a series belong together and are all there, as far as headers tell by anything but positions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from ldct_dist.ct.headers import Header
from ldct_dist.ct.multiframe import Part
from ldct_dist.errors import UserError


def refuse_incomplete(headers: Sequence[Header]) -> None:
    """Raises UserError where files of a concatenation are missing, or do not follow each other."""
    wholes: dict[str, dict[Path, Part]] = {}
    for h in headers:
        if h.part is not None:
            wholes.setdefault(h.part.uid, {})[h.path] = h.part
    for files in wholes.values():
        frames = sorted(chain.from_iterable(part.frames for part in files.values()))
        stated = max(part.parts or len(files) for part in files.values())
        if len(set(frames)) < len(frames):
            raise UserError(
                "files of its concatenation have the same frames (ConcatenationFrameOffsetNumber); export the series again"
            )
        if stated > len(files) or frames[-1] >= len(frames):
            raise UserError(
                f"parts of its concatenation are missing: of {stated} files there are {len(files)}, with {len(frames)} frames "
                f"up to number {frames[-1] + 1}; export the series again, complete"
            )


def refuse_mixed(headers: Sequence[Header], names: Sequence[str]) -> None:
    """Raises UserError where slices differ in what a series has but one of. `names` says what each is called.

    The error names files, not values: lines like these end up in shared logs, and patients must not.
    """
    first = headers[0]
    for h, name in zip(headers, names, strict=True):
        for what, a, b in (
            ("kinds of file, single-frame and multi-frame", first.sop_class, h.sop_class),
            ("patients", first.patient_id, h.patient_id),
            ("studies", first.study_uid, h.study_uid),
            ("frames of reference", first.frame_of_reference, h.frame_of_reference),
            ("matrix sizes", first.matrix, h.matrix),
            ("pixel spacings", first.pixel_spacing, h.pixel_spacing),
            ("orientations", first.orientation, h.orientation),
            ("kernels", first.kernel, h.kernel),  # two reconstructions, or energies, slice by slice in turn
            ("tube voltages", first.kvp, h.kvp),
            ("stacks or phases", first.stack, h.stack),
        ):
            if a != b and not _rounding(a, b):
                raise UserError(
                    f"mixed {what}: {names[0]} and {name} differ; separate them into series of their own"
                )


def _rounding(a: object, b: object) -> bool:
    """Whether two tuples of mm or direction cosines differ only by rounding of their last digits."""
    if not (isinstance(a, tuple) and isinstance(b, tuple)):
        return False
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) < 5e-4
