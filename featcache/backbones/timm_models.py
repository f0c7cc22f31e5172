"""The world of timm: create a backbone, load its weights, read its transform."""

import inspect
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import resources
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featcache.backbones import (
    BUNDLED,
    hub_has_an_address,
    local_files_only,
    origin_of,
    pinned,
    published_origin,
    read_config,
    sha256_of_given_weights,
)
from featcache.backbones.base import OWN_HEAD, Backbone, TimmBackbone, default_device
from featcache.backbones.cut import timm
from featcache.errors import DataError, SetupError, UsageError
from featcache.fingerprint import sha256_of_bytes, sha256_of_chunks
from featcache.resources import FETCH, may_fetch
from featcache.specs import CLIP, INTERPOLATIONS, BackboneSpec, LoadedBackbone, Transform, freeze_args


def load_backbone(spec: BackboneSpec, device: torch.device | None = None) -> TimmBackbone:
    """Create a backbone and load its weights.

    Raises:
        UsageError: timm has no such model, or refuses the arguments; a folder is not there; no vector comes out.
        DataError: the weights are broken, of another architecture, NaN or infinite, or changed while they were read.
        SetupError: the published weights cannot be downloaded.
    """
    device = device or default_device()
    named, folder, content = origin_of(spec), None, None
    architecture, args, config = _architecture_of(spec)
    if named is not None:
        architecture, folder = pinned(spec.name, named)
        content = named.content() if named.kind == "folder" else None  # a commit of the hub's does not change
    is_published = spec.weights is None and spec.random_init is None and config is None
    module = _create(architecture, args, pretrained=is_published, seed=spec.random_init)
    file_sha256 = _fill(module, spec)
    freeze(module, device)
    published = config or timm.data.resolve_model_data_config(module)
    pretrained_cfg = getattr(module, "pretrained_cfg", None) or {}
    if named is not None:
        # neither the path nor the repository decides a row: what config.json says of the architecture does
        folder = folder or named.folder()
        architecture = pretrained_cfg.get("architecture") or architecture
        args = (read_config(folder) if folder is not None else {}) | args
        before, content = content, named.content(folder)
        if before not in {None, content}:
            raise DataError(f"`backbone` {spec.name}: its files changed while they were read. Run again.")
    elif is_published:
        named = published_origin(pretrained_cfg)
        content = named.content() if named is not None else None
    # the part behind the dot names the weights, which their hash says better
    base = spec.name if config is not None else architecture.partition(".")[0]
    loaded = LoadedBackbone(base, _tag(spec, pretrained_cfg), hash_weights(module), freeze_args(args), spec.pool)
    transform = transform_of(published, spec)
    try_image(module, spec, transform.input_size, device)
    return TimmBackbone(spec, loaded, transform, module, device, named, content, file_sha256)


def with_drop_path(backbone: Backbone, drop_path: float) -> Backbone:
    """Return a copy of a backbone that may be changed, with so much stochastic depth, whatever the model brings of its own.

    Raises:
        DataError: its weights are others by now.
        UsageError: it takes none.
    """
    if backbone.spec.samples != "image":
        raise UsageError("`drop_path` is of backbones of images: encoders of texts train with the dropout of their own.")
    if backbone.spec.name.startswith(CLIP):
        raise UsageError("`drop_path` is of timm's backbones: towers of open_clip's are trained without.")
    # timm spreads the rate over the blocks as it builds them: the network is built again, from the same weights
    spec = replace(backbone.spec, model_args=(*backbone.spec.model_args, ("drop_path_rate", drop_path)))
    built = load_backbone(spec, backbone.device)
    if built.loaded.weights_sha256 != backbone.loaded.weights_sha256:
        raise DataError(f"`backbone` {spec.name}: its weights changed while this ran. Run again.")
    return built


def _architecture_of(spec: BackboneSpec) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """Return timm's name, the arguments, and the data configuration where it is not timm's to say."""
    if spec.name not in BUNDLED:
        _require_known(spec.name)
        return spec.name, dict(spec.model_args), None
    card = _read_card(spec.name)
    return card["architecture"], card["model_args"] | dict(spec.model_args), card["data_config"]


