"""One short training of the last stage, to see whether weights are worth training: nothing of it is kept."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.display import progress
from featcache.evaluation.splits import Fold, Index
from featcache.finetuning import RATES, FineTunePlan, Unfreeze

if TYPE_CHECKING:
    from featcache.backbones.base import Backbone
    from featcache.finetuning.model import LinearHead
    from featcache.finetuning.unfreezing import Trainable

DEPTH = "last:1"
PROBE_HEAD = "logistic"  # where fine-tuning starts
EPOCHS = 5
TRIED = RATES[1:]  # the lowest needs more epochs than these to get anywhere


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


@dataclass(frozen=True)
class ShortTuning:
    """Which judged samples (j,) the probe and the trained stage have right; both were fitted on the same samples."""

    probe: NDArray[np.bool_]
    tuned: NDArray[np.bool_]


def last_stage(backbone: "Backbone") -> "Trainable":
    """Return what trains, and the cut before it.

    Raises:
        CutError: the backbone cannot be cut there.
    """
    from featcache.finetuning.unfreezing import select_trainable

    trainable = select_trainable(backbone.stages, Unfreeze.parse(DEPTH))
    backbone.prefix(trainable.cut)
    return trainable


def tune_shortly(backbone: "Backbone", given: TuningRows, seed: int) -> ShortTuning:
    """Train the last stage at two rates for a few epochs, from the linear probe of the same samples.

    The rate that answers one half of the judged samples was chosen on the other half: none is chosen where it is judged.
    """
    from featcache.extraction.runtimes import own_randomness
    from featcache.finetuning.loop import TrainContext, Trial
    from featcache.finetuning.model import Network, open_up, predict
    from featcache.finetuning.unfreezing import ProcessGroup

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
    return ShortTuning(probe, chosen_crosswise(tuned, given.halves))


def chosen_crosswise(answers: list[NDArray[np.bool_]], halves: tuple[Index, Index]) -> NDArray[np.bool_]:
    """Return, for each half of the judged samples (j,), the answers that did best on the other half."""
    chosen = np.zeros_like(answers[0])
    for judged, choosing in (halves, halves[::-1]):
        best = max(answers, key=lambda right: right[choosing].sum())
        chosen[judged] = best[judged]
    return chosen
