"""A loaded backbone: its stages, where it is cut, its frozen prefix and how PyTorch runs it."""

import copy
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featcache.backbones import Origin, sha256_of_given_weights
from featcache.backbones.cut import (
    FEATURES,
    Cutter,
    Layer,
    Place,
    parameters_by_use,
    random_images,
    timm,
    without_unused_tokens,
)
from featcache.backbones.pooling import (
    LastActivations,
    Layers,
    Layout,
    OwnPooling,
    PooledFeatures,
    Pooling,
    Poolings,
    TokenCounts,
    layout_of_version_1,
    prove_layout,
    same_vectors,
)
from featcache.datasets.decoding import ImagePreprocess
from featcache.display import logger
from featcache.errors import CutError, SetupError, UsageError
from featcache.specs import (
    FORMAT_VERSION,
    INPUT,
    POOLED,
    POOLS,
    REVISED,
    TOKENS,
    BackboneSpec,
    LoadedBackbone,
    Pool,
    Precision,
    Tokenisation,
    Transform,
    Views,
    is_embedding,
    layers_of,
)

Pixels = NDArray[np.uint8]
Outputs = tuple[NDArray[Any], ...]
# A child below it, such as a lone norm, makes no stage worth storing activations at.
_LIGHT = 0.01  # of all parameters
OWN_HEAD = "featcache_head."  # in the files of tuned networks that have no classifier of their own


@dataclass(frozen=True)
class Stage:
    """One of the ordered groups of layers that timm divides a backbone into."""

    name: str
    parameters: tuple[str, ...]
    size: int


def stages_of(module: nn.Module) -> tuple[Stage, ...]:
    """Return a backbone's stages in forward order: timm's groups, else its blocks, else its children."""
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    rules = _rules(module)
    if rules is None:
        ordered = _children(module, sizes)
    else:
        groups = timm.models.group_parameters(module, rules, reverse=False)
        ordered = [list(groups[index]) for index in sorted(groups)]
        if len(ordered) > 1 and not any(_matched(rules, name) for name in ordered[-1]):
            tail = ordered.pop()
            ordered[-1].extend(tail)
    return tuple(
        Stage(_stage_name(group, index, sizes), tuple(group), sum(sizes[name] for name in group))
        for index, group in enumerate(group for group in ordered if group)
    )


def _rules(module: nn.Module) -> Any:
    """Return timm's rules that order a backbone's parameters by depth; ``None`` where it has none."""
    matcher = getattr(module, "group_matcher", None)
    if matcher is None:
        return None
    try:
        return matcher(coarse=True)
    except AssertionError:  # some know single blocks only
        return matcher(coarse=False)


def _children(module: nn.Module, sizes: dict[str, int]) -> list[list[str]]:
    """Group parameters by child, and by grandchild in lists, in order; a group of little weight joins the one before."""
    by_child: dict[str, list[str]] = {}
    for name in sizes:
        parts = name.split(".")
        is_list = len(parts) > 2 and isinstance(getattr(module, parts[0]), nn.Sequential | nn.ModuleList)
        by_child.setdefault(".".join(parts[: 2 if is_list else 1]) if len(parts) > 1 else "", []).append(name)
    direct = by_child.pop("", [])
    least = _LIGHT * sum(sizes.values())
    groups: list[list[str]] = []
    for group in by_child.values():
        if groups and min(sum(sizes[name] for name in members) for members in (group, groups[-1])) < least:
            groups[-1].extend(group)
        else:
            groups.append(group)
    return [direct + groups[0], *groups[1:]] if groups else [direct]


def _matched(rules: Any, name: str) -> bool:
    if not isinstance(rules, dict):
        return True
    patterns = [
        pattern
        for rule in rules.values()
        if rule is not None
        for pattern in ([rule] if isinstance(rule, str) else [part[0] for part in rule])
    ]
    return any(re.match(pattern, name) for pattern in patterns)


def _stage_name(group: list[str], index: int, sizes: dict[str, int]) -> str:
    """Return the shortest module path that holds most of a group's parameters and none of another's."""
    foreign = [name for name in sizes if name not in set(group)]
    parts = group[0].split(".")
    for depth in range(1, len(parts)):
        path = ".".join(parts[:depth])
        inside = sum(name.startswith(f"{path}.") for name in group)
        enough = inside == len(group) if index == 0 else 2 * inside > len(group)
        if enough and not any(name.startswith(f"{path}.") for name in foreign):
            return path
    return "stem" if index == 0 else f"stage{index}"


