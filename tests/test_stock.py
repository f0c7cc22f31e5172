"""What an entry knows of images: a copy's word is none, times are believed where they can be, flags are remembered."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import COLOURS, TINY, Run, draw_folder, draw_image

from featcache import datasets
from featcache import extraction as caching
from featcache.datasets import Dataset, FileStat, MemoryReader, Sample, open_dataset
from featcache.datasets.decoding import ImagePreprocess, encode
from featcache.errors import StorageError
from featcache.extraction import extract as stage
from featcache.extraction import files as looking
from featcache.extraction.extract import EntryWriter, ExtractPlan, ExtractReport, Runtime
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.extraction.files import DatasetFiles
from featcache.specs import BackboneSpec, FeatureSpec, LoadedBackbone, Transform
from featcache.store.entry import FeatureStore
from featcache.store.hdf5 import FileIndex, Listing, Part

SPEC = FeatureSpec(Transform(8), LoadedBackbone("x", "x", "00"))


def with_copies() -> Dataset:
    """Return four images in memory, the second a copy of the first."""
    rng = np.random.default_rng(0)
    images = [encode(rng.integers(0, 255, (8, 8, 3), np.uint8)) for _ in range(3)]
    blobs = {"a.ppm": images[0], "b.ppm": images[0], "c.ppm": images[1], "d.ppm": images[2]}
    return Dataset("copies", "memory", [Sample(name, "x") for name in blobs], MemoryReader(blobs))


def compute(source: Dataset, store: FeatureStore, run: Callable[[Any], Any], workers: int = 2) -> ExtractReport:
    """Extract what is missing with a function of pixels."""
    scanned = scan(source, store)
    runtime = Runtime(lambda pixels: (run(pixels),), workers=workers)
    entry = EntryWriter(store, scanned, (1,), 1)
    return stage.extract(
        scanned.files, [entry], lambda *_: runtime, ExtractPlan(ImagePreprocess(Transform(8)), batch_size=1)
    )[0]


def scan(source: Dataset, store: FeatureStore) -> looking.Scan:
    """Hold an entry against files that nothing is known of yet."""
    return looking.scan(DatasetFiles(source), store.remembered())


def brightness(pixels: np.ndarray) -> np.ndarray:
    """Return one number an image."""
    return pixels.reshape(len(pixels), -1).mean(axis=1, dtype=np.float32)[:, None]


def test_a_copy_is_not_written_down_before_its_original(tmp_path: Path) -> None:
    """A run that dies while it computes an image whose copy it has seen loses that image alone: the next run computes it."""
    source, store = with_copies(), FeatureStore.create(tmp_path / "entry", SPEC)
    first = np.frombuffer(source.read("a.ppm")[-192:], np.uint8).mean()

    def dying(pixels: np.ndarray) -> np.ndarray:
        if abs(pixels.mean() - first) < 1e-6:
            time.sleep(0.5)
            raise RuntimeError("out of memory")
        return brightness(pixels)

    with pytest.raises(RuntimeError, match="out of memory"):
        compute(source, store, dying)
    again = FeatureStore.open(store.path)
    report = compute(source, again, brightness)

    assert report.computed >= 1
    assert report.rows == 4
    assert again.features().X[:2].tolist() == [[np.float32(first)]] * 2


def test_an_entry_whose_copy_has_no_original_heals(tmp_path: Path) -> None:
    """Where an earlier version wrote a copy down, lost its original and listed both, the next run computes the row."""
    source, store = with_copies(), FeatureStore.create(tmp_path / "entry", SPEC)
    compute(source, store, brightness)
    listing = store.listing()
    broken = FeatureStore.create(tmp_path / "broken", SPEC)
    of_copy = FileIndex(("b.ppm",), listing.files.sha256[1:2], listing.files.stat[1:2], 1)
    rest = FileIndex(listing.files.paths[2:], listing.files.sha256[2:], listing.files.stat[2:], 1)
    part = broken.add_part(Part([store.features().X[2:]], rest, of_copy))
    broken.commit(parts=[part], listing=Listing(listing.files, listing.labels, listing.splits, listing.classes))
    assert any("2 samples have no row" in problem for problem in broken.verify())

    report = compute(source, FeatureStore.open(broken.path), brightness)

    assert (report.rows, report.computed) == (4, 1)
    assert FeatureStore.open(broken.path).features().X.tolist() == store.features().X.tolist()
    assert broken.verify() == []


def aged(path: Path, seconds: int = 100) -> None:
    """Put a file's mtime back."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_file_that_was_written_over_is_noticed_though_its_time_was_put_back(
    folder: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same name, size, inode and mtime, other bytes: ctime differs, and the new image is computed."""
    monkeypatch.setattr(datasets, "RACY_NS", 0)  # so that files of this test are old enough to be believed
    path = folder / "red" / "00.png"
    content = path.read_bytes()
    before = path.stat()
    store = FeatureCache(open_dataset(folder), tiny, settings).extracted().store
    assert len(scan(open_dataset(folder), store).cached) == 36
    draw_image(folder / "other.png", COLOURS["blue"], 5)
    new = (folder / "other.png").read_bytes()
    (folder / "other.png").unlink()
    changed = bytearray(new[: len(content)].ljust(len(content), b"\0"))
    with path.open("r+b") as file:
        file.write(changed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)

    stock = scan(open_dataset(folder), store)

    assert [open_dataset(folder).samples[index].path for index in stock.pending] == ["red/00.png"]


@pytest.mark.parametrize(
    ("mtime", "ctime", "believed"), [(100, 100, True), (1, 100, False), (100, 1, False), (100, -1, True)]
)
def test_a_young_file_is_not_remembered_by_its_times(mtime: int, ctime: int, *, believed: bool) -> None:
    """A file that changed within two seconds of being hashed may change again unseen: whatever it is that says so."""
    now = time.time_ns()
    stat = FileStat(1, now - mtime * 10**9, 1, now - ctime * 10**9 if ctime >= 0 else -1)

    assert stat.is_settled() == believed


def test_the_time_of_hashing_counts_not_that_of_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was young when it was hashed stays doubtful, however much later its row is committed."""
    folder = draw_folder(tmp_path / "images")
    source, store = open_dataset(folder), FeatureStore.create(tmp_path / "entry", SPEC)
    later = time.time_ns() + 60 * 10**9
    monkeypatch.setattr(stage, "time_ns", lambda: later)

    compute(source, store, brightness)
    stock = scan(source, FeatureStore.open(store.path))

    assert {tuple(row) for row in FeatureStore.open(store.path).listing().files.stat.tolist()} == {(-1, -1, -1, -1)}
    assert len(stock.cached) == 36


