"""What is trained: the part of a backbone behind a cut, opened, and a linear head; what that came to, and its file."""

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from featcache.backbones.base import OWN_HEAD, Backbone
from featcache.evaluation.metrics import Scores, TestResult
from featcache.evaluation.splits import Index
from featcache.finetuning.unfreezing import Trainable, add_lora, fold_norms
from featcache.specs import INPUT, Precision
from featcache.store.disk import make_folder, replace_file

_ROUNDING = 1e-9  # of differences of accuracies
_SHIFT = 1 / 8  # of a side: the 4 of 32 pixels of He et al. 2016
Take = Callable[[Index], NDArray[Any]]
# what is called overfitting: the validation loss rose by this share and this much, and training is so far ahead in accuracy
_RISE, _SLIGHT, _AHEAD = 1.1, 0.01, 0.02


@dataclass(frozen=True)
class LinearHead:
    """A linear map from embeddings to logits: weights (classes, d), bias (classes,)."""

    weights: NDArray[np.float64]
    bias: NDArray[np.float64]


@dataclass(frozen=True)
class Network:
    """A backbone's weights and a head; no weights where they are those that the backbone has anyway."""

    weights: dict[str, Tensor]
    head: LinearHead


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

    def linear_head(self) -> LinearHead:
        """Return the head as it is now."""
        weights, bias = (value.detach().double().cpu().numpy().copy() for value in (self.head.weight, self.head.bias))
        return LinearHead(weights, bias)

    def embed(self, stored: Tensor) -> Tensor:
        """Return the embeddings (b, d)."""
        if stored.is_floating_point():  # pixels and token ids are taken as they are stored
            stored = stored.float()
            if stored.dim() == 4 and stored.shape[-1] != 3:  # pixels, even as floats, have their channels last
                # rows are stored channels first, convolutions are faster on channels last: copied once, here
                stored = stored.contiguous(memory_format=torch.channels_last)
        return self.suffix(stored).flatten(1)  # type: ignore[no-any-return]

    def forward(self, stored: Tensor) -> Tensor:
        """Return the logits (b, classes)."""
        return self.head(self.embed(stored))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class OpenNetwork:
    """A copy of a backbone that is open for training.

    Attributes:
        backbone: the copy, whose parameters the model shares.
        trainable: which of them train.
        model: what follows the cut, and the head.
        stages: the parameters that train, stage by stage, in forward order; of low-rank updates, theirs.
    """

    backbone: Backbone
    trainable: Trainable
    model: SuffixAndHead
    stages: tuple[tuple[nn.Parameter, ...], ...]

    def copied(self) -> Network:
        """Return the weights and the head as they are; low-rank updates are no part of the weights yet."""
        weights = {} if self.trainable.spec.what == "lora" else copy.deepcopy(self.backbone.module.state_dict())
        return Network(weights, self.model.linear_head())


def open_up(
    backbone: Backbone, trainable: Trainable, cut: str, start: Network, *, drop_path: float = 0.0, seed: int = 0
) -> OpenNetwork:
    """Return a copy of a backbone, as a network at its start, in which the trainable parameters train and no others.

    Args:
        backbone: is left as it is.
        trainable: what trains.
        cut: what is before it is left out of the model.
        start: weights and head.
        drop_path: stochastic depth.
        seed: of the random half of low-rank updates.

    Raises:
        SetupError: low-rank updates need peft.
        UsageError: no layer can take one.
    """
    separate = _copied(backbone, drop_path)
    if start.weights:
        separate.module.load_state_dict(start.weights)
    model = SuffixAndHead(separate.suffix(cut), start.head).to(separate.device)
    named = dict(separate.module.named_parameters())
    for parameter in (*model.parameters(), *named.values()):
        parameter.requires_grad_(False)
    if trainable.spec.what == "lora":
        weights = {id(named[name]): stage.name for stage in trainable.stages for name in stage.parameters}
        blank = torch.from_numpy(separate.example_inputs(1)).to(separate.device)  # untraced, it takes prepared samples
        if separate.spec.samples == "text" and cut != INPUT:  # never traced, it takes what is stored
            (blank,) = separate.program((cut,))(blank)
        by_stage: dict[str, list[nn.Parameter]] = {stage.name: [] for stage in trainable.stages}
        for weight, parameters in add_lora(model.suffix, weights, trainable.spec.rank, seed, blank):
            by_stage[weights[weight]] += parameters
        stages = tuple(tuple(parameters) for parameters in by_stage.values())
    else:
        stages = tuple(tuple(named[name] for name in stage.parameters) for stage in trainable.stages)
        fold_norms(model.suffix)
    for parameter in (*model.head.parameters(), *(parameter for stage in stages for parameter in stage)):
        parameter.requires_grad_(True)
    return OpenNetwork(separate, trainable, model, stages)