def _by_reading(module: nn.Module, stages: tuple[Stage, ...], names: Sequence[str]) -> tuple[Stage, ...]:
    """Return stages in which no parameter is first read behind those of a later stage.

    timm counts a class token to the stem even where it joins the others ten blocks later (ConViT), and blocks that follow
    all others to one before the last (CaiT): a cut between would leave frozen parameters behind itself.
    """
    stage_of = {name: number for number, stage in enumerate(stages) for name in stage.parameters}
    reached = 0
    for place, name in enumerate(names):
        if "." in name:
            reached = stage_of[name] = max(reached, stage_of[name])
        elif reached > stage_of[name]:  # with what reads it next: a cut before that would leave it behind
            stage_of[name] = max(reached, next((stage_of[later] for later in names[place:] if "." in later), reached))
    if all(name in stages[number].parameters for name, number in stage_of.items()):
        return stages
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    groups = [tuple(name for name in stage_of if stage_of[name] == number) for number in range(len(stages))]
    return tuple(  # names stay: they are in keys and in what people type
        Stage(stage.name, group, sum(sizes[name] for name in group))
        for stage, group in zip(stages, groups, strict=True)
        if group
    )


class Preprocess(Protocol):
    """How a sample's bytes become the array that a backbone takes: frozen, and hashed into the cache key by its spec."""

    @property
    def spec(self) -> Transform | Tokenisation:
        """What decides the array besides the bytes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one view of a sample."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """What the array is made of."""

    @property
    def input_name(self) -> str:
        """What an exported model calls the array."""

    def __call__(self, content: bytes, views: Views) -> NDArray[Any]:
        """Return a sample's views (views, ...); raises where its bytes cannot be used, the text says why."""


class Backbone(Protocol):
    """What the cache, heads and training ask of a network, whatever world it comes from.

    Samples are bytes in every world. ``module`` holds all parameters; those of a stage are called as there.
    """

    @property
    def spec(self) -> BackboneSpec:
        """What was asked for."""

    @property
    def loaded(self) -> LoadedBackbone:
        """What of it decides a row: it is hashed into the cache key."""

    @property
    def preprocess(self) -> Preprocess:
        """How samples become arrays."""

    @property
    def module(self) -> nn.Module:
        """The network, in inference mode."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def origin(self) -> Origin | None:
        """Where the files behind a name lie, where there are any."""

    @property
    def content(self) -> str | None:
        """The hash of those files, as they were loaded."""

    @property
    def file_sha256(self) -> str | None:
        """The hash of the user's own weights file, as it was loaded."""

    @property
    def is_current(self) -> bool:
        """Whether the files that it was loaded from are still what they were."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Groups of layers in forward order: boundaries between them are cuts."""

    @property
    def whole(self) -> nn.Module:
        """Prepared samples to embeddings (b, d); raises UsageError where the pooling that was asked for is impossible."""

    def example_inputs(self, count: int) -> NDArray[Any]:
        """Return blank samples (count, ...), as ``preprocess`` prepares them."""

    def prefix(self, cut: str) -> nn.Module:
        """Return the frozen part up to a stage; raises UsageError or CutError where there is no such cut."""

    def suffix(self, cut: str) -> nn.Module:
        """Return what follows a cut: stored rows (b, ...) to embeddings (b, d)."""

    def program(self, cuts: Sequence[str]) -> nn.Module:
        """Return the frozen part of several cuts in one pass: prepared samples (b, ...) to a tuple of rows."""

    def format_version(self, cut: str) -> int:
        """Return which version of the format a cut's rows have."""

    @property
    def token_layout(self) -> Layout:
        """What the axes of rows at the cut ``tokens`` are; raises UsageError where there is no such cut."""

    def poolings(self) -> Poolings:
        """Return the ways from rows at the cut ``tokens`` to vectors."""

    def separate(self) -> "Backbone":
        """Return a copy whose parameters can be trained without touching this one's."""


