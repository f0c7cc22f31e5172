"""featcache computes a frozen backbone's features once, keeps them, and trains from them.

The public names mirror the commands. They are loaded at first use, so that ``import featcache`` costs nothing.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from featcache.api import (
        advise,
        audit,
        bench,
        compare,
        estimate,
        export,
        extract,
        extract_cuts,
        finetune,
        fit,
        gap,
        next_samples,
        predict,
        quickstart,
        report,
        sweep,
    )
    from featcache.datasets import Dataset, open_dataset
    from featcache.errors import CutError, DataError, FeatcacheError, SetupError, StorageError, UsageError
    from featcache.estimator import FeatureExtractor
    from featcache.experiments.advise import AdviceResult
    from featcache.experiments.audit import AuditResult
    from featcache.experiments.bench import BenchResult
    from featcache.experiments.export import ModelFile
    from featcache.experiments.finetune import FineTuneResult, SweepResult
    from featcache.experiments.fit import FitPlan, FitResult
    from featcache.experiments.gap import GapResult
    from featcache.experiments.next_samples import NextResult
    from featcache.experiments.report import PagePlan, Report
    from featcache.extraction.feature_cache import Extracted, Settings
    from featcache.finetuning import FineTunePlan, Unfreeze
    from featcache.heads.rejection import RejectPlan
    from featcache.reports import RunRecord
    from featcache.specs import BackboneSpec, FeatureSpec, TransformOverrides, Views
    from featcache.store import Features
    from featcache.store.entry import FeatureStore

_NAMES = {  # of each module
    "featcache.api": "advise audit bench compare estimate export extract extract_cuts finetune fit gap next_samples "
    "predict quickstart replay report sweep",
    "featcache.datasets": "Dataset open_dataset",
    "featcache.errors": "CutError DataError FeatcacheError SetupError StorageError UsageError",
    "featcache.estimator": "FeatureExtractor",
    "featcache.experiments.audit": "AuditResult",
    "featcache.experiments.advise": "AdviceResult",
    "featcache.experiments.bench": "BenchResult Places",
    "featcache.experiments.export": "ModelFile",
    "featcache.experiments.finetune": "FineTuneResult SweepResult",
    "featcache.experiments.fit": "FitPlan FitResult",
    "featcache.experiments.gap": "GapResult",
    "featcache.experiments.next_samples": "NextResult",
    "featcache.experiments.report": "PagePlan Report",
    "featcache.extraction.feature_cache": "Extracted Settings",
    "featcache.finetuning": "FineTunePlan Unfreeze",
    "featcache.heads.rejection": "RejectPlan",
    "featcache.reports.tables": "AgainstResult ReplayResult",
    "featcache.reports": "RunRecord",
    "featcache.specs": "BackboneSpec FeatureSpec TransformOverrides Views",
    "featcache.store.entry": "FeatureStore",
    "featcache.store": "Features",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "AdviceResult",
    "AgainstResult",
    "AuditResult",
    "BackboneSpec",
    "BenchResult",
    "CutError",
    "DataError",
    "Dataset",
    "Extracted",
    "FeatcacheError",
    "FeatureExtractor",
    "FeatureSpec",
    "FeatureStore",
    "Features",
    "FineTunePlan",
    "FineTuneResult",
    "FitPlan",
    "FitResult",
    "GapResult",
    "ModelFile",
    "NextResult",
    "PagePlan",
    "Places",
    "RejectPlan",
    "ReplayResult",
    "Report",
    "RunRecord",
    "Settings",
    "SetupError",
    "StorageError",
    "SweepResult",
    "TransformOverrides",
    "Unfreeze",
    "UsageError",
    "Views",
    "advise",
    "audit",
    "bench",
    "compare",
    "estimate",
    "export",
    "extract",
    "extract_cuts",
    "finetune",
    "fit",
    "gap",
    "next_samples",
    "open_dataset",
    "predict",
    "quickstart",
    "replay",
    "report",
    "sweep",
]


# Loaded at first use (PEP 562): `import featcache` takes milliseconds, with PyTorch it would take seconds.
def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'featcache' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # a submodule of the same name, imported meanwhile, must not hide it
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
