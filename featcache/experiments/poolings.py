"""Which pooling heads train on: every one is made from the stored tokens, and validation chooses."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.display import logger, progress
from featcache.errors import UsageError
from featcache.evaluation.metrics import Kind
from featcache.evaluation.splits import Split
from featcache.evaluation.tasks import Task
from featcache.resources import free_memory
from featcache.specs import POOLED, POOLS, TOKENS, Pool
from featcache.store.checksums import keep_note, kept_note
from featcache.store.entry import FeatureStore

if TYPE_CHECKING:
    from featcache.backbones.base import Backbone
    from featcache.backbones.pooling import Poolings

JUDGES: Mapping[Kind, str] = {"label": "logistic", "labels": "logistic", "number": "ridge"}
_AT_ONCE = 32 << 20  # bytes of tokens, as they are stored, that are pooled in one step
_COPIES = 2.5  # as of heads: they train on one of the poolings, beside which the others lie


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
    kind, val = judge(rows, task, split, seed)
    choice = PoolingChoice(kind, val, round(time.monotonic() - started, 3))
    logger.info("%s", choice.text)
    keep_note(path, names, asdict(choice))
    return choice, rows[choice.kind]


def judge(
    rows: Mapping[Pool, NDArray[np.float32]], task: Task, split: Split, seed: int
) -> tuple[Pool, dict[str, dict[str, Any]]]:
    """Return which of several poolings' rows (n, d) does best on validation, and all scores; of views (n, views, d)."""
    from featcache.heads.search import Embeddings

    vals = {}
    with progress(len(rows), "choose the pooling", unit="pooling") as bar:
        for kind, X in rows.items():
            embeddings = Embeddings(task, X.reshape(-1, X.shape[-1]), X.shape[1] if X.ndim == 3 else 1)
            vals[kind] = embeddings.search(JUDGES[task.kind], split, seed).val
            bar.update(1)
    best = min(vals, key=lambda kind: vals[kind].rank)  # of equals the first: the backbone's own way stays where it can
    return best, {kind: asdict(val) for kind, val in vals.items()}


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


def token_card(card: Mapping[str, Any], kind: Pool | None) -> dict[str, Any]:
    """Return the card of a head that trained on an entry of tokens, which are the same whatever pooling is asked for.

    One that trained on a pooling of them answers from the pooled cut of a backbone that pools so.
    """
    pool = {"pool": kind or "default"}
    cut = TOKENS if kind is None else POOLED
    return {**card, "cut": cut, "backbone": card["backbone"] | pool, "loaded": card["loaded"] | pool}


def read_choice(path: Path, names: Sequence[str]) -> PoolingChoice | None:
    """Return what an earlier command chose, ``None`` where that is not there, or not whole."""
    choice = kept_note(path, names, lambda told: PoolingChoice(**told), "the pooling is chosen again")
    return choice if choice is not None and choice.kind in POOLS else None
