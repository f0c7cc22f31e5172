"""Which bytes are believed: files that were hashed and found whole, and what this user's processes have signed."""

import contextlib
import hmac
import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from featcache.display import logger
from featcache.errors import SetupError, StorageError
from featcache.fingerprint import sha256_of_file
from featcache.resources import cores
from featcache.store.atomic import create_file, make_folder, remove_abandoned, replace_file
from featcache.store.manifests import parse_stamps, read_note, sealed, unsealed

Signs = tuple[int, int, int, int]
_RACY_NS = 2_000_000_000  # a file changed this close to being hashed may change again unseen


class Stamps:
    """A note beside an entry's files: SHA-256, and the size, times and inode that they had when it was taken.

    It is only a shortcut: one that is damaged, or from another entry than that of ``key``, is as good as none.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._key = key
        self._noted = self._read()
        self._written: dict[str, tuple[Path, str, Signs]] = {}

    def sha256(self, name: str) -> str:
        """Return what was noted of a file, "" where nothing was."""
        return str(self._noted.get(name, [""])[0])

    def note(self, file: Path, sha256: str) -> None:
        """Remember that a file was whole just now; a cache that cannot be written is only slower."""
        self._keep({file.name: [sha256, *signs(file), time.time_ns()]})

    def wrote(self, file: Path, sha256: str) -> None:
        """Remember that this process has just written a file; it is noted once its times are old enough to be believed."""
        self._written[file.name] = (file, sha256, signs(file))

    def settle(self) -> None:
        """Note those files written here that are unchanged, and old enough."""
        now = time.time_ns()
        aged: dict[str, list[str | int]] = {}
        for name, (file, sha256, then) in list(self._written.items()):
            if now - max(then[1:3]) > _RACY_NS:
                del self._written[name]
                with contextlib.suppress(OSError):
                    if signs(file) == then:
                        aged[name] = [sha256, *then, now]
        if aged:
            self._keep(aged)

    def is_whole(self, file: Path, sha256: str) -> bool:
        """Tell whether a file's bytes are those of a hash, by its signs where they can be believed."""
        return self.are_whole([(file, sha256)])[0]

    def are_whole(self, files: Sequence[tuple[Path, str]]) -> list[bool]:
        """Tell of several files, hashed by all cores; one that cannot be read is not whole."""
        doubtful = {(file, sha256) for file, sha256 in files if not self._is_believed(file, sha256)}
        if not doubtful:
            return [True] * len(files)
        # A hash is worth what the file's times are worth: those are taken before its bytes are read.
        now = time.time_ns()  # before, not after: what changes while it is hashed is younger than this
        before = {file: signs(file) for file, sha256 in doubtful if file.is_file() and self._can_be(file, sha256)}
        with ThreadPoolExecutor(cores()) as hashers:
            digests = dict(zip(before, hashers.map(_hash, before), strict=True))
        intact = {(file, sha256) for file, sha256 in doubtful if file in digests and digests[file] == sha256}
        self._keep({file.name: [sha256, *before[file], now] for file, sha256 in intact})
        return [pair in intact or pair not in doubtful for pair in files]

    def _can_be(self, file: Path, sha256: str) -> bool:
        """Tell whether a file is as long as what was noted under a hash: the terabyte in its place is not read."""
        noted = self._noted.get(file.name)
        return noted is None or noted[0] != sha256 or noted[1] == file.stat().st_size

    def _is_believed(self, file: Path, sha256: str) -> bool:
        noted = self._noted.get(file.name)
        try:
            return bool(
                noted and noted[:-1] == [sha256, *signs(file)] and int(noted[-1]) - max(map(int, noted[2:4])) > _RACY_NS
            )
        except OSError:
            return False

    def _keep(self, notes: dict[str, list[str | int]]) -> None:
        if notes:
            self._noted = self._read() | notes  # what others have noted meanwhile stays
            with contextlib.suppress(StorageError):
                replace_file(self._path, json.dumps(sealed(self._noted, self._key)).encode())

    def _read(self) -> dict[str, list[str | int]]:
        try:
            return parse_stamps(unsealed(read_note(self._path), self._key))
        except (OSError, ValueError):
            return {}


def signs(file: Path) -> Signs:
    """Return a file's size, mtime and ctime in ns, and inode.

    Raises:
        OSError: it cannot be reached.
    """
    facts = file.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino


def _hash(file: Path) -> str:
    try:
        return sha256_of_file(file)
    except OSError:
        return ""


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
    remove_abandoned(path.parent)  # what a start that was killed left: nothing is written here again
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
        "were signed with the old one again, or load them with `trust=True`."
    )


Content = TypeVar("Content")


def kept_note(path: Path, where: Sequence[str], read: Callable[[dict[str, Any]], Content], again: str) -> Content | None:
    """Return what an earlier command has kept in a sealed note, ``None`` where it is not there, or not whole: that is said.

    Args:
        path: of the note.
        where: what it was sealed for.
        read: makes of the note what is returned.
        again: what is done instead.
    """
    try:
        return read(unsealed(read_note(path), *where)) if path.exists() else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: %s; %s", path, error, again)
        return None


def keep_note(path: Path, where: Sequence[str], note: Mapping[str, Any]) -> None:
    """Keep a note of plain values, sealed.

    Raises:
        StorageError: the disk failed.
    """
    make_folder(path.parent)
    plain = json.loads(json.dumps(note))  # as it will be read, so that its hash is the same
    replace_file(path, json.dumps(sealed(plain, *where)).encode())
