"""Files on disk: written whole or not at all, read as if anybody could have written them, believed by hash, seal or sign.

A new file is a temporary one beside the target, flushed to disk, then renamed or linked. A temporary file is locked as long
as its writer lives; every write first removes those in its folder that nobody holds.
"""

import contextlib
import ctypes
import errno
import fcntl
import hmac
import json
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from featcache.display import logger
from featcache.errors import SetupError, StorageError
from featcache.fingerprint import fingerprint, sha256_of_file
from featcache.resources import cores

_TEMPORARY = re.compile(r"\.tmp-(?P<host>\w*)-(?P<process>\d{1,18})-[0-9a-f]{8}")
_SEAL = "check"
_MOST_BYTES = 256 << 20  # a manifest of a million parts; a file that is larger is none of ours
_ABANDONED_SECONDS = 24 * 3600  # whether a process of another machine lives cannot be asked
# What file systems without hard links say (exFAT, SMB, some FUSE): the name is taken in another way there.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}
_NOT_KNOWN = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
Signs = tuple[int, int, int, int]
_RACY_NS = 2_000_000_000  # a file changed this close to being hashed may change again unseen
_SECRET_BYTES = 32
_OTHERS = 0o077  # any right of the group's or of all
Content = TypeVar("Content")
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1  # of Linux


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that it is seen whole or not at all, replacing an older one.

    Raises:
        StorageError: the disk is full or cannot be written.
    """
    replace_file_by(path, lambda file: _write_all(file, content))


def replace_file_by(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """As replace_file, the content written by a function, for what does not fit into memory.

    Raises:
        StorageError: the disk is full or cannot be written.
    """
    with _storage_errors(path), _temporary(path.parent, write) as temporary:
        # The content is on disk by now (fsync in _temporary): after a crash the name leads to all of it or to the old file.
        temporary.replace(path)
        _sync_folder(path.parent)


def create_file(path: Path, content: bytes, mode: int | None = None) -> bool:
    """Write a file that must not exist yet, with some permissions from its first byte; return whether this call made it.

    Raises:
        StorageError: the disk is full or cannot be written.
    """

    def write(file: BinaryIO) -> None:
        if mode is not None:
            os.fchmod(file.fileno(), mode)
        _write_all(file, content)

    with _storage_errors(path), _temporary(path.parent, write) as temporary:
        made = _take_name(temporary, path)
        if made:
            _sync_folder(path.parent)
        return made


def remove_file(path: Path) -> None:
    """Remove a file, where it is there.

    Raises:
        StorageError: it cannot be removed.
    """
    with _storage_errors(path):
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises:
        StorageError: it cannot be created.
    """
    with _storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def is_temporary(path: Path) -> bool:
    """Tell whether a file has the name of a temporary one."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_abandoned(folder: Path) -> None:
    """Remove temporary files whose writer is gone; of another machine's those older than a day."""
    abandoned(folder, remove=True)


def abandoned(folder: Path, *, remove: bool = False) -> list[Path]:
    """Return the temporary files in a folder whose writer is gone, and ``remove`` them if asked to."""
    leftovers = []
    with contextlib.suppress(OSError), os.scandir(folder) as inside:
        for entry in inside:
            named = _TEMPORARY.fullmatch(entry.name)
            if named and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    path = Path(entry.path)
                    leftovers += [path] if _is_abandoned(path, named["host"], int(named["process"]), remove=remove) else []
    return leftovers


def _is_abandoned(path: Path, host: str, process: int, *, remove: bool) -> bool:
    """Tell whether nobody writes a temporary file any more, and remove it then.

    The lock decides: a process of another container, alive under a number that means nothing here, holds it. A lock may be
    known to one machine only, so that the word of the lock is taken for this machine's files alone.
    """
    old = time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
    if not old and (host != _host() or _alive(process)):
        return False
    with path.open("r+b") as file:
        free = _lock(file.fileno())
        gone = bool(free or (free is None and old))
        if gone and remove:
            path.unlink(missing_ok=True)
        return gone


