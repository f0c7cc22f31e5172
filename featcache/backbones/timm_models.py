"""The world of timm: create a backbone, load its weights, read its transform, name its stages."""

import copy
import inspect
import json
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from featcache.errors import CutError, DataError, SetupError, UsageError

try:
    import timm
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    from importlib.metadata import version

    raise SetupError(
        f"torch {version('torch')} and torchvision {version('torchvision')} come from different builds. Repair: "
        "`pip uninstall -y torch torchvision && pip install torch torchvision` (both, in one command)."
    ) from error
import numpy as np
import torch
from numpy.typing import NDArray
from timm.models import group_parameters, load_state_dict
from torch import Tensor, nn

from featcache.backbones import origins
from featcache.backbones.cut import Cutter, Layer, Place, parameters_by_use, without_unused_tokens
from featcache.backbones.layers import Layers, layout_of_version_1
from featcache.backbones.origins import BUNDLED, Origin
from featcache.backbones.pooling import Features, PooledFeatures, Pooling, TokenCounts, prove_layout
from featcache.backbones.prefix import FrozenPrefix, Normalise, TorchRuntime
from featcache.fingerprint import sha256_of_chunks
from featcache.specs import (
    FORMAT_VERSION,
    INPUT,
    INTERPOLATIONS,
    POOLED,
    REVISED,
    BackboneSpec,
    LoadedBackbone,
    Transform,
    freeze_args,
    is_embedding,
    layers_of,
)

_LIGHT = 0.01  # of all parameters
OWN_HEAD = "featcache_head."  # in the files of tuned networks that have no classifier of timm's


@dataclass(frozen=True)
class Stage:
    """One of the ordered groups of layers that timm divides a backbone into."""

    name: str
    parameters: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class Backbone:
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
    def is_current(self) -> bool:
        """Whether the files that it was loaded from are still what they were."""
        same = self.origin is None or self.origin.content() == self.content
        return same and _sha256_of_file(self.spec) == self.file_sha256

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in forward order; a tail without a stage of its own (last norm) belongs to the last one."""
        return _stages(self.module)

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
        inside = "" if self.whole is self.module else PooledFeatures.INSIDE
        return lambda name: is_trained(name.removeprefix(inside))

    @cached_property
    def _last_pooling(self) -> Pooling:
        """The pooling that was asked for, over the last activations' proved positions."""
        what = f"`pool` {self.spec.pool}: the last activations of {self.spec.name}"
        if not hasattr(self.module, "forward_features"):
            raise UsageError(f"`pool` {self.spec.pool}: {self.spec.name} does not give its activations before pooling.")
        features = Features(self.module)
        images = torch.rand(1, 3, *(self.transform.input_size,) * 2, generator=torch.Generator().manual_seed(0))
        images = images.to(self.device)
        try:
            parameters: Iterable[nn.Parameter] = list(parameters_by_use(features))
        except CutError:  # in order of their creation then, which is nearly that of use
            parameters = reversed(list(self.module.parameters()))
        instead = "Leave `pool` out."
        layout = prove_layout(what, lambda: features(images), parameters, self._counts, instead=instead)
        if layout.axes == 2:
            raise UsageError(f"{what} are a vector already. {instead}")
        return Pooling(self.spec.pool, layout, self.spec.name)

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
                elif not is_embedding(cut):
                    places.append(self._trained_in_whole(name))
                    finish.append(nn.Identity())
                else:
                    layer, pooling = self._layers.read(name)
                    places.append(layer)
                    finish.append(pooling)
        if places != [None]:
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
            raise UsageError(f"`cut` {cut}: {self.spec.name} has the stages {', '.join(names)}, besides pooled and input.")
        if cut == names[-1]:
            raise UsageError(f"`cut` {cut} is the last stage, nothing is left to train behind it: use pooled.")
        behind = {name for stage in self.stages[names.index(cut) + 1 :] for name in stage.parameters}
        return behind.__contains__

    def separate(self) -> "Backbone":
        """Return a copy whose parameters can be trained without touching this one's."""
        return replace(self, module=copy.deepcopy(self.module))


