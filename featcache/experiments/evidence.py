"""What lies behind records: the best head's answers sample by sample, the samples, their embeddings, what was left out."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache.datasets import open_dataset
from featcache.display import Table
from featcache.errors import FeatcacheError, SetupError, StorageError
from featcache.evaluation import Task
from featcache.evaluation.metrics import ECE_BINS, TestResult, confusion, per_class
from featcache.fingerprint import as_named
from featcache.heads import bundle
from featcache.reports import RunRecord
from featcache.reports.advice import ABOUT
from featcache.reports.shown import Bin, Cell, Confusion, DatasetEvidence, Learned, Scatter, Shown, Suspicion, best_probes
from featcache.reports.tables import groups_of_seeds
from featcache.store import Features
from featcache.store.checksums import kept_note
from featcache.store.entry import FeatureStore

Way = Literal["pca", "tsne"]
WAYS: tuple[Way, ...] = ("pca", "tsne")
MISTAKES, IN_A_CELL, ON_THE_DIAGONAL, OF_A_KIND, ON_A_MAP = 24, 8, 3, 8, 1200
_LISTED = 20  # samples that were left out, by name
_MOST_CLASSES = 20  # whose confusions fit a page as a matrix
_CONFUSIONS = 12  # that are shown of more classes


@dataclass(frozen=True)
class HeadEvidence:
    """A head that lies in the cache, its answers on the test samples, and the entry that it was trained on.

    ``test`` (t,) are the positions of the test samples in ``features``.
    """

    record: RunRecord
    card: dict[str, Any]
    store: FeatureStore
    features: Features
    test: NDArray[np.int64]
    tested: TestResult

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """The test samples (t,) by their number among them, the surest answers first."""
        sure = self.tested.confidence
        return np.argsort(-sure, kind="stable") if sure is not None else np.arange(len(self.test))

    def shown(self, number: int) -> Shown:
        """Return a test sample by its number among them."""
        place = int(self.test[number])
        sure = self.tested.confidence
        return Shown(
            self.features.paths[place],
            self.features.classes[self.features.y[place]],
            self.features.classes[self.tested.predicted[number]],
            None if sure is None else float(sure[number]),
        )


def best_head(records: Sequence[RunRecord], cache: Path) -> tuple[HeadEvidence | None, list[str]]:
    """Return of a data set's heads the best on validation whose file is in the cache, and why better ones are not taken."""
    groups, remarks = groups_of_seeds(records), list[str]()
    best = best_probes(groups) or ()  # the page's answer speaks of it, so that it comes first
    heads = [record for record in records if record.kind == "fit" and record not in best]
    for record in (*best, *sorted(heads, key=lambda each: -each.val["accuracy"])):
        try:
            return _open_head(record, cache), remarks
        except (FeatcacheError, ValueError, KeyError, TypeError) as error:
            remarks.append(f"{record.method}, seed {record.seed}: {error}")
    return None, remarks[:1]


def _open_head(record: RunRecord, cache: Path) -> HeadEvidence:
    """Return what a head's file says of the test samples.

    Raises:
        StorageError: it is not in this cache, or not as this user wrote it, or its samples have changed since.
    """
    path = (cache / record.artefact).resolve()
    # a record may come from a stranger, and its path lead anywhere
    if not record.artefact or not path.is_relative_to(cache.resolve()):
        raise StorageError("its file is not in the cache")
    card = bundle.own_card(path)
    if card is None or "tested" not in card:
        raise StorageError("its file is not in the cache, or not as it was written there")
    store = FeatureStore.open(path.parent.parent)
    features = store.labelled()
    if tuple(card["classes"]) != tuple(features.classes):
        raise StorageError("the classes have changed since")
    test = _test_positions(record, features, card)
    tested = bundle.fitted_head(path, card, record, "label").tested
    if len(tested.predicted) != len(test):
        raise StorageError("its answers are of other samples")
    return HeadEvidence(record, card, store, features, test, tested)


def _test_positions(record: RunRecord, features: Features, card: dict[str, Any]) -> NDArray[np.int64]:
    """Return the positions of a record's test samples (t,), as their hash proves.

    Raises:
        StorageError: the listing has other samples by now.
    """
    group = record.request.get("group")
    if group is None:
        task = Task(features)
    else:
        from featcache.experiments.experiment import task_of
        from featcache.extraction.files import DatasetFiles

        task = task_of(DatasetFiles(open_dataset(card["data"])), features, group=group)
    split = task.split(record.seed, record.request.get("folds"))
    if task.items(split.test) != record.test_items:
        raise StorageError("the data set's samples, labels or splits have changed since")
    return split.test


