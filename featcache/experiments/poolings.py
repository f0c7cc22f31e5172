"""Heads on stored tokens: on that pooling of them which validation chooses, or on attention, trained from the best probe."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.display import logger, progress
from featcache.errors import UsageError
from featcache.evaluation import Task
from featcache.evaluation.metrics import Kind, best_temperature, evaluate, evaluate_on_test
from featcache.evaluation.splits import Index, Split
from featcache.heads import FittedHead
from featcache.reports import PROTOCOL
from featcache.resources import free_memory
from featcache.specs import POOLS, Pool
from featcache.store.disk import keep_note, kept_note
from featcache.store.entry import FeatureStore

if TYPE_CHECKING:
    from featcache.backbones.attention import AttentiveHead
    from featcache.backbones.base import Backbone
    from featcache.backbones.pooling import Poolings
    from featcache.experiments.experiment import Experiment
    from featcache.extraction.feature_cache import Extracted
    from featcache.finetuning.attentive import Probe
    from featcache.finetuning.finetuner import Checkpoint
    from featcache.heads.search import SearchResult

JUDGES: Mapping[Kind, str] = {"label": "logistic", "labels": "logistic", "number": "ridge"}
_AT_ONCE = 32 << 20  # bytes of tokens, as they are stored, that are pooled in one step
_COPIES = 2.5  # as of heads: they train on one of the poolings, beside which the others lie
_TESTED_AT_ONCE = 256  # samples whose tokens are in memory while they are tested


@dataclass(frozen=True)
class PoolingChoice:
    """The pooling that does best on validation, the validation scores of all, the backbone's own first, and what it took."""

    kind: Pool
    val: Mapping[str, Mapping[str, Any]]
    seconds: float

    @property
    def text(self) -> str:
        """The choice in a sentence."""
        return f"pooling: {self.kind}, chosen on validation among {', '.join(self.val)}"


def choose_pooling(
    backbone: "Backbone", store: FeatureStore, task: Task, split: Split, seed: int, note: tuple[Path, Sequence[str]]
) -> tuple[PoolingChoice, NDArray[np.float32]]:
    """Return the pooling of stored tokens whose logistic probe (ridge, of numbers) does best on validation, with its rows.

    Best is the highest accuracy (mean average precision, R2), then the lowest log-loss, then the backbone's own pooling and
    those that stand first in POOLS. The test split has no say. What was chosen is kept, and not searched for again.

    Args:
        backbone: that has computed the tokens.
        store: of the entry at the cut ``tokens``, one view or several a sample.
        task: its samples; the rows that are returned are theirs, (n, d), of several views (n, views, d).
        split: which of them train and choose.
        seed: of the probe.
        note: the file that keeps the choice, and the names of what it was made for.

    Raises:
        UsageError: the axes of the tokens cannot be told, or their poolings do not fit memory.
        DataError: no probe reached its optimum.
    """
    poolings, (path, names) = backbone.poolings(), note
    choice = read_choice(path, names)
    if choice is not None and choice.kind in poolings.ways:
        return choice, pool_rows(store, poolings.only(choice.kind))[choice.kind]
    started = time.monotonic()
    rows = pool_rows(store, poolings)
    kind, searches = judge(rows, task, split, seed)
    val: dict[str, dict[str, Any]] = {pool: asdict(search.val) for pool, search in searches.items()}
    choice = PoolingChoice(kind, val, round(time.monotonic() - started, 3))
    logger.info("%s", choice.text)
    keep_note(path, names, asdict(choice))
    return choice, rows[choice.kind]


def judge(
    rows: Mapping[Pool, NDArray[np.float32]], task: Task, split: Split, seed: int
) -> tuple[Pool, dict[Pool, "SearchResult"]]:
    """Return which of several poolings' rows (n, d) does best on validation, and all searches; of views (n, views, d)."""
    from featcache.heads.search import Embeddings

    searches = {}
    with progress(len(rows), "choose the pooling", unit="pooling") as bar:
        for kind, X in rows.items():
            embeddings = Embeddings(task, X.reshape(-1, X.shape[-1]), X.shape[1] if X.ndim == 3 else 1)
            searches[kind] = embeddings.search(JUDGES[task.kind], split, seed)
            bar.update(1)
    # of equals the first: the backbone's own way stays where it can
    return min(searches, key=lambda kind: searches[kind].val.rank), searches


