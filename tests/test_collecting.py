"""``store gc``: only what nothing needs goes, and only if asked to; rows and tables stay what they were."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import Run
from test_damage import OTHER, entry, seen

from featcache.experiments.upkeep import collect
from featcache.store.disk import _host
from featcache.store.entry import FeatureStore
from featcache.store.hdf5 import Listing, Part


def tree(root: Path) -> dict[str, bytes]:
    """Return every file below a folder but the notes of what was hashed."""
    several = (path for path in sorted(root.rglob("*")) if path.is_file() and path.name != "checked.json")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in several}


def aged(store: FeatureStore) -> FeatureStore:
    """Make an entry's parts look a day old."""
    for path in (store.path / "parts").iterdir():
        os.utime(path, (time.time() - 86400,) * 2)
    return FeatureStore.open(store.path)


def littered(root: Path) -> FeatureStore:
    """Make an entry with a part that was never committed, one that is young, a killed writer's file and an old listing."""
    store = entry(root)
    store.commit(listing=Listing(seen(range(8)), np.arange(8) % 2, np.ones(8, np.uint8), ("a", "b")))
    store.write_table()
    store.add_part(Part([np.zeros((1, 3), np.float32)], seen(range(90, 91))))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for folder in (store.path / "parts", store.path.parent):
        (folder / f".tmp-{_host()}-{ended.pid}-0123abcd").write_bytes(b"half")
    aged(store)
    store.add_part(Part([np.ones((1, 3), np.float32)], seen(range(91, 92))))
    return FeatureStore.open(store.path)


def test_nothing_is_changed_unasked(tmp_path: Path) -> None:
    """Without ``act`` the same things are found, and every file stays."""
    store = littered(tmp_path)
    before = tree(tmp_path)

    found = collect(tmp_path, act=False)

    assert tree(tmp_path) == before
    assert {one.why for one in found.litter} == {
        "left by a process that is gone",
        "list of samples before the entry's last change",
        "rows that no version of the entry lists",
        "manifest of the entry before its last change",
    }
    assert [(path, len(one.parts), one.dropped) for path, one in found.joined.items()] == [(store.path, 2, 0)]


def test_what_is_needed_stays(tmp_path: Path) -> None:
    """Afterwards there is one part beside the young one, one listing, one version; rows, table and flags are as before."""
    store = littered(tmp_path)
    before, table, flags = store.features(), (store.path / "features.h5").read_bytes(), list(store.requests())

    collect(tmp_path, act=True)

    after = FeatureStore.open(store.path)
    assert after.verify() == []
    assert after.features().X.tolist() == before.X.tolist()
    assert after.rows_of(seen(range(8)).sha256).tolist() == before.X.tolist()
    assert (store.path / "features.h5").read_bytes() == table
    assert list(after.requests()) == flags
    assert len(after.manifest.parts) == 1
    assert len(list((store.path / "parts").iterdir())) == 3
    assert [path.name for path in store.path.glob("manifest-*")] == ["manifest-4.json"]
    assert not list(tmp_path.rglob(".tmp-*"))
    assert collect(tmp_path, act=True).lines == []


def test_rows_of_removed_images_and_double_rows_go(tmp_path: Path) -> None:
    """What the listing does not name is left out, and a row that is there twice is kept once."""
    store = entry(tmp_path)
    again = Part([np.repeat(np.arange(2, 6, dtype=np.float32)[:, None], 3, axis=1)], seen(range(2, 6)))
    labels = np.arange(4) % 2
    store.commit(
        parts=[store.add_part(again)], listing=Listing(seen(range(1, 5)), labels, np.zeros(4, np.uint8), ("a", "b"))
    )
    store = aged(store)
    assert store.manifest.rows == 12

    found = collect(tmp_path, act=True)

    after = FeatureStore.open(store.path)
    assert found.joined[store.path].dropped == 8
    assert after.manifest.rows == 4
    assert after.features().X[:, 0].tolist() == [1, 2, 3, 4]
    assert after.verify() == []


