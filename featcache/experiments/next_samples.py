"""Which samples to label next, from cached rows, and what that saved on the labels that are there."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache.display import Displayed, Table, csv_cell, progress
from featcache.errors import DataError, UsageError
from featcache.evaluation.intervals import Interval
from featcache.evaluation.likeness import Crowd, herd, unit_rows
from featcache.evaluation.metrics import at_temperature, best_temperature
from featcache.evaluation.splits import FOLDS, Drawing, Fold, Units, draw, drawing_order, fold_of, units_of
from featcache.extraction.extract import require_usable
from featcache.extraction.feature_cache import FeatureCache
from featcache.heads.search import predict_with, search_head, train
from featcache.reports.wording import manifest_csv

Rows = NDArray[np.float32]
Index = NDArray[np.int64]
Rule = Literal["coverage", "unsure"]

# From so many labels a class on, on average, what the probe is unsure of counts more. With fewer its doubts are noise, and
# following them cost up to 9 points against coverage alone (benchmarks/next.md).
USABLE = 20
# Of few labels C is not chosen: folds of five a class choose at random, and samples that are chosen to be unlike each other
# make every fold look hard, so that too strong a penalty wins. scikit-learn's own value was near the best everywhere.
_PARAMS = {"C": 1.0}
SHOTS = 5
_LATE_SHOTS = 2 * USABLE
DRAWS, _RANDOM = 10, 5  # simulations, and random choices in each
_HELD_OF_REST = 0.25  # of a fifth held out and the rest
_MOST_POOL, _MOST_HELD = 2000, 2000  # samples of a simulation: more would take longer, not say more


@dataclass(frozen=True)
class NextSample:
    """A sample to label: ``share`` of the samples are nearer to it than to all that are labelled, or chosen with it.

    ``unsure``: how little the probe tells its two likeliest classes apart, from 0 to 1, where the rule asks the probe.
    """

    path: str
    share: float
    unsure: float | None = None


@dataclass(frozen=True)
class Saving:
    """What choosing so was worth on the labels that are there, which were hidden and given again one by one.

    Attributes:
        shots: labels a class, on average.
        labels: how many were given.
        accuracy: of a logistic probe on samples held out, trained on the chosen ones; a mean over draws.
        random: of the same probe, trained on as many drawn at random.
        points: how many points more the chosen ones were worth.
        ci: a 95 % interval of that, over draws.
        draws: how many.
    """

    shots: int
    labels: int
    accuracy: float
    random: float
    points: float
    ci: Interval
    draws: int

    @property
    def is_better(self) -> bool:
        """Tell whether the interval lies above 0."""
        return self.ci[0] > 0


@dataclass(frozen=True, repr=False)
class NextResult(Displayed):
    """What to label next, the most useful first.

    ``saving`` is ``None`` where there are too few labels to simulate on.
    """

    dataset: str
    backbone: str
    kind: str
    labelled: int
    unlabelled: int
    classes: int
    rule: Rule
    samples: tuple[NextSample, ...]
    saving: Saving | None

    def table(self) -> Table:
        """Return what to label."""
        rows = [
            (str(number), sample.path, f"{100 * sample.share:.1f} %", *_doubt_cell(sample.unsure))
            for number, sample in enumerate(self.samples, 1)
        ]
        headers = ("", "label next", "stands for", *(("unsure",) if self.rule == "unsure" else ()))
        counts = f"{self.labelled} labelled {self.kind}s of {self.classes} classes, {self.unlabelled} unlabelled"
        return Table(headers, rows, f"{self.dataset}, {self.backbone}: {counts}", f"{self.reason} {self.worth}")

    @property
    def reason(self) -> str:
        """By which rule these were chosen, and why by that one."""
        if self.rule == "unsure":
            return (
                f"Chosen: what stands for most of what the probe is unsure of; there are at least {USABLE} labels a class."
            )
        few = f"fewer than {USABLE} labels a class, too few to go by a probe's doubts"
        return f"Chosen: what stands for most of what no label stands for; there are {few}."

    @property
    def worth(self) -> str:
        """What the simulation says."""
        saving = self.saving
        if saving is None:
            return "What that is worth cannot be simulated: there are too few labels."
        low, high = saving.ci
        told = "" if saving.is_better else "; not better than random here"
        gain = f"{saving.points:+.1f} points ({low:+.1f} to {high:+.1f}){told}."
        chosen = f"{100 * saving.accuracy:.1f} % with {saving.labels} chosen so"
        return f"On the labels that are there: {chosen}, {100 * saving.random:.1f} % with as many at random: {gain}"

    @property
    def csv(self) -> str:
        """The samples as CSV; a cell that a spreadsheet would run as a formula is quoted with an apostrophe."""
        rows = (
            [csv_cell(sample.path), f"{sample.share:.6g}", "" if sample.unsure is None else f"{sample.unsure:.6g}"]
            for sample in self.samples
        )
        return manifest_csv([("path", "share", "unsure"), *rows])

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of ``featcache next``."""
        return {
            "dataset": self.dataset,
            "backbone": self.backbone,
            "labelled": self.labelled,
            "unlabelled": self.unlabelled,
            "classes": self.classes,
            "rule": self.rule,
            "samples": [asdict(sample) for sample in self.samples],
            "saving": None if self.saving is None else asdict(self.saving) | {"is_better": self.saving.is_better},
        }


