"""Several processes that train one model, as torchrun starts them: each takes its share of every batch."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from featcache.evaluation.splits import Index

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