def gather(head: HeadEvidence, way: Way = "pca") -> DatasetEvidence:
    """Return what a page shows of a data set, samples by their paths alone.

    Args:
        head: the best one, and its entry.
        way: how the embeddings are mapped.
    """
    right = head.tested.right
    wrong = [number for number in head.order.tolist() if not right[number]]
    manifest = head.store.manifest
    return DatasetEvidence(
        head=f"{head.record.method} on {head.record.backbone}, seed {head.record.seed}",
        confusion=_confusion(head),
        per_class=_per_class(head),
        mistakes=tuple(head.shown(number) for number in wrong[:MISTAKES]),
        mistakes_total=len(wrong),
        bins=reliability(head.tested),
        learned=tuple(_learned(head.store)),
        suspicions=tuple(_suspicions(head)),
        scatter=_scatter(head, way),
        counts=_class_counts(head),
        left_out=tuple((bad.path, bad.reason) for bad in manifest.quarantined[:_LISTED]),
        left_out_total=len(manifest.quarantined),
    )


def _confusion(head: HeadEvidence) -> Confusion:
    """Return the matrix with samples behind its cells; of many classes, those that are confused most."""
    classes, truth, predicted = head.features.classes, head.features.y[head.test], head.tested.predicted
    matrix = confusion(truth, predicted, len(classes))
    wrong = matrix - np.diag(np.diag(matrix))
    behind: dict[tuple[int, int], list[int]] = defaultdict(list)  # each cell's samples, the surest answers first
    for number in head.order.tolist():
        behind[int(truth[number]), int(predicted[number])].append(number)
    if len(classes) > _MOST_CLASSES:
        pairs = [divmod(int(place), len(classes)) for place in np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSIONS]]
        rows = [tuple(_cell(head, pair, behind[pair]) for pair in pairs if wrong[pair])]
        return Confusion(tuple(rows), ())
    numbers = range(len(classes))
    rows = [tuple(_cell(head, (true, taken), behind[true, taken]) for taken in numbers) for true in numbers]
    return Confusion(tuple(rows), tuple(classes))


def _cell(head: HeadEvidence, pair: tuple[int, int], inside: Sequence[int]) -> Cell | None:
    """Return the cell of a true and a predicted class, given its test samples; ``None`` where there is none."""
    if not inside:
        return None
    true, taken = pair
    # of right answers the least sure tell most
    shown = inside[::-1][:ON_THE_DIAGONAL] if true == taken else inside[:IN_A_CELL]
    classes = head.features.classes
    return Cell(classes[true], classes[taken], len(inside), tuple(map(head.shown, shown)))


def _per_class(head: HeadEvidence) -> Table:
    matrix = confusion(head.features.y[head.test], head.tested.predicted, len(head.features.classes))
    rows = [
        (row["class"], str(row["support"]), *(f"{100 * row[name]:.1f}" for name in ("precision", "recall", "f1")))
        for row in per_class(matrix, head.features.classes)
    ]
    return Table(("class", "test samples", "precision %", "recall %", "F1 %"), rows)


def reliability(tested: TestResult) -> tuple[Bin, ...]:
    """Return the bins of the expected calibration error that have samples; none where a head tells no probabilities."""
    if tested.confidence is None:
        return ()
    confidence = np.asarray(tested.confidence, np.float64)
    numbers = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    bins = []
    for number in np.unique(numbers):
        inside = numbers == number
        mean, accuracy = 100 * confidence[inside].mean(), 100 * tested.right[inside].mean()
        bins.append(Bin(int(inside.sum()), float(mean), float(accuracy)))
    return tuple(bins)


def _learned(store: FeatureStore) -> Iterator[tuple[str, tuple[Learned, ...]]]:
    """Yield the learning curves that ``fit`` has kept beside its heads."""
    for path in sorted((store.path / "heads").glob("curve-*.json")):
        if curve := kept_note(path, [store.key], _curve, "the page goes without it"):
            yield curve


def _curve(note: dict[str, Any]) -> tuple[str, tuple[Learned, ...]]:
    told = [as_named(point) for point in note["points"]]
    points = [Learned(int(point["samples"]), 100 * point["mean"], 100 * point["std"]) for point in told]
    return str(note["head"]), tuple(points)


def _suspicions(head: HeadEvidence) -> Iterator[Suspicion]:
    """Yield what the last audit has found, by kind."""
    paths = sorted((head.store.path / "heads").glob("suspects-*.json"), key=lambda path: path.stat().st_mtime)
    without = "the page goes without suspects"
    suspects = (kept_note(paths[-1], [head.store.key], _suspects, without) if paths else None) or []
    present = set(head.features.paths)
    suspects = [(kind, shown) for kind, shown in suspects if shown.path in present]
    for kind, count in Counter(kind for kind, _ in suspects).items():
        yield Suspicion(ABOUT.get(kind, kind), count, tuple(shown for each, shown in suspects if each == kind)[:OF_A_KIND])


