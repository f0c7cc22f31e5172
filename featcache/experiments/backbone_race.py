"""Which backbone: candidates answer for growing parts of the samples, and those that fall behind are left.

Rounds on parts that double, as in successive halving (Jamieson and Talwalkar 2016), by heads that have not seen what they
answer. Who goes on is no fixed half, but whoever paired draws of samples still give a chance: by the log-loss of ridge,
which tells backbones apart on a hundred samples where accuracies are tied, and by its accuracy. Rows go through the cache,
so that whatever is fitted later finds them. The test split is not looked at.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from featcache.datasets import Dataset
from featcache.datasets.decoding import SIDE
from featcache.display import logger
from featcache.errors import CutError, SetupError, UsageError
from featcache.evaluation import Task
from featcache.evaluation.splits import (
    FOLDS,
    Drawing,
    Fold,
    Index,
    Split,
    Units,
    chances,
    drawn_accuracies,
    drawn_weights,
    fold_of,
    part_of,
    units_of,
)
from featcache.extraction.extract import require_usable
from featcache.extraction.feature_cache import FeatureCache, Output, Settings
from featcache.extraction.files import DatasetFiles
from featcache.heads.search import ridge_shares, search_head
from featcache.specs import POOLED, BackboneSpec
from featcache.store import Features

MARGIN = 0.005  # of accuracy: backbones that are nearer to each other than this are as good as each other
HEADS = ("knn", "ridge")  # that judge backbones
MOST = 1600  # samples of the last part; more tell little for what they cost
_FIRST, _OF_A_CLASS = 100, 5  # samples of the first part, and of each class in it
_IN_THE_RACE = 0.05  # the chance of being better than the leader from which on nobody is left behind
_MOST_LOSS = 5.0  # nats that one sample counts: a single sure mistake is no reason to drop a backbone


@dataclass(frozen=True)
class Pool:
    """The samples that train and choose, of which parts are drawn; those that are tested are not among them.

    Attributes:
        dataset: whose samples they are.
        positions: of the readable samples in the data set (u,).
        task: these samples with their classes; features are empty.
        split: of them, as ``fit`` has it.
        seed: of the draws.
    """

    dataset: Dataset
    positions: Index
    task: Task
    split: Split
    seed: int

    @classmethod
    def of(cls, dataset: Dataset, groups: Mapping[str, str] | None, seed: int) -> "Pool":
        """Return the pool of a data set; where no test samples are given, all are read, since they are drawn by content."""
        dataset.require_kind("label")
        files = DatasetFiles(dataset)
        positions, is_drawn = np.arange(len(files)), "test" not in dataset.table.splits
        if is_drawn:
            files.hash(positions)
            positions = np.array([place for place in positions.tolist() if place not in files.unreadable], np.int64)
        samples = [dataset.samples[place] for place in positions.tolist()]
        number = {name: place for place, name in enumerate(dataset.classes)}
        contents = [files.digest(place).hex() if is_drawn else "" for place in positions.tolist()]
        features = Features(
            np.empty((len(samples), 0)),
            np.array([number[sample.label] for sample in samples], np.int64),
            dataset.classes,
            [sample.path for sample in samples],
            [sample.split for sample in samples],
            contents,
        )
        belongs = None if groups is None else [groups[sample.path] for sample in samples]
        task = Task(features, "label", belongs)
        return cls(dataset, positions, task, task.split(seed), seed)

    @property
    def samples(self) -> Index:
        """The places (p,) of the samples that may be looked at."""
        return self.split.train_val

    @property
    def y(self) -> Index:
        """The classes (u,) of all."""
        return self.task.features.y

    @property
    def classes(self) -> int:
        """How many classes the samples that may be looked at have."""
        return len(np.unique(self.y[self.samples]))

    @property
    def first(self) -> int:
        """How many samples the first part has."""
        return min(max(_FIRST, _OF_A_CLASS * self.classes), self.most)

    @property
    def most(self) -> int:
        """How many samples the last part has at most."""
        return min(max(MOST, _OF_A_CLASS * self.classes), len(self.samples))

    def drawn(self, size: int) -> Index:
        """Return about so many samples (k,), as many of each class as its share; larger parts hold the smaller."""
        nothing = np.empty(0, np.int64)
        inside = Split(self.samples, nothing, nothing, groups=self.split.groups, same=self.split.same)
        return part_of(inside, self.y, size / len(self.samples), self.seed, self.task.features.sha256).train

    def part(self, places: Index) -> Dataset:
        """Return a data set of some samples, in the place of the whole: rows are shared with it."""
        samples = [self.dataset.samples[place] for place in self.positions[places].tolist()]
        return replace(self.dataset, samples=samples, notes=())

    def units(self, places: Index, contents: Sequence[str]) -> Units:
        """Return what must not be parted of some samples: copies, and groups."""
        groups = self.task.groups
        return units_of(len(places), contents, None if groups is None else [groups[place] for place in places.tolist()])


@dataclass(eq=False)
class Runner:
    """A backbone in the race: its rows of parts, and what they took."""

    spec: BackboneSpec
    settings: Settings
    cache: FeatureCache | None = None
    seconds: float = 0.0
    computed: int = 0

    def rows(self, pool: Pool, places: Index, cuts: Sequence[str] = (POOLED,)) -> tuple[list[NDArray[np.generic]], Index]:
        """Return the rows of some samples at some cuts, and which of the samples have them all (k,), by their order.

        Raises:
            FeatcacheError: the backbone cannot be had, or too many samples cannot be used.
        """
        started, dataset = time.monotonic(), pool.part(places)
        # the entry goes on listing what it lists: a part is no data set
        cache = FeatureCache(dataset, self.spec, self.settings, lists=False)
        cache.purpose = f"{self.spec.label} as a candidate"
        if self.cache is not None and "backbone" in self.cache.__dict__:
            cache.backbone = self.cache.backbone
        self.cache = cache
        entries = cache.features([Output(cut) for cut in cuts], thumbnails=SIDE)
        has_row = np.sort(entries[0].report.positions)
        for entry in entries:
            require_usable(dataset, len(entry.report.positions), entry.report.quarantined, self.settings.max_bad)
            has_row = np.intersect1d(has_row, entry.report.positions)
        rows = [entry.store.rows_of(cache.files.sha256[has_row]) for entry in entries]
        computed = max(entry.report.computed for entry in entries)
        if computed:  # what was cached says nothing of the price
            self.computed, self.seconds = self.computed + computed, self.seconds + time.monotonic() - started
        return rows, has_row

    def digests(self, has_row: Index) -> list[str]:
        """Return the SHA-256 of samples of the last part, as hexadecimal digits."""
        assert self.cache is not None
        return [row.tobytes().hex() for row in self.cache.files.sha256[has_row]]

    def price(self, samples: int) -> float:
        """Return about how many seconds so many more samples take, 0 where none was computed yet."""
        return samples * self.seconds / self.computed if self.computed else 0.0


@dataclass(frozen=True)
class Judged:
    """A part with its folds, and which of its samples each runner has right.

    Attributes:
        places: of the samples in the pool (k,).
        y: their classes (k,).
        folds: over them.
        units: what is drawn together.
        X: the runners' embeddings, each (k, d).
        right: of each runner and head, which samples it has right when it has not seen them (k,).
        params: of each runner and head, what was chosen.
    """

    places: Index
    y: Index
    folds: tuple[Fold, ...]
    units: Units
    X: list[NDArray[np.float32]]
    right: list[dict[str, NDArray[np.bool_]]] = field(default_factory=list)
    params: list[dict[str, dict[str, float]]] = field(default_factory=list)

    def scored(self) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Return which samples each runner's ridge has right, and its log-loss of each (r, k), unseen by it."""
        order = np.concatenate([fold.val for fold in self.folds])
        right = np.zeros((len(self.X), len(self.y)), np.bool_)
        losses = np.zeros(right.shape)
        for number, embeddings in enumerate(self.X):
            shares = ridge_shares(embeddings, self.y, self.folds)
            right[number, order] = shares.argmax(axis=1) == self.y[order]
            own = np.maximum(shares[np.arange(len(order)), self.y[order]], np.exp(-_MOST_LOSS))
            losses[number, order] = -np.log(own)
        return right, losses

    def answer(self, head: str, X: NDArray[np.float32], seed: int) -> tuple[NDArray[np.bool_], dict[str, float]]:
        """Return which samples a head has right that has not seen them (k,), and what was chosen for it."""
        search = search_head(head, X, self.y, self.folds, seed)
        order = np.concatenate([fold.val for fold in self.folds])
        told = search.answers.argmax(axis=1) if search.answers.ndim == 2 else search.answers
        right = np.zeros(len(self.y), np.bool_)
        right[order] = told == self.y[order]
        return right, search.params