@contextmanager
def _temporary(folder: Path, write: Callable[[BinaryIO], object]) -> Iterator[Path]:
    # Whoever writes cleans up: nothing has to run at the end of a process that was killed.
    remove_abandoned(folder)
    path, file = _new_temporary(folder)
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            yield path  # still open: closing it gives the lock back
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _new_temporary(folder: Path) -> tuple[Path, BinaryIO]:
    """Make a temporary file and lock it; another one where it was swept between the two."""
    while True:
        path = folder / f".tmp-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            file = path.open("xb")
            if _lock(file.fileno()) is not False and path.exists():
                return path, file
        except KeyboardInterrupt:  # most often it comes while a busy disk makes the file
            path.unlink(missing_ok=True)
            raise
        file.close()


def _lock(descriptor: int) -> bool | None:
    """Lock an open file; ``False`` where somebody else holds it, ``None`` where the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _take_name(temporary: Path, path: Path) -> bool:
    """Give a whole file its name unless that is taken, and tell whether it was free. There is no moment of half a file."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    else:
        return True
    renamed = _rename_to_free(temporary, path)  # exFAT and SMB know no links
    return _rename_in_turn(temporary, path) if renamed is None else renamed


def _rename_to_free(old: Path, new: Path) -> bool | None:
    """Rename unless the new name is taken: Linux's renameat2; ``None`` where system or file system do not know it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return None
    if call(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE) == 0:
        return True
    number = ctypes.get_errno()
    if number == errno.EEXIST:
        return False
    if number in _NOT_KNOWN:
        return None
    raise OSError(number, os.strerror(number), str(new))


def _rename_in_turn(old: Path, new: Path) -> bool:
    """Rename unless the new name is taken, one process at a time: each locks the folder, where it can be locked."""
    folder = os.open(new.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        if os.path.lexists(new):
            return False
        old.rename(new)
        return True
    finally:
        os.close(folder)


def _write_all(file: BinaryIO, content: bytes | memoryview) -> None:
    file.write(content)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = "free some space, then run the same command again" if error.errno == errno.ENOSPC else "check `cache`"
        raise StorageError(f"{path}: cannot be written ({error.strerror or error}): {advice}.") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def _host() -> str:
    return "".join(char if char.isalnum() else "_" for char in socket.gethostname())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def read_plain(path: Path, most: int = _MOST_BYTES) -> bytes:
    """Return the bytes of a file, at most so many.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a device, a pipe or a folder, or larger.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for its writer
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("not a plain file")
        if facts.st_size > most:
            raise ValueError(f"{facts.st_size} bytes")
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


def parse_stamps(note: dict[str, object]) -> dict[str, list[str | int]]:
    """Return what ``checked.json`` says of each file: SHA-256, size, mtime, ctime, inode, and when it was hashed.

    Raises:
        ValueError: it says something else.
    """
    for name, stamp in note.items():
        kinds = [type(value) for value in stamp] if isinstance(stamp, list) else []
        if kinds != [str, int, int, int, int, int]:
            raise ValueError(f"what it says of {name}")
    return note  # type: ignore[return-value]  # as just checked


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


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
        create_file(path, secrets.token_bytes(_SECRET_BYTES), mode=0o600)
    try:
        # neither what a link points to, nor waiting for whoever feeds a pipe
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise SetupError(_advice(path, f"cannot be read ({error.strerror})")) from error
    try:
        if why := _why_open(os.fstat(descriptor)):
            raise SetupError(_advice(path, why))
        secret = os.read(descriptor, _SECRET_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(secret) != _SECRET_BYTES:
        raise SetupError(_advice(path, f"holds {len(secret)} bytes instead of {_SECRET_BYTES}: anyone could guess it"))
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


def time_of(path: Path) -> str:
    """Return when a file was written, to the minute of this machine's clock."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