def pool_rows(store: FeatureStore, poolings: "Poolings") -> dict[Pool, NDArray[np.float32]]:
    """Return what several poolings make of an entry's tokens, each (n, d), of several views (n, views, d).

    All of them come of one pass over the entry, of which some megabytes are in memory at a time.
    """
    reader = store.reader()
    views, shape = store.spec["views"], reader.shape
    _require_room(len(reader), shape, len(poolings.ways))
    inner = shape[1:] if views > 1 else shape
    step = max(1, _AT_ONCE // (math.prod(shape) * np.dtype(store.spec["dtype"]).itemsize))
    pieces: dict[Pool, list[NDArray[np.float32]]] = {kind: [] for kind in poolings.ways}
    for start in range(0, len(reader), step):
        stored = reader.take(np.arange(start, min(start + step, len(reader))))
        for kind, vectors in poolings(stored.reshape(-1, *inner)).items():
            pieces[kind].append(vectors.reshape(len(stored), views, -1) if views > 1 else vectors)
        reader.forget()
    return {kind: np.concatenate(parts) for kind, parts in pieces.items()}


def _require_room(count: int, shape: tuple[int, ...], poolings: int) -> None:
    """Refuse what would not fit memory; how wide vectors are is told from the longest axis, twice that for class tokens."""
    needed = (_COPIES + poolings) * 4 * count * 2 * max(shape)
    if needed > (free := free_memory()):
        raise UsageError(
            f"`best_pool`: the poolings need up to {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: name "
            "one with `pool`."
        )


def read_choice(path: Path, names: Sequence[str]) -> PoolingChoice | None:
    """Return what an earlier command chose, ``None`` where that is not there, or not whole."""
    choice = kept_note(path, names, lambda told: PoolingChoice(**told), "the pooling is chosen again")
    return choice if choice is not None and choice.kind in POOLS else None


def fit_attentive(experiment: "Experiment", entry: "Extracted", split: Split, name: str) -> FittedHead:
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
    from featcache.experiments.experiment import aligned
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
        evaluate_on_test(_tokens_answered(trained.head, take, split.test), task.y, split, temperature),
        seconds,
        lambda: trained.head,
        lambda: trained.answers,
        temperature=temperature,
    )


def _state_of(experiment: "Experiment", entry: "Extracted", name: str, trained: str) -> "Checkpoint":
    """Return where the state of an unfinished training lies, of one of those that a head is chosen among."""
    from featcache.finetuning.finetuner import Checkpoint

    stem = f"{name}-{trained}-seed{experiment.seed}-{experiment.short_key}"  # as fine-tuning's end: forgotten as those are
    return Checkpoint(entry.store.path / "tuned" / f"{stem}.unfinished", protocol=PROTOCOL)


def _probe(backbone: "Backbone", entry: "Extracted", task: Task, split: Split, seed: int) -> "Probe":
    """Return the best on validation of the logistic probes that attention can start as."""
    from featcache.backbones.pooling import Pooling, Poolings
    from featcache.finetuning.attentive import Probe
    from featcache.finetuning.model import LinearHead
    from featcache.heads.linear import linear_weights
    from featcache.heads.search import train

    layout, y = backbone.token_layout, task.y
    kinds: tuple[Pool, ...] = ("avg", "cls", "avg+cls") if layout.class_token else ("avg",)
    position = {path: index for index, path in enumerate(entry.store.listing().files.paths)}
    order = np.array([position[path] for path in task.features.paths])
    poolings = Poolings({kind: Pooling(kind, layout) for kind in kinds}, backbone.device)
    rows = {kind: X[order] for kind, X in pool_rows(entry.store, poolings).items()}
    pool, searches = judge(rows, task, split, seed)
    # a probe that is sure of every training sample leaves nothing to learn from: as sure as validation finds it right
    truth = np.concatenate([y[fold.val] for fold in split.folds])
    temperature = best_temperature(truth, searches[pool].answers) or 1.0

    def fitted(samples: Index) -> LinearHead:
        estimator = train(JUDGES[task.kind], searches[pool].params, rows[pool][samples], y[samples], seed)
        return LinearHead(*(values / temperature for values in linear_weights(estimator, len(task.names))))

    return Probe(pool, fitted(split.train), fitted(split.train_val), tuple(fitted(fold.train) for fold in split.cross))


def _tokens_answered(head: "AttentiveHead", take: Callable[[Index], NDArray[Any]], samples: Index) -> NDArray[np.float64]:
    parts = [samples[start : start + _TESTED_AT_ONCE] for start in range(0, len(samples), _TESTED_AT_ONCE)]
    return np.concatenate([head.predict_proba(take(part)) for part in parts])
