"""What is wrong with a data set, from its cached rows: copies across splits, doubtful labels, shortcuts, their cost."""

import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.datasets import Dataset, FileReader, MemoryReader, Sample
from featcache.datasets.decoding import (
    ALTERATIONS,
    SIDE,
    Exif,
    altered,
    exif_measures,
    exif_of,
    measures,
    oddities,
    size_of,
)
from featcache.display import Displayed, Table, logger, progress
from featcache.errors import SetupError, StorageError, UnreadableSample, UsageError
from featcache.evaluation.likeness import (
    Likeness,
    Neighbourhood,
    components,
    mirrored,
    nearest_others,
    neighbourhood,
    tone_rows,
    unit_rows,
)
from featcache.evaluation.metrics import Gap, paired_gap
from featcache.evaluation.splits import Units, units_of
from featcache.experiments.experiment import Experiment, aligned
from featcache.experiments.fit import PROBE, FitPlan, HeadResult, in_memory, run_fit
from featcache.extraction.feature_cache import Extracted, FeatureCache, Output
from featcache.fingerprint import as_stored
from featcache.heads.checks import (
    Doubts,
    Removal,
    Shift,
    Shortcut,
    label_issues,
    out_of_fold,
    outliers,
    shift,
    shortcuts,
    without,
)
from featcache.heads.search import Embeddings
from featcache.specs import POOLED, BackboneSpec
from featcache.store import Features
from featcache.store.disk import keep_note, kept_note

ACROSS = " across splits"
COPIES = ("copy", "near copy", "mirrored copy")
KINDS = (*(f"{kind}{ACROSS}" for kind in COPIES), *COPIES, "label", "blank", "dark", "bright", "tiny", "long", "outlier")
_DRAWN = 100  # samples whose copies thresholds are fitted on: 400 more to compute, once
_NEVER = Likeness(2.0, 2.0)  # of no sample that shows anything there is nothing to fit
_PARTS = ("train", "val", "test")
_KEPT = 1000  # suspects, for reports: copies across splits come first


@dataclass(frozen=True)
class Suspect:
    """A sample that wants a look.

    Attributes:
        kind: one of ``KINDS``.
        path: the sample, as its data set calls it.
        label: its class.
        split: the part that it is in.
        other: the sample that it is a copy of.
        other_label: that one's class, or the class that a doubtful label should rather be.
        other_split: the part that the other sample is in.
        score: what suspects of a kind are sorted by: likeness, doubt, distance.
    """

    kind: str
    path: str
    label: str
    split: str
    other: str = ""
    other_label: str = ""
    other_split: str = ""
    score: float = 0.0


@dataclass(frozen=True)
class Leaks:
    """What test accuracy owes to copies of test samples in train and val, and what doubtful test samples cost it.

    Attributes:
        leaked: without the test samples that train or val hold a copy of.
        retrained: the probe less one that was trained without those copies, on the same test samples; ``None`` without any.
        doubtful: without leaked samples, and without those of doubtful labels: an upper end, since those are samples that
            heads get wrong, whether their labels are right or not.
    """

    leaked: Removal
    retrained: Gap | None
    doubtful: Removal


