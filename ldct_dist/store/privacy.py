"""Patients enter a store only as keyed hashes; the key stays outside it."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from ldct_dist.errors import UserError

KEY_BYTES = 32


def default_key_path(store: Path) -> Path:
    """Beside the store, never in it: who gets a copy of the store does not get the key."""
    return store.with_name(f"{store.name}.key")


def load_key(path: Path) -> bytes:
    """The key at `path`, made with owner-only access if there is none yet.

    Parts of an array job that start together agree: the first to link its key into place wins.
    Raises UserError if the file is not a key.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
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
    except (OSError, ValueError) as e:
        raise UserError(
            f"patient key {path}: not readable as a key ({e}); name the right file with --key"
        ) from e
    if len(key) < KEY_BYTES:
        raise UserError(f"patient key {path}: holds {len(key)} bytes, at least {KEY_BYTES} are needed")
    return key


def keyed_hash(key: bytes, *items: bytes | str) -> str:
    """HMAC-SHA256 of the items, 128 bits in hex; the items' borders count."""
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for item in items:
        raw = item.encode() if isinstance(item, str) else item
        mac.update(len(raw).to_bytes(8, "little") + raw)
    return mac.hexdigest()[:32]