def _suspects(note: dict[str, Any]) -> list[tuple[str, Shown]]:
    return [(str(suspect["kind"]), _suspect(suspect)) for suspect in note["suspects"]]


def _suspect(suspect: dict[str, Any]) -> Shown:
    if suspect["other"]:
        note = f"in {suspect['split']}; copy of {suspect['other']} ({suspect['other_label']}, {suspect['other_split']})"
    else:
        rather = f", rather {suspect['other_label']}" if suspect["other_label"] else ""
        note = f"in {suspect['split']}{rather}"
    return Shown(suspect["path"], suspect["label"], note=note)


def _scatter(head: HeadEvidence, way: Way) -> Scatter | None:
    """Return the embeddings on a plane, of many samples a seeded draw; ``None`` where rows are no embeddings."""
    features = head.features
    rows = head.store.reader()
    if len(rows.shape) != 1 or min(rows.shape[0], len(rows)) < 3:
        return None
    drawn = np.sort(np.random.default_rng(0).permutation(len(rows))[:ON_A_MAP])
    plane = projected(rows.take(drawn).astype(np.float32), way)
    number_of = {place: number for number, place in enumerate(head.test.tolist())}
    shown = tuple(
        head.shown(number_of[place])
        if place in number_of
        else Shown(features.paths[place], features.classes[features.y[place]])
        for place in drawn.tolist()
    )
    # classes of many samples first: they get the colours that can be told apart
    counts = Counter(features.y.tolist())
    order = sorted(range(len(features.classes)), key=lambda number: -counts[number]) if len(features.classes) > 10 else None
    classes = features.classes if order is None else tuple(features.classes[number] for number in order)
    places = tuple((float(x), float(y)) for x, y in plane.xy)
    return Scatter(places, shown, tuple(classes), plane.how, len(rows))


def _class_counts(head: HeadEvidence) -> Table:
    """Return how many samples of each class are in each part, as given; those without one are drawn from."""
    features = head.features
    splits = np.array(list(features.splits), dtype=object)
    names = [name for name in ("train", "val", "test", "") if (splits == name).any()]
    counts = [np.bincount(features.y[splits == name], minlength=len(features.classes)) for name in names]
    rows = [(label, *(str(count[number]) for count in counts)) for number, label in enumerate(features.classes)]
    return Table(("class", *(name or "no split given" for name in names)), rows)


@dataclass(frozen=True)
class Plane:
    """Places (n, 2) float64, and how they were found, in words."""

    xy: NDArray[np.float64]
    how: str


def projected(X: NDArray[Any], way: Way = "pca", seed: int = 0) -> Plane:
    """Return embeddings X (n, d) on a plane.

    ``pca`` takes the two directions of the greatest variance (Pearson 1901); ``tsne`` keeps neighbours together and says
    nothing of distances (van der Maaten and Hinton 2008; the package openTSNE, Policar et al. 2024).

    There are at least three rows and three columns.

    Raises:
        SetupError: openTSNE is asked for and not installed.
    """
    centred = np.asarray(X, np.float64) - X.mean(axis=0, dtype=np.float64)
    if way == "tsne":
        return _by_neighbours(centred, seed)
    from scipy.sparse.linalg import eigsh

    # the smaller of both products, of which two eigenvectors are wanted: all of them would take seconds
    is_wide = centred.shape[1] > centred.shape[0]
    product = centred @ centred.T if is_wide else centred.T @ centred
    values, vectors = eigsh(product, k=2, v0=np.linspace(1, 2, len(product)))
    values, vectors = values[::-1], vectors[:, ::-1]
    xy = vectors * np.sqrt(np.maximum(values, 0)) if is_wide else centred @ vectors
    # a direction has no sign of its own: the same rows always give the same picture
    xy = xy * np.where(xy[np.abs(xy).argmax(axis=0), np.arange(xy.shape[1])] < 0, -1, 1)
    total = float((centred**2).sum())
    share = 100 * float(np.maximum(values, 0).sum()) / total if total else 0.0
    return Plane(xy, f"the two principal components, which hold {share:.0f} % of the variance")


def _by_neighbours(centred: NDArray[np.float64], seed: int) -> Plane:
    try:
        from openTSNE import TSNE
    except ImportError:
        raise SetupError("a t-SNE map needs openTSNE: `pip install 'featcache[map]'`.") from None
    perplexity = max(2.0, min(30.0, (len(centred) - 1) / 3))
    xy = np.asarray(TSNE(perplexity=perplexity, random_state=seed, metric="cosine", n_jobs=-1).fit(centred), np.float64)
    return Plane(xy, f"t-SNE of perplexity {perplexity:g}: neighbours are alike, distances between groups say nothing")