def judge_part(pool: Pool, runners: Sequence[Runner], places: Index) -> Judged:
    """Extract a part's rows by every runner, and see which samples each has right, on the same folds."""
    rows = [runner.rows(pool, places) for runner in runners]
    common = rows[0][1]
    for _, has_row in rows[1:]:
        common = np.intersect1d(common, has_row)
    chosen, y = places[common], pool.y[places[common]]
    units = pool.units(chosen, runners[0].digests(common))
    X = [np.ascontiguousarray(of[0][np.isin(has_row, common)], np.float32) for of, has_row in rows]
    judged = Judged(chosen, y, _whole_folds(y, units, pool), units, X)
    for embeddings in X:
        by_head = {head: judged.answer(head, embeddings, pool.seed) for head in HEADS}
        judged.right.append({head: right for head, (right, _) in by_head.items()})
        judged.params.append({head: params for head, (_, params) in by_head.items()})
    return judged


def _whole_folds(y: Index, units: Units, pool: Pool) -> tuple[Fold, ...]:
    drawing = Drawing(y, (), units, pool.seed, grouped=pool.task.groups is not None)
    everyone, count = np.arange(len(y)), min(FOLDS, len(units.names))
    number = fold_of(everyone, drawing, count)
    folds = (Fold(everyone[number != fold], everyone[number == fold]) for fold in range(count))
    return tuple(fold for fold in folds if len(fold.val) and len(np.unique(y[fold.train])) > 1)