@dataclass(frozen=True)
class Samples:
    """Different samples, in the order of their contents, that may be trained on or labelled.

    Attributes:
        paths: one of each content.
        X: embeddings (n, d).
        rows: those less their mean, of length 1 (n, d).
        y: classes (n,), -1 where there is none.
        units: groups, else each its own.
    """

    paths: tuple[str, ...]
    X: Rows
    rows: Rows
    y: Index
    units: Units

    @property
    def labelled(self) -> Index:
        """The places of what has a label."""
        return np.flatnonzero(self.y >= 0)

    @property
    def pool(self) -> Index:
        """The places of what has none."""
        return np.flatnonzero(self.y < 0)

    @property
    def classes(self) -> int:
        """How many classes labels name."""
        return len(np.unique(self.y[self.y >= 0]))


def run_next(cache: FeatureCache, groups: Mapping[str, str] | None, count: int, seed: int = 0) -> NextResult:
    """Choose what to label next among the samples without a label.

    Test samples neither train nor are chosen, nor is what has the content of one. Copies are one sample, and of a group one
    is chosen before another of it.

    Args:
        cache: the data set, whose samples have the label "" where they have none, beside a backbone.
        groups: what each path belongs to.
        count: how many to choose.
        seed: of the simulation; the choice itself draws nothing.

    Raises:
        UsageError: ``count`` is no number of samples.
        DataError: there is nothing without a label.
    """
    if count < 1:
        raise UsageError(f"`n` {count}: at least 1 is needed.")
    samples = read_samples(cache, groups)
    pool, labelled = samples.pool, samples.labelled
    if not len(pool):
        raise DataError(
            f"{cache.dataset.location}: there is nothing to label: each {cache.dataset.kind} has a label, or the content of "
            "one that has. Name some with `unlabelled`, or leave labels empty in a CSV."
        )
    unsure = doubts(samples, labelled, pool, seed)
    return NextResult(
        cache.folder.name,
        cache.spec.label,
        cache.dataset.kind,
        len(labelled),
        len(pool),
        samples.classes,
        "coverage" if unsure is None else "unsure",
        _chosen(samples, count, unsure),
        simulate(samples, seed),
    )


