"""An experiment's key and record: what decides an outcome is in the key, and keys of before stay."""

from pathlib import Path

import pytest

from featcache.datasets import open_dataset
from featcache.evaluation.tasks import Task
from featcache.experiments.experiment import Experiment
from featcache.experiments.fit import FitPlan
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.finetuning.plan import FineTunePlan, Unfreeze
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
        return Experiment(cache, Task.of(features, group=group), unfreeze, plan, seed).key[:16]

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