@dataclass(frozen=True)
class Standing:
    """How a backbone did in the last round that it was in.

    Attributes:
        runner: the backbone.
        samples: of the part.
        accuracies: of each head on samples that it had not seen.
        chance: of being the best there, or as good.
        log_loss: of ridge there, by which backbones are ranked.
        is_left: whether it fell behind before the end.
    """

    runner: Runner
    samples: int
    accuracies: Mapping[str, float]
    chance: float
    log_loss: float
    is_left: bool = False


@dataclass(frozen=True)
class Round:
    """What draws of a part's samples say of those that were in the race.

    Attributes:
        alive: their numbers (r,).
        accuracies: of each in each draw (draws, r).
        losses: the log-losses (draws, r).
    """

    alive: list[int]
    accuracies: NDArray[np.float64]
    losses: NDArray[np.float64]

    def doubt(self, best: int, rivals: Sequence[int]) -> float:
        """Return the chance that any of some is better than ``best``: by log-loss, or by accuracy and more than the margin.

        The greater of both: where the two disagree on who is ahead, nobody is sure.
        """
        if not rivals:
            return 0.0
        place, others = self.alive.index(best), [self.alive.index(number) for number in rivals]
        accurate = self.accuracies[:, others].max(axis=1) > self.accuracies[:, place] + MARGIN
        likely = self.losses[:, others].min(axis=1) < self.losses[:, place]
        return float(max(accurate.mean(), likely.mean()))


@dataclass
class Race:
    """Rounds on parts that double, after each of which those without a chance against the leader are left."""

    pool: Pool
    runners: list[Runner]
    deadline: float | None = None
    standings: dict[int, Standing] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    stopped: bool = False

    def run(self) -> tuple[Runner, float]:
        """Return the backbone that won, and the chance that no other is better by more than the margin."""
        alive, size = self._able(), self.pool.first
        while True:
            alive = self._round(alive, size)
            if len(alive) == 1 or size >= self.pool.most:
                break
            if self._is_late(alive, size):
                self.stopped = True
                break
            size = min(2 * size, self.pool.most)
        best = min(alive, key=lambda number: self.standings[number].log_loss)
        return self.runners[best], self._chance(best)

    def _able(self) -> list[int]:
        """Return the runners whose backbone can be had here."""
        able, reason = list[int](), UsageError("`backbones`: at least one is needed.")
        places = self.pool.drawn(self.pool.first)
        for number, runner in enumerate(self.runners):
            try:
                runner.rows(self.pool, places)
            except (SetupError, UsageError, CutError) as error:
                logger.warning("%s is left out: %s", runner.spec.label, error)
                reason = error  # type: ignore[assignment]
                continue
            able.append(number)
        if not able:
            raise reason
        return able

    def _round(self, alive: list[int], size: int) -> list[int]:
        """Judge those in the race on a part; return those that stay in it."""
        judged = judge_part(self.pool, [self.runners[number] for number in alive], self.pool.drawn(size))
        weights = drawn_weights(judged.units.numbers, self.pool.seed)
        right, losses = judged.scored()
        drawn = drawn_accuracies(right, weights)
        by_draw = (weights @ losses.T.astype(np.float32)) / weights.sum(axis=1, keepdims=True)
        self.rounds.append(Round(alive, drawn, by_draw.astype(np.float64)))
        told = zip(alive, chances(drawn, MARGIN).tolist(), judged.right, losses.mean(axis=1).tolist(), strict=True)
        for number, chance, by_head, loss in told:
            accuracies = {head: float(hits.mean()) for head, hits in by_head.items()}
            self.standings[number] = Standing(self.runners[number], len(judged.y), accuracies, chance, loss)
        if size >= self.pool.most:
            return alive
        leader = min(alive, key=lambda number: self.standings[number].log_loss)
        stay = [number for number in alive if number == leader or self.rounds[-1].doubt(leader, [number]) >= _IN_THE_RACE]
        for number in set(alive) - set(stay):
            self.standings[number] = replace(self.standings[number], is_left=True)
        return stay

    def _is_late(self, alive: Sequence[int], size: int) -> bool:
        """Tell whether the next round would end after the deadline."""
        more = min(size, self.pool.most - size)
        price = sum(self.runners[number].price(more) for number in alive)
        return self.deadline is not None and time.monotonic() + price > self.deadline

    def _chance(self, best: int) -> float:
        """Return the chance that nobody is better than the winner by more than the margin.

        By the last round of each of the others: that anybody is is at most as likely as the sum of all (Boole).
        """
        doubt, seen = 0.0, {best}
        for last in reversed(self.rounds):
            doubt += last.doubt(best, [number for number in last.alive if number not in seen])
            seen.update(last.alive)
        return max(0.0, 1 - doubt)
