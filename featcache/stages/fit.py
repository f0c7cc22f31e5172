"""Train a head on cached features: choose on validation, refit on train and validation, test once."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.pipeline import Pipeline

from featcache import heads
from featcache.errors import DataError
from featcache.fingerprint import sha256_of_bytes
from featcache.metrics import Scores, Tested, test_scores
from featcache.splits import Split
from featcache.store import Features
from featcache.store.atomic import make_folder, replace_file


@dataclass(frozen=True)
class FittedHead:
    """A head, what was chosen for it, its validation scores before the refit and its test scores after."""

    name: str
    estimator: Pipeline
    params: dict[str, Any]
    val: Scores
    tested: Tested
    seconds: float
    notes: tuple[str, ...]


def fit(features: Features, split: Split, name: str, *, seed: int = 0) -> FittedHead:
    """Train one head.

    Args:
        features: embeddings X (n, d) float, labels y (n,).
        split: which images train, choose and test.
        name: a key of ``heads.HEADS``.
        seed: of the head's own randomness.

    Raises:
        UsageError: there is no such head.
        DataError: the features are no embeddings.
    """
    heads.require_head(name)
    X, y = features.X, features.y
    if X.ndim != 2:
        raise DataError(f"heads train on embeddings (n, d), these features are {X.shape}: extract at the cut `pooled`.")
    X = np.ascontiguousarray(X, dtype=np.float32)
    started = time.monotonic()
    chosen = heads.choose(name, X, y, split, seed)
    estimator, converged = heads.train(name, chosen.params, X[split.train_val], y[split.train_val], seed)
    seconds = time.monotonic() - started
    tested = test_scores(lambda index: heads.answers(estimator, X[index], len(features.classes)), y, split)
    notes = [] if converged else [f"{name}: the final fit did not converge"]
    if chosen.unconverged:
        notes.append(f"{name}: {chosen.unconverged} of {chosen.tried} candidates did not converge")
    return FittedHead(name, estimator, chosen.params, chosen.val, tested, seconds, tuple(notes))


def save_bundle(fitted: FittedHead, path: Path, *, classes: tuple[str, ...], feature_key: str) -> Path:
    """Write a head as joblib, and beside it a JSON with its hash, scikit-learn's version, classes and feature key.

    Raises:
        StorageError: the disk failed.
    """
    import io

    import joblib
    import sklearn

    buffer = io.BytesIO()
    joblib.dump(fitted.estimator, buffer)
    content = buffer.getvalue()
    card = {
        "sha256": sha256_of_bytes(content),
        "scikit_learn": sklearn.__version__,
        "classes": list(classes),
        "feature_key": feature_key,
        "head": fitted.name,
        "params": fitted.params,
        "test": asdict(fitted.tested.scores),
    }
    make_folder(path.parent)
    replace_file(path, content)
    replace_file(path.with_suffix(".json"), json.dumps(card, indent=1).encode())
    return path
