"""The attentive head: attention trained on stored tokens, from the logistic probe on what they come to without it."""

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.evaluation.metrics import best_temperature, evaluate, evaluate_on_test
from featcache.evaluation.splits import Index, Split
from featcache.evaluation.tasks import Task
from featcache.experiments.experiment import Experiment, aligned
from featcache.experiments.poolings import pool_rows
from featcache.extraction.feature_cache import Extracted
from featcache.heads.fit import FittedHead
from featcache.reports.records import PROTOCOL
from featcache.specs import Pool

if TYPE_CHECKING:
    from featcache.backbones.attention import AttentiveHead
    from featcache.backbones.base import Backbone
    from featcache.finetuning.attentive import Probe
    from featcache.finetuning.model import Checkpoint

_PROBE = "logistic"
_AT_ONCE = 256  # samples whose tokens are in memory while they are tested


def fit_attentive(experiment: Experiment, entry: Extracted, split: Split, name: str) -> FittedHead:
    """Train one attentive head on an entry's tokens; a training that was killed goes on.

    It starts from the best on validation of the probes on average, class token, and both. Where other heads are chosen on
    folds, what ``split.val`` has chosen is judged on them, and left for the probe where it is no better there.

    Args:
        experiment: of the head, its task of samples that the entry has.
        entry: at the cut ``tokens``.
        split: of these samples.
        name: of the head.

    Raises:
        DataError: a probe did not reach its optimum.
        StorageError: the state cannot be kept.
    """
    from featcache.extraction.runtimes import own_randomness
    from featcache.finetuning.attentive import AttentiveTraining

    started, seed, task, backbone = time.monotonic(), experiment.seed, experiment.task, experiment.cache.backbone
    layout, device, take = backbone.token_layout, backbone.device, aligned(task, entry.store)[2]
    probe = _probe(backbone, entry, task, split, seed)
    state = partial(_state_of, experiment, entry, name)
    with own_randomness(device):
        training = AttentiveTraining(name, layout, take, task.y, split, probe, seed, device, state)
        trained = training.run()
    temperature = best_temperature(trained.truth, trained.answers)
    seconds = time.monotonic() - started  # the test is no training
    return FittedHead(
        name,
        trained.params,
        evaluate(trained.truth, trained.answers, temperature),
        evaluate_on_test(lambda samples: _tokens_answered(trained.head, take, samples), task.y, split, temperature),
        seconds,
        lambda: trained.head,
        lambda: trained.answers,
        temperature=temperature,
    )


def _state_of(experiment: Experiment, entry: Extracted, name: str, trained: str) -> "Checkpoint":
    """Return where the state of an unfinished training lies, of one of those that a head is chosen among."""
    from featcache.finetuning.model import Checkpoint

    stem = f"{name}-{trained}-seed{experiment.seed}-{experiment.short_key}"  # as fine-tuning's end: forgotten as those are
    return Checkpoint(entry.store.path / "tuned" / f"{stem}.unfinished", protocol=PROTOCOL)


def _probe(backbone: "Backbone", entry: Extracted, task: Task, split: Split, seed: int) -> "Probe":
    """Return the best on validation of the logistic probes that attention can start as."""
    from featcache.backbones.pooling import Pooling, Poolings
    from featcache.finetuning.attentive import Probe
    from featcache.finetuning.model import LinearHead
    from featcache.heads.linear import linear_weights
    from featcache.heads.search import search_head, train

    layout, y = backbone.token_layout, task.y
    kinds: tuple[Pool, ...] = ("avg", "cls", "avg+cls") if layout.class_token else ("avg",)
    position = {path: index for index, path in enumerate(entry.store.listing().files.paths)}
    order = np.array([position[path] for path in task.features.paths])
    poolings = Poolings({kind: Pooling(kind, layout) for kind in kinds}, backbone.device)
    rows = {kind: X[order] for kind, X in pool_rows(entry.store, poolings).items()}
    searches = {kind: search_head(_PROBE, X, y, split.folds, seed) for kind, X in rows.items()}
    pool = min(searches, key=lambda kind: searches[kind].val.rank)
    # a probe that is sure of every training sample leaves nothing to learn from: as sure as validation finds it right
    truth = np.concatenate([y[fold.val] for fold in split.folds])
    temperature = best_temperature(truth, searches[pool].answers) or 1.0

    def fitted(samples: Index) -> LinearHead:
        estimator = train(_PROBE, searches[pool].params, rows[pool][samples], y[samples], seed)
        return LinearHead(*(values / temperature for values in linear_weights(estimator, len(task.names))))

    return Probe(pool, fitted(split.train), fitted(split.train_val), tuple(fitted(fold.train) for fold in split.cross))


def _tokens_answered(head: "AttentiveHead", take: Callable[[Index], NDArray[Any]], samples: Index) -> NDArray[np.float64]:
    parts = [samples[start : start + _AT_ONCE] for start in range(0, len(samples), _AT_ONCE)]
    return np.concatenate([head.predict_proba(take(part)) for part in parts])
