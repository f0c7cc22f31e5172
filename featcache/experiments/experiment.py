"""What every job of the pipeline needs to report: the experiment's name, its record, rows of two entries side by side."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.evaluation.draws import copies, remarks
from featcache.evaluation.splits import Split, items_hash, untested
from featcache.extraction.feature_cache import Extracted, FeatureCache
from featcache.finetuning.plan import FineTunePlan
from featcache.fingerprint import fingerprint
from featcache.reports.records import RunRecord, stamp
from featcache.store.entry import FeatureStore
from featcache.store.rows import Features, RowReader


def cell_of(
    bench: FeatureCache, features: Features, method: str, plan: FineTunePlan | dict[str, Any] | None, seed: int
) -> str:
    """Return the name of an experiment: everything that decides its outcome but the code."""
    everything = np.arange(len(features.y))
    return fingerprint(
        {
            "backbone": bench.identity,
            "items": items_hash(features.sha256, everything, features.y),
            "splits": list(features.splits),
            "method": method,
            "plan": (asdict(plan) if isinstance(plan, FineTunePlan) else plan) if plan else None,
            "seed": seed,
        }
    )


def new_record(bench: FeatureCache, done: Extracted, features: Features, split: Split, **facts: Any) -> RunRecord:
    """Return a record of a model that was trained on an entry; ``facts`` are the fields that depend on the model."""
    request = {"backbone": bench.identity} | facts.pop("request", {})
    counted, notes = look_at(features, split)
    return RunRecord(
        dataset=done.store.path.parent.name,
        backbone=bench.spec.label,
        cut=done.cut,
        feature_key=done.store.key,
        request=request,
        split=split.sizes(),
        test_items=items_hash(features.sha256, split.test, features.y),
        test_groups=numbered(split.test_groups),
        copies=counted,
        notes=(*notes, *facts.pop("notes", ())),
        **facts,
        **stamp(),
    )


def look_at(features: Features, split: Split) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return how many images splits or labels take for different that are equal, and what is to be said of a split."""
    parts = {"train": split.train, "val": split.val, "test": split.test}
    counted = copies(parts, features.y, features.sha256)
    return counted, (*remarks(counted, split.sizes()), *untested(split, features.y, features.classes))


def numbered(groups: NDArray[np.int64] | None) -> list[int] | None:
    """Return the groups of some images as plain numbers from 0 on, ``None`` where there are no groups."""
    return None if groups is None else np.unique(groups, return_inverse=True)[1].tolist()


def encode_correct(right: NDArray[np.bool_]) -> str:
    """Return truth values as a text of 0 and 1."""
    return "".join("1" if one else "0" for one in right)


def decode_correct(text: str) -> NDArray[np.bool_]:
    """Return the truth values of a text of 0 and 1."""
    return np.array([char == "1" for char in text])


def aligned(
    features: Features, store: FeatureStore
) -> tuple[NDArray[np.int64], Features, Callable[[NDArray[np.int64]], NDArray[Any]]]:
    """Return which images (k,) both entries have, those alone, and what reads the second's rows in that order."""
    reader: RowReader = store.reader()
    position = {path: index for index, path in enumerate(store.listing().seen.paths)}
    keep = np.array([index for index, path in enumerate(features.paths) if path in position], dtype=np.int64)
    if len(keep) < len(features.paths):
        features = replace(
            features,
            X=features.X[keep],
            y=features.y[keep],
            paths=tuple(features.paths[index] for index in keep),
            splits=tuple(features.splits[index] for index in keep),
            sha256=tuple(features.sha256[index] for index in keep),
        )
    where = np.array([position[path] for path in features.paths], dtype=np.int64)
    return keep, features, lambda index: reader.take(where[index])
