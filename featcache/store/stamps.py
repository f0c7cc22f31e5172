"""Which files were hashed and found whole, so that reading them again need not hash them again."""

import contextlib
import json
import time
from pathlib import Path

from featcache.errors import StorageError
from featcache.fingerprint import sha256_of_file
from featcache.store.atomic import replace_file

_RACY_NS = 2_000_000_000  # a file changed this close to being hashed may change again unseen


class Stamps:
    """A note beside an entry's files: SHA-256, and the size, times and inode that they had when it was taken."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._noted: dict[str, list[str | int]] = json.loads(path.read_text())
        except (OSError, ValueError):
            self._noted = {}

    def sha256(self, name: str) -> str:
        """Return what was noted of a file, "" where nothing was."""
        return str(self._noted.get(name, [""])[0])

    def note(self, file: Path, sha256: str) -> None:
        """Remember that a file was whole just now; a cache that cannot be written is only slower."""
        self._noted[file.name] = [sha256, *_signs(file), time.time_ns()]
        with contextlib.suppress(StorageError):
            replace_file(self._path, json.dumps(self._noted).encode())

    def is_whole(self, file: Path, sha256: str) -> bool:
        """Tell whether a file's bytes are those of a hash, by its signs where they can be believed.

        Raises:
            OSError: the file cannot be read.
        """
        signs = _signs(file)
        noted = self._noted.get(file.name)
        if noted and noted[:-1] == [sha256, *signs] and int(noted[-1]) - max(signs[1:3]) > _RACY_NS:
            return True
        if sha256_of_file(file) != sha256:
            return False
        self.note(file, sha256)
        return True


def _signs(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
