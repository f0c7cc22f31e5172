"""How weights move: groups with their rates, the optimiser, the schedule."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from featcache.finetuning.plan import FineTunePlan

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
        own = lr * plan.layer_decay**depth
        groups.append({"params": [tensor for tensor in tensors if tensor.dim() > 1], "lr": own})
        groups.append({"params": [tensor for tensor in tensors if tensor.dim() <= 1], "lr": own, "weight_decay": 0.0})
    groups.append({"params": [head.weight], "lr": plan.head_lr})
    groups.append({"params": [head.bias], "lr": plan.head_lr, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def make_optimiser(groups: Sequence[Group], plan: FineTunePlan) -> torch.optim.Optimizer:
    """Return the plan's optimiser, which reads and writes each weight once a step."""
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