@dataclass(frozen=True)
class TimmBackbone:
    """A loaded backbone without classifier, in inference mode: images (b, 3, h, w) -> embeddings (b, d)."""

    spec: BackboneSpec
    loaded: LoadedBackbone
    transform: Transform
    module: nn.Module
    device: torch.device
    origin: Origin | None = None  # of what was found by a name
    content: str | None = None  # of the origin's files, as they were loaded
    file_sha256: str | None = None  # of the weights file, as it was loaded

    @property
    def preprocess(self) -> ImagePreprocess:
        """How image files become pixels."""
        return ImagePreprocess(self.transform)

    def example_inputs(self, count: int) -> NDArray[np.uint8]:
        """Return blank images, uint8 (count, h, w, 3)."""
        return np.zeros((count, *self.preprocess.shape), np.uint8)

    @property
    def is_current(self) -> bool:
        """Whether the files that it was loaded from are still what they were."""
        same = self.origin is None or self.origin.content() == self.content
        return same and sha256_of_given_weights(self.spec) == self.file_sha256

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in forward order; a tail without a stage of its own (last norm) belongs to the last one."""
        stages = stages_of(self.module)
        loose = any("." not in name for stage in stages[:-1] for name in stage.parameters)
        mixed = any(stage.name == f"stage{number}" for number, stage in enumerate(stages))
        if not loose and not mixed:  # then timm's groups are modules in their order, and a trace would find out nothing
            return stages
        try:
            names = [name.removeprefix(self._inside) for name in self._cutter.names_by_use()]
        except CutError:  # nothing can be cut then, and nothing is behind a cut
            return stages
        return _by_reading(self.module, stages, names)

    @property
    def _inside(self) -> str:
        return "" if self.whole is self.module else PooledFeatures.INSIDE

    @cached_property
    def whole(self) -> nn.Module:
        """Images (b, 3, h, w) to embeddings (b, d), by the pooling that was asked for."""
        if self.spec.pool == "default":
            return self.module
        return PooledFeatures(self.module, self._last_pooling)

    def prefix(self, cut: str) -> nn.Module:
        """Return the frozen part up to a stage, images (b, 3, h, w) -> activations (b, ...).

        Raises:
            UsageError: there is no such stage.
            CutError: the backbone cannot be cut there.
        """
        return self._cutter.split(self._trained_in_whole(cut)).prefix

    def suffix(self, cut: str) -> nn.Module:
        """Return what follows a cut: stored activations (b, ...) -> embeddings (b, d).

        The suffix of ``input`` takes pixels, uint8 (b, h, w, 3).
        """
        # Pixels are stored as they are: mean and std belong to the suffix, so that all backbones share them.
        if cut == INPUT:
            return nn.Sequential(Normalise(self.transform), self._traced_whole())
        return self._cutter.split(self._trained_in_whole(cut)).suffix

    def _traced_whole(self) -> nn.Module:
        """Return what ``whole`` computes, traced where that can be, without tokens that nobody looks at."""
        try:
            return without_unused_tokens(self.whole, self.transform.input_size)
        except CutError:
            return self.whole

    @cached_property
    def _cutter(self) -> Cutter:
        return Cutter(self.whole, self.transform.input_size)

    def _trained_in_whole(self, cut: str) -> Callable[[str], bool]:
        is_trained = self.trained_after(cut)
        return lambda name: is_trained(name.removeprefix(self._inside))

    @cached_property
    def _last_pooling(self) -> Pooling:
        """The pooling that was asked for, over the last activations' proved positions."""
        layout = self._last_layout(f"`pool` {self.spec.pool}", "Leave `pool` out.")
        return Pooling(self.spec.pool, layout, self.spec.name)

    @cached_property
    def token_layout(self) -> Layout:
        """What the axes of rows at the cut ``tokens`` are; raises UsageError where that cannot be told."""
        return self._last_layout(f"`cut` {TOKENS}", "Choose a stage, or pooled.")

    def _last_layout(self, setting: str, instead: str) -> Layout:
        """Return what the axes of the last activations are, which a setting needs; ``instead``: what to do without."""
        if not hasattr(self.module, FEATURES):
            raise UsageError(f"{setting}: {self.spec.name} does not give its activations before pooling. {instead}")
        subject = f"{setting}: the last activations of {self.spec.name}"
        features, images = LastActivations(self.module), random_images(self.module, 1, self.transform.input_size)
        try:
            parameters: Iterable[nn.Parameter] = list(parameters_by_use(features))
        except CutError:  # in order of their creation then, which is nearly that of use
            parameters = reversed(list(self.module.parameters()))
        layout = prove_layout(subject, lambda: features(images), parameters, self._counts, instead=instead)
        if layout.axes == 2:
            raise UsageError(f"{subject} are a vector already. {instead}")
        return layout

    def poolings(self) -> Poolings:
        """Return the ways from rows at the cut ``tokens`` to vectors, the backbone's own first.

        Those that come to the same vectors as one before them are left out, and the own one where the backbone does not
        pool what it gives as its last activations.

        Raises:
            UsageError: the axes of these activations cannot be told.
        """
        layout, images = self.token_layout, random_images(self.module, 2, self.transform.input_size)
        ways: dict[Pool, nn.Module] = {"default": OwnPooling(self.module)} if hasattr(self.module, OwnPooling.METHOD) else {}
        ways |= {kind: Pooling(kind, layout) for kind in POOLS[1:] if layout.class_token or "cls" not in kind}
        with torch.inference_mode():
            tokens = LastActivations(self.module)(images)
            vectors = {kind: way(tokens).flatten(1) for kind, way in ways.items()}
            if "default" in vectors and not same_vectors(vectors["default"], self.module(images).flatten(1)):
                del ways["default"], vectors["default"]
        kinds = list(ways)
        for place, kind in enumerate(kinds):
            if any(same_vectors(vectors[kind], vectors[earlier]) for earlier in kinds[:place]):
                del ways[kind]
        return Poolings(ways, self.device)

    @cached_property
    def _counts(self) -> TokenCounts:
        return TokenCounts.of(self.module, self.transform.input_size)

    def program(self, cuts: Sequence[str]) -> nn.Module:
        """Return the frozen part of several cuts in one pass: pixels uint8 (b, h, w, 3) -> a tuple of activations.

        Raises:
            UsageError: there is no such stage or layer, or a layer's output makes no one vector.
            CutError: the backbone cannot be cut there.
        """
        layers = [layers_of(cut) for cut in cuts]
        places: list[Place] = []
        finish: list[nn.Module] = []
        for cut, names in zip(cuts, layers, strict=True):
            for name in names:
                if name == POOLED:
                    places.append(None)
                    finish.append(nn.Flatten())
                elif name == TOKENS:
                    _ = self.token_layout  # what no pooling could take is no tokens
                    places.append(self._layers.before_pooling() if len(cuts) > 1 else None)
                    finish.append(nn.Identity())
                elif not is_embedding(cut):
                    places.append(self._trained_in_whole(name))
                    finish.append(nn.Identity())
                else:
                    layer, pooling = self._layers.read(name)
                    places.append(layer)
                    finish.append(pooling)
        # Embeddings or tokens alone run the backbone itself; anything else needs the graph.
        if tuple(cuts) == (TOKENS,):
            body: nn.Module = LastActivations(self.module)
        elif places != [None]:
            has_layers = any(isinstance(place, Layer) for place in places)
            body = (self._layers.cutter if has_layers else self._cutter).joint_prefix(places)
        else:  # a trace takes time, and gains where a class token is alone in the end
            body = self._traced_whole() if getattr(self.module, "global_pool", None) == "token" else self.whole
        return FrozenPrefix(Normalise(self.transform), body, finish, [len(names) for names in layers]).eval().to(self.device)

    def format_version(self, cut: str) -> int:
        """Return which version of the format a cut's rows have: entries of another version are not taken for them.

        Raises:
            UsageError: there is no such stage or layer.
            CutError: the backbone cannot be cut there.
        """
        if cut == INPUT:
            return FORMAT_VERSION
        if cut == TOKENS:
            _ = self.token_layout
            return FORMAT_VERSION
        names = layers_of(cut)
        if not names:
            raise UsageError(f"`cut` {cut}: write a stage's name, or those of layers with + between them.")
        layers = [name for name in names if name != POOLED]
        if not is_embedding(cut):
            changed = any(self._cutter.has_moved(self._trained_in_whole(layer)) for layer in layers)
        else:
            changed = True in {self._layers.has_changed(layer) for layer in layers}  # all are looked at: one may be refused
        return REVISED if changed or (POOLED in names and self._pools_otherwise) else FORMAT_VERSION

    @cached_property
    def _pools_otherwise(self) -> bool:
        """Whether version 1 of the format pooled the last activations over other axes, or other tokens."""
        if self.spec.pool == "default":
            return False
        layout = self._last_pooling.layout
        return replace(layout, class_token=False) != layout_of_version_1(self.module, layout.axes)

    @cached_property
    def _layers(self) -> Layers:
        names = [stage.name for stage in self.stages]
        behind = {name: None if name == names[-1] else self._trained_in_whole(name) for name in names}
        return Layers(self.spec.name, self.whole, behind, self.spec.pool, self._counts)

    def runner(self, cut: str) -> Callable[[NDArray[np.uint8]], NDArray[Any]]:
        """Return the frozen part as a plain function on arrays: pixels uint8 (b, h, w, 3) -> rows float32 (b, ...)."""
        run = TorchRuntime(self.program((cut,)), self.device, self.spec.precision)
        return lambda pixels: run(pixels)[0]

    def trained_after(self, cut: str) -> Callable[[str], bool]:
        """Return a test for the names of the parameters that lie behind a cut."""
        names = [stage.name for stage in self.stages]
        if cut not in names:
            raise UsageError(
                f"`cut` {cut}: {self.spec.name} has the stages {', '.join(names)}, besides pooled, tokens and input."
            )
        if cut == names[-1]:
            raise UsageError(f"`cut` {cut} is the last stage, nothing is left to train behind it: use pooled.")
        behind = {name for stage in self.stages[names.index(cut) + 1 :] for name in stage.parameters}
        return behind.__contains__

    def separate(self) -> "TimmBackbone":
        """Return a copy whose parameters can be trained without touching this one's, stochastic depth off."""
        module = copy.deepcopy(self.module)
        for part in module.modules():
            if type(part).__name__ == "DropPath":
                setattr(part, "drop_prob", 0.0)  # noqa: B010 - its type does not know it
        return replace(self, module=module)


