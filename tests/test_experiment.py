"""An experiment's key and record: what decides an outcome is in the key, and keys of before stay."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import TINY, draw_image

import featcache
from featcache.datasets import open_dataset
from featcache.evaluation import Task
from featcache.experiments.experiment import Experiment
from featcache.experiments.fit import FitPlan, run_fit
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.finetuning import FineTunePlan, Unfreeze
from featcache.heads import baselines as heads_baselines
from featcache.heads import bundle
from featcache.reports import read_records
from featcache.specs import BackboneSpec


@pytest.fixture
def cache(tmp_path: Path, tiny: BackboneSpec, settings: Settings) -> FeatureCache:
    """Twelve images whose bytes no library decides."""
    for label, red in (("blue", 40), ("red", 200)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(6):
            pixels = bytes((red + number * 7 * place) % 256 for place in range(192))
            (tmp_path / "images" / label / f"{number}.ppm").write_bytes(b"P6 8 8 255\n" + pixels)
    return FeatureCache(open_dataset(tmp_path / "images"), tiny, settings)


def test_keys_of_before_stay(cache: FeatureCache) -> None:
    """Keys are a promise: what was recorded under one is found again, whatever becomes of the code."""
    features = cache.extracted().store.labelled()

    def head(name: str, plan: FitPlan, seed: int = 0, members: tuple[str, ...] = ()) -> str:
        kind = plan.target
        task = Task(features, kind)  # unchecked: these labels are no numbers
        return plan.experiment(cache, task, name, seed, members).key[:16]

    def tuned(unfreeze: str, seed: int, group: str | None = None, epochs: int = 10) -> str:
        plan = FineTunePlan(Unfreeze.parse(unfreeze), epochs=epochs)
        return Experiment(cache, Task(features, group=group), unfreeze, plan, seed).key[:16]

    keys = {
        "logistic": head("logistic", FitPlan()),
        "seed": head("knn", FitPlan(), 3),
        "grid": head("ridge", FitPlan(grid=(("alpha", (1.0, 10)),))),
        "folds": head("ridge", FitPlan(folds=3)),
        "group": head("ridge", FitPlan(group="patient")),
        "layers": head("logistic", FitPlan(layers=("layer3", "layer4"))),
        "views": head("logistic", FitPlan(views=3)),
        "ensemble": head("ensemble", FitPlan(), members=("knn", "logistic")),
        "labels": head("logistic", FitPlan(target="labels")),
        "number": head("ridge", FitPlan(target="number", layers=("layer3",))),
        "last": tuned("last:1", 0),
        "lora": tuned("lora:4", 1, "patient", epochs=2),
    }

    assert keys == {
        "logistic": "d927d2394bb35a0d",
        "seed": "5d6a4325ddef3955",
        "grid": "fe5f481ecff9ad7e",
        "folds": "605aa0a62e2d1383",
        "group": "60e4431420dd3534",
        "layers": "080cc1a7a158e582",
        "views": "497397fe3c5b7e5e",
        "ensemble": "c4cd2683ed925e34",
        "labels": "365d945258cd87c8",
        "number": "41ebe58d54686524",
        "last": "43c059772a0e1f70",
        "lora": "24900e6e9fed9cc8",
    }


def test_what_was_fitted_answers_from_its_file(folder: Path, tmp_path: Path) -> None:
    """A repeated fit prints the same figures, baselines too, appends no second record and loads no learning library."""
    command = ("fit", str(folder), *TINY, "--cache", str(tmp_path / "cache"), "--head", "knn", "--mistakes", "3", "--json")

    first, again = (told_and_loaded(*command, cwd=tmp_path) for _ in range(2))

    assert "sklearn" in first[1]
    assert not again[1] & {"torch", "timm", "sklearn", "scipy", "joblib"}
    assert again[0]["extract"].pop("computed") == 0
    for told in (first[0], again[0]):
        told.pop("extract")
    assert again[0] == first[0]
    assert len(read_records([tmp_path / "cache" / "records" / "runs.jsonl"])) == 1


def told_and_loaded(*arguments: str, cwd: Path) -> tuple[dict[str, Any], set[str]]:
    """Run a command in a new process and return its JSON object and the packages that it has loaded."""
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print(*sorted({m.split('.')[0] for m in sys.modules})))\n"
        f"from featcache.cli import main\nmain({list(arguments)!r})\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cwd)
    told, loaded = ended.stdout.strip().splitlines()
    return json.loads(told), set(loaded.split())


def test_baselines_are_trained_once_for_all_heads(
    folder: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another head is compared with what lies in the file: the same figures, and nothing is trained for it again."""
    real, trained = heads_baselines.baselines, []

    def noted(*arguments: Any, **named: Any) -> Any:
        trained.append(arguments[1])
        return real(*arguments, **named)

    monkeypatch.setattr(heads_baselines, "baselines", noted)
    cache = FeatureCache(open_dataset(folder), tiny, settings)

    first, second = (run_fit(cache, FitPlan((name,))) for name in ("knn", "ridge"))

    assert len(trained) == 1
    assert first.summary["controls"] == second.summary["controls"]


