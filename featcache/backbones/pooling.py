"""Activations to one vector, over axes that are proved to be positions; and what each of a backbone's layers gives."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import register_notrace_module
from torch import Tensor, nn

from featcache.backbones.cut import FEATURES, Cutter, Layer
from featcache.errors import CutError, UsageError
from featcache.specs import Pool

_TRIES = 12  # parameters that are changed before a layout counts as unknown
_STRENGTHS = (1, 32)  # of a change, in a parameter's own size: the greater lifts a channel that a ReLU keeps at zero
_VISIBLE = 1e-5  # of the greatest activation: a smaller change is rounding
_RELEVANT = 1e-3  # of the greatest change
_FEW, _MANY = 1 / 8, 1 / 2  # shares of an axis: what one channel's change may reach of channels, and must of positions


@dataclass(frozen=True)
class Layout:
    """What the axes of activations (b, ...) are.

    There are ``axes`` of them; ``channels`` is that of channels: the last of (b, h, w, c) and (b, n, c), 1 of (b, c),
    (b, c, h, w) and (b, c, n). ``prefix_tokens`` of n tokens come before the image's; ``class_token`` tells whether the
    first of them is one. Where they are ``masked`` the last channel is no activation: it is 1 for a token and 0 for what
    only fills a text up; the class token of a text is one of its tokens too.
    """

    axes: int
    channels: int
    prefix_tokens: int = 0
    class_token: bool = False
    masked: bool = False

    def tokens(self, activations: Tensor) -> tuple[Tensor, Tensor]:
        """Return activations of more than two axes as the tokens before the image's own, (b, p, c), and these, (b, n, c)."""
        if self.masked:
            states = activations[..., :-1]
            return states[:, :1], states
        if self.channels == self.axes - 1:
            tokens = activations.flatten(1, 2) if self.axes == 4 else activations
        else:
            tokens = activations.flatten(2).transpose(1, 2)
        return tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :]

    def mask(self, activations: Tensor) -> Tensor | None:
        """Return which of the tokens are some, bool (b, n), ``None`` where all are."""
        return activations[..., -1] > 0.5 if self.masked else None


@dataclass(frozen=True)
class TokenCounts:
    """What is known of a backbone's tokens: the side of its images in pixels, and how many may precede the patches."""

    image_size: int
    prefixes: tuple[int, ...] = (0,)
    class_token: bool = False

    @classmethod
    def of(cls, backbone: nn.Module, image_size: int) -> "TokenCounts":
        """Read the attributes of a timm backbone; what they leave out is told from the number of tokens later on."""
        declared = getattr(backbone, "num_prefix_tokens", 0)
        names = [name.rpartition(".")[2].rstrip("0123456789") for name, _ in backbone.named_parameters()]
        class_token = not {"cls_token", "class_embedding"}.isdisjoint(names)  # as timm, and as open_clip call it
        return cls(
            image_size, tuple(sorted({0, declared if isinstance(declared, int) else 0, int(class_token)})), class_token
        )

    def prefix_of(self, tokens: int) -> int | None:
        """Return how many tokens are no patches of a square grid, ``None`` where that cannot be told.

        As few tokens as may precede the patches could be these alone.
        """
        if 0 < tokens <= max(self.prefixes):
            return None
        grids = {count: math.isqrt(tokens - count) for count in self.prefixes if count < tokens}
        fitting = [count for count, side in grids.items() if side * side == tokens - count]
        if len(fitting) > 1:
            fitting = [count for count in fitting if self.image_size % grids[count] == 0]
        return fitting[0] if len(fitting) == 1 else None


