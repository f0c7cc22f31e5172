"""Writes: whole or absent wherever a process is killed, on file systems with and without links; nothing stays behind."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from featcache.errors import StorageError
from featcache.store import disk
from featcache.store.disk import create_file, remove_abandoned, replace_file

KILLED = 9
ABROAD = "another"


def refuse(number: int) -> Callable[..., None]:
    """Return a system call that always fails."""

    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def temporary_name(process: int, host: str | None = None) -> str:
    """Return what a process calls its temporary file."""
    return f".tmp-{host or disk._host()}-{process}-0123abcd"


def a_dead_process() -> int:
    """Return the number of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def killed_before(call_number: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run something in a child that dies before its n-th change of the disk; return whether it died."""
    child = os.fork()
    if child == 0:
        left = call_number

        def dying(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **named: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(KILLED)
                return real(*arguments, **named)

            return call

        for name in ("fsync", "link"):
            monkeypatch.setattr(disk.os, name, dying(getattr(os, name)))
        for name in ("rename", "replace", "unlink"):
            monkeypatch.setattr(disk.Path, name, dying(getattr(Path, name)))
        monkeypatch.setattr(disk, "_rename_to_free", dying(disk._rename_to_free))
        try:
            act()
        except BaseException:  # noqa: BLE001 - a child of the tests must not run on
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED


@pytest.mark.parametrize("world", ["links", "no links", "no links, no renameat2"])
def test_a_new_file_is_whole_or_absent_wherever_its_writer_dies(
    tmp_path: Path, world: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before whichever call it is killed, the name stands for all of the content or for nothing, and the next goes on."""
    if world != "links":
        monkeypatch.setattr(disk.os, "link", refuse(errno.EPERM))
    if world.endswith("renameat2"):
        monkeypatch.setattr(disk, "_rename_to_free", lambda *_: None)
    number, died = 0, True
    while died:
        path = tmp_path / str(number) / "file"
        path.parent.mkdir()
        died = killed_before(number, lambda path=path: create_file(path, b"content" * 1000), monkeypatch)  # type: ignore[misc]

        assert not path.exists() or path.read_bytes() == b"content" * 1000
        create_file(path, b"content" * 1000)
        assert path.read_bytes() == b"content" * 1000
        assert [each.name for each in path.parent.iterdir()] == ["file"]
        number += 1
    assert number > 3


@pytest.mark.parametrize("world", ["links", "no links", "no links, no renameat2"])
def test_a_name_is_given_once(tmp_path: Path, world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is there is not written over, with and without links."""
    if world != "links":
        monkeypatch.setattr(disk.os, "link", refuse(errno.EPERM))
    if world.endswith("renameat2"):
        monkeypatch.setattr(disk, "_rename_to_free", lambda *_: None)

    assert create_file(tmp_path / "file", b"first")
    assert not create_file(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_what_renameat2_cannot_do_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that takes no new name ends in one plain error, and leaves nothing."""
    monkeypatch.setattr(disk.os, "link", refuse(errno.EPERM))
    long = "n" * 300

    with pytest.raises(StorageError, match="cannot be written"):
        create_file(tmp_path / long, b"content")
    assert [each.name for each in tmp_path.iterdir()] == []


def test_a_dead_writers_file_is_removed_by_the_next_write(tmp_path: Path) -> None:
    """Whatever is written next into a folder, what a killed process left there goes."""
    (tmp_path / temporary_name(a_dead_process())).write_bytes(b"half")

    replace_file(tmp_path / "other", b"")

    assert [each.name for each in tmp_path.iterdir()] == ["other"]


def test_a_living_writers_file_stays(tmp_path: Path) -> None:
    """A writer in another container, whose number means nothing here, holds a lock: its file is not swept."""
    path = tmp_path / temporary_name(a_dead_process())

    with path.open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(path, (1, 1))
        remove_abandoned(tmp_path)
        assert path.exists()
    remove_abandoned(tmp_path)

    assert not path.exists()


def test_our_own_files_are_locked_while_they_are_written(tmp_path: Path) -> None:
    """A sweep in the middle of a write finds the file held, though no process of its number lives here."""
    seen = []

    def look(_file: object) -> None:
        (temporary,) = tmp_path.iterdir()
        renamed = temporary.rename(tmp_path / temporary_name(a_dead_process()))
        remove_abandoned(tmp_path)
        seen.append(renamed.exists())
        renamed.rename(temporary)

    disk.replace_file_by(tmp_path / "file", look)

    assert seen == [True]
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_file_swept_before_it_was_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between making a temporary file and locking it another process may remove it: the write still succeeds."""
    real, thefts = disk._lock, []

    def stolen(descriptor: int) -> bool | None:
        if not thefts:
            thefts.extend(tmp_path.iterdir())
            thefts[0].unlink()
        return real(descriptor)

    monkeypatch.setattr(disk, "_lock", stolen)
    replace_file(tmp_path / "file", b"content")

    assert len(thefts) == 1
    assert (tmp_path / "file").read_bytes() == b"content"


def test_other_machines_and_file_systems_without_locks_are_given_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing tells whether a writer lives, only what is older than a day is removed."""
    old, young = (tmp_path / temporary_name(number, ABROAD) for number in (1, 2))
    unknown = tmp_path / temporary_name(a_dead_process())
    for path in (old, young, unknown):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    monkeypatch.setattr(disk.fcntl, "flock", refuse(errno.ENOLCK))

    remove_abandoned(tmp_path)

    assert sorted(tmp_path.iterdir()) == sorted([young, unknown])


@pytest.mark.parametrize("name", [".tmp-", ".tmp-notes.txt", ".tmp-host-1-xyz", f".tmp-host-{'9' * 18}-0123abcd.jpg"])
def test_files_of_other_names_are_not_swept(tmp_path: Path, name: str) -> None:
    """Only what has exactly the name of a temporary file of ours goes."""
    (tmp_path / name).write_bytes(b"mine")
    os.utime(tmp_path / name, (1, 1))

    remove_abandoned(tmp_path)

    assert (tmp_path / name).exists()


def test_a_process_number_of_any_size_is_no_error(tmp_path: Path) -> None:
    """A number that no process can have is that of a dead one."""
    (tmp_path / temporary_name(10**17)).write_bytes(b"")

    remove_abandoned(tmp_path)

    assert [each.name for each in tmp_path.iterdir()] == []


def test_an_interrupt_while_a_file_is_made_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy disk takes long to make a file: an interrupt that comes meanwhile is raised once the file is there."""
    made = Path.open

    def slow(path: Path, mode: str = "r") -> object:
        made(path, mode).close()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "open", slow)
    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "file", b"content")

    assert not list(tmp_path.iterdir())
