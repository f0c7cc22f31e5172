"""A program that calls featcache finds its own state as it left it: random numbers, environment, threads, warnings, logs."""

import gc
import logging
import os
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

import featcache
from featcache import FeatureExtractor, FineTunePlan
from featcache import resources as machine
from featcache.extraction.feature_cache import Settings
from featcache.finetuning import Unfreeze
from featcache.specs import BackboneSpec

DROPPING = replace(FineTunePlan(Unfreeze.parse("last:1"), epochs=1, lr=(1e-3,)), drop_path=0.2)
GRID = """
heads = ["ridge"]
unfreeze = ["last:1"]
[[dataset]]
data = "{}"
[[backbone]]
name = "test_resnet"
random_init = 0
input_size = 32
[finetune]
epochs = 1
"""


def state() -> dict[str, Any]:
    """Return what a call could disturb, as values that can be compared."""
    root, own = logging.getLogger(), logging.getLogger("featcache")
    return {
        "random": random.getstate(),
        "numpy": repr(np.random.get_state()),  # noqa: NPY002 - the caller's
        "torch": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "threads": torch.get_num_threads(),
        "pools": sorted((one["filepath"], one["num_threads"]) for one in threadpool_info()),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "warnings": list(warnings.filters),
        "logs": [(one.level, list(one.handlers), one.propagate, one.disabled) for one in (root, own)],
        "errors": np.geterr(),
        "collector": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
    }


@pytest.fixture
def head(folder: Path, tiny: BackboneSpec, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fitted head; what libraries set up at their first use is set up by then."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    return featcache.fit(folder, tiny, settings=settings).heads[0].bundle


def use_extractor(folder: Path, cache: Path) -> None:
    """Fit and ask a transformer."""
    paths = sorted(map(str, folder.rglob("*.png")))
    FeatureExtractor("test_resnet", random_init=1, input_size=32, cache=cache).fit(paths).transform(paths)


def run_bench(folder: Path, settings: Settings) -> None:
    """Run a small grid."""
    path = folder.parent / "grid.toml"
    path.write_text(GRID.format(folder))
    featcache.bench(path, out=folder.parent / "out", settings=settings)


CALLS: dict[str, Callable[[Path, Path, BackboneSpec, Settings], object]] = {
    "extract": lambda folder, _, spec, settings: featcache.extract(folder, replace(spec, random_init=1), settings=settings),
    "fit": lambda folder, _, spec, settings: featcache.fit(folder, replace(spec, random_init=1), settings=settings),
    "finetune": lambda folder, _, spec, settings: featcache.finetune(folder, spec, plan=DROPPING, settings=settings),
    "sweep": lambda folder, _, spec, settings: featcache.sweep(folder, spec, plan=DROPPING, settings=settings),
    "predict": lambda folder, head, _, settings: list(featcache.predict(head, [folder], settings=settings)[1]),
    "export": lambda folder, head, _, settings: featcache.export(head, folder.parent / "m.onnx", settings=settings),
    "bench": lambda folder, _, __, settings: run_bench(folder, settings),
    "FeatureExtractor": lambda folder, _, __, settings: use_extractor(folder, settings.cache),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_nothing_of_the_callers_is_changed(
    name: str, head: Path, folder: Path, tiny: BackboneSpec, settings: Settings
) -> None:
    """Before and after every public function all of it is the same."""
    if name == "export":
        pytest.importorskip("onnxruntime")
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002 - as a caller may
    torch.manual_seed(3)
    before = state()

    CALLS[name](folder, head, tiny, settings)

    after = state()
    assert [what for what in before if before[what] != after[what]] == []


def test_between_two_predictions_too(head: Path, folder: Path, settings: Settings) -> None:
    """Answers are computed as they are asked for; meanwhile the caller has its own threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        _, answers = featcache.predict(head, [folder], settings=replace(settings, batch_size=4, workers=2))
        seen = [torch.get_num_threads() for _ in answers]
    finally:
        torch.set_num_threads(threads)

    assert seen == [3] * 36


@pytest.mark.parametrize(
    ("said", "pinned", "expected"),
    [("max 100000", 8, 8), ("150000 100000", 8, 2), ("400000 100000", 2, 2), ("1000 100000", 8, 1), ("", 4, 4)],
)
def test_cores_are_those_that_may_be_used(
    said: str, pinned: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pinned process counts its own cores, a container its share of time."""
    if said:
        (tmp_path / "cpu.max").write_text(f"{said}\n")
    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(pinned)), raising=False)

    assert machine.cores() == expected


def test_what_libraries_make_is_old_once_they_are_loaded() -> None:
    """The collector does not look through what was made while libraries were loaded as through what is young."""
    with machine.libraries_load():
        made: list[list[int]] = [[] for _ in range(10_000)]

    assert any(one is made[-1] for one in gc.get_objects(generation=2))


def test_what_a_caller_has_frozen_stays_frozen_while_libraries_load() -> None:
    """Objects that a caller has taken out of the collector's sight stay out of it."""
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with machine.libraries_load():
            pass

        assert gc.get_freeze_count() > frozen // 2  # some of them may have gone since
    finally:
        gc.unfreeze()
