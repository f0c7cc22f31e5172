"""Writes that are whole or absent: a temporary file beside the target, flushed to disk, then renamed or linked.

A temporary file is locked as long as its writer lives; every write first removes those in its folder that nobody holds.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from featcache.errors import StorageError

_TEMPORARY = re.compile(r"\.tmp-(?P<host>\w*)-(?P<process>\d{1,18})-[0-9a-f]{8}")
_ABANDONED_SECONDS = 24 * 3600  # whether a process of another machine lives cannot be asked
# What file systems without hard links say (exFAT, SMB, some FUSE): the name is taken in another way there.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}
_NOT_KNOWN = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
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
