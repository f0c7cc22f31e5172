"""Advice from measurements on a part: which backbone, whether to train its weights, and what more samples would bring."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache.backbones import BUNDLED
from featcache.datasets.decoding import SIDE, statistics
from featcache.display import Displayed, Table, logger, progress
from featcache.errors import CutError, UsageError
from featcache.evaluation.metrics import Gap, paired_gap
from featcache.evaluation.splits import Fold, Index, MoreSamples, drawn_accuracies, drawn_weights, more_samples, round_count
from featcache.experiments.backbone_race import MARGIN, Judged, Pool, Race, Runner, Standing, judge_part
from featcache.extraction import entry_folders
from featcache.extraction.feature_cache import FeatureCache, remark_on_toy
from featcache.finetuning import RATES, FineTunePlan, Unfreeze
from featcache.fingerprint import as_stored
from featcache.heads.baselines import standardised
from featcache.heads.search import predict_with, train
from featcache.specs import POOLED, BackboneSpec, cut_of_layers
from featcache.store.entry import FeatureStore

if TYPE_CHECKING:
    from featcache.backbones.base import Backbone
    from featcache.finetuning.model import LinearHead, Trainable

Depth = Literal["features", "last", "all"]
CURVE_HEAD = "ridge"
_LAYERS = 4  # as of a gap's step
_SHARES, _REPEATS = (0.125, 0.25, 0.5, 1.0), 2
_FEWEST_IN_A_CURVE = 2  # samples of each class
_TRAINS = 0.6  # of the part, in the short training: the rest judges it
_STEP = 0.5  # of the seconds of extracting a sample, that a step of training takes for one, about
FEW, MANY = 1000, 20_000  # training samples, of the textbook rule, which gives no numbers
SURE = 0.9  # below that a choice is called open
ERROR_LEFT = 0.1  # after the short training, from which on all weights are worth a try
DEPTH = "last:1"
PROBE_HEAD = "logistic"  # where fine-tuning starts
EPOCHS = 5
TRIED = RATES[1:]  # the lowest needs more epochs than these to get anywhere


@dataclass(frozen=True)
class Evidence:
    """What was measured of the best backbone, on samples of train and val alone; what was not is ``None``.

    Attributes:
        samples: that train and choose, in the whole data set.
        classes: that they have.
        seen: of the last part.
        majority: share of the commonest class.
        statistics: accuracy of neighbours by statistics of thumbnails, without a backbone.
        accuracies: of each head on features, on samples that it had not seen.
        layers: points that ridge on several layers adds to ridge on the last.
        tuned: points that a short training of the last stage adds to its probe.
        pays: the chance that these are more than the margin.
        error_left: the share of samples that the short training leaves wrong.
    """

    samples: int
    classes: int
    seen: int
    majority: float
    statistics: float
    accuracies: dict[str, float]
    layers: Gap | None = None
    tuned: Gap | None = None
    pays: float | None = None
    error_left: float | None = None

    @property
    def is_similar(self) -> bool | None:
        """Whether the last features are what the task asks for: earlier ones add nothing that could be told from noise."""
        return None if self.layers is None else not (self.layers.ci is not None and self.layers.ci[0] > 0)

    @property
    def depth(self) -> tuple[Depth, float | None]:
        """What to train, and the chance that training weights pays, or that it does not where features alone are advised.

        ``None`` where it was not tried.
        """
        if self.pays is None:
            return ("features" if self.is_similar in {True, None} else "last"), None
        # a training that gains nothing answers with its probe: to try costs time, not to try may cost accuracy
        if 1 - self.pays >= SURE:
            return "features", 1 - self.pays
        many_wrong = (self.error_left or 0.0) >= ERROR_LEFT
        return ("all" if self.pays >= 0.5 and many_wrong else "last"), self.pays

    @property
    def is_open(self) -> bool:
        """Whether the short training is not sure that training weights pays, nor that it does not."""
        return self.pays is not None and max(self.pays, 1 - self.pays) < SURE

    @property
    def textbook(self) -> Depth | None:
        """What the usual rule says (Karpathy, CS231n, transfer learning), by samples and whether their kind is similar."""
        if self.samples >= MANY:
            return "all"
        if self.is_similar is None:
            return None
        if self.samples < FEW:
            return "features" if self.is_similar else "last"
        return "last" if self.is_similar else "all"


@dataclass(frozen=True, repr=False)
class AdviceResult(Displayed):
    """Advice and what it rests on.

    Attributes:
        dataset: its name.
        backbone: the best one.
        chance: that no other candidate is better by more than the margin.
        standings: of all candidates, the best first.
        evidence: about the best one.
        more: what more samples would bring; ``None`` where the curve does not tell.
        missing: what the budget left no time for, or could not be measured.
        seconds: by what they were spent on.
    """

    dataset: str
    backbone: BackboneSpec
    chance: float
    standings: tuple[Standing, ...]
    evidence: Evidence
    more: MoreSamples | None = None
    missing: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def depth(self) -> Depth:
        """What to train: a head on features only, the last stages, or all."""
        return self.evidence.depth[0]

    @property
    def is_open(self) -> bool:
        """Whether it is not sure that no other candidate is better."""
        return self.chance < SURE

    def table(self) -> Table:
        """Return the candidates."""
        from featcache.reports.wording import advice_table

        return advice_table(self)

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of ``featcache advise``."""
        depth, sure = self.evidence.depth
        summary = {
            "dataset": self.dataset,
            "backbone": self.backbone.text,
            "backbone_chance": self.chance,
            "train": depth,
            "train_chance": sure,
            "textbook": self.evidence.textbook,
            "candidates": [
                as_stored(
                    {
                        "backbone": standing.runner.spec.text,
                        "samples": standing.samples,
                        "accuracy": dict(standing.accuracies),
                        "chance": standing.chance,
                        "log_loss": standing.log_loss,
                        "left": standing.is_left,
                        "seconds_a_sample": standing.runner.price(1) or None,
                    }
                )
                for standing in self.standings
            ],
            "evidence": as_stored(asdict(self.evidence)),
            "more_samples": None if self.more is None else as_stored(asdict(self.more)),
            "missing": list(self.missing),
            "seconds": self.seconds,
        }
        return as_stored(summary)


