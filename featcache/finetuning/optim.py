"""How weights move, in one process or in several: groups with their rates, the optimiser, the schedule."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from featcache.evaluation.splits import Index
from featcache.finetuning import FineTunePlan

_PATIENCE = timedelta(days=7)  # the first process may extract for long while the others wait; the default is 30 minutes


class ProcessGroup:
    """The processes of this run; alone, it does nothing."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if self.size > 1 and not dist.is_initialized():
            on_gpu = torch.cuda.is_available()
            if on_gpu:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            # both: gradients are summed on the GPU, barriers and votes are tensors on the CPU
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)

    def share(self, index: Index) -> Index:
        """Return this process's positions among those of a batch."""
        # every size-th: shares differ by one image at most, whatever the batch's length
        return index[self.rank :: self.size]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all processes: each loss counts by its rows in the whole step."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:  # this process's share of a last batch may be empty; the sum needs all of them
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def total(self, numbers: NDArray[np.float64], device: torch.device) -> NDArray[Any]:
        """Return the sums of all processes' numbers."""
        if self.size == 1:
            return numbers
        tensor = torch.from_numpy(numbers.copy()).to(device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def agrees(self, each: bool) -> bool:  # noqa: FBT001 - what is voted on
        """Tell whether all processes say yes."""
        return bool(self.total(np.array([float(each)]), torch.device("cpu"))[0] == self.size)

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Let the first process go through the block before the others: they find what it has put into the cache."""
        if self.rank:
            self._wait()
        try:
            yield
        finally:
            if not self.rank:
                self._wait()

    def _wait(self) -> None:
        if self.size > 1:
            dist.all_reduce(torch.zeros(1))


_MOMENTUM = 0.9
Group = dict[str, Any]


def parameter_groups(
    stages: Sequence[Sequence[nn.Parameter]], head: nn.Linear, plan: FineTunePlan, lr: float
) -> list[Group]:
    """Return an optimiser's groups: each stage its rate, the head its own, no weight decay for vectors (norms, biases).

    Args:
        stages: the parameters that train, stage by stage, in forward order.
        head: the linear head.
        plan: its rate, and the factor from each stage to the one before.
        lr: the last stage's rate.
    """
    groups: list[Group] = []
    for depth, tensors in enumerate(reversed(stages)):
        rate = lr * plan.layer_decay**depth
        groups.append({"params": [tensor for tensor in tensors if tensor.dim() > 1], "lr": rate})
        groups.append({"params": [tensor for tensor in tensors if tensor.dim() <= 1], "lr": rate, "weight_decay": 0.0})
    groups.append({"params": [head.weight], "lr": plan.head_lr})
    groups.append({"params": [head.bias], "lr": plan.head_lr, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def make_optimiser(groups: Sequence[Group], plan: FineTunePlan) -> torch.optim.Optimizer:
    """Return the plan's optimiser, which reads and writes each weight once a step."""
    # fused: otherwise every operation of the update is a pass over all weights
    if plan.optimiser == "sgd":
        return torch.optim.SGD(groups, momentum=_MOMENTUM, weight_decay=plan.weight_decay, fused=True)
    kind = torch.optim.AdamW if plan.optimiser == "adamw" else torch.optim.Adam
    return kind(groups, weight_decay=plan.weight_decay, fused=True)


def rate(step: int, steps: int, warmup: float) -> float:
    """Return the factor on the learning rates: a linear rise over a share of the steps, then a half cosine to zero."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