def load_backbone(spec: BackboneSpec, device: torch.device | None = None) -> Backbone:
    """Create a backbone and load its weights.

    Raises:
        UsageError: timm has no such model, or refuses the model arguments; a folder that is named is not there; the model
            does not turn an image of its size and three channels into a vector.
        DataError: the weights file is broken, or not for this architecture; files changed while they were read; weights
            are NaN or infinite.
        SetupError: the published weights cannot be downloaded.
    """
    device = device or default_device()
    named, folder, content = origins.named(spec), None, None
    if spec.name == BUNDLED:
        architecture, args, config = _bundled()
        args |= dict(spec.model_args)
    else:
        architecture, args, config = spec.name, dict(spec.model_args), None
        _require_known(architecture)
    if named is not None:
        architecture, folder = _pinned(spec.name, named)
        content = named.content() if named.kind == "folder" else None  # a commit of the hub's does not change
    pretrained = spec.weights is None and spec.random_init is None and config is None
    module = _create(architecture, args, pretrained=pretrained, seed=spec.random_init)
    file_sha256 = _fill(module, spec, bundled=config is not None)
    module.eval().requires_grad_(False).to(device)
    for value in (*module.parameters(), *module.buffers()):
        if value.dim() == 4:  # weights of five axes, such as a lambda layer's, have no such format
            value.data = value.data.to(memory_format=torch.channels_last)
    published = config or timm.data.resolve_model_data_config(module)
    pretrained_cfg = getattr(module, "pretrained_cfg", None) or {}
    if named is not None:
        # neither the path nor the repository decides a row: what config.json says of the architecture does
        folder = folder or named.folder()
        architecture = pretrained_cfg.get("architecture") or architecture
        args = (origins.read_config(folder) if folder is not None else {}) | args
        before, content = content, named.content(folder)
        if before not in {None, content}:
            raise DataError(f"`backbone` {spec.name}: its files changed while they were read. Run again.")
    elif pretrained:
        named = _published(pretrained_cfg)
        content = named.content() if named is not None else None
    loaded = LoadedBackbone(
        architecture=BUNDLED if config is not None else architecture.partition(".")[0],
        tag=_tag(spec, pretrained_cfg),
        weights_sha256=hash_weights(module),
        model_args=freeze_args(args),
        pool=spec.pool,
    )
    transform = _transform(published, spec)
    _try_image(module, spec, transform.input_size, device)
    return Backbone(spec, loaded, transform, module, device, named, content, file_sha256)


def _fill(module: nn.Module, spec: BackboneSpec, *, bundled: bool) -> str | None:
    """Load the weights that timm does not, and return the SHA-256 of the user's file, if there is one."""
    digest = _sha256_of_file(spec)
    if spec.weights is not None:
        _load_weights(module, Path(spec.weights))
        if _sha256_of_file(spec) != digest:
            raise DataError(f"`weights` {spec.weights}: changed while it was read. Run again.")
    elif bundled and spec.random_init is None:
        with resources.as_file(resources.files("featcache") / "assets" / "mini.safetensors") as path:
            _load_weights(module, path)
    return digest


def _sha256_of_file(spec: BackboneSpec) -> str | None:
    path = Path(spec.weights) if spec.weights is not None else None
    return origins.sha256_of_weights(path) if path is not None and path.is_file() else None


def _pinned(name: str, origin: Origin) -> tuple[str, Path | None]:
    """Return a name that means one network, and the folder of its files.

    A branch of the hub's becomes the commit that it stands for now, so that what is loaded and what is noted are the same.

    Raises:
        UsageError: a folder is not there, or no network.
    """
    if origin.kind == "folder":
        return name, origin.folder()
    from huggingface_hub import hf_hub_download

    try:
        with nullcontext() if _hub_has_an_address() else _local_weights_only():
            config = Path(hf_hub_download(origin.place, "config.json", revision=origin.revision or None))
    except Exception:  # noqa: BLE001 - timm asks for the same file, and its error is told
        return name, None
    return f"hf-hub:{origin.place}@{config.parent.name}", config.parent


def _published(pretrained_cfg: dict[str, Any]) -> Origin | None:
    """Return where timm has a name's published weights from; ``None`` where it does not say: they are then never trusted."""
    from timm.models import _builder

    try:
        kind, place = _builder._resolve_pretrained_source(pretrained_cfg)  # noqa: SLF001 - the one place that decides it
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None
    if kind == "hf-hub":
        identifier, filename = place if isinstance(place, tuple) else (place, "")
        repository, _, revision = identifier.partition("@")
        return Origin("hub", repository, revision, filename, ("weights",))
    if kind == "url":
        url = place if isinstance(place, str) else place[0]
        name = Path(urlsplit(url).path).name if isinstance(place, str) else place[1]
        return Origin("file", name, filename=name, reads=("weights",))
    return None


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