def test_a_damaged_head_is_fitted_again(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Neither another file nor another card under a head's name is believed."""
    cache, plan = FeatureCache(open_dataset(folder), tiny, settings), FitPlan(("knn", "ridge"), baselines=False)
    knn, ridge = run_fit(cache, plan).heads
    whole = knn.bundle.read_bytes()
    knn.bundle.write_bytes(whole[:-1])
    card = ridge.bundle.with_name(f"{ridge.bundle.name}.json")
    card.write_text(card.read_text().replace('"accuracy": ', '"accuracy": 1'))

    heads = run_fit(cache, plan).heads

    assert [head.record.test for head in heads] == [knn.record.test, ridge.record.test]
    assert not bundle.problem_of(knn.bundle)
    assert not bundle.problem_of(ridge.bundle)


def test_a_head_of_another_version_is_fitted_again(
    folder: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code is not in an experiment's key: what another featcache has fitted is not today's answer."""
    run = partial(featcache.fit, folder, tiny, heads=["ridge"], settings=settings)
    before = run().heads[0].bundle.stat().st_mtime_ns
    assert run().heads[0].bundle.stat().st_mtime_ns == before

    monkeypatch.setattr(featcache, "__version__", "0.0.9")

    assert run().heads[0].bundle.stat().st_mtime_ns > before


@pytest.mark.parametrize("target", ["labels", "number"])
def test_every_kind_of_target_takes_the_same_road(
    target: str, tiny: BackboneSpec, settings: Settings, tmp_path: Path
) -> None:
    """Folds, groups, views, curves, a grid and baselines serve several labels and numbers too, and answer from files."""
    lines = ["path,label,patient"]
    for index in range(40):
        draw_image(tmp_path / f"{index}.png", (60 + 4 * index, 100, 220 - 4 * index), index)
        label = str(index) if target == "number" else "low;dim" if index < 12 else "low" if index < 20 else "high;dim"
        lines.append(f"{index}.png,{label},p{index // 2}")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    cache = FeatureCache(open_dataset(tmp_path / "list.csv"), tiny, settings)
    head, grid = ("ridge", ("alpha", (1.0, 100.0))) if target == "number" else ("logistic", ("C", (0.01, 1.0)))
    plan = FitPlan((head,), target=target, folds=3, group="patient", views=2, curve=True, grid=(grid,))

    first, again = run_fit(cache, plan), run_fit(cache, plan)

    assert len(first.baselines) == 3
    assert first.heads[0].record.method == f"{head} ({target}) 2 views"
    assert first.heads[0].fitted.val.primary[0] > first.baselines[0].val.primary[0] + 0.2
    assert [len(curve.points) for curve in first.curves] == [7]
    assert first.summary["heads"] == again.summary["heads"]
    assert first.summary["controls"] == again.summary["controls"]


def test_members_in_files_make_an_ensemble(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Its members are not fitted again: what they answered on validation lies beside them."""
    cache = FeatureCache(open_dataset(folder), tiny, settings)
    together = run_fit(cache, FitPlan(("knn", "lda", "ensemble"), baselines=False)).heads[-1]
    together.bundle.unlink()
    stamps = {path: path.stat().st_mtime_ns for path in together.bundle.parent.glob("*.joblib")}

    again = run_fit(cache, FitPlan(("knn", "lda", "ensemble"), baselines=False)).heads[-1]

    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert (again.record.val, again.record.test) == (together.record.val, together.record.test)