def run_advise(
    cache: FeatureCache,
    specs: Sequence[BackboneSpec],
    *,
    group: str | None = None,
    seed: int = 0,
    budget: float | None = None,
) -> AdviceResult:
    """Find the backbone that does best on parts, and measure on its last part what speaks for training weights.

    The test split is neither computed nor looked at. Rows of parts stay in the cache.

    Args:
        cache: the data set, and where its rows are kept; its backbone says nothing here.
        specs: candidates beside the bundled ones and those that have rows of this data set already.
        group: a manifest's column whose values are never in two parts.
        seed: of splits, parts and draws.
        budget: seconds after which no further step is begun.

    Raises:
        DataError: labels are no classes, or too few samples can be used.
        UsageError: no candidate can be had here.
    """
    started = time.monotonic()
    pool = Pool.of(cache.dataset, None if group is None else cache.files.groups(group), seed)
    settings = replace(cache.settings, part=None, engine="local")
    runners = [Runner(spec, settings) for spec in candidates(cache, specs)]
    deadline = None if budget is None else started + budget
    race = Race(pool, runners, deadline)
    runner, chance = race.run()
    remark_on_toy(runner.spec, cache.dataset)
    raced = time.monotonic()
    best_first = sorted(
        race.standings.values(), key=lambda standing: (standing.is_left, -standing.samples, standing.log_loss)
    )
    missing = ["larger parts for the last candidates"] if race.stopped else []
    evidence, more = Study(pool, runner, deadline, missing).evidence()
    seconds = {"backbones": round(raced - started, 3), "evidence": round(time.monotonic() - raced, 3)}
    return AdviceResult(cache.folder.name, runner.spec, chance, tuple(best_first), evidence, more, tuple(missing), seconds)


