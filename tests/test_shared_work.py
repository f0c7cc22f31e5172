"""Several processes on one entry, and any history of changes: always what one run from scratch gives."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import h5py
import numpy as np
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support import TINY, draw_folder, draw_image

from featcache.datasets import open_dataset
from featcache.errors import DataError
from featcache.extraction import extract
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.specs import BackboneSpec, TransformOverrides
from featcache.store.entry import FeatureStore

SPEC = BackboneSpec("test_resnet", random_init=0, overrides=TransformOverrides(input_size=32))


def table(entry: Path) -> dict[str, np.ndarray]:
    """Return a features.h5 as arrays."""
    with h5py.File(entry / "features.h5") as file:
        return {name: file[name][:] for name in file}


def entry_of(cache: Path) -> Path:
    """Return a cache's only entry beside thumbnails, which parts of a data set do not make."""
    (spec,) = (spec for spec in cache.glob("*/*/spec.json") if not spec.parent.name.startswith("pixels."))
    return spec.parent


def equal_bytes(one: Path, other: Path) -> bool:
    """Two entries' features.h5 are the same file."""
    return (one / "features.h5").read_bytes() == (other / "features.h5").read_bytes()


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Two tables are equal bit for bit."""
    assert set(one) == set(other)
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def test_four_parts_one_killed_give_what_one_run_gives(tmp_path: Path) -> None:
    """Four processes at once on one entry, one of them killed and started again."""
    folder = draw_folder(tmp_path / "images", per_class=200)
    code = "from featcache.extraction import extract; extract.MIN_PART_SECONDS = 0.1; from featcache.cli import main; main()"
    command = [sys.executable, "-c", code, "extract", str(folder), *TINY, "--input-size", "96", "--workers", "1", "--cache"]

    def start(number: int) -> subprocess.Popen[bytes]:
        arguments = [*command, str(tmp_path / "shared"), "--part", f"{number}/4"]
        return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    running = [start(number) for number in (1, 2, 3, 4)]
    deadline = time.monotonic() + 120
    while not list((tmp_path / "shared").glob("*/*/manifest-1.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(running[1].pid, signal.SIGKILL)
    assert running[1].wait() == -signal.SIGKILL
    assert [process.wait(120) for process in (running[0], *running[2:])] == [0, 0, 0]
    assert FeatureStore.open(entry_of(tmp_path / "shared")).manifest.listing is None
    assert start(2).wait(120) == 0
    subprocess.run([*command, str(tmp_path / "alone")], check=True, capture_output=True)

    assert equal_bytes(entry_of(tmp_path / "shared"), entry_of(tmp_path / "alone"))
    assert not FeatureStore.open(entry_of(tmp_path / "shared")).verify()


def test_parts_are_shares_of_the_whole(folder: Path, settings: Settings) -> None:
    """Each image belongs to one part; the one that ends last completes the entry, bad images and copies included."""
    (folder / "red" / "bad.png").write_bytes(b"nothing")
    shutil.copy(folder / "red" / "00.png", folder / "blue" / "copy.png")
    computed = []
    for number in (1, 2, 3):
        bench = FeatureCache(open_dataset(folder), SPEC, Settings(settings.cache, 8, part=(number, 3)))
        report = bench.extracted().report
        computed.append(report.computed)

    assert sum(computed) == 36
    assert min(computed) > 0
    assert (report.left, report.rows, [bad.path for bad in report.quarantined]) == (0, 37, ["red/bad.png"])
    alone = FeatureCache(open_dataset(folder), SPEC, Settings(settings.cache / "alone", 8)).extracted()
    assert equal_bytes(entry_of(settings.cache), alone.store.path)


class History(RuleBasedStateMachine):
    """Images are added, removed, renamed, changed and relabelled, runs crash and resume; the rows never go wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(mkdtemp())
        self.folder = draw_folder(self.root / "images", per_class=2)
        self.seed = 5000
        self.dirty = True

    def teardown(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _images(self) -> list[Path]:
        return sorted(self.folder.rglob("*.png"))

    def _pick(self, number: int) -> Path:
        images = self._images()
        return images[number % len(images)]

    def _new(self, path: Path) -> None:
        self.seed += 1
        draw_image(path, (90, 120, 150), self.seed)
        self.dirty = True

    @rule(label=st.sampled_from(["blue", "green", "red", "new"]), count=st.integers(1, 4))
    def add(self, label: str, count: int) -> None:
        """New images, perhaps of a new class."""
        for _ in range(count):
            self._new(self.folder / label / f"added{self.seed}.png")

    @precondition(lambda self: len(self._images()) > 4)
    @rule(number=st.integers(0, 99))
    def remove(self, number: int) -> None:
        """An image goes."""
        self._pick(number).unlink()
        self.dirty = True

    @rule(number=st.integers(0, 99))
    def rename(self, number: int) -> None:
        """An image gets another name."""
        path = self._pick(number)
        self.seed += 1
        path.rename(path.with_name(f"renamed{self.seed}.png"))
        self.dirty = True

    @rule(number=st.integers(0, 99))
    def modify(self, number: int) -> None:
        """An image becomes another under the same name."""
        self._new(self._pick(number))

    @rule(number=st.integers(0, 99))
    def spoil(self, number: int) -> None:
        """An image breaks."""
        if len(self._images()) > 4:
            self._pick(number).write_bytes(b"spoilt")
            self.dirty = True

    @rule(number=st.integers(0, 99), label=st.sampled_from(["blue", "green", "red"]))
    def relabel(self, number: int, label: str) -> None:
        """An image moves to another class."""
        path = self._pick(number)
        self.seed += 1
        (self.folder / label).mkdir(exist_ok=True)
        path.rename(self.folder / label / f"moved{self.seed}.png")
        self.dirty = True

    @rule(number=st.integers(0, 99))
    def copy(self, number: int) -> None:
        """An image is there twice."""
        path = self._pick(number)
        self.seed += 1
        shutil.copy(path, path.with_name(f"copy{self.seed}.png"))
        self.dirty = True

    @rule(part=st.integers(1, 3))
    def run_a_part(self, part: int) -> None:
        """A process computes its share and ends."""
        self._extract("cache", part=(part, 3))

    @rule(after=st.integers(0, 3))
    def crash(self, after: int) -> None:
        """A run dies between two commits: what it had written stays."""
        commits: list[int] = []
        real = FeatureStore.commit

        def dying(store: FeatureStore, **more: Any) -> Any:
            if len(commits) == after:
                raise KeyboardInterrupt
            commits.append(1)
            return real(store, **more)

        patience, extract.MIN_PART_SECONDS = extract.MIN_PART_SECONDS, 0.0
        FeatureStore.commit = dying  # type: ignore[method-assign, assignment]
        try:
            self._extract("cache")
        except KeyboardInterrupt:
            pass
        finally:
            FeatureStore.commit = real  # type: ignore[method-assign]
            extract.MIN_PART_SECONDS = patience

    @rule()
    def resume(self) -> None:
        """A run to the end equals one from scratch, and every row is its image's."""
        if not self._extract("cache"):
            return
        self._extract("scratch")
        ours, scratch = (table(entry_of(self.root / name)) for name in ("cache", "scratch"))
        shutil.rmtree(self.root / "scratch")
        same(ours, scratch)
        names = ours["class_names"].astype(str)
        paths = [path.decode() for path in ours["paths"]]
        assert [path.split("/")[0] for path in paths] == names[ours["labels"]].tolist()
        self.dirty = False

    def _extract(self, cache: str, part: tuple[int, int] | None = None) -> bool:
        settings = Settings(self.root / cache, 4, max_bad=1.0, part=part)
        try:
            FeatureCache(open_dataset(self.folder), SPEC, settings).extracted()
        except DataError:
            return False
        return True

    @invariant()
    def nothing_is_damaged(self) -> None:
        """Whatever is on disk is whole."""
        for spec in (self.root / "cache").glob("*/*/spec.json"):
            assert not FeatureStore.open(spec.parent).verify()


History.TestCase.settings = hypothesis_settings(
    max_examples=12, stateful_step_count=14, deadline=None, suppress_health_check=list(HealthCheck)
)
TestHistory = History.TestCase
