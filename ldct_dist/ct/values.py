"""Values of DICOM elements as plain text and numbers, even where they are damaged, and pydicom's errors as UserErrors
that name the file."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

from pydicom import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence

from ldct_dist.errors import UserError


@contextmanager
def pydicom_faults_as_user_errors(where: object) -> Iterator[None]:
    """Silence pydicom's warnings about the file or slice called `where`, and raise its exceptions as a UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (UserError, MemoryError):
        raise
    except OSError as e:
        raise UserError(f"{where}: cannot be read ({e.strerror or e}); make it readable or remove it") from e
    except Exception as e:  # on damaged bytes, parsers and codecs raise all kinds of exceptions
        # pydicom sometimes appends a traceback to its message.
        reason = (str(e) or type(e).__name__).partition("Traceback")[0].strip()
        raise UserError(f"{where}: not readable as DICOM ({reason}); export it again or remove it") from e


def text(ds: Dataset, keyword: str) -> str | None:
    """The element's value as printable text, multiple values joined by backslashes as DICOM writes them."""
    return as_text(lambda: ds.get(keyword))


def as_text(convert: Callable[[], object]) -> str | None:
    """What `convert` returns, as `text`; None if it fails, or there is no text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = convert()
            if isinstance(value, MultiValue):
                value = "\\".join(map(str, value))
    except Exception:  # noqa: BLE001 - a value that pydicom cannot convert is as good as absent
        return None
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if value is None or isinstance(value, Sequence):
        return None
    return "".join(filter(str.isprintable, str(value))).strip() or None


def number(ds: Dataset, keyword: str) -> float | None:
    """The element's one finite number; None if it holds anything else."""
    return as_number(text(ds, keyword))


def as_number(text: str | None) -> float | None:
    """An element's text as one finite number; None if it is anything else."""
    values = as_numbers(text, 1)
    return values[0] if values else None


@lru_cache(1 << 12)  # most texts are the same as in the slice before
def as_numbers(text: str | None, count: int) -> tuple[float, ...] | None:
    """An element's text as `count` finite numbers; None if it is anything else."""
    try:
        values = tuple(float(part) for part in (text or "").split("\\"))
    except ValueError:
        return None
    return values if len(values) == count and all(map(math.isfinite, values)) else None
