"""featcache computes a frozen backbone's features once, keeps them, and trains from them.

The public names mirror the commands. They are loaded at first use, so that ``import featcache`` costs nothing.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from featcache.api import bench, export, extract, finetune, fit, predict, sweep
    from featcache.datasets import open_dataset
    from featcache.estimator import FeatureExtractor
    from featcache.experiments.fit import FitPlan
    from featcache.finetuning.plan import FineTunePlan
    from featcache.reports.records import RunRecord
    from featcache.specs import BackboneSpec, FeatureSpec
    from featcache.store.entry import FeatureStore

_HOMES = {
    "extract": "featcache.api",
    "fit": "featcache.api",
    "predict": "featcache.api",
    "export": "featcache.api",
    "finetune": "featcache.api",
    "sweep": "featcache.api",
    "bench": "featcache.api",
    "FitPlan": "featcache.experiments.fit",
    "RunRecord": "featcache.reports.records",
    "open_dataset": "featcache.datasets",
    "BackboneSpec": "featcache.specs",
    "FeatureSpec": "featcache.specs",
    "FineTunePlan": "featcache.finetuning.plan",
    "FeatureExtractor": "featcache.estimator",
    "FeatureStore": "featcache.store.entry",
}

__all__ = [
    "BackboneSpec",
    "FeatureExtractor",
    "FeatureSpec",
    "FeatureStore",
    "FineTunePlan",
    "FitPlan",
    "RunRecord",
    "bench",
    "export",
    "extract",
    "finetune",
    "fit",
    "open_dataset",
    "predict",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'featcache' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # a submodule of the same name, imported meanwhile, must not hide it
    return value
