"""Turn a text such as ``last:2`` into the parameters that train and the cut that freezes the rest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from featcache.backbones.base import Stage
from featcache.errors import UsageError
from featcache.finetuning.plan import Unfreeze
from featcache.specs import INPUT


@dataclass(frozen=True)
class Trainable:
    """The stages that train, in forward order, each with those of its parameters that do, and the cut before them.

    Where low-rank updates train, the parameters are the weights that they stand beside.
    """

    stages: tuple[Stage, ...]
    cut: str
    spec: Unfreeze


def select_trainable(stages: Sequence[Stage], spec: Unfreeze, module: nn.Module | None = None) -> Trainable:
    """Return which stages and parameters train, and the cut before them.

    ``P%`` is the fewest last stages that hold at least P percent of the parameters. Norms and low-rank updates are told
    by the layers of ``module``.

    Raises:
        UsageError: the backbone has no such stage, or not that many, or nothing of that kind in them.
    """
    first = _first_trained(stages, spec)
    allowed = _allowed(module, spec) if module is not None and spec.what != "weights" else None
    picked = [
        replace(stage, parameters=tuple(name for name in stage.parameters if allowed is None or name in allowed))
        for stage in stages[first:]
    ]
    empty = next((number for number, stage in enumerate(picked) if stage.parameters), None)
    if empty is None:
        raise UsageError(
            f"`unfreeze` {spec.text}: there is nothing of that kind in {', '.join(stage.name for stage in picked)}."
        )
    first += empty  # stages with nothing of that kind before the first that has some stay frozen: the cut comes after them
    return Trainable(tuple(picked[empty:]), stages[first - 1].name if first else INPUT, spec)


def depths(stages: Sequence[Stage]) -> list[Unfreeze]:
    """Return what to unfreeze at each depth, from the last stage to all: every depth up to 8 stages, else doubling ones."""
    count = len(stages)
    # a long backbone's depths double: 24 blocks one by one would be 24 trainings for a curve that five points show
    numbers = range(1, count) if count <= 8 else (2**power for power in range(count.bit_length()) if 2**power < count)
    return [*(Unfreeze.parse(f"last:{number}") for number in numbers), Unfreeze.parse("all")]


def _allowed(module: nn.Module, spec: Unfreeze) -> set[str]:
    if spec.what == "bias":
        return {name for name, _ in module.named_parameters() if name.endswith("bias")}
    if spec.what == "norm":
        return {
            f"{path}.{name}"
            for path, layer in module.named_modules()
            if "norm" in type(layer).__name__.lower()  # timm's norms have no class in common
            for name, _ in layer.named_parameters(recurse=False)
        }
    # the paper updates linear layers; a convolutional network has none but its classifier, which is replaced
    return _weights(module, nn.Linear) or _weights(module, nn.Conv2d)


def _weights(module: nn.Module, kind: type[nn.Module]) -> set[str]:
    """Return the names of the weights of ungrouped layers of a kind."""
    return {
        f"{path}.weight"
        for path, layer in module.named_modules()
        if isinstance(layer, kind) and getattr(layer, "groups", 1) == 1
    }


def _first_trained(stages: Sequence[Stage], spec: Unfreeze) -> int:
    names = [stage.name for stage in stages]
    if spec.kind == "all":
        return 0
    if spec.kind == "last":
        if spec.amount > len(stages):
            raise UsageError(f"`unfreeze` {spec.text}: the backbone has {len(stages)} stages ({', '.join(names)}).")
        return len(stages) - int(spec.amount)
    if spec.kind == "stage":
        if spec.stage not in names:
            raise UsageError(f"`unfreeze` {spec.text}: the backbone's stages are {', '.join(names)}.")
        return names.index(spec.stage)
    least = math.ceil(spec.amount * sum(stage.size for stage in stages))
    first, parameters = len(stages), 0
    while parameters < least:
        first -= 1
        parameters += stages[first].size
    return first