def freeze(module: nn.Module, device: torch.device) -> None:
    """Put a network into inference mode: BatchNorm that stayed in training mode would let a row depend on its batch."""
    module.eval().requires_grad_(False).to(device)
    for value in (*module.parameters(), *module.buffers()):
        if value.dim() == 4:  # weights of five axes, such as a lambda layer's, have no such format
            value.data = value.data.to(memory_format=torch.channels_last)


def _fill(module: nn.Module, spec: BackboneSpec) -> str | None:
    """Load the weights that timm does not, and return the SHA-256 of the user's file, if there is one."""
    digest = sha256_of_given_weights(spec)
    if spec.weights is not None:
        load_weights(module, Path(spec.weights))
        if sha256_of_given_weights(spec) != digest:
            raise DataError(f"`weights` {spec.weights}: changed while it was read. Run again.")
    elif spec.name in BUNDLED and spec.random_init is None:
        card = _read_card(spec.name)
        if "package" in card:
            _load_packaged(module, spec, card)
        else:
            with resources.as_file(resources.files("featcache") / "assets" / f"{spec.name}.safetensors") as path:
                load_weights(module, path)
    return digest


def _load_packaged(module: nn.Module, spec: BackboneSpec, card: dict[str, Any]) -> None:
    """Load weights that another package brings: its file is read, and none of its code is run.

    Tensors are matched by order and shape, since they go by the names of another implementation; that the order is the
    same one is proved by a known output.
    """
    package = card["package"]
    again = f"Uninstall and install {package} again, or use `backbone='mini'`."
    try:
        content = Path(str(distribution(package).locate_file(card["file"]))).read_bytes()
    except (PackageNotFoundError, OSError):
        raise SetupError(f"`backbone` {spec.name}: its weights are not there. {again}") from None
    if sha256_of_bytes(content) != card["sha256"]:
        raise DataError(f"`backbone` {spec.name}: its weights are not those that were published with {package}. {again}")
    tensors = list(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True).values())
    expected = module.state_dict()
    tensors = tensors[: len(expected)]  # behind them is the classifier
    if [value.shape for value in tensors] != [value.shape for value in expected.values()]:
        raise UsageError(f"`model_args`: the weights of {spec.name} are not those of this architecture. Leave them out.")
    module.load_state_dict(dict(zip(expected, tensors, strict=True)))
    if spec.model_args:  # such as output_stride: the same weights, and another output
        return
    size = card["data_config"]["input_size"][-1]
    with torch.no_grad():
        embedding = module.eval()(torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size))[0]
    pinned = {int(index): value for index, value in card["ramp"].items()}
    if not torch.allclose(embedding[list(pinned)], torch.tensor(list(pinned.values())), rtol=1e-3):
        raise SetupError(f"`backbone` {spec.name}: this version of timm or PyTorch computes another network. Report it.")


@dataclass(frozen=True)
class ModelFacts:
    """What ``featcache backbones`` lists of a timm model."""

    name: str
    input_size: int
    pretrained: bool


def list_backbones(pattern: str) -> Iterator[ModelFacts]:
    """Yield timm's models whose name matches a shell pattern, those that are bundled first."""
    import fnmatch

    for name in fnmatch.filter(BUNDLED, pattern):
        yield ModelFacts(name, _read_card(name)["data_config"]["input_size"][-1], pretrained=True)
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

    card: dict[str, Any] = _read_card(name) if name in BUNDLED else {"architecture": name, "model_args": {}}
    size = next(facts.input_size for facts in list_backbones(name))
    # The meta device has shapes only: no weights are drawn for a model that is merely listed.
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.inference_mode():
        try:
            module = timm.create_model(card["architecture"], num_classes=0, **card["model_args"]).eval()
            width = module(torch.empty(1, 3, size, size)).shape[1]
        except (RuntimeError, NotImplementedError):
            return None
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return ModelSize(parameters, counter.get_total_flops() / 2e9, int(width))


def _read_card(name: str) -> dict[str, Any]:
    """Return what a bundled backbone is made of: timm's architecture and arguments, images, and where its weights are."""
    card: dict[str, Any] = json.loads((resources.files("featcache") / "assets" / f"{name}.json").read_text())
    return card


