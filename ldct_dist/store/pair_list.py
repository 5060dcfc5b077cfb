"""What was found in a source, as a file: a list of pairs, exact to the last bit, and of refusals."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from dataclasses import astuple
from pathlib import Path
from typing import Any

from ldct_dist import files
from ldct_dist.ct.dicom import Series
from ldct_dist.ct.stored import PixelForm, Stored
from ldct_dist.ct.volume import Acquisition
from ldct_dist.store.pairing import Pair, Refusal

FORMAT = 3

Found = tuple[list[Pair], list[Refusal]]
What = dict[str, Any]
"""of what a list is: one that differs in anything is not used"""


def write_list(path: Path, what: What, found: Found) -> None:
    """Write what was found to `path`, for its owner alone.

    One line of JSON for each pair: so, of a million files, no more than one pair's are in memory twice.
    """
    pairs, refused = found
    with files.replacing(path) as temporary:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "wb") as raw, gzip.open(raw, "wt", compresslevel=1, encoding="ascii") as f:
            f.write(f"{json.dumps(what)}\n{json.dumps([astuple(r) for r in refused])}\n")
            f.writelines(f"{json.dumps(_pair_to_plain(pair))}\n" for pair in pairs)


def read_list(path: Path, what: What) -> Found | None:
    """What `write_list` wrote; None if there is no list at `path`, or one of something else, or a damaged one."""
    try:
        with gzip.open(path, "rb") as f:
            if json.loads(f.readline()) != what:
                return None
            refused = [Refusal(*r) for r in json.loads(f.readline())]
            pairs = [_pair_from_plain(json.loads(line)) for line in f]  # to the end, where the checksum is
            return pairs, refused
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError):
        return None


def is_of(path: Path, what: What) -> bool:
    """Whether there is a list of `what` at `path`, as far as its first line shows."""
    try:
        with gzip.open(path, "rb") as f:
            return bool(json.loads(f.readline()) == what)
    except (OSError, EOFError, zlib.error, ValueError):
        return False


def _pair_to_plain(pair: Pair) -> dict[str, Any]:
    low = None if pair.low is None else _series_to_plain(pair.low)
    return vars(pair) | {"full": _series_to_plain(pair.full), "low": low}


def _pair_from_plain(plain: dict[str, Any]) -> Pair:
    low = None if plain["low"] is None else _series_from_plain(plain["low"])
    return Pair(**plain | {"full": _series_from_plain(plain["full"]), "low": low})


def _series_to_plain(series: Series) -> dict[str, Any]:
    folders: dict[str, int] = {}
    forms: dict[PixelForm, int] = {}
    slices = []
    for path, size, changed, pixels, form, frame in series.slices:
        folder, name = os.path.split(path)
        in_folder, in_form = folders.setdefault(folder, len(folders)), forms.setdefault(form, len(forms))
        slices.append((in_folder, name, size, changed, pixels, in_form, frame))
    shared = {"folders": list(folders), "forms": list(forms)}
    return vars(series) | shared | {"slices": slices, "acquisition": vars(series.acquisition)}


def _series_from_plain(plain: dict[str, Any]) -> Series:
    folders = [Path(folder) for folder in plain.pop("folders")]
    forms = [PixelForm(*map(_as_tuple, form)) for form in plain.pop("forms")]
    slices = [
        Stored(folders[in_folder] / name, size, changed, _as_tuple(pixels), forms[in_form], frame)
        for in_folder, name, size, changed, pixels, in_form, frame in plain.pop("slices")
    ]
    acquisition = Acquisition(**plain.pop("acquisition"))
    rest = {name: _as_tuple(value) for name, value in plain.items()}
    return Series(slices=tuple(slices), acquisition=acquisition, **rest)


def _as_tuple(value: Any) -> Any:
    """`value` with a tuple for each list in it, of which JSON makes no difference."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