def default_device() -> torch.device:
    """Return the first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(text: str) -> torch.device:
    """Return a device by its name, once it has held a number.

    Raises:
        UsageError: PyTorch knows no such device, or it is not here.
    """
    try:
        device = torch.device(text)
        torch.zeros(1).to(device).cpu()
    except Exception as error:  # a device that was not built in fails in any way
        here = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise UsageError(f"`device` {text}: PyTorch has no such device here; it has {', '.join(here)}.") from error
    return device


class FrozenPrefix(nn.Module):
    """The frozen part as runtimes execute it: pixels uint8 (b, h, w, 3) -> a tuple of activations, one a cut.

    ``body`` gives one tensor a layer, ``finish`` turns each into what is stored, ``spans`` says how many layers are
    concatenated into each cut's row.
    """

    def __init__(self, normalise: "Normalise", body: nn.Module, finish: Sequence[nn.Module], spans: Sequence[int]) -> None:
        super().__init__()
        self.normalise = normalise
        self.body = body
        self.finish = nn.ModuleList(finish)
        self.spans = tuple(spans)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return the activations of each cut."""
        tensors = self.body(self.normalise(pixels).contiguous(memory_format=torch.channels_last))
        tensors = tensors if isinstance(tensors, tuple) else (tensors,)
        finished = [step(tensor) for step, tensor in zip(self.finish, tensors, strict=True)]
        rows, start = [], 0
        for span in self.spans:
            rows.append(finished[start] if span == 1 else torch.cat(finished[start : start + span], 1))
            start += span
        return tuple(rows)