def prove_layout(
    subject: str, run: Callable[[], Tensor], parameters: Iterable[nn.Parameter], counts: TokenCounts, *, instead: str
) -> Layout:
    """Find out what the axes of some activations are, by what changes when one channel's parameter does.

    An element of a bias, or a row of a convolution or a linear layer, belongs to one channel: of all axes it moves one
    at a single place, and the others all along. What then is no axis of channels must be a square, or patches of a square
    and the tokens that are known to precede them.

    Args:
        subject: the activations, as an error calls them.
        run: computes them anew, (b, ...).
        parameters: those they depend on, the last used first; each is changed for a moment.
        counts: of the backbone's tokens.
        instead: what to do where it cannot be found out, as a sentence.

    Raises:
        UsageError: they are no tensor of one row an image, or their axes cannot be told.
    """
    with torch.inference_mode():
        before = run()
    if not isinstance(before, Tensor) or before.dim() < 2:
        raise UsageError(f"{subject}: {_kind(before)} comes out, not one tensor an image. {instead}")
    if before.dim() == 2:
        return Layout(2, 1)
    shape = tuple(before.shape[1:])
    tries = product(_STRENGTHS, _few(parameters))
    channels = next((axis for strength, each in tries if (axis := _moved_axis(run, each, strength, before))), None)
    if channels is None:
        raise UsageError(f"{subject}: which axis of {shape} holds the channels cannot be proved. {instead}")
    positions = shape[: channels - 1] + shape[channels:]
    if len(positions) == 2 and positions[0] == positions[1] and channels in {1, 3}:
        return Layout(4, channels)
    prefix = counts.prefix_of(positions[0]) if len(positions) == 1 else None
    if prefix is None:
        raise UsageError(
            f"{subject}: beside {shape[channels - 1]} channels it has {' x '.join(map(str, positions))}, which are neither "
            f"a square of positions nor one behind the tokens that this backbone is known to have. {instead}"
        )
    return Layout(3, channels, prefix, counts.class_token and prefix > 0)


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, Sequence | dict) else "")


def _few(parameters: Iterable[nn.Parameter]) -> Iterable[nn.Parameter]:
    """Yield the first parameters that have one row a channel: vectors, and weights of more than one row."""
    tried = 0
    for parameter in parameters:
        if parameter.is_floating_point() and _row_axis(parameter) is not None and tried < _TRIES:
            tried += 1
            yield parameter


def _row_axis(parameter: nn.Parameter) -> int | None:
    """Return the axis that counts output channels, ``None`` for scalars and tables such as embeddings of positions."""
    wide = [axis for axis, size in enumerate(parameter.shape) if size > 1]
    if len(wide) == 1:
        return wide[0]
    return 0 if wide and wide[0] == 0 else None


def _moved_axis(run: Callable[[], Tensor], parameter: nn.Parameter, strength: int, before: Tensor) -> int | None:
    """Return the only axis along which few places change with a row of a parameter, others with another row, else ``None``.

    Where a class token alone is worked on, every row changes the same place of the tokens' axis.
    """
    axis = _row_axis(parameter)
    assert axis is not None
    middle = parameter.shape[axis] // 2
    rows = (parameter.data.select(axis, number) for number in (middle, middle - 1))
    first, second = (_changed(run, row, strength * (1 + parameter.data.abs().max()), before) for row in rows)
    if first is None or second is None:
        return None
    axes = range(1, before.dim())
    few = [number for number in axes if 0 < int(first[number].sum()) <= max(1, _FEW * before.shape[number])]
    few = [number for number in few if before.shape[number] > 1]
    rest_moves = all(int(first[number].sum()) >= _MANY * before.shape[number] for number in axes if number not in few)
    apart = len(few) == 1 and not torch.equal(first[few[0]], second[few[0]])
    return few[0] if rest_moves and apart else None


def _changed(run: Callable[[], Tensor], row: Tensor, size: Tensor, before: Tensor) -> dict[int, Tensor] | None:
    """Return at which places of each axis some activation changes with a row of a parameter, ``None`` if none does."""
    before_row = row.clone()
    try:
        # no constant: standardised weights would not change with it
        slope = torch.linspace(0.5, 1.5, row.numel(), dtype=row.dtype, device=row.device).reshape(row.shape)
        row.add_(size * slope)
        with torch.inference_mode():
            moved = (run() - before).abs()
    finally:
        row.copy_(before_row)
    peak = float(moved.max())
    if not math.isfinite(peak) or peak <= _VISIBLE * float(before.abs().max()):
        return None
    changed = moved > peak * _RELEVANT
    every = range(before.dim())
    return {along: changed.any(dim=[each for each in every if each != along]) for along in every if along > 0}


