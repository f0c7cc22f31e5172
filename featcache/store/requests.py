"""The flags that led to an entry, each in a file that is called by the hash of its bytes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featcache.fingerprint import sha256_of_bytes
from featcache.store.json_files import parse, read_plain

_ENTRY = "entry"
_NAMED = 16  # digits of the hash in the name


def encode(request: Mapping[str, Any], key: str) -> tuple[str, bytes]:
    """Return a request's file name and bytes, bound to the entry of a key."""
    content = json.dumps({**request, _ENTRY: key}, sort_keys=True, indent=1).encode()
    return f"{sha256_of_bytes(content)[:_NAMED]}.json", content


def read(path: Path, key: str) -> dict[str, Any]:
    """Return a request.

    Raises:
        OSError: it cannot be read.
        ValueError: its content is not what its name says, or it belongs to another entry.
    """
    content = read_plain(path)
    if path.stem != sha256_of_bytes(content)[:_NAMED]:
        raise ValueError("its bytes are not what its name says")
    request = parse(content)
    if request.pop(_ENTRY, key) != key:  # those written before there was a binding have none
        raise ValueError("it belongs to another entry")
    return request