@dataclass(frozen=True, repr=False)
class AuditResult(Displayed):
    """What was found: suspects, copies across splits first; ``dropped``: what a cleaned list leaves out, with the reason.

    ``shift`` is ``None`` where test was drawn, or has too few samples; ``missing`` says what could not be looked for.
    ``doubting``: the heads that doubt labels, and how much each counts (``heads.checks.Doubts.weights``).
    """

    dataset: str
    backbone: str
    samples: Mapping[str, int]
    suspects: tuple[Suspect, ...]
    leaks: Leaks
    shortcuts: tuple[Shortcut, ...]
    shift: Shift | None
    dropped: Mapping[str, str]
    missing: tuple[str, ...] = ()
    doubting: Mapping[str, float] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """How many suspects of each kind each part has; kinds without any are left out."""
        counts = Counter((suspect.kind, suspect.split) for suspect in self.suspects)
        present = [kind for kind in KINDS if any(counts[kind, part] for part in _PARTS)]
        return {kind: {part: counts[kind, part] for part in _PARTS} for kind in present}

    def table(self) -> Table:
        """Return the counts."""
        from featcache.reports.wording import audit_table

        return audit_table(self)

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of ``featcache audit``."""
        summary = {
            "dataset": self.dataset,
            "backbone": self.backbone,
            "samples": dict(self.samples),
            "counts": self.counts,
            "test": asdict(self.leaks),
            "shortcuts": [asdict(shortcut) for shortcut in self.shortcuts],
            "shift": None if self.shift is None else asdict(self.shift),
            "suspects": [asdict(suspect) for suspect in self.suspects],
            "dropped": dict(self.dropped),
            "missing": list(self.missing),
            "doubting": dict(self.doubting),
        }
        return as_stored(summary)


def run_audit(
    cache: FeatureCache, *, beside: Sequence[BackboneSpec] = (), group: str | None = None, seed: int = 0
) -> AuditResult:
    """Look for what makes a data set's scores mean less than they say.

    Rows and thumbnails are those of ``fit``; the probe is the logistic one, fitted or taken from the cache.

    Args:
        cache: the data set and the backbone.
        beside: other backbones, on whose embeddings heads doubt labels too.
        group: a manifest's column whose values are never in two parts.
        seed: of the drawn splits, folds, and the part that thresholds are fitted on.

    Raises:
        DataError: labels are no classes, or there are too few samples.
        UsageError: the features do not fit into memory.
    """
    cache.dataset.require_kind("label")
    cache.dataset.require_thumbnails("an audit")
    entry = cache.features([Output(POOLED)], thumbnails=SIDE)[0]
    if not in_memory(entry.store):
        raise UsageError(f"{cache.dataset.name}: an audit holds all features in memory, and they do not fit.")
    (probe,) = run_fit(cache, FitPlan((PROBE,), group=group, baselines=False), seed=seed).heads
    result = _Audit(cache, entry, probe, seed, tuple(spec for spec in dict.fromkeys(beside) if spec != cache.spec)).result()
    # for reports, which show suspects without looking for them again
    path = entry.store.path / "heads" / f"suspects-seed{seed}.json"
    with suppress(StorageError):  # a cache that cannot be written answers all the same
        keep_note(path, [entry.store.key], {"suspects": [asdict(suspect) for suspect in result.suspects[:_KEPT]]})
    return result


@dataclass(frozen=True)
class _Copy:
    """A sample's nearest copy: which, what of, and how alike; exact ones are 1."""

    other: int
    kind: str
    score: float


