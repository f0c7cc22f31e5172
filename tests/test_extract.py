"""Extraction: only what is missing is computed, one bad image harms no other, a killed run goes on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from support import COLOURS, TINY, draw_folder, draw_image

from featcache.api import extract_cuts
from featcache.datasets import open_dataset
from featcache.datasets.decoding import ImagePreprocess
from featcache.errors import DataError, StorageError
from featcache.extraction import extract as stage
from featcache.extraction.extract import EntryWriter, ExtractPlan, Runtime
from featcache.extraction.feature_cache import Extracted, FeatureCache, Output, Settings
from featcache.extraction.files import Batch, BatchReader, DatasetFiles, scan
from featcache.specs import BackboneSpec, FeatureSpec, LoadedBackbone, Transform, TransformOverrides
from featcache.store.entry import FeatureStore


def extract(folder: Path, spec: BackboneSpec, settings: Settings, cut: str = "pooled") -> Extracted:
    """Extract a folder."""
    return FeatureCache(open_dataset(folder, "images"), spec, settings).extracted(cut)


def age(folder: Path) -> None:
    """Make files look old enough to be recognised by their time."""
    for path in folder.rglob("*.png"):
        os.utime(path, (1_500_000_000, 1_500_000_000))


def table(store: FeatureStore) -> dict[str, np.ndarray]:
    """Return a features.h5 as arrays."""
    with h5py.File(store.path / "features.h5") as file:
        return {name: file[name][:] for name in file}


def same_tables(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Two tables are equal bit for bit."""
    assert set(one) == set(other)
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])


