"""The manifest that makes a directory a checkpoint: what is in it, and the hash of every byte."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldct_dist.files import file_sha256, replace

NAME = "MANIFEST.json"


class Corrupt(Exception):
    """A checkpoint whose bytes are not those that were written; the message says which file and how."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds. generation: of the start that wrote it. files: name to size in bytes and sha256. state: the
    run's counters (see TrainState) and what else was given to `Saver.save`, as JSON."""

    generation: int
    step: int
    files: dict[str, tuple[int, str]]
    state: dict[str, Any]

    def write(self, directory: Path) -> None:
        """Write and fsync the manifest, then the directory: the last thing before the rename."""
        replace(directory / NAME, _encode(self))

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Raises Corrupt if the manifest is missing or any byte of it changed."""
        try:
            raw = (directory / NAME).read_bytes()
        except OSError as e:
            raise Corrupt(f"{NAME} is not readable ({e.strerror})") from e
        try:
            body = json.loads(raw)["manifest"]
            body["files"] = {name: (size, digest) for name, (size, digest) in body["files"].items()}
            manifest = cls(**body)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise Corrupt(f"{NAME} does not parse") from e
        # Comparing bytes, not parsed values, also finds a change that JSON would forgive.
        if _encode(manifest) != raw:
            raise Corrupt(f"{NAME} does not match its own checksum")
        return manifest

    def check(self, directory: Path, name: str) -> None:
        """Raises Corrupt unless the file `name` is byte for byte what was written."""
        size, digest = self.files[name]
        try:
            found = (directory / name).stat().st_size
            if found != size:
                raise Corrupt(f"{name} has {found} bytes, {size} were written")
            if file_sha256(directory / name) != digest:
                raise Corrupt(f"{name} does not match its sha256")
        except OSError as e:
            raise Corrupt(f"{name} is not readable ({e.strerror})") from e


def _encode(manifest: Manifest) -> bytes:
    body = asdict(manifest)
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    checksum = hashlib.sha256(canonical.encode()).hexdigest()
    return json.dumps({"manifest": body, "sha256": checksum}, sort_keys=True, indent=1).encode()
