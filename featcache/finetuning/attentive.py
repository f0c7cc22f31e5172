"""Train attention over stored tokens and a linear head as what follows a cut is trained: from the linear probe on.

Attention that weighs all tokens alike is their average, so that epoch 0 is the probe on averaged tokens, and the epoch that
validation keeps is never below it there. Rate first, then the number of queries, then weight decay is chosen on validation.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray

from featcache.backbones.attention import FORMS, Attention, AttentiveHead, scale_of
from featcache.backbones.base import Backbone, Stage
from featcache.backbones.pooling import Layout
from featcache.display import progress
from featcache.evaluation.metrics import score
from featcache.evaluation.splits import Split
from featcache.finetuning import FineTunePlan, Unfreeze
from featcache.finetuning.finetuner import Checkpoint, Finetuner, RateSearch, not_worse
from featcache.finetuning.loop import ProcessGroup, TrainContext, Trial, predict
from featcache.finetuning.model import LinearHead, Network, OpenNetwork, SuffixAndHead, Take, Trainable
from featcache.specs import TOKENS, Pool

Searched: TypeAlias = tuple[Finetuner, RateSearch]

QUERIES = (16, 4, 32)  # the first is tried at every rate
DECAYS = (0.05, 0.5)
RATES = (1e-3, 1e-2, 3e-2)
_SMOOTHING = 0.1
_HEAD_RATE = 1e-3  # of one channel; of many each must move less for the same change of logits
_EPOCHS, _PATIENCE, _BATCH = 50, 5, 32
_MEASURED = 256  # images whose tokens tell how widely each channel is spread
_AT_ONCE = 256  # images a step of predicting


@dataclass(frozen=True)
class Probe:
    """The linear probe that training starts as.

    Attributes:
        pool: what of the tokens it was fitted on: averages, class tokens, or both.
        on_train: fitted on train alone.
        refitted: fitted on train and val.
        on_folds: fitted on each fold's train, where validation is by folds.
    """

    pool: Pool
    on_train: LinearHead
    refitted: LinearHead
    on_folds: tuple[LinearHead, ...] = ()


@dataclass(frozen=True)
class AttentionSpec:
    """What one training is given beside its rates."""

    queries: int
    decay: float


@dataclass(frozen=True)
class Attended:
    """A trained attentive head: what was chosen, and what was answered on validation before the refit.

    ``answers`` (v, classes) and the ``truth`` (v,) are those of all folds where validation is by folds.
    """

    head: AttentiveHead
    params: dict[str, Any]
    answers: NDArray[np.float64]
    truth: NDArray[np.int64]


@dataclass(frozen=True)
class _Attention:
    """What holds the parameters that train, where otherwise a backbone does."""

    module: Attention


@dataclass(eq=False)
class AttentiveTraining:
    """Trains attention over tokens; ``run`` does all. A training that was killed goes on, as a fine-tuning does.

    Attributes:
        form: one of FORMS.
        layout: what the axes of rows are.
        take: gives tokens (k, ...) by their positions.
        y: labels (n,) int64.
        split: which images train and choose.
        probe: where training starts.
        seed: of the order of images, and of what is random in the network.
        device: where it is trained.
        checkpoint: where the state of a candidate's training is kept.
    """

    form: str
    layout: Layout
    take: Take
    y: NDArray[np.int64]
    split: Split
    probe: Probe
    seed: int
    device: torch.device
    checkpoint: Callable[[str], Checkpoint] = field(default=lambda _: Checkpoint(None))

    def __post_init__(self) -> None:
        """Measure how widely the channels of the tokens are spread."""
        rows = self.take(self.split.train[:_MEASURED])
        self.scale = scale_of(self.layout, torch.from_numpy(rows))

    def run(self) -> Attended:
        """Choose, refit, and return the head."""
        searched = self._search()
        candidate = self._best(searched)
        finetuner, outcome = searched[candidate]
        model, trial = finetuner.network.model, outcome.best
        answers, truth = predict(model, self.take, self.split.val, _AT_ONCE), self.y[self.split.val]
        if self.split.cross:  # one val split of so few images chooses, all of them judge what it chose
            truth = np.concatenate([self.y[fold.val] for fold in self.split.cross])
            answers = self._on_folds(candidate, trial.lr, epochs=0)
            trained = self._on_folds(candidate, trial.lr, trial.best.number) if trial.best.number else answers
            if score(truth, trained).rank < score(truth, answers).rank:
                answers = trained
            else:
                trial = replace(trial, best=trial.history[0])
        finetuner.refit(replace(outcome, best=trial))
        state = {name: value.detach().cpu().numpy().copy() for name, value in model.state_dict().items()}
        params = asdict(candidate) | {"lr": trial.lr, "epoch": trial.best.number, "start": self.probe.pool}
        return Attended(AttentiveHead(self.form, self.layout, candidate.queries, state), params, answers, truth)

    def _on_folds(self, candidate: AttentionSpec, lr: float, epochs: int) -> NDArray[np.float64]:
        """Return answers on each fold's val, one fold after the other, of networks trained on its train so many epochs."""
        answers = []
        with progress(max(1, epochs) * sum(len(fold.train) for fold in self.split.cross), "attention on folds") as bar:
            for fold, start in zip(self.split.cross, self.probe.on_folds, strict=True):
                network = self.network(candidate, start)
                if epochs:
                    context = self._context(network, candidate, (lr,))
                    before = context.before(fold.val)[0]
                    trained = Trial(context, lr, fold.train, None, before, epochs).run(bar, lambda _: None)
                    network.model.load_state_dict(trained.state)
                answers.append(predict(network.model, self.take, fold.val, _AT_ONCE))
        return np.concatenate(answers)

    def _search(self) -> dict[AttentionSpec, Searched]:
        """Train on ``train``: all rates at the first number of queries, then the other numbers, then the other decays."""
        queries = [count for count in QUERIES if len(self.scale) % count == 0] or [1]
        first = AttentionSpec(queries[0], DECAYS[0])
        searched = {first: self._train(first, RATES)}
        rates = (searched[first][1].best.lr,)
        for count in queries[1:]:
            candidate = AttentionSpec(count, DECAYS[0])
            searched[candidate] = self._train(candidate, rates)
        best = self._best(searched)
        for decay in DECAYS[1:]:
            candidate = replace(best, decay=decay)
            searched[candidate] = self._train(candidate, rates)
        return searched

    def _best(self, searched: Mapping[AttentionSpec, Searched]) -> AttentionSpec:
        """Return the best on validation: of those that accuracy cannot tell apart, that of the lowest scaled loss."""
        contenders = not_worse([outcome.best for _, outcome in searched.values()], len(self.split.val))
        best = min(contenders, key=lambda trial: trial.best.scaled_loss)
        return next(candidate for candidate, (_, outcome) in searched.items() if outcome.best is best)

    def _train(self, candidate: AttentionSpec, rates: tuple[float, ...]) -> Searched:
        network = self.network(candidate, self.probe.on_train)
        context = self._context(network, candidate, rates)
        checkpoint = self.checkpoint(f"{candidate.queries}q-{candidate.decay:g}")
        refitted = Network({}, self._on_vectors(self.probe.refitted))
        finetuner = Finetuner(network, context, self.split, refitted, checkpoint)
        return finetuner, finetuner.search()

    def _context(self, network: OpenNetwork, candidate: AttentionSpec, rates: tuple[float, ...]) -> TrainContext:
        plan = FineTunePlan(
            network.trainable.spec,
            epochs=_EPOCHS,
            batch_size=_BATCH,
            lr=rates,
            head_lr=_HEAD_RATE / len(self.scale) ** 0.5,
            weight_decay=candidate.decay,
            label_smoothing=_SMOOTHING,
            patience=_PATIENCE,
            precision="float32",  # there is so little to compute that another one would save nothing
        )
        return TrainContext(network.model, network.stages, self.take, self.y, plan, ProcessGroup(), self.seed)

    def network(self, candidate: AttentionSpec, start: LinearHead) -> OpenNetwork:
        """Return a candidate's network where its training starts: it answers as a probe does."""
        torch.default_generator.manual_seed(self.seed)  # whoever trains takes care of the caller's generators
        module = FORMS[self.form](self.layout, len(self.scale), candidate.queries, self.scale).to(self.device)
        parameters = dict(module.named_parameters())
        stage = Stage("attention", tuple(parameters), sum(parameter.numel() for parameter in parameters.values()))
        trainable = Trainable((stage,), TOKENS, Unfreeze("attention", "all"))
        model = SuffixAndHead(module, self._on_vectors(start)).to(self.device)
        # of a backbone no more is asked here than its parameters
        backbone = cast("Backbone", _Attention(module))
        return OpenNetwork(backbone, trainable, model, (tuple(parameters.values()),))

    def _on_vectors(self, head: LinearHead) -> LinearHead:
        """Return a head on pooled tokens as one on what the attention gives at first: scaled averages and class tokens."""
        scale, pools = self.scale.double().numpy(), self.probe.pool.split("+")
        parts = dict(zip(pools, np.split(head.weights, len(pools), axis=1), strict=True))
        blank = np.zeros((len(head.bias), len(scale)))
        kinds = ("avg", "cls") if self.layout.class_token else ("avg",)
        return LinearHead(np.concatenate([parts.get(kind, blank) / scale for kind in kinds], axis=1), head.bias)
