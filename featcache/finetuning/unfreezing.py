"""Turn a wish such as ``last:2`` into the parameters that train and the cut that freezes the rest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from featcache.backbones.timm_models import Stage
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
    wish: Unfreeze


def select_trainable(stages: Sequence[Stage], wish: Unfreeze, module: nn.Module | None = None) -> Trainable:
    """Return what a wish means for a backbone's stages.

    ``P%`` is the fewest last stages that hold at least P percent of the parameters. Norms and low-rank updates are told
    by the layers of ``module``.

    Raises:
        UsageError: the backbone has no such stage, or not that many, or nothing of that kind in them.
    """
    first = _first_trained(stages, wish)
    allowed = _allowed(module, wish) if module is not None and wish.what != "weights" else None
    picked = [
        replace(stage, parameters=tuple(name for name in stage.parameters if allowed is None or name in allowed))
        for stage in stages[first:]
    ]
    empty = next((number for number, stage in enumerate(picked) if stage.parameters), None)
    if empty is None:
        raise UsageError(
            f"--unfreeze {wish.text}: there is nothing of that kind in {', '.join(one.name for one in picked)}."
        )
    first += empty
    return Trainable(tuple(picked[empty:]), stages[first - 1].name if first else INPUT, wish)


def depths(stages: Sequence[Stage]) -> list[Unfreeze]:
    """Return the wishes from the last stage to all: each depth of a short backbone, doubling ones of a long one."""
    count = len(stages)
    numbers = range(1, count) if count <= 8 else (2**power for power in range(count.bit_length()) if 2**power < count)
    return [*(Unfreeze.parse(f"last:{number}") for number in numbers), Unfreeze.parse("all")]


def _allowed(module: nn.Module, wish: Unfreeze) -> set[str]:
    if wish.what == "bias":
        return {name for name, _ in module.named_parameters() if name.endswith("bias")}
    if wish.what == "norm":
        return {
            f"{path}.{name}"
            for path, layer in module.named_modules()
            if "norm" in type(layer).__name__.lower()
            for name, _ in layer.named_parameters(recurse=False)
        }
    return _weights(module, nn.Linear) or _weights(module, nn.Conv2d)


def _weights(module: nn.Module, kind: type[nn.Module]) -> set[str]:
    """Return the names of the weights of ungrouped layers of a kind."""
    return {
        f"{path}.weight"
        for path, layer in module.named_modules()
        if isinstance(layer, kind) and getattr(layer, "groups", 1) == 1
    }


def _first_trained(stages: Sequence[Stage], wish: Unfreeze) -> int:
    names = [stage.name for stage in stages]
    if wish.kind == "all":
        return 0
    if wish.kind == "last":
        if wish.amount > len(stages):
            raise UsageError(f"--unfreeze {wish.text}: the backbone has {len(stages)} stages ({', '.join(names)}).")
        return len(stages) - int(wish.amount)
    if wish.kind == "stage":
        if wish.stage not in names:
            raise UsageError(f"--unfreeze {wish.text}: the backbone's stages are {', '.join(names)}.")
        return names.index(wish.stage)
    wanted = math.ceil(wish.amount * sum(stage.size for stage in stages))
    first, held = len(stages), 0
    while held < wanted:
        first -= 1
        held += stages[first].size
    return first