@dataclass(frozen=True)
class ModelFacts:
    """What ``featcache backbones`` lists of a timm model."""

    name: str
    input_size: int
    pretrained: bool


def list_backbones(pattern: str) -> Iterator[ModelFacts]:
    """Yield timm's models whose name matches a shell pattern, ``mini`` first where it does."""
    import fnmatch

    if fnmatch.fnmatch(BUNDLED, pattern):
        yield ModelFacts(BUNDLED, _bundled()[2]["input_size"][-1], pretrained=True)
    for name in timm.list_models(pattern):
        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
        size = config.input_size[-1] if config is not None else 224
        yield ModelFacts(name, size, pretrained=timm.models.is_model_pretrained(name))


@dataclass(frozen=True)
class ModelSize:
    """How big a model is without its classifier: parameters, multiply-adds of one image, width of the embedding."""

    parameters: int
    gmacs: float
    width: int


def model_size(name: str) -> ModelSize | None:
    """Measure a model on torch's meta device: nothing is allocated or computed; ``None`` where a model needs values."""
    from torch.utils.flop_counter import FlopCounterMode

    architecture, args = _bundled()[:2] if name == BUNDLED else (name, {})
    size = next(facts.input_size for facts in list_backbones(name))
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.inference_mode():
        try:
            module = timm.create_model(architecture, num_classes=0, **args).eval()
            width = module(torch.empty(1, 3, size, size)).shape[1]
        except (RuntimeError, NotImplementedError):
            return None
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return ModelSize(parameters, counter.get_total_flops() / 2e9, int(width))


def _bundled() -> tuple[str, dict[str, Any], dict[str, Any]]:
    card = json.loads((resources.files("featcache") / "assets" / "mini.json").read_text())
    return card["architecture"], card["model_args"], card["data_config"]


def _require_known(name: str) -> None:
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return
    if not timm.is_model(name):
        import difflib

        close = difflib.get_close_matches(name.partition(".")[0], [*timm.list_models(), BUNDLED], n=3)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise UsageError(f"`backbone` {name}: timm has no such model.{hint} `featcache backbones 'resnet*'` lists them.")


def _create(name: str, args: dict[str, Any], *, pretrained: bool, seed: int | None) -> nn.Module:
    reachable = not pretrained or _hub_has_an_address()
    try:
        with torch.random.fork_rng(devices=[]), nullcontext() if reachable else _local_weights_only():
            torch.default_generator.manual_seed(seed or 0)  # of the CPU alone: a GPU's numbers are the caller's
            module: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **args)
            return module
    except TypeError as error:
        raise UsageError(f"`model_args`: {name} does not take it ({error}).") from error
    except Exception as error:
        if not pretrained:
            raise UsageError(f"`backbone` {name}: timm cannot create it ({_first_line(error)}).") from error
        if name.startswith("local-dir:"):
            raise DataError(f"`backbone` {name}: its weights cannot be read ({_first_line(error)}).") from error
        reason = _first_line(error) if reachable else "they are not on this machine, and the hub cannot be reached"
        raise SetupError(
            f"the published weights of {name} cannot be had ({reason}). "
            "Use `backbone='mini'`, which is bundled, give a checkpoint with `weights=FILE`, or say `random_init=SEED`."
        ) from error


def _hub_has_an_address() -> bool:
    """Tell whether it is worth asking the hub; a proxy may know its address where this machine does not."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies().keys() & {"https", "all"}:
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


@contextmanager
def _local_weights_only() -> Iterator[None]:
    """Let the hub's client look at what was downloaded before, and spare a minute of retries."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _load_weights(module: nn.Module, path: Path) -> None:
    if path.is_dir():
        raise DataError(
            f"`weights` {path}: this is a folder. Name the file in it; a folder with config.json is "
            "`backbone='local-dir:...'`."
        )
    if not path.is_file():
        raise DataError(f"`weights` {path}: there is no such file.")
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # a foreign file can be anything
        raise DataError(
            f"`weights` {path}: not a safetensors file or a plain .pth state of tensors{_reason(error)}. A model "
            "that was pickled whole is not loaded, since it could run code: save its state_dict()."
        ) from error
    if not all(isinstance(value, Tensor) for value in state.values()):
        known = ", ".join(map(str, list(state)[:4]))
        raise DataError(f"`weights` {path}: no plain state, it holds {known}. Save the network's own state_dict().")
    config = getattr(module, "pretrained_cfg", None) or {}
    heads = config.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    own = module.state_dict()
    misfits = [name for name, value in state.items() if name in own and own[name].shape != value.shape]
    wanted = [name for name in own if not name.endswith("num_batches_tracked")]
    missing = [name for name in wanted if name not in state]
    foreign = [
        name for name in state if name not in own and not name.startswith((OWN_HEAD, *(f"{head}." for head in heads)))
    ]
    if missing or foreign or misfits:
        architecture = config.get("architecture", "this backbone")
        reason = _why_not(own, wanted, state, missing=missing, foreign=foreign, misfits=misfits)
        raise DataError(f"`weights` {path}: not for {architecture}: {reason}")
    module.load_state_dict({name: value for name, value in state.items() if name in own}, strict=False)