def candidates(cache: FeatureCache, specs: Sequence[BackboneSpec]) -> list[BackboneSpec]:
    """Return those asked for, the bundled ones, and those of which the cache has rows of this data set; each once."""
    bundled = [BackboneSpec(name) for name in reversed(BUNDLED)]
    return list(dict.fromkeys([*specs, *bundled, *_cached(cache)]))


def _cached(cache: FeatureCache) -> list[BackboneSpec]:
    """Return the backbones that a data set's entries name; one whose weights are a file cannot be told from there."""
    specs = []
    for path in entry_folders(cache.folder.parent):
        if path.parent != cache.folder or f".{POOLED}-" not in path.name:
            continue
        for request in FeatureStore.open(path).requests():
            with suppress(KeyError, TypeError, UsageError):
                is_plain = request["cut"] == POOLED and request["count"] == 1 and request["weights"] is None
                if is_plain and not request["name"].startswith("local-dir:"):
                    specs.append(BackboneSpec.of_facts(request, None))
    return specs


@dataclass
class Study:
    """What is measured of the winner, the cheapest first."""

    pool: Pool
    runner: Runner
    deadline: float | None
    missing: list[str]

    def evidence(self) -> tuple[Evidence, MoreSamples | None]:
        """Return what was measured, as far as there was time."""
        pool = self.pool
        places = pool.drawn(pool.most)
        if self._is_late("the largest part", self.runner.price(pool.most - self.runner.computed)):
            places = pool.drawn(min(pool.most, max(pool.first, self.runner.computed)))
        judged = judge_part(pool, [self.runner], places)
        (X,), (right,) = judged.X, judged.right
        probe, params = judged.answer(PROBE_HEAD, X, pool.seed)
        counts = np.bincount(pool.y[pool.samples])
        measured = Evidence(
            len(pool.samples),
            pool.classes,
            len(judged.y),
            float(counts.max() / counts.sum()),
            self._by_statistics(judged),
            {head: float(hits.mean()) for head, hits in (right | {PROBE_HEAD: probe}).items()},
        )
        return self._deeper(judged, measured, params), self._more(judged)

    def _by_statistics(self, judged: Judged) -> float:
        """Return the accuracy of neighbours by colours and edges of thumbnails."""
        cache = self.runner.cache
        assert cache is not None
        thumbnails = cache.thumbnails(SIDE).store
        known = thumbnails.remembered().with_row
        digests = [bytes.fromhex(content) for content in judged.units.contents]
        if not all(digest in known for digest in digests):
            return float("nan")
        small = thumbnails.rows_of(np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32))
        rows = standardised(statistics(small.reshape(-1, SIDE, SIDE, 3)), np.arange(len(small)))
        return float(judged.answer("knn", rows, self.pool.seed)[0].mean())

    def _more(self, judged: Judged) -> MoreSamples | None:
        """Return what more samples would bring to a head on features."""
        sizes, hits = self.curve(judged)
        weights, now = drawn_weights(judged.units.numbers, self.pool.seed), len(self.pool.samples)
        return more_samples(sizes, hits, weights, now, round_count(now))

    def curve(self, judged: Judged) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return sizes of training sets (s,), and samples that are right, unseen by the head, by size and draw (s, r, n)."""
        (X,), (params,), (right,) = judged.X, judged.params, judged.right
        least = min(len(fold.train) for fold in judged.folds)
        shares = [share for share in _SHARES if share * least >= _FEWEST_IN_A_CURVE * self.pool.classes]
        rng = np.random.default_rng(self.pool.seed)
        hits = np.zeros((len(shares), _REPEATS, len(judged.y)), np.bool_)
        hits[-1] = right[CURVE_HEAD]
        with progress(len(shares) * _REPEATS, "learning curve", unit="fit") as bar:
            for place, share in enumerate(shares[:-1]):
                for repeat in range(_REPEATS):
                    for fold in judged.folds:
                        drawn = _stratified(fold.train, judged.y, share, rng)
                        head = train(CURVE_HEAD, params[CURVE_HEAD], X[drawn], judged.y[drawn], self.pool.seed)
                        told = predict_with(head, X[fold.val], "label", int(judged.y.max()) + 1)
                        told = told.argmax(axis=1) if told.ndim == 2 else told
                        hits[place, repeat, fold.val] = told == judged.y[fold.val]
                    bar.update(1)
        return np.array([round(share * least) for share in shares], np.int64), hits

    def _deeper(self, judged: Judged, measured: Evidence, params: dict[str, float]) -> Evidence:
        """Add what other layers and a short training say; both take their rows of one pass."""
        pool, runner = self.pool, self.runner
        passed = runner.price(len(judged.y))
        training = len(TRIED) * EPOCHS * _TRAINS * _STEP * passed
        if self._is_late("other layers, and a short training of the last stage", passed):
            return measured
        assert runner.cache is not None
        backbone = runner.cache.backbone
        cuts = [POOLED, cut_of_layers((*(stage.name for stage in backbone.stages[-_LAYERS:]), POOLED))]
        is_late = self._is_late("a short training of the last stage", passed + training)
        if not is_late:
            try:
                cuts.append(last_stage(backbone).cut)
            except CutError as error:
                self.missing.append(f"a short training of the last stage ({error})")
        rows, has_row = runner.rows(pool, judged.places, cuts)
        if len(has_row) < len(judged.y):
            self.missing.append("other layers, and a short training: some samples have no row there")
            return measured
        groups = None if len(judged.units.names) == len(judged.y) else judged.units.numbers
        on_layers, _ = judged.answer(CURVE_HEAD, np.ascontiguousarray(rows[1], np.float32), pool.seed)
        measured = replace(measured, layers=paired_gap(on_layers, judged.right[0][CURVE_HEAD], groups=groups))
        return self._tuned(judged, measured, rows[2], params) if len(cuts) > 2 else measured

    def _tuned(self, judged: Judged, measured: Evidence, rows: NDArray[Any], params: dict[str, float]) -> Evidence:
        """Add what a short training says, on samples that it has not seen."""
        pool, runner, numbers = self.pool, self.runner, judged.units.numbers
        assert runner.cache is not None
        fold, halves = _parted(judged, pool.seed)
        given = TuningRows(rows, judged.X[0], judged.y, fold, halves, params)
        probe, tuned = tune_shortly(runner.cache.backbone, given, pool.seed)
        groups = numbers[fold.val]
        is_grouped = len(np.unique(groups)) < len(groups)
        drawn = drawn_accuracies(np.stack([tuned, probe]), drawn_weights(groups, pool.seed))
        return replace(
            measured,
            tuned=paired_gap(tuned, probe, groups=groups if is_grouped else None),
            pays=float((drawn[:, 0] > drawn[:, 1] + MARGIN).mean()),
            error_left=float(1 - tuned.mean()),
        )

    def _is_late(self, what: str, price: float) -> bool:
        """Tell whether a step would end after the deadline, and note it."""
        is_late = self.deadline is not None and time.monotonic() + price > self.deadline
        if is_late and what not in self.missing:
            logger.warning("`budget`: no time is left for %s", what)
            self.missing.append(what)
        return is_late


def _stratified(
    train_rows: NDArray[np.int64], y: NDArray[np.int64], share: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return a share of some rows, of each class as much, at least one."""
    picked = []
    for label in np.unique(y[train_rows]):
        inside = rng.permutation(train_rows[y[train_rows] == label])
        picked.append(inside[: max(1, round(share * len(inside)))])
    return np.sort(np.concatenate(picked))


