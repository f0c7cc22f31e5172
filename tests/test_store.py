"""The store: committed means safe, damaged is never returned."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from featcache.errors import StorageError
from featcache.specs import FeatureSpec, LoadedBackbone, Transform
from featcache.store import disk
from featcache.store.entry import FeatureStore
from featcache.store.hdf5 import FileIndex, Listing, Part
from featcache.store.manifests import Quarantined

SPEC = FeatureSpec(Transform(), LoadedBackbone("x", "x", "00"))


def seen(first: int, count: int) -> FileIndex:
    """Return files ``first`` to ``first + count``, each with a hash of its own."""
    digests = np.zeros((count, 32), np.uint8)
    digests[:, 0] = np.arange(first, first + count)
    return FileIndex(
        tuple(f"{index}.png" for index in range(first, first + count)), digests, np.zeros((count, 4), np.int64), 1
    )


def part(first: int, count: int = 4) -> Part:
    """Return rows that say which file they belong to."""
    return Part([np.repeat(np.arange(first, first + count, dtype=np.float32)[:, None], 3, axis=1)], seen(first, count))


def listing(first: int, count: int, order: int = 1) -> Listing:
    """Return a listing of some files, backwards where ``order`` is -1."""
    files = seen(first, count)
    turned = FileIndex(files.paths[::order], files.sha256[::order].copy(), files.stat, 1)
    return Listing(turned, np.arange(count) % 2, np.zeros(count, np.uint8), ("a", "b"))


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """An empty entry."""
    return FeatureStore.create(tmp_path / "data" / "entry", SPEC)


def filled(store: FeatureStore) -> FeatureStore:
    """Commit two parts and a listing."""
    store.commit(parts=[store.add_part(part(0)), store.add_part(part(4))])
    store.commit(listing=listing(0, 8))
    return store


def test_rows_come_in_the_listings_order(store: FeatureStore) -> None:
    """However they were computed, rows follow the listing."""
    store.commit(parts=[store.add_part(part(4)), store.add_part(part(0))], listing=listing(0, 8, order=-1))

    features = FeatureStore.open(store.path).features()

    assert features.X[:, 0].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert features.paths[0] == "7.png"


def test_features_h5_opens_with_h5py_alone(store: FeatureStore) -> None:
    """The table is one plain file: contiguous, uncompressed, with labels, paths, splits and hashes."""
    path = filled(store).write_table()

    assert path is not None
    with h5py.File(path, "r") as file:
        assert file["features"].shape == (8, 3)
        assert file["features"].chunks is None
        assert file["features"].compression is None
        assert file["class_names"].asstr()[:].tolist() == ["a", "b"]
        assert file["paths"].asstr()[3] == "3.png"
        assert set(file) == {"features", "labels", "class_names", "paths", "splits", "item_sha256"}


def test_an_entry_without_listing_is_not_complete(store: FeatureStore) -> None:
    """Parts alone are no result: the error says how to go on."""
    store.commit(parts=[store.add_part(part(0))])

    with pytest.raises(StorageError, match="again to resume"):
        store.features()


def test_a_new_listing_keeps_the_rows(store: FeatureStore) -> None:
    """Removing images changes the listing only."""
    filled(store).commit(listing=listing(2, 3))

    assert store.features().X[:, 0].tolist() == [2, 3, 4]
    assert store.manifest.rows == 8


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "foreign"])
def test_damage_is_never_returned(store: FeatureStore, damage: str) -> None:
    """A part that is not what was written stops the read, names the file, and shows in verify."""
    path = store.path / "parts" / filled(store).manifest.parts[0].name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "foreign":
        path.unlink()
        with h5py.File(path, "w") as file:
            file["x"] = np.zeros(3)
    else:
        path.unlink()

    with pytest.raises(StorageError, match=path.name):
        FeatureStore.open(store.path).features()
    assert any(path.name in problem for problem in FeatureStore.open(store.path).verify())


def test_a_foreign_table_is_not_overwritten(store: FeatureStore) -> None:
    """A file called features.h5 that someone else wrote stays."""
    filled(store)
    with h5py.File(store.path / "features.h5", "w") as file:
        file["mine"] = np.arange(3)

    with pytest.raises(StorageError, match="not written by featcache"):
        store.write_table()
    with h5py.File(store.path / "features.h5") as file:
        assert file["mine"][:].tolist() == [0, 1, 2]


def test_a_foreign_folder_is_not_taken_over(tmp_path: Path) -> None:
    """An entry is not made in a folder that holds something else."""
    (tmp_path / "mine.txt").write_text("mine")

    with pytest.raises(StorageError, match="not empty"):
        FeatureStore.create(tmp_path, SPEC)


def test_two_writers_merge(store: FeatureStore) -> None:
    """A commit made meanwhile by another process is kept."""
    other = FeatureStore.open(store.path)
    first, second = store.add_part(part(0)), other.add_part(part(4))

    store.commit(parts=[first], quarantined=[Quarantined("bad.png", "", "reason")])
    other.commit(parts=[second])

    newest = FeatureStore.open(store.path).manifest
    assert {record.name for record in newest.parts} == {first.name, second.name}
    assert [item.path for item in newest.quarantined] == ["bad.png"]


def test_many_writers_lose_nothing(store: FeatureStore) -> None:
    """Eight writers at once: every part is listed."""

    def write(number: int) -> None:
        own = FeatureStore.open(store.path)
        for step in range(5):
            own.commit(parts=[own.add_part(part(20 * number + 4 * step))])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(FeatureStore.open(store.path).manifest.parts) == 40


def test_a_sleeper_cannot_take_a_pruned_number(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that read an old version and wakes after its number was pruned still loses nothing."""
    sleeper, stale = FeatureStore.open(store.path), [store._newest()]
    for number in range(24):
        store.commit(parts=[store.add_part(part(4 * number))])
    real = sleeper._newest
    monkeypatch.setattr(sleeper, "_newest", lambda: stale.pop() if stale else real())

    sleeper.commit(parts=[sleeper.add_part(part(200))])

    assert len(FeatureStore.open(store.path).manifest.parts) == 25


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, error: int) -> Callable[[], int]:
    """Let the ``number``-th call that changes the disk fail with an error; return a counter of calls."""
    calls = 0

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(error, os.strerror(error))
            return real(*args, **kwargs)

        return call

    for name in ("link", "fsync"):
        monkeypatch.setattr(disk.os, name, guarded(getattr(os, name)))
    monkeypatch.setattr(disk.Path, "replace", guarded(Path.replace))
    real_open = Path.open

    def open_for_writing(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        opened = guarded(real_open) if "x" in mode else real_open
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(disk.Path, "open", open_for_writing)
    return lambda: calls


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failing_disk_at_any_call_loses_nothing(tmp_path: Path, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever call fails: one plain error, the version before stays readable, and trying again completes."""
    number = errors = 0
    while True:
        number += 1
        store = filled(FeatureStore.create(tmp_path / f"{number}" / "entry", SPEC))
        with monkeypatch.context() as patch:
            count = fail_at(patch, number, error)
            message = ""
            try:
                store.commit(parts=[store.add_part(part(8))], listing=listing(0, 12))
                store.write_table()
            except StorageError as raised:
                message = str(raised)
            failed = count() >= number
        assert failed or not message
        errors += "cannot be written" in message
        again = FeatureStore.open(store.path)
        assert again.features().X[:8, 0].tolist() == list(range(8))
        again.commit(parts=[again.add_part(part(8))], listing=listing(0, 12))
        assert again.features().X[:, 0].tolist() == list(range(12))
        assert not again.verify()
        assert not list(again.path.rglob(".tmp-*"))
        if not failed:
            break
    assert errors > 10


def test_names_that_are_not_unicode_survive(store: FeatureStore) -> None:
    """A file name of any bytes comes back as it was."""
    name = os.fsdecode(b"bad\xff.png")
    files = FileIndex((name,), np.zeros((1, 32), np.uint8), np.zeros((1, 4), np.int64), 1)
    rows = Part([np.zeros((1, 3), np.float32)], files)

    store.commit(parts=[store.add_part(rows)], listing=Listing(files, np.zeros(1, np.int64), np.zeros(1, np.uint8), ("a",)))

    assert store.features().paths == (name,)
    assert store.write_table() is not None


def test_old_manifests_are_pruned_and_linked(store: FeatureStore) -> None:
    """A few versions stay; each names the hash of the one before."""
    for number in range(24):
        store.commit(parts=[store.add_part(part(4 * number))])

    assert len(list(store.path.glob("manifest-*.json"))) == 20
    assert len(store.manifest.previous) == 64