def test_an_entry_without_listing_keeps_all_rows(tmp_path: Path) -> None:
    """Rows of a transformer have no listing: many small parts become one, and none is lost."""
    store = FeatureStore.create(tmp_path / "data" / f"x.pooled-{OTHER.key[:8]}", OTHER)
    for number in range(5):
        rows = np.full((1, 3), number, np.float32)
        store.commit(parts=[store.add_part(Part([rows], seen(range(number, number + 1)), seen(range(number, number + 1))))])
    aged(store)

    collect(tmp_path, act=True)

    after = FeatureStore.open(store.path)
    assert len(after.manifest.parts) == 1
    assert after.rows_of(seen(range(5)).sha256)[:, 0].tolist() == [0, 1, 2, 3, 4]
    remembered = after.remembered()
    assert [len(files.paths) for files in remembered.files] == [5, 5]
    assert remembered.with_row == {row.tobytes() for row in seen(range(5)).sha256}
    assert after.verify() == []


def test_parts_of_another_writer_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is committed while parts are joined is kept."""
    store = aged(entry(tmp_path))
    real = FeatureStore.add_part

    def meanwhile(self: FeatureStore, part: Part, runtime: str = "") -> object:
        monkeypatch.setattr(FeatureStore, "add_part", real)
        other = FeatureStore.open(store.path)
        other.commit(parts=[other.add_part(Part([np.full((1, 3), 50, np.float32)], seen(range(50, 51))))])
        return real(self, part, runtime)

    monkeypatch.setattr(FeatureStore, "add_part", meanwhile)
    collect(tmp_path, act=True)

    after = FeatureStore.open(store.path)
    assert sorted(part.rows for part in after.manifest.parts) == [1, 8]
    assert after.rows_of(seen(range(50, 51)).sha256)[0].tolist() == [50] * 3
    assert after.verify() == []


def test_many_files_are_told_by_kind_and_listed_if_asked(run: Run, tmp_path: Path) -> None:
    """A line a kind over all entries, with counts and bytes; with -v one a folder and kind; both end with the same sum."""
    stores = [littered(tmp_path / "cache" / name) for name in ("one", "two", "three")]

    brief, told = (run("store", "gc", *(store.path for store in stores), *flag).out.splitlines() for flag in ((), ("-v",)))

    summary = run("store", "gc", *(store.path for store in stores), "--json").json
    kinds = {file["why"] for file in summary["files"]}
    assert len([line for line in brief if line.startswith("To remove: ")]) == len(kinds)
    for why in kinds:
        of_kind = [file for file in summary["files"] if file["why"] == why]
        folders = len({Path(file["path"]).parent for file in of_kind})
        size = sum(file["bytes"] for file in of_kind) / 1e3
        assert f"To remove: {why}, {len(of_kind)} files in {folders} folders, {size:.1f} kB" in brief
    assert brief[-1] == told[-1]
    assert "nothing was changed, --yes does it" in brief[-1]
    assert len(told) > len(brief)


def test_what_was_removed_is_told_as_done(run: Run, tmp_path: Path) -> None:
    """With --yes the same kinds are said to be gone; then there is nothing."""
    path = littered(tmp_path / "cache").path

    lines = run("store", "gc", path, "--yes").out.splitlines()

    assert {line.split()[0] for line in lines[:-1]} == {"Joined:", "Removed:"}
    assert lines[-1].endswith("removed.")
    assert run("store", "gc", path).out == "Nothing to remove or join.\n"


def test_a_broken_entry_is_left_alone(run: Run, tmp_path: Path) -> None:
    """The command names it, cleans the others, and ends with 4."""
    broken, whole = entry(tmp_path / "cache"), littered(tmp_path / "cache" / "..")
    (broken.path / "spec.json").write_bytes(b"{")
    before = tree(broken.path)

    done = run("store", "gc", "--yes", "--cache", tmp_path / "cache")

    assert done.code == 4
    assert str(broken.path) in done.out
    assert tree(broken.path) == before
    assert whole.verify() == []
    assert run("store", "gc", whole.path).code == 0


def test_entries_are_named_as_everywhere(run: Run, tmp_path: Path) -> None:
    """By their path, from the cache on, or by their data set; what is none is an error that says where names are."""
    store = littered(tmp_path / "cache")
    names = (store.path, store.path.relative_to(tmp_path / "cache"), store.path.parent.name)

    assert len({run("store", "gc", name).out for name in names}) == 1
    assert {run("store", "verify", name).out for name in names} == {"1 entry checked, 0 problems\n"}
    assert "store ls" in run("store", "gc", "nothing").err
