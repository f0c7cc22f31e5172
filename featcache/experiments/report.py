"""Records, and what lies behind them, into files: a page to send, and tables in Markdown, CSV and LaTeX.

Behind them lie the best head's answers sample by sample, the samples, their embeddings, and what was left out.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache.datasets import Dataset, open_dataset
from featcache.datasets.decoding import Sheet, sheet_of, size_of, thumbnail
from featcache.display import Displayed, Table, logger
from featcache.errors import DataError, FeatcacheError, SetupError, StorageError, UnreadableSample, UsageError
from featcache.evaluation import Task
from featcache.evaluation.metrics import ECE_BINS, TestResult, confusion
from featcache.fingerprint import as_named, sha256_of_bytes
from featcache.heads import bundle
from featcache.reports import RunRecord, page, read_records, tables
from featcache.reports.page import Bin, Cell, Confusion, DatasetEvidence, Learned, Scatter, Shown, Suspicion, best_probes
from featcache.reports.tables import groups_of_seeds
from featcache.reports.wording import ABOUT, per_class_table
from featcache.resources import cores
from featcache.specs import check_fields
from featcache.store import Features
from featcache.store.disk import kept_note, make_folder, replace_file
from featcache.store.entry import FeatureStore

Way = Literal["pca", "tsne"]
WAYS: tuple[Way, ...] = ("pca", "tsne")
MISTAKES, IN_A_CELL, ON_THE_DIAGONAL, OF_A_KIND, ON_A_MAP = 24, 8, 3, 8, 1200
_LISTED = 20  # samples that were left out, by name
_MOST_CLASSES = 20  # whose confusions fit a page as a matrix
_CONFUSIONS = 12  # that are shown of more classes
Format = Literal["html", "md", "csv", "tex"]
MOST_SAMPLES = 600  # of a page, all data sets together
_MOST_BYTES = 1_000_000  # of the sheet: a third more in the page, which stays below 2 MB
_LETTERS = 300  # of a text that is shown in place of a sample


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
    matrix = confusion(head.features.y[head.test], head.tested.predicted, len(head.features.classes))
    return DatasetEvidence(
        head=f"{head.record.method} on {head.record.backbone}, seed {head.record.seed}",
        confusion=_confusion(head, matrix),
        per_class=per_class_table(matrix, head.features.classes),
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


def _confusion(head: HeadEvidence, matrix: NDArray[np.int64]) -> Confusion:
    """Return a matrix with samples behind its cells; of many classes, those that are confused most."""
    classes, truth, predicted = head.features.classes, head.features.y[head.test], head.tested.predicted
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
    noted = (
        kept_note(paths[-1], [head.store.key], lambda note: list(map(_suspect, note["suspects"])), without)
        if paths
        else None
    )
    present = set(head.features.paths)
    suspects = [(kind, shown) for kind, shown in noted or () if shown.path in present]
    for kind, count in Counter(kind for kind, _ in suspects).items():
        yield Suspicion(ABOUT.get(kind, kind), count, tuple(shown for each, shown in suspects if each == kind)[:OF_A_KIND])


def _suspect(suspect: dict[str, Any]) -> tuple[str, Shown]:
    if suspect["other"]:
        note = f"in {suspect['split']}; copy of {suspect['other']} ({suspect['other_label']}, {suspect['other_split']})"
    else:
        rather = f", rather {suspect['other_label']}" if suspect["other_label"] else ""
        note = f"in {suspect['split']}{rather}"
    return str(suspect["kind"]), Shown(suspect["path"], suspect["label"], note=note)


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


def _call(record: RunRecord, data: str) -> str:
    """Return the call of this library that makes a record again, as far as its usual values go."""
    name = {"finetune": "finetune", "gap": "gap"}.get(record.kind, "fit")
    how = {"finetune": f", unfreeze={record.short_method!r}", "fit": f", heads=[{record.method!r}]"}.get(record.kind, "")
    return f"featcache.{name}({data!r}, {record.request.get('backbone', {}).get('name')!r}{how}, seed={record.seed})"


@dataclass(frozen=True)
class PagePlan:
    """What a page shows beside the records.

    Attributes:
        samples: show test samples; without, nothing of any is in the page.
        projection: how embeddings are mapped, ``pca`` or ``tsne``.
        command: tells how a record is made again; by default the call of this library.
    """

    samples: bool = True
    projection: Way = "pca"
    command: Callable[[RunRecord, str], str] = _call

    def __post_init__(self) -> None:
        """Refuse values of the wrong kind."""
        check_fields(self)
        if self.projection not in WAYS:
            raise UsageError(f"`projection` {self.projection!r}: {' or '.join(WAYS)} is needed.")


@dataclass(frozen=True, repr=False)
class Report(Displayed):
    """Records, the texts that were made of them by format, and where these were written."""

    records: tuple[RunRecord, ...]
    texts: Mapping[Format, str]
    paths: Mapping[Format, str]

    def table(self) -> Table:
        """Return the table for a terminal."""
        return tables.short_table(_scored(self.records))

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of ``featcache report``."""
        sizes = {kind: len(text.encode("utf-8", "surrogateescape")) for kind, text in self.texts.items()}
        return {"records": len(self.records), "files": dict(self.paths), "bytes": sizes}


