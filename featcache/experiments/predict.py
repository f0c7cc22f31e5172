"""A trained head on samples that were never extracted: from files to labels, nothing kept."""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.backbones import origin_of, other_revisions
from featcache.datasets import Dataset, FileStat, Sample, read_file, stat_file
from featcache.datasets.folder import sample_files
from featcache.datasets.tables import open_unlabelled
from featcache.display import logger, progress
from featcache.errors import DataError, StorageError, UsageError
from featcache.evaluation import ColumnCoder
from featcache.evaluation.metrics import at_temperature
from featcache.extraction.extract import Runtime, run_batches, sample
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.extraction.files import Batch, BatchReader
from featcache.fingerprint import canonical, sha256_of_file
from featcache.heads.bundle import Bundle
from featcache.heads.rejection import Judgement, Rejection, Verdict
from featcache.heads.search import over_views, predict_with
from featcache.specs import DEFAULT_KIND, TOKENS, BackboneSpec, SampleKind, Views
from featcache.store import beside
from featcache.store.entry import FeatureStore
from featcache.store.manifests import Quarantined

_TABLES = (".csv", ".parquet")
_AT_ONCE = 4096  # samples whose embeddings and answers are held: copies among them are computed once


@dataclass(frozen=True)
class Prediction:
    """What a head says of one sample: ``probabilities`` (classes,) where it knows any; ``reason`` where it says nothing.

    Where it was asked when it does not know: ``candidates``, the classes in its set, likeliest first; ``familiar``, the
    share of training samples that are at most as familiar; and whether that is one answer.
    """

    path: str
    label: str | None = None
    probabilities: NDArray[np.float64] | None = None
    reason: str | None = None
    candidates: tuple[str, ...] | None = None
    familiar: float | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True)
class _Anywhere:
    """Files by the paths that the user gave."""

    def read(self, path: str) -> bytes:
        return read_file(path)

    def stat(self, path: str) -> FileStat:
        return stat_file(path)


def backbone_of(card: dict[str, Any], weights: str | None = None) -> BackboneSpec:
    """Return the backbone that a head was trained on; its weights may lie in the file ``weights`` now.

    Raises:
        UsageError: the weights file is not where it was.
        DataError: it is another file now.
    """
    facts = card.get("backbone")
    if not isinstance(facts, dict) or not {"name", "weights", "random_init", "model_args", "overrides"} <= set(facts):
        raise DataError("the head's card does not say on which backbone it was trained.")
    path, wanted = weights or card.get("weights"), facts["weights"]
    if wanted and wanted.startswith("sha256:"):
        if path is None or not Path(path).is_file():
            raise UsageError(f"{path or 'the weights'}: no such file; say with `weights` where the backbone's weights are.")
        if f"sha256:{sha256_of_file(Path(path))}" != wanted:
            raise DataError(f"{path}: not the weights that the head was trained on (another SHA-256).")
    else:
        path = weights or wanted
    try:
        return BackboneSpec.of_facts(facts if path is None else facts | {"random_init": None}, path)
    except TypeError as error:
        raise DataError(f"the head's card names what no transform has ({error}).") from error


def cache_of(bundle: Bundle, source: Dataset, settings: Settings, weights: str | None = None) -> FeatureCache:
    """Return a data set beside a loaded backbone, which is the one that a head was trained on.

    Of a repository of the hub that has moved on, the local copy that the head was trained on is taken.

    Raises:
        UsageError: the weights file, or the folder of the backbone, is not where it was.
        DataError: another network lies behind the backbone's name now.
    """
    spec = backbone_of(bundle.card, weights)
    names = dict.fromkeys([spec.name, *(other_revisions(spec) if spec.weights is None else ())])
    reasons = []
    for name in names:
        cache = FeatureCache(source, replace(spec, name=name), settings)
        reason = _why_unlike(bundle, cache)
        if not reason:
            return cache
        reasons.append(reason)
    raise DataError(
        f"{bundle.path}: {reasons[0]}. Put the old one back, give its weights with `weights=FILE`, or train the head again."
    )


