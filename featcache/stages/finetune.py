"""Train what follows a cut, from the activations that are stored there, starting from the linear probe.

The head starts as the probe (LP-FT: Kumar et al. 2022, arXiv 2202.10054); BatchNorm of the trained part stays in
inference mode unless asked; the best epoch on validation is kept, and the probe itself is epoch 0.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from featcache.backbone import Backbone
from featcache.metrics import Scores, Tested, score, scores_on_test
from featcache.progress import progress
from featcache.specs import FineTunePlan
from featcache.splits import Index, Split
from featcache.store.atomic import make_folder, replace_file
from featcache.unfreeze import Thawed

Take = Callable[[Index], NDArray[Any]]


@dataclass(frozen=True)
class LinearHead:
    """A linear map from embeddings to logits: weights (classes, d), bias (classes,)."""

    weights: NDArray[np.float64]
    bias: NDArray[np.float64]


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave; epoch 0 is the probe, untrained."""

    number: int
    train_loss: float | None
    val: Scores
    seconds: float


@dataclass(frozen=True)
class FineTuned:
    """A trained suffix and head with its history; ``best`` is the epoch that was kept.

    ``rates`` gives for each rate that was tried the validation accuracy of its best epoch.
    """

    model: "SuffixAndHead"
    history: tuple[Epoch, ...]
    best: int
    lr: float
    rates: dict[float, float]
    tested: Tested
    seconds: float
    images_per_second: float


class SuffixAndHead(nn.Module):
    """What follows the cut: stored activations (b, ...) -> logits (b, classes)."""

    def __init__(self, suffix: nn.Module, head: LinearHead) -> None:
        super().__init__()
        self.suffix = suffix
        self.head = nn.Linear(head.weights.shape[1], head.weights.shape[0])
        self.set_head(head)

    def set_head(self, head: LinearHead) -> None:
        """Make the head compute what a linear head computes."""
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(head.weights))
            self.head.bias.copy_(torch.from_numpy(head.bias))

    def forward(self, stored: Tensor) -> Tensor:
        """Return the logits (b, classes)."""
        embedding = self.suffix(stored if stored.dtype == torch.uint8 else stored.float())
        return self.head(embedding.flatten(1))  # type: ignore[no-any-return]


def finetune(
    backbone: Backbone,
    suffix: nn.Module,
    take: Take,
    y: NDArray[np.int64],
    split: Split,
    plan: FineTunePlan,
    thawed: Thawed,
    *,
    start: LinearHead,
    probe: LinearHead,
    seed: int = 0,
) -> FineTuned:
    """Train a suffix and its head on ``train``, keep the best rate and epoch on ``val``, test that once.

    Args:
        backbone: the one whose parameters the suffix shares; they are changed.
        suffix: stored activations to embeddings.
        take: gives stored rows (k, ...) for positions (k,).
        y: labels (n,) int64.
        split: which images train, choose and test.
        plan: rates, epochs, patience.
        thawed: which stages train.
        start: the probe fitted on ``train`` alone: where training starts, so that ``val`` judges it fairly.
        probe: the probe refitted on train and val: what epoch 0 answers with, where it stays the best.
        seed: of the order of images and of dropout.
    """
    started = time.monotonic()
    model = SuffixAndHead(suffix, start).to(backbone.device)
    _thaw_parameters(backbone, thawed)
    job = _Job(backbone, model, take, y, split, plan, thawed, seed)
    untouched = copy.deepcopy(model.state_dict())
    before = Epoch(0, None, _validate(job), 0.0)
    best: _Trained | None = None
    rates: dict[float, float] = {}
    with progress(len(plan.lr) * plan.epochs * len(split.train), f"finetune {plan.unfreeze.text}") as bar:
        for lr in plan.lr:
            model.load_state_dict(untouched)
            trained = _train(job, lr, before, bar)
            rates[lr] = trained.best.val.accuracy
            if best is None or trained.best.val.rank < best.best.val.rank:
                best = trained
    assert best is not None
    model.load_state_dict(best.state)
    if best.best.number == 0:
        model.set_head(probe)
    seconds = time.monotonic() - started
    tested = scores_on_test(lambda index: predict(model, take, index, plan.batch_size), y, split)
    return FineTuned(model, best.history, best.best.number, best.lr, rates, tested, seconds, best.images_per_second)


@dataclass(frozen=True)
class _Job:
    """What stays the same while rates are tried."""

    backbone: Backbone
    model: SuffixAndHead
    take: Take
    y: NDArray[np.int64]
    split: Split
    plan: FineTunePlan
    thawed: Thawed
    seed: int


@dataclass(frozen=True)
class _Trained:
    """What one rate came to: its best epoch and the weights then."""

    lr: float
    history: tuple[Epoch, ...]
    best: Epoch
    state: dict[str, Tensor]
    images_per_second: float