def run_report(
    sources: Sequence[Path], files: Mapping[Format, Path | None], plan: PagePlan, cache: Path, datasets: Sequence[str] = ()
) -> Report:
    """Read records and write reports of them.

    Args:
        sources: JSONL files of records.
        files: what is made, and where it is written; ``None``: nowhere, it is in ``Report.texts``.
        plan: what the page shows.
        cache: the one that the records' heads lie in.
        datasets: only these are reported; all, where none is named.

    Raises:
        DataError: there is no such record.
        StorageError: a file cannot be read or written.
    """
    if absent := [path for path in sources if not path.exists()]:
        raise DataError(f"{absent[0]}: there is no such file of records.")
    every = [record for record in read_records(sources) if record.test]
    records = [record for record in tables.latest_of(every) if not datasets or record.dataset in datasets]
    if not records:
        names, asked = ", ".join(dict.fromkeys(record.dataset for record in every)), ",".join(datasets)
        among = f"; there are {names}" if names and datasets else ""
        raise DataError(f"{', '.join(map(str, sources))}: no record{f' of {asked}' if asked else ''}{among}.")
    makers: dict[Format, Callable[[], str]] = {
        "html": lambda: page_of(records, plan, cache),
        "md": lambda: f"{tables.markdown(_scored(records))}\n",
        "csv": lambda: tables.to_csv(_scored(records)),
        "tex": lambda: f"{tables.latex(_scored(records))}\n",
    }
    texts = {kind: makers[kind]() for kind in files}
    for kind, path in files.items():
        if path is not None:
            make_folder(path.parent)
            replace_file(path, texts[kind].encode("utf-8", "backslashreplace"))
    return Report(tuple(records), texts, {kind: str(path) for kind, path in files.items() if path is not None})