@dataclass(frozen=True)
class _Audit:
    cache: FeatureCache
    entry: Extracted
    probe: HeadResult
    seed: int
    beside: tuple[BackboneSpec, ...] = ()

    def result(self) -> AuditResult:
        copies, missing, doubts = list(self._copy_suspects()), [], self._doubts()
        try:
            doubtful = list(self._label_suspects(doubts))
        except SetupError as error:
            doubtful, missing = [], [str(error)]
        sizes, notes = self.headers
        suspects = [*copies, *doubtful, *self._odd_suspects(sizes[:, :2]), *self._outlier_suspects()]
        order = {kind: place for place, kind in enumerate(KINDS)}
        return AuditResult(
            self.entry.store.path.parent.name,
            self.cache.spec.label,
            self.probe.split.sizes(),
            tuple(sorted(suspects, key=lambda suspect: (order[suspect.kind], -suspect.score))),
            self._leaks({suspect.path for suspect in doubtful}),
            tuple(
                shortcuts(
                    measures(self.thumbnails, sizes) | exif_measures(notes), self.y, self.probe.split, self.right, self.seed
                )
            ),
            shift(self.features.X, self.units, self.probe.split, self.probe.fitted.params, self.seed)
            if "test" in self.features.splits
            else None,
            self._dropped(suspects),
            tuple(missing),
            doubts.weights,
        )

    @cached_property
    def features(self) -> Features:
        features = self.entry.store.features()
        return replace(features, X=np.ascontiguousarray(features.X, np.float32))

    @property
    def y(self) -> NDArray[np.int64]:
        return self.features.y

    @property
    def right(self) -> NDArray[np.bool_]:
        return self.probe.fitted.tested.right

    @cached_property
    def part(self) -> NDArray[np.object_]:
        """Which part each sample is in (n,)."""
        part = np.full(len(self.y), "", dtype=object)
        for name in _PARTS:
            part[getattr(self.probe.split, name)] = name
        return part

    @cached_property
    def thumbnails(self) -> NDArray[np.uint8]:
        """The samples' thumbnails (n, 32, 32, 3); what has none is left black, and so is like no other."""
        store = self.cache.thumbnails(SIDE).store
        keep, _, take = aligned(self.probe.task, store)
        thumbnails = np.zeros((len(self.y), SIDE, SIDE, 3), np.uint8)
        thumbnails[keep] = take(np.arange(len(keep)))
        return thumbnails

    @cached_property
    def headers(self) -> tuple[NDArray[np.int64], list[Exif]]:
        """Width, height and bytes of each sample's file (n, 3), and what its camera noted."""
        sizes, notes = np.zeros((len(self.y), 3), np.int64), list[Exif]()
        with progress(len(self.y), "sizes") as bar:
            for place, path in enumerate(self.features.paths):
                content = self.cache.dataset.read(path)
                sizes[place] = (*size_of(content), len(content))
                notes.append(exif_of(content))
                bar.update(1)
        return sizes, notes

    @cached_property
    def first(self) -> NDArray[np.int64]:
        """Of each sample the first of the same bytes (n,)."""
        _, first, number = np.unique(np.array(self.features.sha256, dtype=object), return_index=True, return_inverse=True)
        return first[number].astype(np.int64)

    @cached_property
    def mean(self) -> NDArray[np.float32]:
        mean: NDArray[np.float32] = self.features.X.mean(axis=0)
        return mean

    @cached_property
    def near(self) -> Neighbourhood:
        """Near copies and nearest neighbours of samples of different bytes, by their positions."""
        different = np.unique(self.first)
        limits = self._limits(different)
        rows = unit_rows(self.features.X[different], self.mean)
        around = neighbourhood(rows, self.thumbnails[different], limits)
        if around.is_cut:
            logger.warning("So many samples are alike that copies are told of the first blocks of them only")
        nearest = np.full(len(self.y), 1, np.float32)
        nearest[different] = around.nearest
        pairs = replace(around.pairs, first=different[around.pairs.first], second=different[around.pairs.second])
        return replace(around, pairs=pairs, nearest=nearest)

    @cached_property
    def units(self) -> Units:
        """What must be in one fold: copies of any kind, and samples of one group."""
        everyone = np.arange(len(self.y))
        first, second = self.near.pairs.first, self.near.pairs.second
        numbers = components(len(self.y), np.concatenate([everyone, first]), np.concatenate([self.first, second]))
        contents = [self.features.sha256[place] for place in np.unique(numbers, return_index=True)[1][numbers].tolist()]
        return units_of(len(self.y), contents, self.probe.task.groups)

    def _limits(self, different: NDArray[np.int64]) -> Mapping[bool, Likeness]:
        """Return from when on samples are copies: from the note of an earlier audit, or fitted on copies of a part."""
        experiment = Experiment(
            self.cache, self.probe.task, "audit", {"alterations": list(ALTERATIONS), "above": "others"}, self.seed
        )
        path = experiment.path(self.entry, "audit")
        path = path.with_name(f"{path.name}.json")
        kept = kept_note(
            path,
            [experiment.key],
            lambda note: {name == "mirrored": Likeness(**note[name]) for name in ("plain", "mirrored")},
            "thresholds are fitted again",
        )
        if kept is not None:
            return kept
        odd = np.any(list(oddities(self.thumbnails, self.headers[0][:, :2]).values()), axis=0)
        drawn = np.random.default_rng(self.seed).permutation(different[~odd[different]])[:_DRAWN]
        limits = self._fitted_limits(np.sort(drawn))
        told = {name: asdict(limits[name == "mirrored"]) for name in ("plain", "mirrored")}
        keep_note(path, [experiment.key], told)
        return limits

    def _fitted_limits(self, drawn: NDArray[np.int64]) -> Mapping[bool, Likeness]:
        """Send altered copies of some samples through preprocessing and backbone, and see how alike they have stayed."""
        content = self._altered(drawn)
        if not content:
            return {False: _NEVER, True: _NEVER}
        samples = [Sample(path, "copy") for path in content]
        # a cache of its own, that nobody else's list of entries shows
        with tempfile.TemporaryDirectory(prefix="featcache-audit-") as folder:
            settings = replace(self.cache.settings, cache=Path(folder), part=None, engine="local", rebind=False, max_bad=1.0)
            cache = FeatureCache(Dataset("copies", folder, samples, MemoryReader(content)), self.cache.spec, settings)
            cache.purpose = "altered copies"
            (rows,) = cache.features([Output(POOLED)], thumbnails=SIDE)
            copies, small = rows.store.features(), cache.thumbnails(SIDE).store.features()
        shown = dict(zip(small.paths, np.asarray(small.X).reshape(-1, SIDE, SIDE, 3), strict=True))
        everyone, limits = tone_rows(self.thumbnails), dict[bool, Likeness]()
        for is_mirrored in (False, True):
            originals = self.thumbnails[drawn]
            flipped = mirrored(originals) if is_mirrored else originals
            others = nearest_others(tone_rows(flipped), everyone, drawn)
            limits[is_mirrored] = self._limit(copies, shown, is_mirrored=is_mirrored).above(others)
        return limits

    def _altered(self, drawn: NDArray[np.int64]) -> dict[str, bytes]:
        """Return copies of some samples, by how they were altered and which sample they are of."""
        content: dict[str, bytes] = {}
        for place in drawn.tolist():
            original = self.cache.dataset.read(self.features.paths[place])
            for how in ALTERATIONS:
                try:
                    content[f"{how}/{place}"] = altered(original, how)
                except UnreadableSample as error:
                    logger.debug("%s: %s", self.features.paths[place], error)
        return content

    def _limit(self, copies: Features, shown: Mapping[str, NDArray[np.uint8]], *, is_mirrored: bool) -> Likeness:
        rows = [row for row, path in enumerate(copies.paths) if path.startswith("mirrored") == is_mirrored and path in shown]
        if not rows:
            return _NEVER
        places = np.array([int(copies.paths[row].rpartition("/")[2]) for row in rows], np.int64)
        originals = self.thumbnails[places]
        tones = tone_rows(mirrored(originals) if is_mirrored else originals)
        cosine = (unit_rows(self.features.X[places], self.mean) * unit_rows(copies.X[rows], self.mean)).sum(axis=1)
        correlation = (tones * tone_rows(np.stack([shown[copies.paths[row]] for row in rows]))).sum(axis=1)
        return Likeness.fitted(cosine, correlation)

    @cached_property
    def copies(self) -> Mapping[int, Sequence[_Copy]]:
        """The copies of each sample that has any, exact ones first; of samples of the same bytes the first of each part."""
        members, firsts = defaultdict[int, list[int]](list), defaultdict[int, dict[str, int]](dict)
        for place, first in enumerate(self.first.tolist()):
            members[first].append(place)
            # one a part: a thousand times the same sample would be a million pairs
            firsts[first].setdefault(self.part[place], place)
        copies = defaultdict[int, list[_Copy]](list)
        for first, same in members.items():
            for place in same if len(same) > 1 else ():
                copies[place] += [_Copy(other, "copy", 1.0) for other in firsts[first].values() if other != place]
        pairs = self.near.pairs
        columns = (pairs.first.tolist(), pairs.second.tolist(), pairs.mirrored.tolist(), pairs.cosine.tolist())
        for first, second, is_mirrored, cosine in zip(*columns, strict=True):
            kind = "mirrored copy" if is_mirrored else "near copy"
            for original, twin in ((first, second), (second, first)):
                for place in members[original]:
                    copies[place] += [_Copy(other, kind, cosine) for other in firsts[twin].values()]
        return {place: sorted(several, key=lambda copy: -copy.score) for place, several in copies.items()}

    def _copy_suspects(self) -> Iterator[Suspect]:
        """Yield a suspect a sample: of test with its copy in train or val, of val in train, else with an earlier one."""
        for place, several in self.copies.items():
            own = _PARTS.index(self.part[place])
            across = [copy for copy in several if _PARTS.index(self.part[copy.other]) < own]
            within = [copy for copy in several if _PARTS.index(self.part[copy.other]) == own and copy.other < place]
            if across:
                yield self._suspect(f"{across[0].kind}{ACROSS}", place, across[0].score, across[0].other)
            elif within:
                yield self._suspect(within[0].kind, place, within[0].score, within[0].other)

    def _doubts(self) -> Doubts:
        embeddings = {self.cache.spec.label: self.features.X} | {spec.label: self._rows_beside(spec) for spec in self.beside}
        return out_of_fold(embeddings, self.y, self.units, self.probe.fitted.params, self.seed)

    def _rows_beside(self, spec: BackboneSpec) -> NDArray[np.float32]:
        """Return the samples' embeddings (n, d) by another backbone; the mean of the others where it has none."""
        dataset = replace(self.cache.dataset, notes=())  # they were told
        cache = FeatureCache(dataset, spec, replace(self.cache.settings, part=None), files=self.cache.files)
        cache.purpose = f"{spec.label} beside it"
        features = cache.features([Output(POOLED)])[0].store.features()
        place = {digest: row for row, digest in enumerate(features.sha256)}
        rows = np.tile(np.mean(features.X, axis=0, dtype=np.float64).astype(np.float32), (len(self.y), 1))
        has_row = [number for number, digest in enumerate(self.features.sha256) if digest in place]
        rows[has_row] = features.X[[place[self.features.sha256[number]] for number in has_row]]
        return rows

    def _label_suspects(self, doubts: Doubts) -> Iterator[Suspect]:
        """Yield samples whose label heads doubt that have seen neither them nor their copies."""
        if not len(doubts.places):
            return
        issues, doubt = label_issues(self.y[doubts.places], doubts.shares)
        for issue in issues.tolist():
            suspect = self._suspect("label", int(doubts.places[issue]), float(doubt[issue]))
            yield replace(suspect, other_label=self.features.classes[int(doubts.shares[issue].argmax())])

    def _odd_suspects(self, sizes: NDArray[np.int64]) -> Iterator[Suspect]:
        for kind, mask in oddities(self.thumbnails, sizes).items():
            yield from (self._suspect(kind, place) for place in np.flatnonzero(mask).tolist())

    def _outlier_suspects(self) -> Iterator[Suspect]:
        nearest = self.near.nearest
        for place in outliers(nearest).tolist():
            yield self._suspect("outlier", place, 1 - float(nearest[place]))

    def _suspect(self, kind: str, place: int, score: float = 0.0, other: int | None = None) -> Suspect:
        features = self.features
        suspect = Suspect(kind, features.paths[place], features.classes[self.y[place]], str(self.part[place]), score=score)
        if other is None:
            return suspect
        label, part = features.classes[self.y[other]], str(self.part[other])
        return replace(suspect, other=features.paths[other], other_label=label, other_split=part)

    def _with_copies_in(self, part: str, *, of: Sequence[str]) -> list[int]:
        """Return the samples of some parts that another part holds a copy of."""
        return [
            place
            for place, several in self.copies.items()
            if self.part[place] in of and any(self.part[copy.other] == part for copy in several)
        ]

    def _leaks(self, doubtful: set[str]) -> Leaks:
        split = self.probe.split
        leaked = {place for part in ("train", "val") for place in self._with_copies_in(part, of=["test"])}
        is_leaked = np.isin(split.test, sorted(leaked))
        is_doubtful = np.array([self.features.paths[place] in doubtful for place in split.test.tolist()])
        twins = self._with_copies_in("test", of=["train", "val"])
        rest = split.train_val[~np.isin(split.train_val, twins)]
        retrained = None
        # a class that only copies train would be asked of a head that has never met it
        if twins and set(self.y[rest].tolist()) == set(self.y[split.train_val].tolist()):
            embeddings = Embeddings.of(replace(self.probe.task, features=self.features), 1)
            estimator = embeddings.train(PROBE, self.probe.fitted.params, rest, self.seed)
            tested = embeddings.test(estimator, split)
            retrained = paired_gap(self.right, tested.right, groups=split.test_groups)
        return Leaks(without(self.right, is_leaked), retrained, without(self.right, is_leaked | is_doubtful))

    def _dropped(self, suspects: Sequence[Suspect]) -> dict[str, str]:
        """Return what a cleaned list leaves out, with the reason: the test part stays whole, train gives way to it.

        Near copies within a part, doubtful labels and outliers stay: whether they are wrong only a look can tell.
        """
        twins = (
            (f"copy of a test {self.cache.dataset.kind}", self._with_copies_in("test", of=["train", "val"])),
            (f"copy of a validation {self.cache.dataset.kind}", self._with_copies_in("val", of=["train"])),
        )
        dropped = dict[str, str]()
        for reason, places in twins:
            for place in places:
                dropped.setdefault(self.features.paths[place], reason)
        for suspect in suspects:
            if suspect.kind in {"copy", "blank"}:
                dropped.setdefault(suspect.path, suspect.kind)
        return dropped


def cleaned(dataset: Dataset, dropped: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Return the rows of a manifest of the samples that are not dropped, its header first.

    Raises:
        UsageError: the samples are no files of their own, which a manifest could name.
    """
    if not isinstance(dataset.reader, FileReader):
        raise UsageError(
            f"{dataset.name}: its {dataset.kind}s are no files of their own, so that no manifest can list them."
        )
    root, has_splits = dataset.reader.root.resolve(), any(dataset.table.splits)
    rows = [
        (str(root / sample.path), sample.label, *((sample.split,) if has_splits else ()))
        for sample in dataset.samples
        if sample.path not in dropped
    ]
    return [("path", "label", *(("split",) if has_splits else ())), *rows]