def _why_unlike(bundle: Bundle, cache: FeatureCache) -> str:
    """Return what tells a loaded backbone from the one that a head was trained on, "" where nothing does."""
    card, backbone = bundle.card, cache.backbone
    wanted, transform = card.get("loaded"), card.get("transform")
    if not isinstance(wanted, dict) or not isinstance(transform, dict):
        return _key_differs(bundle, cache)
    loaded = json.loads(canonical(backbone.loaded))
    if wanted.get("weights_sha256") != loaded["weights_sha256"]:
        then, now = str(wanted.get("weights_sha256"))[:12], loaded["weights_sha256"][:12]
        return f"the weights of {cache.spec.name} have changed since it was trained (SHA-256 {then}... then, {now}... now)"
    if canonical(transform) != canonical(backbone.preprocess.spec):
        return f"{cache.spec.name} prepares samples otherwise than when it was trained"
    # the tag says where weights came from: with their hash it decides nothing
    if canonical(wanted | {"tag": ""}) != canonical(loaded | {"tag": ""}):
        return f"{cache.spec.name} is built otherwise than when it was trained"
    return ""


def _key_differs(bundle: Bundle, cache: FeatureCache) -> str:
    """Hold a backbone against the cache key in a card that says no more: of heads of an older version."""
    card, cut = bundle.card, bundle.card.get("cut", "pooled")
    if card["backbone"]["weights"] or card.get("feature_key") is None:
        return ""  # the hash of the weights file was compared
    try:
        entry = FeatureStore.open(bundle.path.parent.parent)
    except StorageError:
        entry = None
    if entry is not None and entry.key == card["feature_key"] and entry.spec["backbone"]:
        same = entry.spec["backbone"]["weights_sha256"] == cache.backbone.loaded.weights_sha256
        return "" if same else f"the weights of {cache.spec.name} have changed since it was trained"
    views, dtypes = Views(card.get("views", 1)), ("float32", "float16")
    if card["feature_key"] in {cache.key(cut, dtype, views) for dtype in dtypes}:  # type: ignore[arg-type]
        return ""
    if origin_of(cache.spec) is None:
        return f"{cache.spec.name} is not what it was when the head was trained (other weights, or another transform)"
    logger.warning("%s: its card does not say which weights %s had: nothing was compared", bundle.path, cache.spec.name)
    return ""


def samples_of(bundle: Bundle) -> SampleKind:
    """Return what a head labels, as its backbone's name says."""
    facts = bundle.card.get("backbone")
    return BackboneSpec(facts["name"]).samples if isinstance(facts, dict) and facts.get("name") else DEFAULT_KIND


def find_samples(places: Iterable[str], kind: SampleKind = DEFAULT_KIND) -> Iterator[str]:
    """Yield files as they are, and the samples, or texts, in and below folders.

    Raises:
        DataError: a path is not there.
    """
    for place in places:
        path = Path(place)
        if path.is_dir():
            found, notes = sample_files(path, kind)
            for note in notes or ([] if found else [f"{place}: no {kind} in it"]):
                logger.warning(note)
            yield from (str(path / inside) for inside in found)
        elif path.exists():
            yield place
        else:
            raise DataError(f"{place}: there is no such file or folder.")


def label_samples(
    bundle: Bundle,
    paths: Sequence[str],
    settings: Settings,
    *,
    weights: str | None = None,
    rejection: Rejection | None = None,
) -> Iterator[Prediction]:
    """Return what yields a prediction for each sample, in the order given; one that cannot be read gives the reason.

    Probabilities are scaled by the head's temperature. Heads that were fitted before cards said ``scaled_by`` are not.

    Args:
        bundle: the head.
        paths: of files.
        settings: device, batch size, runtime, workers.
        weights: where the backbone's weights file is now.
        rejection: when the head does not know.

    Raises:
        UsageError: the backbone is not where it was.
        DataError: it is another one now.
    """
    items = tuple(Sample(path, "") for path in dict.fromkeys(paths))
    kind = samples_of(bundle)
    source = Dataset(f"{kind}s", f"{kind}s", items, _Anywhere(), kind=kind)
    cache = cache_of(bundle, source, settings, weights)
    return _predictions(_Answering(bundle, rejection), paths, cache)