def _scored(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the records that a table of accuracies has a row for."""
    return [record for record in records if "accuracy" in record.test]


def page_of(records: Sequence[RunRecord], plan: PagePlan, cache: Path) -> str:
    """Return the page of some records."""
    evidence: dict[str, DatasetEvidence] = {}
    looks: dict[str, _Look] = {}
    heads: dict[str, HeadEvidence] = {}
    for name in dict.fromkeys(record.dataset for record in records):
        head, remarks = best_head([record for record in records if record.dataset == name], cache)
        if head is None:
            evidence[name] = DatasetEvidence(
                remarks=(f"No samples and no map: {remarks[0]}." if remarks else "No head was fitted.",)
            )
            continue
        heads[name] = head
        evidence[name] = gather(head, plan.projection)
        if plan.samples:
            looks[name] = _Look.at(head)
    sheet = _tiled(evidence, looks) if plan.samples else None
    places = {name: str(head.card["data"]) for name, head in heads.items()}
    return page.render(
        records, evidence, sheet, lambda record: plan.command(record, places.get(record.dataset, record.dataset))
    )


@dataclass(frozen=True)
class _Glance:
    """What a sample shows: a tile or the beginning of a text, its width and height and bytes."""

    tile: NDArray[np.uint8] | None = None
    text: str = ""
    size: tuple[int, int] = (0, 0)
    bytes: int = 0


@dataclass(frozen=True)
class _Look:
    """A data set that was opened again, as its head's card says; ``dataset`` is ``None`` where that cannot be done."""

    head: HeadEvidence
    dataset: Dataset | None
    problem: str = ""

    @classmethod
    def at(cls, head: HeadEvidence) -> "_Look":
        try:
            return cls(head, open_dataset(head.card["data"]))
        except FeatcacheError as error:
            return cls(head, None, str(error))

    def glances(self, paths: Sequence[str]) -> dict[str, _Glance]:
        """Return what some samples show, those alone that are still the ones that were seen, by their SHA-256."""
        if self.dataset is None:
            return {}
        place = {path: number for number, path in enumerate(self.head.features.paths)}
        with ThreadPoolExecutor(cores()) as pool:
            seen = pool.map(lambda path: self._glance(path, self.head.features.sha256[place[path]]), paths)
            return {path: glance for path, glance in zip(paths, seen, strict=True) if glance is not None}

    def _glance(self, path: str, sha256: str) -> _Glance | None:
        assert self.dataset is not None
        try:
            content = self.dataset.read(path)
            if sha256_of_bytes(content) != sha256:
                return None
            if "input_size" not in self.head.store.spec["transform"]:
                return _Glance(text=content.decode("utf-8", "replace")[:_LETTERS], bytes=len(content))
            return _Glance(thumbnail(content), size=size_of(content), bytes=len(content))
        except (OSError, KeyError, UnreadableSample, FeatcacheError) as error:
            logger.debug("%s: not shown (%s)", path, error)
            return None


def _tiled(evidence: dict[str, DatasetEvidence], looks: Mapping[str, _Look]) -> Sheet | None:
    """Put samples into evidence, in place, and return the sheet that holds them; data sets get equal numbers."""
    asked = {name: worth_showing(evidence[name]) for name in looks}
    turns = zip_longest(*([(name, path) for path in paths] for name, paths in asked.items()))
    chosen = list(islice((pair for turn in turns for pair in turn if pair is not None), MOST_SAMPLES))
    tiles: list[NDArray[np.uint8]] = []
    for name, look in looks.items():
        paths = [path for of, path in chosen if of == name]
        glances = look.glances(paths)
        places = {
            path: len(tiles) + place for place, path in enumerate(path for path in glances if glances[path].tile is not None)
        }
        tiles += [glance.tile for glance in glances.values() if glance.tile is not None]
        texts = {path: glance.text for path, glance in glances.items()}
        evidence[name] = replace(
            with_tiles(evidence[name], places, texts),
            facts=_size_facts(list(glances.values())),
            remarks=(*evidence[name].remarks, *_remarks(look, len(paths), len(glances))),
        )
    return sheet_of(tiles, _MOST_BYTES) if tiles else None


def _remarks(look: _Look, asked: int, seen: int) -> tuple[str, ...]:
    if look.dataset is None:
        return (f"The samples cannot be read any more, so that none is shown: {look.problem}",)
    if seen < asked:
        noun = f"{look.dataset.kind}s"
        return (f"{asked - seen} of {asked} {noun} that had a place here cannot be read any more, or have changed since.",)
    return ()


def _size_facts(glances: Sequence[_Glance]) -> tuple[tuple[str, str], ...]:
    """Return sizes in words: of the samples that were read for the page alone, since reading all would take too long."""
    sizes = np.array([glance.size for glance in glances if all(glance.size)])
    facts = []
    if len(sizes):
        (low_x, low_y), (x, y), (high_x, high_y) = (np.percentile(sizes, percent, axis=0) for percent in (0, 50, 100))
        facts.append(
            ("width x height", f"{x:.0f} x {y:.0f} (median; {low_x:.0f} to {high_x:.0f} x {low_y:.0f} to {high_y:.0f})")
        )
    if glances:
        median = float(np.median([glance.bytes for glance in glances]))
        facts.append(("bytes of a file", f"{median / 1000:.1f} kB (median)"))
        facts.append(("these are of", f"the {len(glances)} samples that were read for this page"))
    return tuple(facts)


def worth_showing(evidence: DatasetEvidence) -> list[str]:
    """Return the paths of the samples that a page has a place for, what matters most first, each once."""
    cells = [cell for row in (evidence.confusion.cells if evidence.confusion else ()) for cell in row if cell is not None]
    cells.sort(key=lambda cell: cell.label == cell.predicted)  # confusions before what is right
    shown = [
        *evidence.mistakes,
        *(each for suspicion in evidence.suspicions for each in suspicion.shown),
        *(each for cell in cells for each in cell.shown),
        *(evidence.scatter.shown if evidence.scatter else ()),
    ]
    return list(dict.fromkeys(each.path for each in shown))


def with_tiles(evidence: DatasetEvidence, tiles: Mapping[str, int], texts: Mapping[str, str]) -> DatasetEvidence:
    """Return evidence whose samples know their place in the sheet, or whose texts are there to be read."""

    def placed(shown: tuple[Shown, ...]) -> tuple[Shown, ...]:
        return tuple(replace(each, tile=tiles.get(each.path), text=texts.get(each.path, "")) for each in shown)

    matrix, scatter = evidence.confusion, evidence.scatter
    if matrix is not None:
        rows = (
            tuple(cell if cell is None else replace(cell, shown=placed(cell.shown)) for cell in row) for row in matrix.cells
        )
        matrix = replace(matrix, cells=tuple(rows))
    return replace(
        evidence,
        mistakes=placed(evidence.mistakes),
        suspicions=tuple(replace(each, shown=placed(each.shown)) for each in evidence.suspicions),
        confusion=matrix,
        scatter=scatter if scatter is None else replace(scatter, shown=placed(scatter.shown)),
    )