class Normalise(nn.Module):
    """Pixels, uint8 (b, h, w, 3), to what the backbone expects, float32 (b, 3, h, w), on the pixels' device."""

    scale: Tensor
    shift: Tensor

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (transform.mean, transform.std))
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the normalised images."""
        images = pixels.permute(0, 3, 1, 2).float()
        return images * self.scale + self.shift


class TorchRuntime:
    """PyTorch as it is. Out of memory on the device it halves the batch, for good."""

    def __init__(self, program: nn.Module, device: torch.device, precision: Precision) -> None:
        self._program = program
        self._device = device
        self._dtype = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
        # Workers decode side by side and take turns at the device: two batches at once would only halve its memory.
        self._turn = threading.Lock()
        self._piece = 0

    def __call__(self, pixels: Pixels) -> Outputs:
        """Return the activations of a batch, uint8 (b, h, w, 3)."""
        with torch.inference_mode(), torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
            if self._device.type == "cpu":
                return tuple(to_array(output) for output in self._whole(torch.from_numpy(pixels)))
            # Pinned memory is copied while the device computes; float32 on the way back, since NumPy has no bfloat16.
            images = torch.from_numpy(pixels).pin_memory()
            with self._turn:
                outputs = self._whole(images.to(self._device, non_blocking=True))
                copies = [output.float().to("cpu", non_blocking=True) for output in outputs]
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record()
            copied.synchronize()
            return tuple(to_array(copy) for copy in copies)

    def _whole(self, images: Tensor) -> tuple[Tensor, ...]:
        while True:
            size = self._piece or len(images)
            try:
                pieces = [as_tuple(self._program(piece)) for piece in torch.split(images, size)]
                return tuple(torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*pieces, strict=True))
            except torch.OutOfMemoryError:
                if size == 1:
                    raise SetupError(f"`device` {self._device}: its memory does not hold one image's activations.") from None
                # For good: a size that failed once would fail again with the next large batch.
                self._piece = size // 2
                logger.warning("Out of memory on %s: going on with %d images at a time", self._device, self._piece)
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """Return one tensor, or several, as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def to_array(output: Tensor) -> NDArray[Any]:
    """Return a tensor on the CPU as a float32 array, its memory in order."""
    return output.float().contiguous().numpy()