def needs_tables(bundle: Bundle, places: Sequence[Path]) -> bool:
    """Tell whether tables are to be read: a head needs columns beside samples, or tables hold the texts that it labels."""
    has_tables = any(place.suffix.lower() in _TABLES for place in places)
    return bool(bundle.card.get("columns")) or (has_tables and samples_of(bundle) == "text")


def label_manifests(
    bundle: Bundle,
    places: Sequence[Path],
    settings: Settings,
    *,
    weights: str | None = None,
    rejection: Rejection | None = None,
) -> Iterator[Prediction]:
    """Return what yields a prediction for each sample of tables, by a head that needs their columns, or is of their texts.

    Args:
        bundle: the head.
        places: CSV or Parquet files with path, the samples' bytes, or text, and these columns; labels are not needed.
        settings: as of ``label_samples``.
        weights: as of ``label_samples``.
        rejection: as of ``label_samples``.

    Raises:
        UsageError: as of ``label_samples``.
        DataError: as of ``label_samples``; or a file is no manifest, lacks a column, or a number is none.
    """
    coder = ColumnCoder.of_card(bundle.card["columns"]) if bundle.card.get("columns") else None
    for place in places:
        if place.suffix.lower() not in _TABLES:
            if coder is None:
                raise DataError(f"{place}: no table, and others are: give tables, or files and folders of texts.")
            raise DataError(
                f"{place}: this head was trained on the columns {', '.join(coder.names)} beside each sample: give a CSV or "
                "Parquet file with path and these columns."
            )
    opened = [open_unlabelled(place, coder.names if coder else ()) for place in places]
    coded = [coder.encode(values, source.location) if coder else None for source, values in opened]
    caches = [cache_of(bundle, source, settings, weights) for source, _ in opened]
    return chain.from_iterable(
        _predictions(_Answering(bundle, rejection), [sample.path for sample in cache.dataset.samples], cache, columns)
        for cache, columns in zip(caches, coded, strict=True)
    )


@dataclass(frozen=True)
class _Answering:
    """A head, and when it does not know, where that is asked."""

    bundle: Bundle
    rejection: Rejection | None


def _predictions(
    asked: _Answering, paths: Sequence[str], cache: FeatureCache, columns: NDArray[np.float32] | None = None
) -> Iterator[Prediction]:
    bundle = asked.bundle
    embedder = _Embedder(cache, bundle.card.get("cut", "pooled"), Views(bundle.card.get("views", 1)), columns)
    position = {item.path: index for index, item in enumerate(cache.dataset.samples)}
    with progress(len(paths), "predict") as bar:
        for start in range(0, len(paths), _AT_ONCE):
            yield from _in_order(asked, paths[start : start + _AT_ONCE], position, embedder)
            bar.update(min(_AT_ONCE, len(paths) - start))


def _in_order(
    asked: _Answering, paths: Sequence[str], position: dict[str, int], embedder: "_Embedder"
) -> Iterator[Prediction]:
    """Yield the predictions of some paths, of which one may come twice; they are forgotten then."""
    done: dict[str, Prediction] = {}
    waiting = list(reversed(paths))
    for several in embedder.batches([position[path] for path in dict.fromkeys(paths)]):
        done.update((one.path, one) for one in _answer(asked, several, embedder))
        while waiting and waiting[-1] in done:
            yield done[waiting.pop()]