def _copied(backbone: Backbone, drop_path: float) -> Backbone:
    if not drop_path:
        return backbone.separate()
    from featcache.backbones.timm_models import with_drop_path

    return with_drop_path(backbone, drop_path)


def has_batchnorm(network: OpenNetwork) -> bool:
    """Tell whether statistics of batches could move in what trains."""
    return bool(moving_norms(network.model))


def moving_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the BatchNorm layers that train."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001 - no public name
        and any(parameter.requires_grad for parameter in module.parameters())
    ]


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave; epoch 0 is where training starts from. Training's own scores are those of its batches.

    ``scaled_loss`` is the log-loss on validation at the temperature that is best there: the start was fitted without label
    smoothing and what is trained with it, so that plain losses tell their confidence apart rather than what they know.
    """

    number: int
    train_loss: float | None
    val: Scores
    seconds: float
    train_accuracy: float | None = None
    scaled_loss: float = math.inf

    @property
    def rank(self) -> tuple[float, float]:
        """The smaller the better: by accuracy, then by scaled log-loss."""
        return (-self.val.accuracy, self.scaled_loss)


def noise(accuracy: float, images: int) -> float:
    """Return by how much the accuracy on so many images is uncertain: a standard error, of at least one image.

    Candidates that are nearer to each other than this are not told apart by accuracy (the one-standard-error rule: Breiman
    et al. 1984, section 3.4.3): on a small validation split a single image would decide otherwise.
    """
    share = (accuracy * images + 1) / (images + 2)  # Laplace's: no accuracy is certain
    return max(math.sqrt(share * (1 - share) / images), 1 / images)


def kept(history: Sequence[Epoch], images: int) -> int:
    """Return which epoch is kept: the latest that cannot be told from the best, of those better than the start; else 0.

    Of epochs within the noise the latest: there the rate has fallen furthest, weights have come to rest, and the refit,
    whose rate falls to zero, is most like what was judged.

    Args:
        history: the epochs, the first of them the start.
        images: that judged them.
    """
    better = [epoch for epoch in history[1:] if epoch.rank < history[0].rank]
    if not better:
        return 0
    highest = max(epoch.val.accuracy for epoch in better)
    return max(epoch.number for epoch in better if epoch.val.accuracy >= highest - noise(highest, images) - _ROUNDING)


def is_gain(accuracy: float, scaled_loss: float, start: Epoch, images: int) -> bool:
    """Tell whether what was chosen is better than the start: by more than the noise, or as accurate at a lower scaled loss.

    The best of many epochs and rates is ahead by an image or two of a small validation split anyway.
    """
    if accuracy > start.val.accuracy + noise(start.val.accuracy, images) - _ROUNDING:
        return True
    return accuracy >= start.val.accuracy and scaled_loss < start.scaled_loss


def epoch_of(fields: dict[str, Any]) -> Epoch:
    """Return an epoch from its fields as plain values."""
    val: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields["val"].items()}
    return Epoch(**(fields | {"val": Scores(**val)}))


@dataclass(frozen=True)
class FineTuned:
    """A trained suffix and head with its history.

    Attributes:
        network: as it was tested.
        history: the epochs of the rate that was kept, epoch 0 the start.
        best: the epoch that was kept.
        lr: the rate that was kept.
        live: whether BatchNorm statistics of the trained part moved.
        rates: for each rate that was tried the validation accuracy of its best epoch.
        share: of the way from the start to the kept epoch, that was gone.
        val: scores on validation there.
        tested: scores on the test split.
        seconds: of all training, that of killed processes included up to the last state that they kept.
        samples_per_second: of the kept rate's.
        similarity: linear CKA of the embeddings of validation images before and after (Kornblith et al. 2019).
        precision: what training steps were computed in.
        refitted: whether the model has trained on validation images too; not where that left it worse on them.
        from_train: as it was chosen, trained on ``train`` alone: where a deeper training may start.
        finished: as it was tested, the weights not copied: what a deeper training answers with that gains nothing.
    """

    network: OpenNetwork
    history: tuple[Epoch, ...]
    best: int
    lr: float
    live: bool
    rates: dict[str, float]
    share: float
    val: Scores
    tested: TestResult
    seconds: float
    samples_per_second: float
    similarity: float
    precision: Precision
    refitted: bool
    from_train: Network
    finished: Network

    @property
    def learns_little(self) -> str:
        """What is to be said where training images have become no more often right than validation's were at the start."""
        first, last = self.history[0], self.history[-1]
        if last.train_accuracy is None or last.train_accuracy >= first.val.accuracy - _AHEAD:
            return ""
        return (
            f"it hardly learns: after {last.number} epochs {100 * last.train_accuracy:.1f} % of the training images are "
            f"right, where it started with {100 * first.val.accuracy:.1f} % of validation's: try other rates (`lr`), more "
            "`epochs`, or `train_batchnorm`"
        )

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


