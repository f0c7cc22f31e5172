"""Turn a wish such as ``last:2`` into the stages that train and the cut that freezes the rest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from featcache.backbone import Stage
from featcache.errors import UsageError
from featcache.specs import INPUT, Unfreeze


@dataclass(frozen=True)
class Thawed:
    """The stages that train, in forward order, and the cut before them."""

    stages: tuple[Stage, ...]
    cut: str


def thaw(stages: Sequence[Stage], wish: Unfreeze) -> Thawed:
    """Return what a wish means for a backbone's stages.

    ``P%`` is the fewest last stages that hold at least P percent of the parameters.

    Raises:
        UsageError: the backbone has no such stage, or not that many.
    """
    first = _first_trained(stages, wish)
    return Thawed(tuple(stages[first:]), stages[first - 1].name if first else INPUT)


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