@register_notrace_module  # traced as one call: what depends on shapes inside stays out of the graph
class Pooling(nn.Module):
    """Activations (b, c, h, w), (b, h, w, c), (b, n, c) or (b, c, n) to vectors (b, c), twice as long for ``avg+cls``.

    ``gem`` is the generalised mean with p = 3 (Radenović et al. 2018, section 3.2). Averages and maxima leave class and
    register tokens out. Vectors stay as they are.

    Args:
        kind: one of POOLS; ``default`` averages.
        layout: what the axes are.
        what: the activations, as an error calls them.

    Raises:
        UsageError: a class token is asked for, and there is none.
    """

    def __init__(self, kind: Pool, layout: Layout, subject: str = "this backbone") -> None:
        super().__init__()
        if "cls" in kind and not layout.class_token:
            raise UsageError(f"`pool` {kind}: {subject} has no class token.")
        self.kind = kind
        self.layout = layout

    def forward(self, activations: Tensor) -> Tensor:
        """Return the vectors."""
        if self.layout.axes == 2:
            return activations
        before, patches = self.layout.tokens(activations)
        mask = self.layout.mask(activations)
        if self.kind == "max":
            return (patches if mask is None else patches.masked_fill(~mask[..., None], -torch.inf)).amax(1)
        if self.kind == "cls":
            return before[:, 0]
        if self.kind == "gem":
            return mean_of(patches.clamp(min=1e-6).pow(3), mask).pow(1 / 3)
        average = mean_of(patches, mask)
        return torch.cat([average, before[:, 0]], 1) if self.kind == "avg+cls" else average


def mean_of(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean (b, c) of tokens (b, n, c), of those alone that a mask (b, n) names."""
    if mask is None:
        return tokens.mean(1)
    weights = mask.to(tokens.dtype)[..., None]
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


class LastActivations(nn.Module):
    """A backbone's last activations before pooling: images (b, 3, h, w) -> whatever ``forward_features`` gives."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        # no method of this class: functions that a tracer must not enter are looked for where ``forward`` was written
        self.forward = backbone.forward_features  # type: ignore[assignment]


class PooledFeatures(nn.Module):
    """A backbone whose last activations go through another pooling than its own: images -> vectors (b, d)."""

    FEATURES = "features"  # the module that gives the activations before pooling
    INSIDE = f"{FEATURES}.backbone."  # what precedes the names of the backbone's modules and parameters

    def __init__(self, backbone: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        self.features = LastActivations(backbone)
        self.pooling = pooling

    def forward(self, images: Tensor) -> Tensor:
        """Return the vectors (b, d)."""
        return self.pooling(self.features(images))  # type: ignore[no-any-return]


class OwnPooling(nn.Module):
    """A backbone's own way from its last activations to the embedding: (b, ...) -> (b, d)."""

    METHOD = "forward_head"  # timm's name for it

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.forward = getattr(backbone, self.METHOD)


@dataclass(frozen=True)
class Poolings:
    """Several ways from stored tokens to vectors."""

    ways: Mapping[Pool, nn.Module]
    device: torch.device

    def only(self, kind: Pool) -> "Poolings":
        """Return one of the ways alone."""
        return Poolings({kind: self.ways[kind]}, self.device)

    def __call__(self, rows: NDArray[Any]) -> dict[Pool, NDArray[np.float32]]:
        """Return what each way makes of rows (b, ...) of any float type: float32 (b, d)."""
        with torch.inference_mode():
            tokens = torch.from_numpy(rows).to(self.device).float()
            return {kind: way(tokens).flatten(1).cpu().numpy() for kind, way in self.ways.items()}


_SAME = 1e-4  # of the greatest number: what rounding leaves of two ways to the same vector


def same_vectors(now: Tensor, then: Tensor) -> bool:
    """Tell whether vectors (b, d) are the same but for rounding."""
    return now.shape == then.shape and torch.allclose(now, then, rtol=_SAME, atol=_SAME * float(now.abs().max()))


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
        module: nn.Module,
        stages: Mapping[str, Callable[[str], bool] | None],
        kind: Pool,
        counts: TokenCounts,
    ) -> None:
        self._name, self._whole, self._stages, self._kind, self._counts = name, module, stages, kind, counts
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

    def before_pooling(self) -> Layer:
        """Return the last activations before they are pooled.

        Raises:
            CutError: the backbone does not compute its embeddings from them, or several tensors are there.
        """
        return self.cutter.layer(FEATURES if self._kind == "default" else PooledFeatures.FEATURES)

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
        return not same_vectors(now, then)

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