class _Embedder:
    """Computes embeddings of samples some at a time; the backbone is made ready once, on the first batch."""

    def __init__(self, cache: FeatureCache, cut: str, views: Views, columns: NDArray[np.float32] | None) -> None:
        self.cache, self.cut, self.views, self.columns = cache, cut, views, columns
        self._runtime: Runtime | None = None

    def batches(self, positions: Sequence[int]) -> Iterator[Batch]:
        """Yield samples with their embeddings; copies of a sample come last, with those of the first."""
        cache = self.cache
        plan = cache.plan_for(cache.backbone.preprocess, self.views)
        files, reader = cache.files, BatchReader(cache.files, positions, plan.preprocess, plan.views)
        first = reader.fill(plan.batch_size)
        rows: dict[bytes, NDArray[Any]] = {}
        reasons: dict[str, str] = {}
        copies: list[int] = []
        if first.fresh:
            with cache.threads():
                if self._runtime is None:
                    self._runtime = cache.prepare([self.cut], sample(first, plan.batch_size), len(files))
            with closing(run_batches(reader, self._runtime, plan.batch_size, deque([first]))) as running:
                for batch in _inside(cache.threads, running):
                    if batch.fresh:  # the last batch may hold copies and broken samples alone
                        rows.update(zip(map(files.digest, batch.fresh), batch.rows[0], strict=True))
                    reasons.update((bad.sha256, bad.reason) for bad in batch.bad)
                    copies += batch.copies
                    yield batch
        elif len(first):
            reasons.update((bad.sha256, bad.reason) for bad in first.bad)
            copies += first.copies
            yield first
        answered = [position for position in copies if files.digest(position) in rows]
        if answered:
            yield Batch(fresh=answered, rows=(np.stack([rows[files.digest(position)] for position in answered]),))
        unanswered = [position for position in copies if files.digest(position) not in rows]
        broken = [(files.path(position), files.digest(position).hex()) for position in unanswered]
        if broken:  # they are answered too, else what comes behind them would wait for ever
            unread = "a copy of a sample that could not be read"
            yield Batch(bad=[Quarantined(path, digest, reasons.get(digest, unread)) for path, digest in broken])


def _inside(enter: Callable[[], AbstractContextManager[None]], batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches that are waited for inside a context; between two of them the caller's own state holds."""
    while True:
        with enter():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _answer(asked: _Answering, batch: Batch, embedder: _Embedder) -> list[Prediction]:
    bundle = asked.bundle
    source, views = embedder.cache.dataset, embedder.views.count
    said = [Prediction(bad.path, reason=bad.reason) for bad in batch.bad]
    if not batch.fresh:
        return said
    names = [source.samples[position].path for position in batch.fresh]
    X = np.ascontiguousarray(batch.rows[0], dtype=np.float32)
    if bundle.card.get("cut") != TOKENS:  # attention asks where tokens lie
        X = X.reshape(-1, X.shape[-1])
    plain = X[::views]
    if embedder.columns is not None:  # a sample's own, for each of its views
        X = beside(X, np.repeat(embedder.columns[np.array(batch.fresh)], views, axis=0))
    kind = bundle.card.get("target", "label")
    found = over_views(predict_with(bundle.estimator, X, kind, len(bundle.classes)), views)
    if kind == "number":
        return said + [Prediction(name, f"{value:.6g}") for name, value in zip(names, found, strict=True)]
    if kind == "labels":
        return said + [
            Prediction(name, ";".join(label for label, value in zip(bundle.classes, row, strict=True) if value >= 0.5), row)
            for name, row in zip(names, found, strict=True)
        ]
    if found.ndim == 1:
        return said + [Prediction(name, bundle.classes[number]) for name, number in zip(names, found, strict=True)]
    labels = [bundle.classes[number] for number in found.argmax(axis=1)]
    if (temperature := bundle.card.get("scaled_by")) is not None:
        found = at_temperature(found, temperature)
    answered = [Prediction(*one) for one in zip(names, labels, found, strict=True)]
    if asked.rejection is not None:
        contents = [embedder.cache.files.digest(position).hex() for position in batch.fresh]
        judged = asked.rejection.judge(found, plain, contents)
        answered = [_judged(one, judged, number, bundle.classes) for number, one in enumerate(answered)]
    return said + answered


def _judged(prediction: Prediction, judged: Judgement, number: int, classes: Sequence[str]) -> Prediction:
    """Return a prediction with what is said of its certainty."""
    assert prediction.probabilities is not None
    inside = np.flatnonzero(judged.sets[number])
    likeliest = inside[np.argsort(-prediction.probabilities[inside], kind="stable")]
    return replace(
        prediction,
        candidates=tuple(classes[number] for number in likeliest.tolist()),
        familiar=None if judged.familiar is None else float(judged.familiar[number]),
        verdict=judged.verdict(number),
    )
