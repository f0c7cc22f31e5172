"""What training steps are computed in, where no precision is named."""

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featcache.finetuning.distributed import ProcessGroup
from featcache.finetuning.model import SuffixAndHead, set_training
from featcache.specs import Precision

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHOICE: tuple[Precision, Precision] = ("float32", "bfloat16")
_ROUNDS = 2
_PAYS = 1.2  # times the speed of float32: what is faster by less may be so by chance


def choose_precision(model: SuffixAndHead, rows: Tensor, team: ProcessGroup, *, on_cpu: bool) -> Precision:
    """Return bfloat16 on GPUs that have it (since Ampere), and if asked on CPUs (AMX) where a step is clearly faster in it.

    Depthwise convolutions, for one, can be slower. All processes of a team come to the same choice.

    Args:
        model: the one to train; neither weights nor statistics are changed.
        rows: a batch of stored rows on the model's device.
        team: the processes that share the work.
        on_cpu: try it on CPUs too.
    """
    if rows.device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    facts: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.10
    if not on_cpu or rows.device.type != "cpu" or not facts.get("amx_bf16"):
        return "float32"
    set_training(model, train_batchnorm=False)
    rounds = [[_step_seconds(model, rows, precision) for precision in _CHOICE] for _ in range(1 + _ROUNDS)]
    slow, fast = team.total(np.min(rounds[1:], axis=0), rows.device)
    return "bfloat16" if slow > _PAYS * fast else "float32"


def _step_seconds(model: SuffixAndHead, rows: Tensor, precision: Precision) -> float:
    dtype, start = DTYPES[precision], time.perf_counter()
    with torch.autocast(rows.device.type, dtype, enabled=dtype is not None):
        loss = model(rows).float().square().mean()
    loss.backward()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - start