def _train(job: _Job, lr: float, before: Epoch, bar: Any) -> _Trained:
    """Train at one rate; epochs without gain in accuracy or loss over the trained ones before end it."""
    plan, model = job.plan, job.model
    groups = parameter_groups(job.backbone, model, plan, job.thawed, lr)
    optimiser = torch.optim.AdamW(groups, weight_decay=plan.weight_decay)
    steps = plan.epochs * math.ceil(len(job.split.train) / plan.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, steps, plan.warmup))
    history, best, state, stale = [before], before, copy.deepcopy(model.state_dict()), 0
    accuracy, loss = -1.0, math.inf
    for number in range(1, plan.epochs + 1):
        epoch = _train_epoch(job, optimiser, schedule, number, bar)
        history.append(epoch)
        bar.set_postfix_str(f"lr {lr:g}, val {100 * epoch.val.accuracy:.1f} %")
        if epoch.val.rank < best.val.rank:
            best, state = epoch, copy.deepcopy(model.state_dict())
        loss_now = epoch.val.log_loss if epoch.val.log_loss is not None else math.inf
        stale = 0 if epoch.val.accuracy > accuracy or loss_now < loss else stale + 1
        accuracy, loss = max(accuracy, epoch.val.accuracy), min(loss, loss_now)
        if stale >= plan.patience:
            bar.update((plan.epochs - number) * len(job.split.train))
            break
    seconds = sum(epoch.seconds for epoch in history[1:])
    return _Trained(lr, tuple(history), best, state, (len(history) - 1) * len(job.split.train) / seconds)


def parameter_groups(
    backbone: Backbone, model: SuffixAndHead, plan: FineTunePlan, thawed: Thawed, lr: float
) -> list[dict[str, Any]]:
    """Return AdamW's groups: each stage its rate, the head its own, no weight decay for vectors (norms, biases)."""
    groups = []
    parameters = dict(backbone.module.named_parameters())
    for depth, stage in enumerate(reversed(thawed.stages)):
        own = lr * plan.layer_decay**depth
        tensors = [parameters[name] for name in stage.parameters]
        groups.append({"params": [tensor for tensor in tensors if tensor.dim() > 1], "lr": own})
        groups.append({"params": [tensor for tensor in tensors if tensor.dim() <= 1], "lr": own, "weight_decay": 0.0})
    groups.append({"params": [model.head.weight], "lr": plan.head_lr})
    groups.append({"params": [model.head.bias], "lr": plan.head_lr, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def rate(step: int, steps: int, warmup: float) -> float:
    """Return the factor on the learning rates: a linear rise over a share of the steps, then a half cosine to zero."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def predict(model: SuffixAndHead, take: Take, index: Index, batch_size: int) -> NDArray[np.float64]:
    """Return the probabilities (k, classes) of images at some positions (k,)."""
    model.eval()
    out = []
    with torch.inference_mode():
        for rows in _chunks(index, batch_size):
            logits = model(_to_device(take(rows), model))
            out.append(F.softmax(logits.double(), dim=1).cpu().numpy())
    return np.concatenate(out)


def save_checkpoint(backbone: Backbone, model: SuffixAndHead, path: Path, facts: dict[str, Any]) -> Path:
    """Write the whole tuned network as safetensors, under timm's own names where its classifier is one linear layer.

    Raises:
        StorageError: the disk failed.
    """
    module = copy.deepcopy(backbone.module)
    classes = model.head.out_features
    head = {"weight": model.head.weight.detach(), "bias": model.head.bias.detach()}
    classifier = _timm_classifier(module, classes, model.head.in_features)
    if classifier is None:
        state = module.state_dict() | {f"featcache_head.{name}": value for name, value in head.items()}
    else:
        classifier.load_state_dict(head)
        state = module.state_dict()
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    make_folder(path.parent)
    replace_file(path, save_safetensors(tensors, metadata={"featcache": json.dumps(facts)}))
    return path


def _timm_classifier(module: nn.Module, classes: int, width: int) -> nn.Linear | None:
    reset = getattr(module, "reset_classifier", None)
    if reset is None:
        return None
    trial = copy.deepcopy(module)
    trial.reset_classifier(classes)  # type: ignore[operator]
    found = trial.get_classifier()  # type: ignore[operator]
    if not isinstance(found, nn.Linear) or found.in_features != width:
        return None
    reset(classes)
    own = module.get_classifier()  # type: ignore[operator]
    return own if isinstance(own, nn.Linear) else None


def _thaw_parameters(backbone: Backbone, thawed: Thawed) -> None:
    trained = {name for stage in thawed.stages for name in stage.parameters}
    for name, parameter in backbone.module.named_parameters():
        parameter.requires_grad_(name in trained)


def _train_epoch(
    job: _Job,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    number: int,
    bar: Any,
) -> Epoch:
    started = time.monotonic()
    model, plan = job.model, job.plan
    torch.manual_seed(job.seed * 1000 + number)
    set_training(model, train_batchnorm=plan.train_batchnorm)
    order = np.random.default_rng((job.seed, number)).permutation(job.split.train)
    losses = []
    for rows in _chunks(order, plan.batch_size):
        logits = model(_to_device(job.take(rows), model))
        labels = torch.from_numpy(job.y[rows]).to(logits.device)
        loss = F.cross_entropy(logits, labels, label_smoothing=plan.label_smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.item() * len(rows))
        bar.update(len(rows))
    seconds = time.monotonic() - started
    return Epoch(number, sum(losses) / len(order), _validate(job), seconds)


def set_training(model: nn.Module, *, train_batchnorm: bool) -> None:
    """Put a model in training mode, its BatchNorm layers in inference mode unless asked otherwise."""
    model.train()
    if not train_batchnorm:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - torch has no public name for it
                module.eval()


def _validate(job: _Job) -> Scores:
    val = job.split.val
    return score(job.y[val], predict(job.model, job.take, val, job.plan.batch_size))


def _chunks(index: Index, size: int) -> Iterator[Index]:
    for start in range(0, len(index), size):
        yield index[start : start + size]


def _to_device(rows: NDArray[Any], model: SuffixAndHead) -> Tensor:
    return torch.from_numpy(rows).to(model.head.weight.device)