def _parted(judged: Judged, seed: int) -> tuple[Fold, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return which samples train and which judge, by whole folds, and the halves of those that judge, by whole units."""
    folds = judged.folds
    count = max(1, round((1 - _TRAINS) * len(folds)))
    val = np.sort(np.concatenate([fold.val for fold in folds[:count]]))
    train_rows = np.setdiff1d(np.arange(len(judged.y)), val)
    numbers = np.unique(judged.units.numbers[val], return_inverse=True)[1]
    side = np.random.default_rng(seed).permutation(np.arange(int(numbers.max()) + 1) % 2)[numbers]
    return Fold(train_rows, val), (np.flatnonzero(side == 0), np.flatnonzero(side == 1))


@dataclass(frozen=True)
class TuningRows:
    """What a short training stands on.

    Attributes:
        rows: activations at the cut (n, ...).
        X: embeddings (n, d).
        y: classes (n,).
        fold: which samples train, and which judge (j,).
        halves: of the judged ones, by their places among them.
        params: of the probe that it starts from.
    """

    rows: NDArray[Any]
    X: NDArray[np.float32]
    y: Index
    fold: Fold
    halves: tuple[Index, Index]
    params: dict[str, Any]

    def probe(self, seed: int) -> "LinearHead":
        """Return the linear probe of the samples that train."""
        from featcache.finetuning.model import LinearHead
        from featcache.heads.linear import linear_weights
        from featcache.heads.search import train as train_head

        train = self.fold.train
        estimator = train_head(PROBE_HEAD, self.params, self.X[train], self.y[train], seed)
        return LinearHead(*linear_weights(estimator, int(self.y.max()) + 1))


def last_stage(backbone: "Backbone") -> "Trainable":
    """Return what trains, and the cut before it.

    Raises:
        CutError: the backbone cannot be cut there.
    """
    from featcache.finetuning.model import select_trainable

    trainable = select_trainable(backbone.stages, Unfreeze.parse(DEPTH))
    backbone.prefix(trainable.cut)
    return trainable


def tune_shortly(backbone: "Backbone", given: TuningRows, seed: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which judged samples (j,) the linear probe and the last stage have right, shortly trained from that probe.

    Two rates are tried for a few epochs. The one that answers a half of the judged samples was chosen on the other half:
    none is chosen where it is judged. Nothing is kept.
    """
    from featcache.extraction.runtimes import own_randomness
    from featcache.finetuning.loop import ProcessGroup, TrainContext, Trial, predict
    from featcache.finetuning.model import Network, open_up

    trainable, plan = last_stage(backbone), FineTunePlan(Unfreeze.parse(DEPTH), epochs=EPOCHS)
    fold, y = given.fold, given.y
    with own_randomness(backbone.device):
        network = open_up(backbone, trainable, trainable.cut, Network({}, given.probe(seed)), seed=seed)
        model = network.model
        context = TrainContext(model, network.stages, given.rows.__getitem__, y, plan, ProcessGroup(), seed, "float32")
        untouched = {name: value.clone() for name, value in model.state_dict().items()}

        def right() -> NDArray[np.bool_]:
            told = predict(model, context.take, fold.val, plan.batch_size).argmax(axis=1)
            return np.asarray(told == y[fold.val], np.bool_)

        start, probe, tuned = context.before(fold.val)[0], right(), list[NDArray[np.bool_]]()
        with progress(len(TRIED) * EPOCHS * len(fold.train), f"short {DEPTH}") as bar:
            for rate in TRIED:
                model.load_state_dict(untouched)
                Trial(context, rate, fold.train, None, start, epochs=EPOCHS).run(bar, lambda _: None)
                tuned.append(right())
    return probe, chosen_crosswise(tuned, given.halves)


def chosen_crosswise(answers: list[NDArray[np.bool_]], halves: tuple[Index, Index]) -> NDArray[np.bool_]:
    """Return, for each half of the judged samples (j,), the answers that did best on the other half."""
    chosen = np.zeros_like(answers[0])
    for judged, choosing in (halves, halves[::-1]):
        best = max(answers, key=lambda right: right[choosing].sum())
        chosen[judged] = best[judged]
    return chosen