def _chosen(samples: Samples, count: int, unsure: Rows | None) -> tuple[NextSample, ...]:
    """Return what to label, by coverage of what no label stands for, or by how unsure a probe is of the pool (p,), too."""
    pool, labelled = samples.pool, samples.rows[samples.labelled]
    crowd = Crowd.of(samples.rows[pool], samples.units.numbers[pool])
    places = herd(crowd, labelled, count, unsure)
    shares = crowd.shares(crowd.rows[places], labelled)
    told = [None] * len(places) if unsure is None else unsure[places].tolist()
    listed = zip(pool[places].tolist(), shares.tolist(), told, strict=True)
    return tuple(NextSample(samples.paths[place], share, doubt) for place, share, doubt in listed)


def read_samples(cache: FeatureCache, groups: Mapping[str, str] | None) -> Samples:
    """Return the samples of a data set that are no test samples, nor copies of any, with their embeddings."""
    dataset = cache.dataset
    dataset.require_kind("label")
    entry = cache.extracted()
    has_row = np.sort(entry.report.positions)
    require_usable(dataset, len(has_row), entry.report.quarantined, cache.settings.max_bad)
    number = {label: place for place, label in enumerate(label for label in dataset.classes if label)}
    first: dict[str, int] = {}
    banned: set[str] = set()
    # what has a label comes before what has none: a copy of it is labelled already
    for place in sorted(has_row.tolist(), key=lambda place: not dataset.samples[place].label):
        content = cache.files.digest(place).hex()
        if dataset.samples[place].split == "test":
            banned.add(content)
        else:
            first.setdefault(content, place)
    places = [place for content, place in sorted(first.items()) if content not in banned]
    chosen = [dataset.samples[place] for place in places]
    X = np.asarray(entry.store.rows_of(cache.files.sha256[np.array(places, np.int64)]), np.float32)
    belongs = None if groups is None else [groups.get(sample.path) or sample.path for sample in chosen]
    units = units_of(len(places), [cache.files.digest(place).hex() for place in places], belongs)
    y = np.array([number.get(sample.label, -1) for sample in chosen], np.int64)
    return Samples(tuple(sample.path for sample in chosen), X, unit_rows(X, X.mean(axis=0)), y, units)


def doubts(samples: Samples, labelled: Index, asked: Index, seed: int) -> Rows | None:
    """Return how unsure a probe on the labelled samples is of others (n,), 0 to 1; ``None`` where there are too few labels.

    That is 1 less the margin of its two greatest probabilities, scaled by the temperature that folds of the labelled ones
    choose: without it a probe that has few labels is sure of everything.
    """
    y = samples.y[labelled]
    classes = int(samples.y.max()) + 1
    present = np.unique(y)
    if len(present) < 2 or len(y) < USABLE * len(present):
        return None
    drawing = Drawing(samples.y, (), samples.units, seed, grouped=False)
    fold = fold_of(labelled, drawing, FOLDS)
    folds = [Fold(labelled[fold != number], labelled[fold == number]) for number in range(FOLDS)]
    usable = [each for each in folds if len(each.val) and len(np.unique(samples.y[each.train])) > 1]
    held = np.concatenate([each.val for each in usable])
    answers = search_head("logistic", samples.X, samples.y, usable, seed, [_PARAMS]).answers
    temperature = best_temperature(samples.y[held], answers) or 1.0
    probe = train("logistic", _PARAMS, samples.X[labelled], y, seed)
    shares = at_temperature(predict_with(probe, samples.X[asked], "label", classes), temperature)
    second, greatest = np.partition(shares, -2, axis=1)[:, -2:].T
    unsure: Rows = (1 - (greatest - second)).astype(np.float32)
    return unsure


def choose(samples: Samples, pool: Index, count: int, seed: int) -> Index:
    """Return what the rule would label of a pool (k,) without any label, the doubts asked once there are enough."""
    crowd = Crowd.of(samples.rows[pool], samples.units.numbers[pool])
    early = pool[herd(crowd, samples.rows[:0], min(count, USABLE * samples.classes))]
    if len(early) == count:
        return early
    rest = pool[~np.isin(pool, early)]
    crowd = Crowd.of(samples.rows[rest], samples.units.numbers[rest])
    late = herd(crowd, samples.rows[early], count - len(early), doubts(samples, early, rest, seed))
    return np.concatenate([early, rest[late]])


