"""The cache's small JSON files, read as if anybody could have written them."""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featcache.fingerprint import fingerprint

_SEAL = "check"
_MOST_BYTES = 256 << 20  # a manifest of a million parts; a file that is larger is none of ours


def read_plain(path: Path, most: int = _MOST_BYTES) -> bytes:
    """Return the bytes of a file, at most so many.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a device, a pipe or a folder, or larger.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for its writer
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("not a plain file")
        if found.st_size > most:
            raise ValueError(f"{found.st_size} bytes")
        with os.fdopen(os.dup(descriptor), "rb") as file:
            return file.read()
    finally:
        os.close(descriptor)


def parse(content: bytes) -> dict[str, Any]:
    """Return the one object that a JSON file holds.

    Raises:
        ValueError: it holds something else.
    """
    try:
        note = json.loads(content, parse_constant=_refused)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(note, dict):
        raise ValueError("not an object")  # noqa: TRY004 - of the file's content, not of an argument
    return note


def read_note(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else.
    """
    return parse(read_plain(path))


def sealed(note: Mapping[str, Any], *where: str) -> dict[str, Any]:
    """Return a note with its own hash, so that it is known again whole, and nowhere but ``where`` it belongs."""
    return {**note, _SEAL: fingerprint([*where, dict(note)])}


def unsealed(note: Mapping[str, Any], *where: str) -> dict[str, Any]:
    """Return a note without its hash; one that was written before there were any passes.

    Raises:
        ValueError: it is not what was sealed, or from elsewhere.
    """
    content = {name: value for name, value in note.items() if name != _SEAL}
    if _SEAL in note and note[_SEAL] != fingerprint([*where, content]):
        raise ValueError("its content is not what was written here")
    return content


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number")