def _require_known(name: str) -> None:
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return
    if not timm.is_model(name):
        import difflib

        close = difflib.get_close_matches(name.partition(".")[0], [*timm.list_models(), *BUNDLED], n=3)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise UsageError(f"`backbone` {name}: timm has no such model.{hint} `featcache backbones` lists them.")


def _create(name: str, args: dict[str, Any], *, pretrained: bool, seed: int | None) -> nn.Module:
    if pretrained and not may_fetch():
        _require_here(name)
    reachable = not pretrained or hub_has_an_address()
    try:
        # The caller's random numbers go on as if no network had been created.
        with torch.random.fork_rng(devices=[]), nullcontext() if reachable else local_files_only():
            torch.default_generator.manual_seed(seed or 0)  # of the CPU alone: a GPU's numbers are the caller's
            module: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **args)
            return module
    except TypeError as error:
        raise UsageError(f"`model_args`: {name} does not take it ({error}).") from error
    except Exception as error:
        if not pretrained:
            raise UsageError(f"`backbone` {name}: timm cannot create it ({first_line(error)}).") from error
        if name.startswith("local-dir:"):
            raise DataError(f"`backbone` {name}: its weights cannot be read ({first_line(error)}).") from error
        reason = first_line(error) if reachable else "they are not on this machine, and the hub cannot be reached"
        raise SetupError(
            f"the published weights of {name} cannot be had ({reason}). "
            "Use `backbone='lite0'`, which is installed, give a checkpoint with `weights=FILE`, or say `random_init=SEED`."
        ) from error