def test_the_second_run_computes_nothing(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Unchanged images are a hit, whether their times are old or too fresh to trust."""
    first = extract(folder, tiny, settings)
    assert (first.report.computed, first.report.rows) == (36, 36)

    assert extract(folder, tiny, settings).report.computed == 0
    age(folder)
    assert extract(folder, tiny, settings).report.computed == 0


@pytest.mark.parametrize(
    "other",
    [
        BackboneSpec("test_resnet", random_init=1, overrides=TransformOverrides(input_size=32)),
        BackboneSpec("test_resnet", random_init=0, overrides=TransformOverrides(input_size=40)),
        BackboneSpec("test_resnet", random_init=0, overrides=TransformOverrides(input_size=32, mean=(0.1, 0.1, 0.1))),
        BackboneSpec("test_resnet", random_init=0, overrides=TransformOverrides(input_size=32, interpolation="nearest")),
        BackboneSpec("test_efficientnet", random_init=0, overrides=TransformOverrides(input_size=32)),
    ],
)
def test_another_request_is_a_miss(folder: Path, tiny: BackboneSpec, settings: Settings, other: BackboneSpec) -> None:
    """What changes the numbers is never answered from an old entry."""
    first = extract(folder, tiny, settings)
    second = extract(folder, other, settings)

    assert second.report.computed == 36
    assert second.store.path != first.store.path


def test_other_cuts_are_other_entries(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Every cut has its rows; pixels are shared by backbones of one transform."""
    stage, pixels = (extract(folder, tiny, settings, cut) for cut in ("layer2", "input"))
    other = extract(folder, replace(tiny, random_init=5), settings, "input")

    assert stage.store.reader().take(np.array([0])).dtype == np.float16
    assert pixels.store.reader().shape == (32, 32, 3)
    assert other.report.computed == 0
    assert other.store.path == pixels.store.path


def test_batch_size_and_labels_do_not_miss(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """What leaves the rows alone is a hit, and new labels are there."""
    first = extract(folder, tiny, settings)
    rows = dict(zip(first.store.features().sha256, first.store.features().X, strict=True))
    (folder / "red").rename(folder / "crimson")

    second = extract(folder, tiny, replace(settings, batch_size=3, max_bad=0.5))

    features = second.store.features()
    assert second.report.computed == 0
    assert features.classes == ("blue", "crimson", "green")
    assert [features.classes[label] for label in features.y] == [path.split("/")[0] for path in features.paths]
    for digest, row in zip(features.sha256, features.X, strict=True):
        np.testing.assert_array_equal(row, rows[digest])


def test_rename_add_delete_corrupt(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Only new images are computed, broken ones are listed with path and reason, and every row is its image's."""
    extract(folder, tiny, settings)
    for index in range(4):
        (folder / "blue" / f"{index:02d}.png").rename(folder / "blue" / f"renamed{index}.png")
        (folder / "green" / f"{index:02d}.png").unlink()
    for index in range(5):
        draw_image(folder / "red" / f"new{index}.png", COLOURS["red"], 900 + index)
    bad = [folder / "red" / "00.png", folder / "blue" / "10.png"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:200])

    changed = extract(folder, tiny, settings)
    scratch = extract(folder, tiny, replace(settings, cache=settings.cache.with_name("other")))

    assert changed.report.computed == 5
    assert changed.report.rows == 36 - 4 + 5 - 2
    found = {item.path: item.reason for item in changed.store.manifest.quarantined}
    assert set(found) == {"red/00.png", "blue/10.png"}
    assert all("broken" in reason for reason in found.values())
    same_tables(table(changed.store), table(scratch.store))
    assert extract(folder, tiny, settings).report.computed == 0


def test_a_repaired_image_leaves_quarantine(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Once its bytes are good again an image has its row, and no place in quarantine."""
    path = folder / "red" / "00.png"
    good = path.read_bytes()
    path.write_bytes(good[:100])
    assert len(extract(folder, tiny, settings).report.quarantined) == 1
    assert len(extract(folder, tiny, settings).report.quarantined) == 1
    path.write_bytes(good)

    repaired = extract(folder, tiny, settings)

    assert (repaired.report.computed, repaired.report.rows) == (1, 36)
    assert repaired.store.manifest.quarantined == ()


def test_a_changed_image_with_the_same_size_and_name_is_computed(
    folder: Path, tiny: BackboneSpec, settings: Settings
) -> None:
    """Other bytes are another image."""
    extract(folder, tiny, settings)
    draw_image(folder / "red" / "00.png", COLOURS["red"], 777)

    assert extract(folder, tiny, settings).report.computed == 1


def test_copies_share_a_row(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """The same bytes under two names are computed once and listed twice; a broken copy is set aside twice."""
    shutil.copy(folder / "red" / "00.png", folder / "red" / "copy.png")
    for name in ("bad1", "bad2"):
        (folder / "red" / f"{name}.png").write_bytes(b"nothing")

    done = extract(folder, tiny, settings)

    features = done.store.features()
    assert done.report.computed == 36
    assert done.report.rows == 37
    same = features.X[[features.paths.index("red/00.png"), features.paths.index("red/copy.png")]]
    np.testing.assert_array_equal(same[0], same[1])
    assert sorted(item.path for item in done.store.manifest.quarantined) == ["red/bad1.png", "red/bad2.png"]


def test_too_many_bad_images_end_the_run_but_keep_the_rows(tmp_path: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Above the limit the run fails; what was computed is there when the files are repaired."""
    folder = draw_folder(tmp_path / "images")
    for index in range(11):
        (folder / "red" / f"{index:02d}.png").write_bytes(b"nothing")

    with pytest.raises(DataError, match=r"11 of 36 images cannot be used .*allow it with `max_bad=0.306`"):
        extract(folder, tiny, settings)

    assert extract(folder, tiny, replace(settings, max_bad=0.5)).report.computed == 0


def test_nothing_usable_is_an_error(tmp_path: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """A folder of broken images gives no empty result."""
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "x.png").write_bytes(b"nothing")

    with pytest.raises(DataError, match="none of the 2 images"):
        extract(tmp_path / "images", tiny, settings)


def test_unreadable_files_are_set_aside(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """A dangling link is named with its reason and harms no other image."""
    (folder / "red" / "gone.png").symlink_to(folder / "nowhere.png")

    done = extract(folder, tiny, settings)

    for report in (done.report, extract(folder, tiny, settings).report):
        assert report.rows == 36
        assert [(item.path, "No such file" in item.reason) for item in report.quarantined] == [("red/gone.png", True)]


def test_a_renamed_broken_image_is_listed_under_its_new_name(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """The quarantine list names files as they are called now."""
    (folder / "red" / "bad.png").write_bytes(b"nothing")
    extract(folder, tiny, settings)
    (folder / "red" / "bad.png").rename(folder / "red" / "worse.png")

    for _ in range(2):
        again = extract(folder, tiny, settings)
        assert (again.report.rows, again.report.computed) == (36, 0)
        assert [item.path for item in again.report.quarantined] == ["red/worse.png"]


def test_not_finite_rows_are_refused(folder: Path, tmp_path: Path) -> None:
    """What overflows half precision is set aside with its reason, not stored."""
    loaded = LoadedBackbone("none", "none", "none")
    store = FeatureStore.create(tmp_path / "entry", FeatureSpec(Transform(16), loaded, "stage", dtype="float16"))
    files = DatasetFiles(open_dataset(folder))
    entry = EntryWriter(store, scan(files, store.remembered()), (1,), 4)
    rows = np.ones((4, 1), np.float32)
    rows[1] = 1e6

    plan = ExtractPlan(ImagePreprocess(Transform(16)), batch_size=4, max_bad=0.5)
    (report,) = stage.extract(files, [entry], lambda _, __: Runtime(lambda _: (rows,)), plan)

    assert report.rows == 27
    assert {"try dtype float32" in bad.reason for bad in report.quarantined} == {True}


def test_kill_and_resume_equals_one_run(tmp_path: Path) -> None:
    """Kill -9 in the middle: the next run computes the rest only, and the table is bit for bit that of one run."""
    folder = draw_folder(tmp_path / "images", per_class=400)
    eager = (
        "from featcache.extraction import extract; extract.MIN_PART_SECONDS = 0.2; from featcache.cli import main; main()"
    )
    how = [*TINY, "--input-size", "144", "--runtime", "torch"]  # a busy machine would choose another in one of the two runs
    command = [sys.executable, "-c", eager, "extract", str(folder), *how, "--cache"]
    slowed = {**os.environ, "OMP_NUM_THREADS": "1"}
    victim = subprocess.Popen(
        [*command, str(tmp_path / "killed")], env=slowed, start_new_session=True, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("*/test_resnet*/manifest-1.json")):
        assert victim.poll() is None, "ended before a part was committed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    entry = next((tmp_path / "killed").glob("*/test_resnet*/spec.json")).parent
    there = FeatureStore.open(entry).manifest.rows

    subprocess.run([*command, str(tmp_path / "killed")], env=slowed, check=True, capture_output=True)
    subprocess.run([*command, str(tmp_path / "whole")], env=slowed, check=True, capture_output=True)

    assert 0 < there < 1200
    assert FeatureStore.open(entry).manifest.rows == 1200
    whole = next((tmp_path / "whole").glob("*/test_resnet*/spec.json")).parent
    same_tables(table(FeatureStore.open(entry)), table(FeatureStore.open(whole)))
    assert not FeatureStore.open(entry).verify()


def test_an_interrupt_keeps_what_was_computed(
    folder: Path,
    tiny: BackboneSpec,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Ctrl-C commits the part in flight, and says how much there is."""
    real = stage._Pass._take
    calls: list[int] = []

    def interrupted(running: stage._Pass, batch: Batch) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(batch))
        real(running, batch)

    monkeypatch.setattr(stage._Pass, "_take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(folder, tiny, settings)
    monkeypatch.setattr(stage._Pass, "_take", real)

    assert f"{sum(calls)} of 36 images are computed and kept" in caplog.messages
    resumed = extract(folder, tiny, settings)

    assert resumed.report.computed == 36 - sum(calls) < 36
    assert resumed.report.rows == 36


def test_rows_of_every_entry_are_kept_before_any_is_listed(
    folder: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is killed while the first entry of a pass is listed has the rows of all."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage._Pass, "rescue", lambda *_: None)  # a kill leaves no time for it
    monkeypatch.setattr(EntryWriter, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(open_dataset(folder), tiny, settings).features([Output(), Output("layer1")])

    entries = [FeatureStore.open(path.parent) for path in settings.cache.glob("*/*/spec.json")]
    assert [sum(part.rows for part in entry.manifest.parts) for entry in entries] == [36, 36]


def test_what_failed_first_is_what_is_told(
    folder: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that does not take what waits, after something else went wrong, is a warning beside that."""

    def broken(*_: object) -> None:
        raise RuntimeError("the device is gone")

    def full(*_: object) -> None:
        raise StorageError("no room")

    real = stage._Pass._take
    monkeypatch.setattr(stage._Pass, "_take", lambda running, batch: (real(running, batch), broken()))
    monkeypatch.setattr(FeatureStore, "add_part", full)
    with pytest.raises(RuntimeError, match="the device is gone"):
        extract(folder, tiny, settings)


def test_a_moved_folder_is_recognised_by_name(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """--name binds a data set to its entries wherever it moves; without it the same name elsewhere is another data set."""
    extract(folder, tiny, settings)
    moved = folder.with_name("elsewhere") / "images"
    moved.parent.mkdir()
    folder.rename(moved)

    assert extract(moved, tiny, replace(settings, rebind=True)).report.computed == 0
    other = draw_folder(folder.with_name("third") / "images", first_seed=50)
    assert extract(other, tiny, settings).store.path.parent.name.startswith("images-")


def test_a_full_disk_is_refused_early(
    folder: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the rows cannot fit, no image is read, and the error says how much is missing."""
    real = shutil.disk_usage
    monkeypatch.setattr(BatchReader, "fill", lambda *_: pytest.fail("an image was read"))
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda path: real(path)._replace(free=1000))

    with pytest.raises(StorageError, match="GB are free"):
        extract(folder, tiny, settings)


def test_thumbnails_without_room_are_left_to_whoever_asks(
    folder: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked for fits: nothing beside it ends the run."""
    real = shutil.disk_usage
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda path: real(path)._replace(free=36 * 3 * 32 * 32))

    (extracted,) = extract_cuts(folder, tiny, cuts=["pooled"], settings=settings)

    assert extracted.report.computed == 36
    assert not list(settings.cache.rglob("pixels.*/parts/*.h5"))


def test_thumbnails_beside_rows_that_are_refused_find_room(
    folder: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backbone whose rows are no numbers keeps none of them, but a part of thumbnails is full all the same."""
    monkeypatch.setattr(stage, "PART_ROWS", 4)

    def broken(*_: Any) -> Runtime:
        return Runtime(lambda pixels: (np.full((len(pixels), 96), np.nan, np.float32),))

    monkeypatch.setattr(FeatureCache, "prepare", broken)

    with pytest.raises(DataError):
        extract_cuts(folder, tiny, cuts=["pooled"], settings=replace(settings, batch_size=4))
