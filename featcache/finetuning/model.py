"""What is trained: the part of a backbone behind a cut, and a linear head."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from featcache.evaluation.splits import Index

Take = Callable[[Index], NDArray[Any]]


@dataclass(frozen=True)
class LinearHead:
    """A linear map from embeddings to logits: weights (classes, d), bias (classes,)."""

    weights: NDArray[np.float64]
    bias: NDArray[np.float64]


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
        if stored.dtype != torch.uint8:
            stored = stored.float()
            if stored.dim() == 4 and stored.shape[-1] != 3:  # pixels, even as floats, have their channels last
                stored = stored.contiguous(memory_format=torch.channels_last)
        return self.suffix(stored).flatten(1)  # type: ignore[no-any-return]

    def forward(self, stored: Tensor) -> Tensor:
        """Return the logits (b, classes)."""
        return self.head(self.embed(stored))  # type: ignore[no-any-return]


def set_training(model: nn.Module, *, train_batchnorm: bool) -> None:
    """Put what trains in training mode; frozen parts stay in inference mode, and BatchNorm too unless asked otherwise."""
    _set_training(model, parent=True)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not train_batchnorm:  # noqa: SLF001 - no public name
            module.training = False


def _set_training(module: nn.Module, *, parent: bool) -> None:
    """Set a module by whether any of its parameters trains; one without any, such as dropout, is as its parent."""
    trains = [parameter.requires_grad for parameter in module.parameters()]
    module.training = any(trains) if trains else parent
    for child in module.children():
        _set_training(child, parent=module.training)


def predict(model: SuffixAndHead, take: Take, index: Index, batch_size: int) -> NDArray[np.float64]:
    """Return the probabilities (k, classes) of rows at some positions (k,)."""
    return _in_batches(lambda rows: F.softmax(model(rows).double(), dim=1), model, take, index, batch_size)


def embed(model: SuffixAndHead, take: Take, index: Index, batch_size: int) -> NDArray[np.float64]:
    """Return the embeddings (k, d) of rows at some positions (k,)."""
    return _in_batches(lambda rows: model.embed(rows).double(), model, take, index, batch_size)


def _in_batches(
    run: Callable[[Tensor], Tensor], model: SuffixAndHead, take: Take, index: Index, batch_size: int
) -> NDArray[np.float64]:
    model.eval()
    device = model.head.weight.device
    with torch.inference_mode():
        out = [run(torch.from_numpy(take(rows)).to(device)).cpu().numpy() for rows in chunks(index, batch_size)]
    return np.concatenate(out)


def chunks(index: Index, size: int) -> Iterator[Index]:
    """Yield the positions so many at a time."""
    for start in range(0, len(index), size):
        yield index[start : start + size]