def simulate(samples: Samples, seed: int) -> Saving | None:
    """Return what the rule is worth on the labelled samples; ``None`` of too few.

    Each draw holds a fifth out, hides the labels of the others, and trains one probe on what the rule takes of them, and
    others on as many at random. Late, where the rule asks the probe, as many are taken as make it do so.
    """
    labelled = samples.labelled
    units = len(np.unique(samples.units.numbers[labelled]))
    # twice as many must be left to choose from: of what is nearly used up any choice is the same
    affordable = int(0.8 * units / (2 * max(samples.classes, 1)))
    shots = _LATE_SHOTS if affordable >= _LATE_SHOTS else min(SHOTS, affordable)
    if samples.classes < 2 or shots < 1:
        return None
    count = shots * samples.classes
    chosen, random = [], []
    with progress(DRAWS, "simulate", unit="draw") as bar:
        for number in range(DRAWS):
            pool, held = _hidden(samples, labelled, seed + number, max(_MOST_POOL, 4 * count))
            chosen.append(accuracy_with(samples, choose(samples, pool, count, seed), held, seed))
            drawn = [drawing_order(samples.units, pool, seed + number, f"random {turn}")[:count] for turn in range(_RANDOM)]
            random.append([accuracy_with(samples, each, held, seed) for each in drawn])
            bar.update(1)
    accuracies, at_random = np.array(chosen), np.array(random)
    points = 100 * float(accuracies.mean() - at_random.mean())
    interval = _interval(100 * accuracies, 100 * at_random)
    return Saving(shots, count, float(accuracies.mean()), float(at_random.mean()), points, interval, DRAWS)


def _hidden(samples: Samples, labelled: Index, seed: int, most: int) -> tuple[Index, Index]:
    """Return labelled samples whose labels are hidden, to choose from, and a fifth that is held out; no unit is in both."""
    drawing = Drawing(samples.y, (), samples.units, seed, grouped=True)
    pool, held = draw(labelled, drawing, "held out", leave=1)
    pool = np.sort(drawing_order(samples.units, pool, seed, "pool")[:most])
    return pool, drawing_order(samples.units, held, seed, "held")[:_MOST_HELD]


def accuracy_with(samples: Samples, trained: Index, held: Index, seed: int) -> float:
    """Return the accuracy on held-out samples of the probe that some samples train."""
    y = samples.y[trained]
    if len(np.unique(y)) < 2:  # one class is all that it could tell
        return float((samples.y[held] == y[0]).mean())
    probe = train("logistic", _PARAMS, samples.X[trained], y, seed)
    answers = predict_with(probe, samples.X[held], "label", int(samples.y.max()) + 1)
    return float((answers.argmax(axis=1) == samples.y[held]).mean())


def _interval(accuracies: NDArray[np.float64], random: NDArray[np.float64]) -> Interval:
    """Return a 95 % interval of what draws (k,) have more, on average, than random choices in each (k, r).

    Draws hold out a fifth each of the same samples, so that they are no independent evidence: their variance is taken as of
    Nadeau and Bengio (2003, section 3). What random choices vary by within a draw is independent, and is counted as such.
    """
    from scipy.stats import t

    gains, (count, turns) = accuracies - random.mean(axis=1), random.shape
    within = float(random.var(axis=1, ddof=1).mean()) / turns
    between = max(0.0, float(gains.var(ddof=1)) - within)
    reach = float(t.ppf(0.975, count - 1)) * float(np.sqrt(within / count + between * (1 / count + _HELD_OF_REST)))
    return float(gains.mean()) - reach, float(gains.mean()) + reach


def _doubt_cell(unsure: float | None) -> tuple[str, ...]:
    return () if unsure is None else (f"{100 * unsure:.0f} %",)
