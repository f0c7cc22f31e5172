"""Writes that are whole or absent: a temporary file beside the target, flushed to disk, then renamed or linked."""

import contextlib
import errno
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from featcache.errors import StorageError

_TEMPORARY = ".tmp-"
_ABANDONED_SECONDS = 24 * 3600
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}


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
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644 if mode is None else mode)
            except FileExistsError:
                return False
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _sync_folder(path.parent)
        return True


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises:
        StorageError: it cannot be created.
    """
    with _storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def sweep(folder: Path) -> None:
    """Remove temporary files that a killed process left more than a day ago, or on this machine and is gone."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{_TEMPORARY}*"):
            host, _, rest = path.name.removeprefix(_TEMPORARY).rpartition("-")[0].rpartition("-")
            gone = host == _host() and rest.isdigit() and not _alive(int(rest))
            if gone or time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink(missing_ok=True)


@contextmanager
def _temporary(folder: Path, write: Callable[[BinaryIO], object]) -> Iterator[Path]:
    path = folder / f"{_TEMPORARY}{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with path.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _write_all(file: BinaryIO, content: bytes | memoryview) -> None:
    file.write(content)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = "free some space, then run the same command again" if error.errno == errno.ENOSPC else "check --cache"
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
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