def test_a_listing_without_ctime_is_believed_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of before know size, mtime and inode: their images are not hashed again."""
    monkeypatch.setattr(datasets, "RACY_NS", 0)
    folder = draw_folder(tmp_path / "images")
    source, store = open_dataset(folder), FeatureStore.create(tmp_path / "entry", SPEC)
    compute(source, store, brightness)
    listing = store.listing()
    listing.files.stat[:, 3] = -1
    store.commit(listing=listing)
    monkeypatch.setattr(type(source.reader), "read", lambda *_: pytest.fail("an image was read"))

    assert len(scan(source, FeatureStore.open(store.path)).cached) == 36


def test_what_was_hashed_again_is_hashed_once(
    folder: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that only got new times are known by their bytes, and by their times from the next run on."""
    FeatureCache(open_dataset(folder), tiny, settings).extracted()
    monkeypatch.setattr(datasets, "RACY_NS", 0)
    for path in folder.rglob("*.png"):
        aged(path)
    second = FeatureCache(open_dataset(folder), tiny, settings).extracted()
    table = (second.store.path / "features.h5").read_bytes()
    source = open_dataset(folder)
    monkeypatch.setattr(type(source.reader), "read", lambda *_: pytest.fail("an image was read"))

    third = FeatureCache(source, tiny, settings).extracted()

    assert (second.report.computed, third.report.computed) == (0, 0)
    assert (third.store.path / "features.h5").read_bytes() == table
    assert third.store.verify() == []