def _why_not(
    own: Mapping[str, Tensor],
    wanted: Sequence[str],
    state: Mapping[str, Tensor],
    *,
    missing: Sequence[str],
    foreign: Sequence[str],
    misfits: Sequence[str],
) -> str:
    """Return why a state is not a network's, and what to do about it."""
    if missing:
        ends = (name[: -len(missing[0])] for name in state if name.endswith(f".{missing[0]}"))
        for prefix in ends:
            under = sum(f"{prefix}{name}" in state for name in wanted)
            if under > len(wanted) - len(missing):
                all_or_some = "all" if under == len(wanted) else f"{under} of"
                return (
                    f"{all_or_some} {len(wanted)} tensors are there behind the prefix {prefix!r}. Save them without it: "
                    f"{{name.removeprefix({prefix!r}): value}}."
                )
        return (
            f"it lacks {len(missing)} of {len(own)} tensors ({missing[0]}, ...)"
            + (f" and has {len(foreign)} others ({foreign[0]}, ...)" if foreign else "")
            + ". Check `backbone` and `model_args`."
        )
    if misfits:
        shapes = f"{tuple(state[misfits[0]].shape)} instead of {tuple(own[misfits[0]].shape)}"
        positions = all("pos" in name for name in misfits)
        return f"it has other shapes of {len(misfits)} of {len(own)} tensors ({misfits[0]}: {shapes}, ...). " + (
            "Positions of a file are not resampled to another size of images: use the `input_size` and img_size that it was "
            "trained with."
            if positions
            else "Check `backbone` and `model_args`."
        )
    groups = list(dict.fromkeys(name.partition(".")[0] for name in foreign))
    return (
        f"all {len(wanted)} of {len(wanted)} tensors are there, and {len(foreign)} more ({', '.join(groups[:4])}), which "
        "may be a part of another network. Save the file without them."
    )


def hash_weights(module: nn.Module) -> str:
    """Return the SHA-256 of every parameter and buffer: name, dtype, shape and bytes, in order of name."""

    def chunks() -> Iterator[bytes | memoryview]:
        for name, value in sorted(module.state_dict().items()):
            if not name.endswith("num_batches_tracked"):
                array = value.detach().cpu().contiguous().reshape(-1)
                yield f"{name}:{value.dtype}:{tuple(value.shape)};".encode()
                yield memoryview(array.view(torch.uint8).numpy()) if array.numel() else b""

    return sha256_of_chunks(chunks())


def _try_image(module: nn.Module, spec: BackboneSpec, size: int, device: torch.device) -> None:
    """Let a blank image through: what a model cannot take is told before anything is computed."""
    try:
        with torch.no_grad():  # what attention keeps of an inference could not be trained
            out = module(torch.zeros(1, 3, size, size, device=device))
    except Exception as error:  # it runs the model's own code, which can fail in any way
        asked = f"`input_size` {size}" if spec.overrides.input_size is not None else f"`backbone` {spec.name}"
        raise UsageError(
            f"{asked}: {spec.name} does not take images of {size} pixels and 3 channels ({_first_line(error)}). "
            f"{_advice(module, spec, size)}"
        ) from error
    if not isinstance(out, Tensor) or out.dim() < 2 or out.shape[0] != 1 or not out.numel() or not out.is_floating_point():
        what = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise UsageError(f"`backbone` {spec.name}: {what} comes out for one image, not one vector. Check `model_args`.")
    if not out.isfinite().all():
        bad = [name for name, value in module.named_parameters() if not value.isfinite().all()]
        bad += [
            name for name, value in module.named_buffers() if name.endswith(("mean", "var")) and not value.isfinite().all()
        ]
        if bad:
            where = f"`weights` {spec.weights}" if spec.weights is not None else f"`backbone` {spec.name}"
            raise DataError(f"{where}: NaN or infinity in {len(bad)} tensors ({bad[0]}, ...). Take other weights.")