def _require_here(name: str) -> None:
    """Refuse a name whose weights timm would ask a network for.

    Raises:
        SetupError: they are not on this machine.
    """
    origin = origin_of(BackboneSpec(name))
    if origin is None and (config := timm.get_pretrained_cfg(name)) is not None:
        origin = published_origin(config.to_dict())
    if origin is None or origin.content() is None:
        raise SetupError(
            f"`backbone` {name}: its weights are not on this machine, and {FETCH}=never. `backbone='lite0'` is installed; "
            "`weights=FILE` takes a checkpoint."
        )


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a file of tensors, .safetensors or a plain .pth, into a network whose tensors are called so.

    Raises:
        DataError: it is no such file, or another network's.
    """
    if path.is_dir():
        raise DataError(
            f"`weights` {path}: this is a folder. Name the file in it; a folder with config.json is "
            "`backbone='local-dir:...'`."
        )
    if not path.is_file():
        raise DataError(f"`weights` {path}: there is no such file.")
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # a foreign file can be anything
        raise DataError(
            f"`weights` {path}: not a safetensors file or a plain .pth state of tensors{_reason(error)}. A model "
            "that was pickled whole is not loaded, since it could run code: save its state_dict()."
        ) from error
    if not all(isinstance(value, Tensor) for value in state.values()):
        first_names = ", ".join(map(str, list(state)[:4]))
        raise DataError(f"`weights` {path}: no plain state, it holds {first_names}. Save the network's own state_dict().")
    config = getattr(module, "pretrained_cfg", None) or {}
    heads = config.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    expected = module.state_dict()
    # Names are compared before shapes: a file of another model fails by what it lacks, the clearer message.
    misfits = [name for name, value in state.items() if name in expected and expected[name].shape != value.shape]
    needed = [name for name in expected if not name.endswith("num_batches_tracked")]
    missing = [name for name in needed if name not in state]
    foreign = [
        name for name in state if name not in expected and not name.startswith((OWN_HEAD, *(f"{head}." for head in heads)))
    ]
    if missing or foreign or misfits:
        architecture = config.get("architecture", "this backbone")
        reason = _why_not(expected, needed, state, missing=missing, foreign=foreign, misfits=misfits)
        raise DataError(f"`weights` {path}: not for {architecture}: {reason}")
    module.load_state_dict({name: value for name, value in state.items() if name in expected}, strict=False)


def _why_not(
    expected: Mapping[str, Tensor],
    needed: Sequence[str],
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
            under = sum(f"{prefix}{name}" in state for name in needed)
            if under > len(needed) - len(missing):
                all_or_some = "all" if under == len(needed) else f"{under} of"
                return (
                    f"{all_or_some} {len(needed)} tensors are there behind the prefix {prefix!r}. Save them without it: "
                    f"{{name.removeprefix({prefix!r}): value}}."
                )
        return (
            f"it lacks {len(missing)} of {len(expected)} tensors ({missing[0]}, ...)"
            + (f" and has {len(foreign)} others ({foreign[0]}, ...)" if foreign else "")
            + ". Check `backbone` and `model_args`."
        )
    if misfits:
        shapes = f"{tuple(state[misfits[0]].shape)} instead of {tuple(expected[misfits[0]].shape)}"
        positions = all("pos" in name for name in misfits)
        return f"it has other shapes of {len(misfits)} of {len(expected)} tensors ({misfits[0]}: {shapes}, ...). " + (
            "Positions of a file are not resampled to another size of images: use the `input_size` and img_size that it was "
            "trained with."
            if positions
            else "Check `backbone` and `model_args`."
        )
    groups = list(dict.fromkeys(name.partition(".")[0] for name in foreign))
    return (
        f"all {len(needed)} of {len(needed)} tensors are there, and {len(foreign)} more ({', '.join(groups[:4])}), which "
        "may be a part of another network. Save the file without them."
    )


def hash_weights(module: nn.Module) -> str:
    """Return the SHA-256 of every parameter and buffer: name, dtype, shape and bytes, in order of name."""

    def chunks() -> Iterator[bytes | memoryview]:
        for name, value in sorted(module.state_dict().items()):
            # A counter of training steps decides no row.
            if not name.endswith("num_batches_tracked"):
                array = value.detach().cpu().contiguous().reshape(-1)
                yield f"{name}:{value.dtype}:{tuple(value.shape)};".encode()
                yield memoryview(array.view(torch.uint8).numpy()) if array.numel() else b""

    return sha256_of_chunks(chunks())


def try_image(module: nn.Module, spec: BackboneSpec, size: int, device: torch.device) -> None:
    """Let a blank image through: what a model cannot take is told before anything is computed."""
    try:
        with torch.no_grad():  # what attention keeps of an inference could not be trained
            out = module(torch.zeros(1, 3, size, size, device=device))
    except Exception as error:  # it runs the model's own code, which can fail in any way
        asked = f"`input_size` {size}" if spec.overrides.input_size is not None else f"`backbone` {spec.name}"
        raise UsageError(
            f"{asked}: {spec.name} does not take images of {size} pixels and 3 channels ({first_line(error)}). "
            f"{_how_to_fit(module, spec, size)}"
        ) from error
    if not isinstance(out, Tensor) or out.dim() < 2 or out.shape[0] != 1 or not out.numel() or not out.is_floating_point():
        description = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise UsageError(
            f"`backbone` {spec.name}: {description} comes out for one image, not one vector. Check `model_args`."
        )
    if not out.isfinite().all():
        bad = [name for name, value in module.named_parameters() if not value.isfinite().all()]
        bad += [
            name for name, value in module.named_buffers() if name.endswith(("mean", "var")) and not value.isfinite().all()
        ]
        if bad:
            where = f"`weights` {spec.weights}" if spec.weights is not None else f"`backbone` {spec.name}"
            raise DataError(f"{where}: NaN or infinity in {len(bad)} tensors ({bad[0]}, ...). Take other weights.")


def _how_to_fit(module: nn.Module, spec: BackboneSpec, size: int) -> str:
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
    if spec.name in BUNDLED:
        return "bundled"
    return str(pretrained_cfg.get("tag") or "default")


def transform_of(config: dict[str, Any], spec: BackboneSpec) -> Transform:
    """Return how images are prepared, by a data configuration of timm's kind and what the user wants otherwise.

    Raises:
        UsageError: its images are not square, or cropped in an unknown way.
    """
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
        "mean": _by_channel(config["mean"]),
        "std": _by_channel(config["std"]),
    }
    return Transform(**fields | spec.overrides.given())


def _by_channel(values: Any) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _reason(error: Exception) -> str:
    """Return an error's first sentence in brackets, "" where it gives advice: PyTorch's is on arguments of its own."""
    sentence = first_line(error).partition(". ")[0].rstrip(".")
    return "" if "weights_only" in sentence else f" ({sentence})"


def first_line(error: Exception) -> str:
    """Return what a library's error says first, its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