def test_an_entry_found_by_its_key_is_remembered(
    folder: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags that led to an entry through the backbone lead there without it the next time."""
    store = FeatureCache(open_dataset(folder), tiny, settings).extracted().store
    for path in (store.path / "requests").iterdir():
        path.unlink()
    FeatureCache(open_dataset(folder), tiny, settings).extracted()
    monkeypatch.setattr(FeatureCache, "backbone", property(lambda _: pytest.fail("the backbone was loaded")))

    assert FeatureCache(open_dataset(folder), tiny, settings).extracted().store.path == store.path


def test_a_hit_leaves_no_litter(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """What killed writers left anywhere in an entry or its data set's folder goes with the next run, a hit too."""
    store = FeatureCache(open_dataset(folder), tiny, settings).extracted().store
    places = [store.path.parent, store.path, *(store.path / name for name in ("parts", "requests", "heads", "tuned"))]
    for place in places:
        place.mkdir(exist_ok=True)
        (place / f".tmp-{os.uname().nodename.replace('-', '_').replace('.', '_')}-{2**31 - 1}-0123abcd").write_bytes(b"half")

    assert FeatureCache(open_dataset(folder), tiny, settings).extracted().report.computed == 0

    assert [path.name for path in settings.cache.rglob(".tmp-*")] == []


@pytest.mark.parametrize("damage", ["another place", "empty", "another folder's"])
def test_a_binding_is_what_was_written_there(folder: Path, settings: Settings, damage: str) -> None:
    """A changed source.json is an error, not a second entry; --name binds the folder anew."""
    source = open_dataset(folder)
    note = caching.dataset_folder(settings.cache, source) / "source.json"
    if damage == "another place":
        note.write_text(note.read_text().replace(str(folder), "/elsewhere"))
    elif damage == "empty":
        note.write_bytes(b"")
    else:
        other = caching.dataset_folder(settings.cache, replace(source, name="other"))
        note.write_bytes((other / "source.json").read_bytes())

    with pytest.raises(StorageError, match=r"source.json: damaged"):
        caching.dataset_folder(settings.cache, source)
    assert caching.dataset_folder(settings.cache, source, rebind=True) == note.parent
    assert caching.dataset_folder(settings.cache, source) == note.parent


def test_a_binding_of_before_is_believed(folder: Path, settings: Settings) -> None:
    """A source.json without its own hash binds as it did."""
    source = open_dataset(folder)
    note = caching.dataset_folder(settings.cache, source) / "source.json"
    note.write_text(json.dumps({"location": source.location}))

    assert caching.dataset_folder(settings.cache, source) == note.parent


def test_a_broken_entry_stops_no_other(run: Run, folder: Path) -> None:
    """Behind a broken spec.json and a broken manifest ls and verify go on, name each, and end with 4."""
    whole = Path(run("extract", folder, *TINY, "--json").json["entry"])
    other, third = (
        Path(run("extract", folder, *TINY, "--random-init", str(seed), "--json").json["entry"]) for seed in (1, 2)
    )
    (other / "spec.json").write_bytes(b"{")
    (third / "manifest-2.json").write_bytes(b"{")

    listed, verified = run("store", "ls"), run("store", "verify")

    assert (listed.code, verified.code) == (4, 4)
    assert str(whole) in listed.out
    for broken in (other, third):
        assert str(broken) in listed.out
        assert str(broken) in verified.out
    assert "4 entries checked, 2 problems" in verified.out  # one of thumbnails, which all three share
    assert run("backbones", "test_resnet").code == 0
    assert run("extract", folder, *TINY).code == 0


def test_verify_reads_what_was_trained_and_recorded(run: Run, folder: Path) -> None:
    """A changed card, head, binding or record is a line of verify each."""
    done = run("fit", folder, *TINY, "--head", "ridge", "--json").json
    entry = Path(run("extract", folder, *TINY, "--json").json["entry"])
    assert run("store", "verify").code == 0
    head = Path(next(iter(done["heads"]))["bundle"] if isinstance(done.get("heads"), list) else done["bundle"])
    changed = [Path(f"{head}.json"), entry.parent / "source.json", next(entry.parent.parent.glob("records/*.jsonl"))]
    for path in changed:
        content = path.read_text()
        path.write_text(content.replace("red", "rad", 1) if "red" in content else content.replace("images", "imagos", 1))

    verified = run("store", "verify", "--json")

    assert verified.code == 4
    assert [any(path.name.removesuffix(".json") in line for line in verified.json["problems"]) for path in changed] == [
        True
    ] * 3
