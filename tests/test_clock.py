"""No number depends on how long anything took: a machine that does other work beside gives what a quiet one gives."""

import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetune_support import GAINS
from safetensors.numpy import load_file

from featcache.datasets import open_dataset
from featcache.experiments.finetune import FineTuneInputs, FineTuneResult, run_finetune
from featcache.experiments.fit import FitPlan, run_fit
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.specs import BackboneSpec

CLOCKS = ("monotonic", "perf_counter", "process_time", "thread_time")
_TIMES = {
    "seconds",
    "time",
    "samples_per_second",
    "peak_memory_mb",
    "artefact",
}  # what a record says of the clock, and where


class StutteringClock(types.ModuleType):
    """The module ``time``, each of whose clocks is minutes ahead of the last look at it, and of the others."""

    def __init__(self) -> None:
        super().__init__("time")
        self._looks = 0
        self.__dict__.update(dict.fromkeys(CLOCKS, self._late))

    def __getattr__(self, name: str) -> Any:
        """Return what is no clock."""
        return getattr(time, name)

    def _late(self) -> float:
        self._looks += 1
        return 100.0 * self._looks**1.5  # each wait is longer than the one before


def results(folder: Path, tiny: BackboneSpec, cache: Path) -> tuple[Path, list[dict[str, Any]], FineTuneResult]:
    """Return the table of embeddings, the records of heads and of a fine-tuning without times, and what was tuned."""
    features = FeatureCache(open_dataset(folder), tiny, Settings(cache, batch_size=8, runtime="torch"))
    fitted = run_fit(features, FitPlan(("logistic", "knn", "mlp", "boosting")))
    tuned = run_finetune(FineTuneInputs(features), replace(GAINS, epochs=2), records=None)
    stored = [vars(record) for record in (*(head.record for head in fitted.heads), tuned.record)]
    told = [{name: value for name, value in record.items() if name not in _TIMES} for record in stored]
    told[-1]["params"] = {**told[-1]["params"], "curve": [point[:-1] for point in told[-1]["params"]["curve"]]}
    told[-1]["probe"] = {name: value for name, value in told[-1]["probe"].items() if name != "seconds"}
    return features.extracted().store.path / "features.h5", told, tuned


@pytest.mark.usefixtures("one_thread")
def test_no_number_is_decided_by_a_clock(
    subtle: Path, tiny: BackboneSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes of features, answers of heads, epochs and weights, whatever the clocks say meanwhile."""
    table, told, tuned = results(subtle, tiny, tmp_path / "quiet")
    loaded = [module for name, module in sys.modules.items() if name.startswith("featcache")]
    late = StutteringClock()
    for module in loaded:
        if vars(module).get("time") is time:
            monkeypatch.setattr(module, "time", late)
    table_late, told_late, tuned_late = results(subtle, tiny, tmp_path / "loaded")

    assert late._looks > 50
    assert table_late.read_bytes() == table.read_bytes()
    assert told_late == told
    weights, weights_late = load_file(tuned.checkpoint), load_file(tuned_late.checkpoint)
    assert all(np.array_equal(weights_late[name], value) for name, value in weights.items())
