"""Train what follows a cut, from the activations that are stored there, starting from the linear probe.

The head starts as the probe (LP-FT: Kumar et al. 2022, arXiv 2202.10054); BatchNorm of the trained part stays in
inference mode unless asked; rate and epoch are chosen on validation, where what cannot be told apart by accuracy is not
told apart by it, and the start itself is epoch 0. Then the same training runs once more on train and validation together,
as long as the kept epoch and with a rate that falls to zero at its end, as the probe was refitted (as Grill et al. 2020,
BYOL, appendix D, do for fine-tuning).
"""

import contextlib
import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featcache.backbones.base import Backbone
from featcache.evaluation.metrics import TestResult, cka, scores_on_test
from featcache.evaluation.splits import Split
from featcache.finetuning.checkpoint import Checkpoint
from featcache.finetuning.distributed import ProcessGroup
from featcache.finetuning.loop import DivergedError, Epoch, TrainContext, Trained, Trial, epoch_of, noise, to_device
from featcache.finetuning.model import LinearHead, SuffixAndHead, Take, embed, predict
from featcache.finetuning.network_edits import add_lora, fold_norms, merge_lora
from featcache.finetuning.optim import choose_precision
from featcache.finetuning.plan import FineTunePlan
from featcache.finetuning.unfreezing import Trainable
from featcache.progress import progress
from featcache.resources import keep_freed_memory
from featcache.specs import Precision

Whole = tuple[dict[str, Tensor], LinearHead]  # a backbone's weights and a head


@dataclass(frozen=True)
class FineTuned:
    """A trained suffix and head with its history.

    Attributes:
        model: as it was tested.
        history: the epochs of the rate that was kept, epoch 0 the start.
        best: the epoch that was kept.
        lr: the rate that was kept.
        rates: for each rate that was tried the validation accuracy of its best epoch.
        tested: scores on the test split.
        seconds: of all training, that of killed processes included up to the last state that they kept.
        images_per_second: of the kept rate's.
        similarity: linear CKA of the embeddings of validation images before and after (Kornblith et al. 2019).
        precision: what training steps were computed in.
        refitted: whether the model has trained on validation images too; not where that left it worse on them.
        from_train: backbone and head as they were chosen, trained on ``train`` alone: where a deeper training may start.
        finished: backbone, not copied, and head as they were tested: what a deeper training answers with that gains
            nothing.
    """

    model: SuffixAndHead
    history: tuple[Epoch, ...]
    best: int
    lr: float
    rates: dict[float, float]
    tested: TestResult
    seconds: float
    images_per_second: float
    similarity: float
    precision: Precision
    refitted: bool
    from_train: Whole
    finished: Whole

    @property
    def overfits(self) -> str:
        """What the curves say against more epochs, "" if nothing."""
        losses = [epoch.val.log_loss or 0.0 for epoch in self.history[1:]]  # the start had no label smoothing
        last = self.history[-1]
        if last.train_accuracy is None or losses[-1] <= _RISE * (lowest := min(losses)) + _SLIGHT:
            return ""
        if last.train_accuracy - last.val.accuracy < _AHEAD:
            return ""
        return (
            f"it overfits: the validation loss rose from {lowest:.3f} to {losses[-1]:.3f} while "
            f"{100 * last.train_accuracy:.1f} % of the training images became right"
        )


_RISE, _SLIGHT, _AHEAD = 1.1, 0.01, 0.02
_ROUNDING = 1e-9  # of differences of accuracies
_LAYOUT = 3  # of a training's state: one of an older version is begun again


