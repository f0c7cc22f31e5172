"""Signatures with a secret of the user's own: what bears one was written by this user's processes on this machine."""

import hmac
import os
import secrets
import stat
from pathlib import Path

from featcache.errors import SetupError
from featcache.store.atomic import create_file, make_folder, sweep

_BYTES = 32
_OTHERS = 0o077  # any right of the group's or of all


def sign(purpose: bytes, content: bytes | memoryview) -> str:
    """Return the HMAC-SHA-256 of a purpose and some bytes, 64 hexadecimal digits.

    The purpose stands in front, so that what was signed as one thing never counts as another.

    Raises:
        SetupError: the secret is not one that only this user knows.
        StorageError: there is none yet, and none can be written.
    """
    mac = hmac.new(_secret(), purpose, "sha256")
    mac.update(content)
    return mac.hexdigest()


def is_signed(signature: str, purpose: bytes, content: bytes | memoryview) -> bool:
    """Tell whether a signature is this user's, of that purpose and those bytes; raises as ``sign``."""
    return hmac.compare_digest(signature.encode("utf-8", "surrogateescape"), sign(purpose, content).encode())


def secret_path() -> Path:
    """Return where the secret is kept: in the user's data folder."""
    from platformdirs import user_data_path

    return user_data_path("featcache") / "secret"


def _secret() -> bytes:
    path = secret_path()
    sweep(path.parent)  # what a start that was killed left: nothing is written here again
    if not os.path.lexists(path):
        make_folder(path.parent)
        create_file(path, secrets.token_bytes(_BYTES), mode=0o600)
    try:
        # neither what a link points to, nor waiting for whoever feeds a pipe
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise SetupError(_advice(path, f"cannot be read ({error.strerror})")) from error
    try:
        if why := _why_open(os.fstat(descriptor)):
            raise SetupError(_advice(path, why))
        secret = os.read(descriptor, _BYTES + 1)
    finally:
        os.close(descriptor)
    if len(secret) != _BYTES:
        raise SetupError(_advice(path, f"holds {len(secret)} bytes instead of {_BYTES}: anyone could guess it"))
    return secret


def _why_open(facts: os.stat_result) -> str:
    """Return why a file is none that only this user can read and write, "" where it is."""
    if not stat.S_ISREG(facts.st_mode):
        return "is no regular file"
    if facts.st_uid != os.geteuid():
        return f"belongs to another user ({facts.st_uid}, not {os.geteuid()})"
    if facts.st_mode & _OTHERS:
        return f"is open to other users (mode {stat.S_IMODE(facts.st_mode):04o} instead of 0600)"
    return ""


def _advice(path: Path, why: str) -> str:
    return (
        f"{path}: this secret, which signs your heads, {why}. Delete it: the next command makes a new one; fit heads that "
        "were signed with the old one again, or load them with --trust."
    )
