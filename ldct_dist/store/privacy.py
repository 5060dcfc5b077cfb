"""Patients enter a store only as keyed hashes; the key stays outside it."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pydicom

from ldct_dist.ct.pixels import read_dataset
from ldct_dist.ct.stored import Stored
from ldct_dist.ct.values import pydicom_faults_as_user_errors, text
from ldct_dist.ct.volume import Acquisition
from ldct_dist.errors import UserError
from ldct_dist.files import unfinished

KEY_BYTES = 32
LONGEST_VALUE = 16  # of text that a store keeps: DICOM's own limit for short strings (SH)
NAMES = ("PatientName", "OtherPatientNames", "PatientBirthName")
NUMBERS = ("OtherPatientIDs", "AccessionNumber", "PatientBirthDate")
IDENTIFYING = (
    *NAMES,
    *NUMBERS,
    *("PatientID", "PatientAddress", "PatientMotherBirthName", "PatientTelephoneNumbers", "StudyID"),
    *("ReferringPhysicianName", "PerformingPhysicianName", "NameOfPhysiciansReadingStudy", "OperatorsName"),
    *("RequestingPhysician", "InstitutionName", "InstitutionAddress"),
)


def default_key_path(store: Path) -> Path:
    """The key's place beside the store, never in it: whoever gets a copy of the store is not to get the key."""
    return store.with_name(f"{store.name}.key")


def load_key(path: Path) -> bytes:
    """The key at `path`, made with owner-only access if there is none yet.

    Parts of an array job that start together agree: the first to link its key into place wins.
    Raises UserError if the file is not a key, or may not be read.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = unfinished(path)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as f:
            f.write(secrets.token_hex(KEY_BYTES))
            f.flush()
            os.fsync(f.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass  # another part's key came first: it is the one to use
        finally:
            temporary.unlink()
    try:
        key = bytes.fromhex(path.read_text().strip())
    except OSError as e:
        raise UserError(
            f"patient key {path}: cannot be read ({e.strerror}); ask its owner for access: with another key, patients "
            "already in the store would be taken for new ones"
        ) from e
    except ValueError as e:
        raise UserError(
            f"patient key {path}: not readable as a key ({e}); give the right file by key="
        ) from e
    if len(key) < KEY_BYTES:
        raise UserError(
            f"patient key {path}: {len(key)} bytes, but a key has {KEY_BYTES} or more; give the right file by key="
        )
    return key


def keyed_hash(key: bytes, *items: bytes | str) -> str:
    """HMAC-SHA256 of the items, 128 bits in hex. ("ab", "c") and ("a", "bc") have different ones."""
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for item in items:
        raw = item.encode(errors="surrogateescape") if isinstance(item, str) else item
        mac.update(len(raw).to_bytes(8, "little") + raw)
    return mac.hexdigest()[:32]


def key_id(key: bytes) -> str:
    """Tells this key from others, and nothing else of it."""
    return keyed_hash(key, "key")[:16]


def patient_hash(key: bytes, patient: str) -> str:
    """A patient's name in a store; `patient` is their name in the source."""
    return keyed_hash(key, "patient", patient)


def scrubbed(acquisition: Acquisition, identifying: Collection[str]) -> Acquisition:
    """`acquisition` with short plain texts, and without any text that contains an identifying word.

    On some scanners people can type into these fields, and they type names.
    """

    def plain(value: str | None) -> str | None:
        if value is None or any(word in value.casefold() for word in identifying):
            return None
        return re.sub(r"[^A-Za-z0-9 ._-]+", "-", value)[:LONGEST_VALUE].strip(" -") or None

    return replace(
        acquisition,
        manufacturer=plain(acquisition.manufacturer),
        model=plain(acquisition.model),
        kernel=plain(acquisition.kernel),
    )


def identifying_words(stored: Stored, patient: str) -> frozenset[str]:
    """The words, case-folded, of `patient` and of the elements that name people and places in a slice's dataset.

    Words of one or two letters are left out: they identify nobody, and "C" is a kernel.
    """
    return _words(patient) | _words(" ".join(_texts_in(stored, IDENTIFYING).values()))


def names_patient(case: str, stored: Stored, identities: Collection[str]) -> bool:
    """Whether `case` contains a word of the patient's name in a slice's dataset, or a number of theirs there, such as
    the accession number, or one of `identities`.

    Upper case and punctuation are ignored. An identity of fewer than four characters is part of many words, so it only
    counts if it is all of `case`.
    """
    bare, told = _bare(case), _texts_in(stored, (*NAMES, *NUMBERS))
    numbers = (number for keyword in NUMBERS for number in told[keyword].split("\\"))
    every = [_bare(identity) for identity in (*identities, *numbers)]
    held = (identity for identity in every if len(identity) > 3 and identity in bare)
    names = _words(" ".join(told[keyword] for keyword in NAMES))
    return bare in every or any(held) or not names.isdisjoint(_words(case))


def _texts_in(stored: Stored, keywords: Collection[str]) -> dict[str, str]:
    """What these elements of the slice's dataset say, by keyword; nothing for those that are not there."""
    if stored.frame is not None:
        ds = read_dataset(stored)
    else:  # without pixels, of which there may be much, on the way to a list of pairs
        with pydicom_faults_as_user_errors(stored):
            ds = pydicom.dcmread(
                stored.path, stop_before_pixels=True, force=True, specific_tags=list(keywords)
            )
    return {keyword: text(ds, keyword) or "" for keyword in keywords}


def _words(phrase: str) -> frozenset[str]:
    return frozenset(word for word in re.split(r"[\W_]+", phrase.casefold()) if len(word) > 2)


def _bare(identity: str) -> str:
    return re.sub(r"[\W_]+", "", identity.casefold())