def finetune(
    backbone: Backbone,
    suffix: nn.Module,
    take: Take,
    y: NDArray[np.int64],
    split: Split,
    plan: FineTunePlan,
    trainable: Trainable,
    *,
    start: LinearHead,
    probe: LinearHead,
    shallower: Whole | None = None,
    seed: int = 0,
    keeper: Checkpoint | None = None,
    processes: ProcessGroup | None = None,
) -> FineTuned:
    """Train a suffix and its head on ``train``, keep the best rate and epoch on ``val``, refit on both, test that once.

    Args:
        backbone: the one whose parameters the suffix shares; they are changed.
        suffix: stored activations to embeddings.
        take: gives stored rows (k, ...) for positions (k,), the views of an image one after the other.
        y: labels (n,) int64.
        split: which images train, choose and test.
        plan: rates, epochs, patience, ...
        trainable: which parameters train.
        start: the probe fitted on ``train`` alone: where training starts, so that ``val`` judges it fairly.
        probe: the probe refitted on train and val: what epoch 0 answers with, where it stays the best, and where the
            refit starts.
        shallower: the finished model that takes the probe's place, where its training on ``train`` was the start.
        seed: of the order of images and of dropout.
        keeper: where the state is kept, so that a killed training goes on; it is the caller's to clear, once what came
            out is on the disk: until then a training that has ended is found here as well.
        processes: those that share the work.

    Raises:
        SetupError: low-rank updates need peft.
        StorageError: the state cannot be kept.
    """
    timed, processes = _Timed(keeper or Checkpoint(None)), processes or ProcessGroup()
    keep_freed_memory()
    model = SuffixAndHead(suffix, start).to(backbone.device)
    stages = open_up(backbone, model, trainable, seed)
    saved = timed.load()
    if not processes.agrees(bool(saved), backbone.device):  # all of them go on from there, or all begin
        saved = {}
    if saved.get("layout") != _LAYOUT:
        saved = {"layout": _LAYOUT, "finished": [], "best": [], "trial": None, "precision": plan.precision}
    if saved.get("precision") in {None, "auto"}:
        batch = to_device(take(split.train[: plan.batch_size] * plan.views), backbone.device)
        saved["precision"] = choose_precision(model, batch, processes, on_cpu=plan.precision == "auto")
    job = TrainContext(model, stages, take, y, plan, processes, seed, saved["precision"])
    untouched = copy.deepcopy(model.state_dict())
    first = embed(model, take, split.val * plan.views, plan.batch_size)
    val, scaled = job.validate(split.val)
    before = Epoch(0, None, val, 0.0, scaled_loss=scaled)
    trials = len(plan.lr) * len(split.train) + plan.refit * len(split.train_val)
    refitted = False
    with progress(plan.epochs * trials, f"finetune {plan.unfreeze.text}") as bar:
        best, rates, saved = _best_rate(job, split, before, untouched, saved, timed, bar)
        model.load_state_dict(best.state)
        number = best.best.number
        from_train = _as_it_is(backbone, model, trainable)
        if number == 0 or plan.refit:
            model.load_state_dict(untouched)
            if shallower is not None:
                backbone.module.load_state_dict(shallower[0])
            model.set_head(probe if shallower is None else shallower[1])
        if number > 0 and plan.refit:
            trial = Trial(job, best.lr, split.train_val, None, before, epochs=number)
            if saved["trial"] is not None:
                trial.resume(saved["trial"])
            again = trial.run(bar, lambda state: timed.save(saved | {"trial": state}))
            model.load_state_dict(again.state)
            with contextlib.suppress(DivergedError):  # it has seen these images: worse is broken
                chosen = best.best.val.accuracy
                refitted = not again.diverged and job.validate(split.val)[0].accuracy >= chosen - noise(
                    chosen, len(split.val)
                )
            if not refitted:
                model.load_state_dict(best.state)
        bar.update(bar.total - bar.n)
    if trainable.spec.what == "lora":
        merge_lora(model.suffix)
    seconds = timed.seconds
    last = embed(model, take, split.val * plan.views, plan.batch_size)
    tested = scores_on_test(lambda index: predict(model, take, index * plan.views, plan.batch_size), y, split)
    return FineTuned(
        model,
        best.history,
        number,
        best.lr,
        rates,
        tested,
        seconds,
        best.images_per_second,
        cka(first, last),
        job.precision,
        refitted,
        from_train,
        (backbone.module.state_dict(), model.linear_head()),
    )