def _advice(module: nn.Module, spec: BackboneSpec, size: int) -> str:
    """Return what may make a model take images that it refused."""
    args = dict(spec.model_args)
    if args.get("in_chans", 3) != 3:
        return "Images have three channels: leave out in_chans of `model_args`."
    if "img_size" in args and args["img_size"] != size:
        return f"Its img_size is {args['img_size']}: give `input_size={args['img_size']}` as well."
    if "img_size" not in args and "img_size" in inspect.signature(type(module).__init__).parameters:
        return f"A transformer may need `model_args='img_size={size}'` as well."
    return "Check `input_size` and `model_args`."


def _tag(spec: BackboneSpec, pretrained_cfg: dict[str, Any]) -> str:
    if spec.random_init is not None:
        return f"random:{spec.random_init}"
    if spec.weights is not None:
        return "file"
    if spec.name == BUNDLED:
        return "bundled"
    return str(pretrained_cfg.get("tag") or "default")


def _transform(config: dict[str, Any], spec: BackboneSpec) -> Transform:
    height, width = config["input_size"][-2:]
    if height != width:
        raise UsageError(f"`backbone` {spec.name}: its input of {height}x{width} pixels is not square; square ones are.")
    mode = config.get("crop_mode") or "center"
    if mode not in {"center", "squash"}:
        raise UsageError(f"`backbone` {spec.name}: its crop mode {mode!r} is not one of center, squash.")
    interpolation = config.get("interpolation") or "bicubic"
    fields: dict[str, Any] = {
        "input_size": int(height),
        "crop_pct": float(config.get("crop_pct") or 1.0),
        "crop_mode": mode,
        "interpolation": interpolation if interpolation in INTERPOLATIONS else "bicubic",
        "mean": _three(config["mean"]),
        "std": _three(config["std"]),
    }
    return Transform(**fields | spec.overrides.given())


def _three(values: Any) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _stages(module: nn.Module) -> tuple[Stage, ...]:
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    rules = _rules(module)
    if rules is None:
        ordered = _children(module, sizes)
    else:
        groups = group_parameters(module, rules, reverse=False)
        ordered = [list(groups[index]) for index in sorted(groups)]
        if len(ordered) > 1 and not any(_matched(rules, name) for name in ordered[-1]):
            tail = ordered.pop()
            ordered[-1].extend(tail)
        ordered = [group for group in ordered if group]
    return tuple(
        Stage(_stage_name(group, index, sizes), tuple(group), sum(sizes[name] for name in group))
        for index, group in enumerate(ordered)
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
    found: dict[str, list[str]] = {}
    for name in sizes:
        parts = name.split(".")
        is_list = len(parts) > 2 and isinstance(getattr(module, parts[0]), nn.Sequential | nn.ModuleList)
        found.setdefault(".".join(parts[: 2 if is_list else 1]) if len(parts) > 1 else "", []).append(name)
    own = found.pop("", [])
    least = _LIGHT * sum(sizes.values())
    groups: list[list[str]] = []
    for group in found.values():
        if groups and min(sum(sizes[name] for name in one) for one in (group, groups[-1])) < least:
            groups[-1].extend(group)
        else:
            groups.append(group)
    return [own + groups[0], *groups[1:]] if groups else [own]


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
    others = [name for name in sizes if name not in set(group)]
    parts = group[0].split(".")
    for depth in range(1, len(parts)):
        path = ".".join(parts[:depth])
        inside = sum(name.startswith(f"{path}.") for name in group)
        enough = inside == len(group) if index == 0 else 2 * inside > len(group)
        if enough and not any(name.startswith(f"{path}.") for name in others):
            return path
    return "stem" if index == 0 else f"stage{index}"


def _reason(error: Exception) -> str:
    """Return an error's first sentence in brackets, "" where it gives advice: PyTorch's is on arguments of its own."""
    sentence = _first_line(error).partition(". ")[0].rstrip(".")
    return "" if "weights_only" in sentence else f" ({sentence})"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
