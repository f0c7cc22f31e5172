"""Extraction on a Ray cluster: the same file as without one, whatever dies on the way."""

import hashlib
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import draw_folder

from featcache.datasets import MemoryReader, open_dataset
from featcache.datasets.decoding import ImagePreprocess
from featcache.errors import SetupError, UsageError
from featcache.extraction.extract import EntryWriter
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.extraction.runtimes import decode_unit
from featcache.specs import BackboneSpec, Transform, TransformOverrides, Views

SPEC = BackboneSpec("test_resnet", random_init=0, overrides=TransformOverrides(input_size=32))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_ray_gives_what_this_process_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers, one of them killed on the way: several cuts, a bad image and copies come out as without a cluster."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    folder = draw_folder(tmp_path / "images", per_class=100)
    (folder / "red" / "bad.png").write_bytes(b"nothing")
    shutil.copy(folder / "red" / "00.png", folder / "blue" / "copy.png")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    real, killed = EntryWriter.adopt, []

    def adopt(harvest: Any, written: Any, number: int) -> None:
        real(harvest, written, number)
        if not killed:
            killed.append(_kill_a_worker())

    monkeypatch.setattr(EntryWriter, "adopt", adopt)
    try:
        bench = FeatureCache(open_dataset(folder), SPEC, Settings(tmp_path / "ray", 8, engine="ray", workers=2))
        done = bench.extracted("layer2")
    finally:
        ray.shutdown()
    alone = FeatureCache(open_dataset(folder), SPEC, Settings(tmp_path / "alone", 8)).extracted("layer2")

    assert killed == [True]
    assert (done.report.rows, alone.report.computed) == (301, 300)
    assert [bad.path for bad in done.report.quarantined] == ["red/bad.png"]
    assert (done.store.path / "features.h5").read_bytes() == (alone.store.path / "features.h5").read_bytes()
    assert not done.store.verify()
    assert 0 < done.store.manifest.seconds <= done.report.seconds + 0.01  # the run's own, not its actors' added up


def _kill_a_worker() -> bool:
    """Kill the process of one backbone actor."""
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if status.read_bytes().startswith(b"ray::_Actor"):
                os.kill(int(status.parent.name), signal.SIGKILL)
                return True
        except OSError:
            continue
    return False


def test_a_unit_s_images_are_those_of_this_process(folder: Path) -> None:
    """A task decodes what it is handed: pixels in order, no image that has a row already, the bad one with its reason."""
    (folder / "red" / "bad.png").write_bytes(b"nothing")
    dataset, views, preprocess = open_dataset(folder), Views(2), ImagePreprocess(Transform(input_size=16))
    first = hashlib.sha256(dataset.read(dataset.samples[0].path)).digest()

    unit = decode_unit(dataset, range(len(dataset.samples)), preprocess, views, {first})

    paths = [dataset.samples[index].path for index in unit.fresh]
    assert len(paths) == 35
    assert dataset.samples[0].path not in paths
    assert [bad.path for bad in unit.bad] == ["red/bad.png"]
    for path, pixels in zip(paths, unit.pixels, strict=True):
        np.testing.assert_array_equal(pixels, preprocess(dataset.read(path), views))


def test_a_cluster_that_cannot_be_used_is_refused(
    folder: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the library, and where images lie in this process alone: before anything is computed."""

    class Here(MemoryReader):
        """Defined in a function: no other process has it."""

    on_ray, dataset = replace(settings, engine="ray"), open_dataset(folder)
    content = {sample.path: dataset.read(sample.path) for sample in dataset.samples}
    with pytest.raises(UsageError, match="`engine` ray cannot send it to other nodes"):
        FeatureCache(replace(dataset, reader=Here(content)), tiny, on_ray).extracted()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SetupError, match="`engine` ray needs Ray"):
        FeatureCache(dataset, tiny, on_ray).extracted()
