"""Findings of an evaluation that is not finished: one that was killed goes on with them, and array tasks share the work."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ldct_dist import files
from ldct_dist.errors import UserError

FOLDER = ".findings"
"""in the report's folder, until the report is there"""
AGAIN = "make room, or make it writable: the same command then goes on with what was measured so far"


class Kept:
    """Findings by name, a file each, complete or absent: JSON, after a line with the hash of it and of what it depends on.

    of: all that findings depend on, as JSON has it. Those of anything else are not found, and are replaced.
    """

    def __init__(self, folder: Path, of: Mapping[str, Any]) -> None:
        self.folder = folder
        self._of = json.dumps(of, sort_keys=True)

    def find(self, name: str) -> dict[str, Any] | None:
        """What was kept under `name`; None if nothing was, or if it is damaged."""
        try:
            seal, _, text = (self.folder / name).read_text("utf-8").partition("\n")
        except (OSError, UnicodeDecodeError):
            return None
        return json.loads(text, object_hook=_array) if seal == self._seal(text) else None

    def keep(self, name: str, findings: Mapping[str, Any]) -> dict[str, Any]:
        """Keep `findings`, of numbers, texts, lists, dicts and arrays; they are returned as `find` would return them.

        Raises UserError if they cannot be written.
        """
        text = json.dumps(findings, default=_plain)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Another start may have just made its report, and forgotten all of these.
            with suppress(FileNotFoundError):
                files.replace(self.folder / name, f"{self._seal(text)}\n{text}")
        except OSError as e:
            raise UserError(f"{self.folder}: cannot be written ({e.strerror}); {AGAIN}") from e
        return json.loads(text, object_hook=_array)

    def forget(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _seal(self, text: str) -> str:
        return hashlib.sha256(f"{self._of}\n{text}".encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A number of numpy's, or an array, as JSON."""
    if isinstance(value, np.ndarray):
        data = base64.b64encode(value.tobytes()).decode()
        return {"dtype": value.dtype.str, "shape": value.shape, "base64": data}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value)} has no JSON")


def _array(found: dict[str, Any]) -> Any:
    """The array, where `found` is one as `_plain` wrote it."""
    if found.keys() != {"dtype", "shape", "base64"}:
        return found
    return np.frombuffer(base64.b64decode(found["base64"]), found["dtype"]).reshape(found["shape"])
