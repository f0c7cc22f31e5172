"""What layers named in a cut give: each layer's own output, pooled along axes that are proved to be positions."""

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import nn

from featcache.backbones.cut import Cutter, Layer
from featcache.backbones.pooling import Layout, PooledFeatures, Pooling, TokenCounts, prove_layout
from featcache.errors import CutError, UsageError
from featcache.specs import Pool

_SAME = 1e-4  # of the greatest number: what rounding leaves of two ways to the same vector


class Layers:
    """A backbone's layers, by the names of its stages and of its modules.

    A stage that is no module of its own, such as a stem of several, ends where the next stage is entered.

    Args:
        name: the backbone's, for errors.
        whole: images (b, 3, h, w) to embeddings (b, d), in ``eval()`` mode.
        stages: whether a parameter lies behind a stage, for each of them but the last, ``None`` for that, in forward order.
        kind: the pooling.
        counts: of the backbone's tokens.
    """

    def __init__(
        self,
        name: str,
        whole: nn.Module,
        stages: Mapping[str, Callable[[str], bool] | None],
        kind: Pool,
        counts: TokenCounts,
    ) -> None:
        self._name, self._whole, self._stages, self._kind, self._counts = name, whole, stages, kind, counts
        self._read: dict[str, tuple[Layer, Pooling]] = {}

    @cached_property
    def cutter(self) -> Cutter:
        """The traced backbone with all of its tokens."""
        return Cutter(self._whole, self._counts.image_size, narrows=False)

    def read(self, name: str) -> tuple[Layer, Pooling]:
        """Return a layer's output and what makes a vector of it.

        Raises:
            UsageError: there is no such layer, several tensors leave it, or its axes cannot be told.
            CutError: the backbone cannot be traced.
        """
        if name not in self._read:
            layer = self._layer(name)
            run = self.cutter.run(layer)
            parameters = self.cutter.parameters_before(layer)
            layout = prove_layout(f"`layers` {name}", run, parameters, self._counts, instead="Take another layer.")
            self._read[name] = layer, Pooling(self._kind, layout, f"layer {name} of {self._name}")
        return self._read[name]

    def has_changed(self, name: str) -> bool:
        """Tell whether version 1 of the format gave another vector for a stage.

        It pooled what is stored where a stage is cut, which need not be the stage's own output, along the axes that timm
        declares for the last activations.
        """
        layer, pooling = self.read(name)
        if name not in self._stages or self._kind != "default":
            return False  # there are no such rows
        is_behind = self._stages[name]
        with torch.inference_mode():
            now = pooling(self.cutter.run(layer)())
            border = self.cutter.border_of_version_1(is_behind) if is_behind is not None else self.cutter.end
            if border is None:
                return False  # several tensors were refused
            then = self.cutter.run(border)()
            if is_behind is not None:
                then = Pooling("avg", layout_of_version_1(self._whole, then.dim()))(then)
            else:
                then = then.flatten(1)
        return now.shape != then.shape or not torch.allclose(now, then, rtol=_SAME, atol=_SAME * float(now.abs().max()))

    def _layer(self, name: str) -> Layer:
        names = list(self._stages)
        if name not in names and self._inside(name) not in dict(self._whole.named_modules()):
            raise UsageError(f"`layers` {name}: {self._name} has the stages {', '.join(names)}, and no layer of that name.")
        try:
            return self.cutter.layer(self._inside(name))
        except CutError as error:
            if name not in names[:-1] or self.cutter.calls(self._inside(name)):
                instead = "Take another layer" + (", or pooled." if name == names[-1] else ".")
                raise UsageError(f"`layers` {name}: {error} {instead}") from error
        following = names[names.index(name) + 1]
        try:
            return self.cutter.layer(self._inside(following), enters=True)
        except CutError as error:
            raise UsageError(
                f"`layers` {name}: this stage is no module of its own, and what enters the next one, {following}, is not "
                f"known: {error} Take another layer."
            ) from error

    def _inside(self, name: str) -> str:
        return name if self._kind == "default" else f"{PooledFeatures.INSIDE}{name}"


def layout_of_version_1(backbone: nn.Module, axes: int) -> Layout:
    """Return what version 1 of the format took activations of so many axes for: what timm declares, 0 where it does not."""
    if axes == 4:
        return Layout(4, 3 if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else 1)
    if axes == 3:
        return Layout(3, 2, getattr(backbone, "num_prefix_tokens", 0))
    return Layout(axes, 1)