class _Timed:
    """A training's kept state, and the seconds that it has taken: those of killed processes, up to what they kept, too."""

    def __init__(self, keeper: Checkpoint) -> None:
        self._keeper, self._started, self._before = keeper, time.monotonic(), 0.0

    def load(self) -> dict[str, Any]:
        """Return what was kept, {} where nothing was."""
        saved = self._keeper.load() or {}
        self._before = float(saved.get("seconds", 0.0))
        return saved

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state."""
        self._keeper.save(state | {"seconds": self.seconds})

    @property
    def seconds(self) -> float:
        """What it has taken up to now."""
        return self._before + time.monotonic() - self._started


def _best_rate(
    job: TrainContext,
    split: Split,
    before: Epoch,
    untouched: dict[str, Tensor],
    saved: dict[str, Any],
    timed: "_Timed",
    bar: Any,
) -> tuple[Trained, dict[float, float], dict[str, Any]]:
    """Return the best trial, the accuracy of each, and what is to be kept while the refit runs."""
    rates: dict[float, float] = dict(saved["finished"])
    trials = [_trained(facts) for facts in saved["best"]]
    for number, lr in enumerate(job.plan.lr):
        if number < len(saved["finished"]):
            bar.update(job.plan.epochs * len(split.train))
            continue
        job.model.load_state_dict(untouched)
        trial = Trial(job, lr, split.train, split.val, before)
        if saved["trial"] is not None:
            trial.resume(saved["trial"])
        current = saved
        trained = trial.run(bar, lambda state, current=current: timed.save(current | {"trial": state}))  # type: ignore[misc]
        rates[lr] = trained.best.val.accuracy
        trials = not_worse([*trials, trained], len(split.val))
        finished = [*saved["finished"], (lr, trained.best.val.accuracy)]
        saved = saved | {"finished": finished, "best": [_plain(one) for one in trials], "trial": None}
        timed.save(saved)
    return min(trials, key=lambda one: one.best.scaled_loss), rates, saved


def not_worse(trials: Sequence[Trained], images: int) -> list[Trained]:
    """Return the trials that may be the best: of those whose accuracy cannot be told apart, that is the lowest scaled loss.

    Args:
        trials: in the order they were run in.
        images: that judged them.
    """
    gained = [trial for trial in trials if trial.best.number > 0]
    if not gained:
        return list(trials[:1])
    highest = max(trial.best.val.accuracy for trial in gained)
    near = [trial for trial in gained if trial.best.val.accuracy >= highest - noise(highest, images) - _ROUNDING]
    return [
        trial
        for place, trial in enumerate(near)
        if not any(_beats(other, trial, earlier=number < place) for number, other in enumerate(near) if number != place)
    ]


def _beats(one: Trained, other: Trained, *, earlier: bool) -> bool:
    """Tell whether a trial is as good as another in accuracy and in loss, better in one of them or run before it."""
    as_good = one.best.val.accuracy >= other.best.val.accuracy and one.best.scaled_loss <= other.best.scaled_loss
    return as_good and (earlier or one.best.rank != other.best.rank)


def _plain(trained: Trained) -> dict[str, Any]:
    return asdict(trained) | {"state": trained.state}


def _trained(facts: dict[str, Any]) -> Trained:
    history = tuple(epoch_of(one) for one in facts["history"])
    return Trained(**(facts | {"history": history, "best": epoch_of(facts["best"])}))


def open_up(
    backbone: Backbone, model: SuffixAndHead, trainable: Trainable, seed: int
) -> tuple[tuple[nn.Parameter, ...], ...]:
    """Let the thawed parameters train and no others; return them, stage by stage."""
    named = dict(backbone.module.named_parameters())
    model.requires_grad_(False)
    for parameter in named.values():
        parameter.requires_grad_(False)
    if trainable.spec.what == "lora":
        weights = {id(named[name]): stage.name for stage in trainable.stages for name in stage.parameters}
        size = backbone.transform.input_size
        blank = torch.zeros((1, size, size, 3), dtype=torch.uint8, device=backbone.device)  # untraced, it takes pixels
        updates = add_lora(model.suffix, weights, trainable.spec.rank, seed, blank)
        by_stage: dict[str, list[nn.Parameter]] = {stage.name: [] for stage in trainable.stages}
        for weight, parameters in updates:
            by_stage[weights[weight]] += parameters
        stages = tuple(tuple(parameters) for parameters in by_stage.values())
    else:
        stages = tuple(tuple(named[name] for name in stage.parameters) for stage in trainable.stages)
        fold_norms(model.suffix)
    for parameter in (*model.head.parameters(), *(parameter for stage in stages for parameter in stage)):
        parameter.requires_grad_(True)
    return stages


def _as_it_is(backbone: Backbone, model: SuffixAndHead, trainable: Trainable) -> Whole:
    """Return the backbone's weights and the head; low-rank updates are no part of the weights yet."""
    if trainable.spec.what == "lora":
        return {}, model.linear_head()
    return copy.deepcopy(backbone.module.state_dict()), model.linear_head()