def read_ahead(take: Take, batches: Sequence[Index]) -> Iterator[NDArray[Any]]:
    """Yield the rows of batches in order, two of them read before they are asked for."""
    # one thread: HDF5 reads one at a time anyway; two batches: a slow read hides behind a step, and memory stays small
    with ThreadPoolExecutor(1) as reader:
        waiting: list[Future[NDArray[Any]]] = []
        try:
            for index in batches:
                waiting.append(reader.submit(take, index))
                if len(waiting) > 2:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def to_device(rows: NDArray[Any], device: torch.device) -> Tensor:
    """Return stored rows on a device."""
    tensor = torch.from_numpy(rows)
    # pinned memory is copied while the GPU computes
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def flipped_and_shifted(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Return pixels (b, h, w, 3), half of the images mirrored, each shifted by up to an eighth of its sides.

    What would be empty is filled by reflection (He et al. 2016, section 4.2, on larger images).
    """
    count, height, width = pixels.shape[:3]
    down, across = (rng.integers(-int(_SHIFT * side), int(_SHIFT * side) + 1, count) for side in (height, width))
    rows = _reflected(np.arange(height) + down[:, None], height)
    columns = _reflected(np.arange(width) + across[:, None], width)
    columns = np.where(rng.random(count)[:, None] < 0.5, columns[:, ::-1], columns)
    images = torch.arange(count)[:, None, None]
    # one gather of bytes for the batch: an image at a time would cost an interpreted step for each
    return pixels[images, torch.from_numpy(rows)[:, :, None], torch.from_numpy(columns.copy())[:, None, :]]


def _reflected(positions: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    positions = np.abs(positions)
    return np.where(positions >= size, 2 * (size - 1) - positions, positions)


def mixed(rows: Tensor, alpha: float, rng: np.random.Generator) -> tuple[Tensor, Tensor, float]:
    """Return rows (b, ...) each mixed with another, the partners' positions (b,), and the share of the first.

    Zhang et al. 2018 (mixup) on pixels, Verma et al. 2019 (manifold mixup) on activations.
    """
    share = float(rng.beta(alpha, alpha))
    partners = torch.from_numpy(rng.permutation(len(rows))).to(rows.device)
    rows = rows.float()  # stored as bytes or float16
    return share * rows + (1 - share) * rows[partners], partners, share


def save_checkpoint(module: nn.Module, model: SuffixAndHead, path: Path, facts: dict[str, Any]) -> Path:
    """Write the whole tuned network as safetensors, under timm's own names where its classifier is one linear layer.

    Args:
        module: the backbone, whose parameters the model has trained.
        model: its head is written.
        path: of the file.
        facts: kept in its metadata.

    Raises:
        StorageError: the disk failed.
    """
    module = copy.deepcopy(module)
    classes = model.head.out_features
    head = {"weight": model.head.weight.detach(), "bias": model.head.bias.detach()}
    classifier = _timm_classifier(module, classes, model.head.in_features)
    if classifier is None:
        state = module.state_dict() | {f"{OWN_HEAD}{name}": value for name, value in head.items()}
    else:
        classifier.load_state_dict(head)
        state = module.state_dict()
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    make_folder(path.parent)
    replace_file(path, save_safetensors(tensors, metadata={"featcache": json.dumps(facts)}))
    return path


def _timm_classifier(module: nn.Module, classes: int, width: int) -> nn.Linear | None:
    """Return a module's classifier, set to so many classes; ``None`` where it is no one linear layer of that width."""
    reset = getattr(module, "reset_classifier", None)
    if reset is None:
        return None
    trial = copy.deepcopy(module)  # some architectures' classifiers have layers before the last: those are left as they are
    trial.reset_classifier(classes)  # type: ignore[operator]
    classifier = trial.get_classifier()  # type: ignore[operator]
    if not isinstance(classifier, nn.Linear) or classifier.in_features != width:
        return None
    reset(classes)
    classifier = module.get_classifier()  # type: ignore[operator]
    return classifier if isinstance(classifier, nn.Linear) else None
