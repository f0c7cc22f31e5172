"""Stable names for values: canonical JSON and SHA-256."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20  # bytes a read: a file of any size is hashed in this much memory
# Samples were images alone when the first records were written: files and scripts go on with these names.
_STORED = {
    "samples": "images",
    "samples_": "images_",
    "test_samples": "test_images",
    "more_samples": "more_images",
    "samples_per_second": "images_per_second",
    "seconds_a_sample": "seconds_an_image",
}
_NAMED = {stored: name for name, stored in _STORED.items()}


def canonical(value: object) -> str:
    """Return the one JSON text of a value: keys sorted, no spaces, dataclasses as objects.

    Raises:
        TypeError: the value holds something that JSON cannot say.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_as_json, allow_nan=False)


def fingerprint(value: object) -> str:
    """Return the SHA-256 of a value's canonical JSON, 64 hexadecimal digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def as_stored(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields by the names that files and JSON call them by, in their order."""
    return {_STORED.get(name, name): value for name, value in fields.items()}


def as_named(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields as the code calls them: the reverse of ``as_stored``."""
    return {_NAMED.get(name, name): value for name, value in fields.items()}


def sha256_of_bytes(content: bytes | memoryview) -> str:
    """Return the SHA-256 of some bytes, 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def sha256_of_chunks(chunks: Iterable[bytes | memoryview]) -> str:
    """Return the SHA-256 of the chunks' concatenation, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, read in blocks, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return sha256_of_chunks(iter(lambda: file.read(_BLOCK), b""))


def _as_json(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(f"{type(value).__name__} has no canonical form")
