"""What is asked for, as frozen values: fields are checked against their annotations, once, and hashed into the cache key."""

import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from featcache.errors import UsageError
from featcache.fingerprint import fingerprint

MAX_SEED = 2**32 - 1  # NumPy's and scikit-learn's generators take no greater one
_MAX_INT = 2**53  # whole numbers beyond are no longer exact in JSON, and no count of anything here
_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}


def check_fields(settings: object) -> None:
    """Refuse a dataclass whose fields are not what their annotations say; call it first in ``__post_init__``.

    What comes from TOML or Python is made to fit where nothing is lost: a list becomes a tuple, a whole number a float. NaN
    and infinite numbers are refused everywhere: no setting here means anything by them.

    Raises:
        UsageError: a field is of another kind; the message names it.
    """
    kind: Any = type(settings)
    for name, hint in _annotations(kind):
        value = getattr(settings, name)
        fitted = _made_to_fit(value, hint)
        if fitted is _MISFIT:
            raise UsageError(f"`{kind.__name__}.{name}`: {_as_text(value)}: {describe(hint)} is needed.")
        if fitted is not value:
            object.__setattr__(settings, name, fitted)


def check_value(value: Any, hint: Any, name: str) -> Any:
    """Return one value as its annotation wants it, as ``check_fields`` does for a field.

    Raises:
        UsageError: it is of another kind; ``name`` names it in the message.
    """
    fitted = _made_to_fit(value, hint)
    if fitted is _MISFIT:
        raise UsageError(f"{name}: {_as_text(value)}: {describe(hint)} is needed.")
    return fitted


def check_seed(seed: Any, name: str = "seed") -> int:
    """Return a seed that every generator here takes.

    Raises:
        UsageError: it is no whole number from 0 to 2**32 - 1.
    """
    number = _made_to_fit(seed, int)
    if number is _MISFIT or not 0 <= number <= MAX_SEED:
        raise UsageError(f"{name}: {_as_text(seed)}: a whole number from 0 to {MAX_SEED} is needed.")
    return int(number)


def describe(hint: Any) -> str:
    """Return an annotation in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in {Union, types.UnionType}:
        return " or ".join(describe(each) for each in arguments if each is not type(None))
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is ...:
            return f"a list (of each: {describe(arguments[0])})"
        return f"a list of {len(arguments)} ({'; '.join(map(describe, arguments))})"
    return _KIND_NAMES.get(hint, f"a {getattr(hint, '__name__', hint)}")


class _Misfit:
    """What no value is."""


_MISFIT: Any = _Misfit()


@cache
def _annotations(kind: Any) -> tuple[tuple[str, Any], ...]:
    hints = typing.get_type_hints(kind)
    return tuple((field.name, hints[field.name]) for field in fields(kind))


def _made_to_fit(value: Any, hint: Any) -> Any:
    """Return a value as the annotation wants it, ``_MISFIT`` where it cannot be."""
    origin, arguments = get_origin(hint), get_args(hint)
    fitted = _MISFIT
    if origin is Literal:
        # True == 1 and 1.0 == 1: equal is not enough
        fitted = value if any(type(value) is type(each) and value == each for each in arguments) else _MISFIT
    elif origin in {Union, types.UnionType}:
        fits = (each for kind in arguments if (each := _made_to_fit(value, kind)) is not _MISFIT)
        fitted = next(fits, _MISFIT)
    elif origin is tuple:
        fitted = _fit_tuple(value, arguments)
    elif hint in {int, float}:
        fitted = _fit_number(value, hint)
    elif hint is Path and isinstance(value, str):
        fitted = Path(value)
    elif hint is Any or isinstance(value, origin or hint):
        fitted = value
    return fitted


def _fit_number(value: Any, hint: type) -> Any:
    # True is a whole number to Python: as a batch size it would be 1.
    if isinstance(value, bool) or not hasattr(value, "__index__" if hint is int else "__float__"):
        return _MISFIT
    if isinstance(value, str | bytes) or getattr(value, "shape", ()) != ():
        return _MISFIT
    try:
        number = value.__index__() if hint is int else float(value)
    except (OverflowError, TypeError, ValueError):
        return _MISFIT
    if abs(number) > _MAX_INT if hint is int else not math.isfinite(number):
        return _MISFIT
    return value if type(value) is hint else number


def _fit_tuple(value: Any, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(value, tuple | list):
        return _MISFIT
    is_repeated = len(arguments) == 2 and arguments[1] is ...
    if not is_repeated and len(value) != len(arguments):
        return _MISFIT
    kinds = (arguments[0],) * len(value) if is_repeated else arguments
    fitted = tuple(_made_to_fit(each, kind) for each, kind in zip(value, kinds, strict=True))
    if any(each is _MISFIT for each in fitted):
        return _MISFIT
    unchanged = isinstance(value, tuple) and all(new is old for new, old in zip(fitted, value, strict=True))
    return value if unchanged else fitted


def _as_text(value: Any) -> str:
    text = repr(value) if not isinstance(value, Mapping) else "a table"
    return text if len(text) <= 60 else f"{text[:57]}..."


FORMAT_VERSION = 1
REVISED = 2  # the version of rows that version 1 held otherwise: of another tensor, or pooled over other axes

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
INTERPOLATIONS: tuple[Interpolation, ...] = ("nearest", "bilinear", "bicubic", "lanczos")
CropMode = Literal["center", "squash"]
StoredDtype = Literal["float32", "float16", "uint8", "int32"]
Decoder = Literal["pillow-scaled", "pillow"]
Pool = Literal["default", "avg", "max", "cls", "avg+cls", "gem"]
POOLS: tuple[Pool, ...] = ("default", "avg", "max", "cls", "avg+cls", "gem")
RuntimeName = Literal["auto", "torch", "compile", "openvino", "onnx"]
RUNTIMES: tuple[RuntimeName, ...] = ("auto", "torch", "compile", "openvino", "onnx")
Precision = Literal["float32", "bfloat16", "float16"]

_MAX_INPUT = 4096  # pixels a side: one float32 image of this size takes 200 MB before the backbone has done anything
_MAX_VIEWS = 1000  # each view is a row: more would fill a disk by a slip of the keyboard

SampleKind = Literal["image", "text"]  # what the bytes of a sample are
DEFAULT_KIND: SampleKind = "image"

LIVE_BATCHNORM = "with live BatchNorm"  # of a rate at which statistics moved, in records
POOLED = "pooled"
TOKENS = "tokens"  # the activations before pooling
INPUT = "input"
TEXT = "text:"  # what names of encoders of texts begin with
CLIP = "clip:"  # what names of models of images and texts begin with


@dataclass(frozen=True)
class Transform:
    """How an image file becomes the numbers that a backbone sees.

    The image is decoded with Pillow, its short side scaled to ``input_size / crop_pct`` and the central square of
    ``input_size`` pixels kept ("center"), or the whole of it squeezed into that square ("squash"); both in one
    resampling step. Then (x / 255 - mean) / std, channel by channel. The decoder "pillow-scaled" lets libjpeg halve large
    JPEGs, once or more, while they decode, as long as both sides stay at least as long as they are scaled to; "pillow"
    decodes every pixel.
    """

    input_size: int = 224
    crop_pct: float = 1.0
    crop_mode: CropMode = "center"
    interpolation: Interpolation = "bicubic"
    # ImageNet's, as torchvision publishes them; a backbone's own configuration replaces them.
    mean: tuple[float, float, float] | None = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] | None = (0.229, 0.224, 0.225)
    decoder: Decoder = "pillow-scaled"
    antialias: bool = True
    exif: str = "ignore"
    alpha: str = "drop"
    deep: str = "scale"  # 16 bits a channel: the high byte

    def __post_init__(self) -> None:
        """Refuse what cannot be carried out."""
        check_fields(self)
        check_input_size(self.input_size)
        if not 0 < self.crop_pct <= 1:
            raise UsageError(f"`crop_pct` {self.crop_pct}: a number above 0 and up to 1 is needed.")
        if self.std is not None and min(self.std) <= 0:
            raise UsageError(f"`std` {self.std}: every value must be above 0.")

    def pixels_only(self) -> "Transform":
        """Return the part of the transform that decides stored pixels: mean and std do not."""
        return replace(self, mean=None, std=None)


@dataclass(frozen=True)
class Tokenisation:
    """How a text becomes the numbers that a backbone sees: so many ids, cut off or filled up with ``padding``.

    ``vocabulary`` tells what turns texts into ids: the SHA-256 of a tokeniser's files, or the name of a rule that needs
    none. What is too long loses its end, or its beginning where ``truncation`` is "left".
    """

    vocabulary: str
    length: int
    padding: int = 0
    truncation: Literal["right", "left"] = "right"

    def __post_init__(self) -> None:
        """Refuse what cannot be carried out."""
        check_fields(self)
        if not self.vocabulary or self.length < 1 or self.padding < 0:
            raise UsageError(f"{self}: a vocabulary, a length from 1 and a padding from 0 are needed.")


@dataclass(frozen=True)
class TransformOverrides:
    """What the user wants otherwise than the backbone's own data configuration; ``None`` leaves it."""

    input_size: int | None = None
    crop_pct: float | None = None
    interpolation: Interpolation | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    decoder: Decoder | None = None

    def __post_init__(self) -> None:
        """Refuse what no transform can have."""
        check_fields(self)
        Transform(**self.given())  # bounds them

    def given(self) -> dict[str, Any]:
        """Return the fields that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone as it is asked for: a timm name, ``lite0`` or ``mini``, where its weights come from, timm's own arguments.

    Without ``weights`` or ``random_init`` the published weights of the name are meant. ``pool`` turns the last activation
    map into the embedding, ``precision`` is what is computed in (autocast, where it is not float32).
    """

    name: str = "lite0"
    weights: str | None = None
    random_init: int | None = None
    model_args: tuple[tuple[str, Any], ...] = ()
    overrides: TransformOverrides = field(default_factory=TransformOverrides)
    pool: Pool = "default"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        check_fields(self)
        if not self.name or not self.name.isprintable():
            raise UsageError("`backbone`: a name is needed, such as mini or resnet18.")
        if self.weights is not None and self.random_init is not None:
            raise UsageError("`weights` and `random_init` exclude each other: keep one.")
        if self.random_init is not None and not 0 <= self.random_init <= MAX_SEED:
            raise UsageError(f"`random_init` {self.random_init}: a seed from 0 to {MAX_SEED} is needed.")

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any], weights: str | None) -> "BackboneSpec":
        """Return the backbone that a record, a head's card or a request names, with its weights where they lie now.

        Raises:
            KeyError, TypeError, UsageError: the facts are none of a backbone's.
        """
        return cls(
            facts["name"],
            weights,
            facts["random_init"],
            freeze_args(dict(facts["model_args"])),
            TransformOverrides(**facts["overrides"]),
            facts.get("pool", "default"),
            facts.get("precision", "float32"),
        )

    @property
    def samples(self) -> SampleKind:
        """What it takes: names say it, so that nothing has to be loaded for it."""
        return "text" if self.name.startswith(TEXT) else "image"

    @property
    def label(self) -> str:
        """The name as it stands in folders and tables."""
        # It becomes a folder's name: a hub's slashes and colons would be folders, or refused by a file system.
        world = next((world for world in (TEXT, CLIP) if self.name.startswith(world)), None)
        name = self.name if world is None else world + "/".join(Path(self.name.removeprefix(world)).parts[-2:])
        label = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
        return f"{label}.random{self.random_init}" if self.random_init is not None else label

    @property
    def text(self) -> str:
        """The name with what is asked otherwise than usual, where several of one name stand side by side."""
        size = f" at {self.overrides.input_size} px" if self.overrides.input_size else ""
        pool = f", pool {self.pool}" if self.pool != "default" else ""
        return f"{self.name}{size}{pool}{' (random weights)' if self.random_init is not None else ''}"


@dataclass(frozen=True)
class LoadedBackbone:
    """A backbone as it was loaded: what the numbers depend on."""

    architecture: str
    tag: str
    weights_sha256: str
    model_args: tuple[tuple[str, Any], ...] = ()
    pool: str = "default"


@dataclass(frozen=True)
class Views:
    """How many views of each image are kept: view 0 is the evaluation transform, the others are augmentations.

    An augmentation is a random resized crop of a quarter to all of the image's area, aspect ratio 3/4 to 4/3, flipped
    half of the time (Szegedy et al. 2015, section 6). It is drawn from the image's bytes, the seed and the view's number.
    """

    count: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse no views, and more than anybody could store."""
        check_fields(self)
        if not (1 <= self.count <= _MAX_VIEWS and 0 <= self.seed <= MAX_SEED):
            raise UsageError(f"`views`: 1 to {_MAX_VIEWS} are possible, and `views_seed` goes from 0 to {MAX_SEED}.")


@dataclass(frozen=True)
class FeatureSpec:
    """Everything that decides a stored row besides the image's bytes: the cache key is its fingerprint.

    At the cut ``input`` the rows are pixels, so that ``backbone`` is ``None`` and all backbones share them.
    """

    transform: Transform | Tokenisation
    backbone: LoadedBackbone | None
    cut: str = POOLED
    compute: str = "float32"
    dtype: StoredDtype = "float32"
    views: int = 1
    views_seed: int = 0
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Refuse a dtype that the cut cannot have."""
        check_fields(self)
        inputs = "int32" if isinstance(self.transform, Tokenisation) else "uint8"
        if self.dtype != inputs if self.cut == INPUT else self.dtype in {"uint8", "int32"}:
            raise UsageError(f"`dtype` {self.dtype}: input is stored as {inputs}, every other cut as a float.")

    @property
    def key(self) -> str:
        """The cache key, 64 hexadecimal digits."""
        return fingerprint(self)


def check_input_size(pixels: int) -> None:
    """Refuse a side that no backbone was made for.

    Raises:
        UsageError: it is below 1 or above 4,096 pixels.
    """
    if not 1 <= pixels <= _MAX_INPUT:
        raise UsageError(f"`input_size` {pixels}: 1 to {_MAX_INPUT} pixels are possible.")


def layers_of(cut: str) -> tuple[str, ...]:
    """Return the layers whose pooled activations a cut such as ``layer3+layer4`` concatenates; else the cut itself."""
    return tuple(name for name in cut.split("+") if name)


def cut_of_layers(layers: Sequence[str]) -> str:
    """Return the cut that concatenates the pooled activations of some layers, ``layer3+`` for a single one.

    Raises:
        UsageError: none is given, or one twice.
    """
    names = [name.strip() for name in layers]
    if not names or not all(names) or len(set(names)) < len(names) or any("+" in name for name in names):
        raise UsageError(f"`layers` {','.join(layers)}: write the names of layers, each once, with commas between them.")
    return "+".join(names) if len(names) > 1 else f"{names[0]}+"


def is_embedding(cut: str) -> bool:
    """Tell whether a cut gives one vector an image: ``pooled``, or several layers such as ``layer3+layer4``."""
    return cut == POOLED or "+" in cut


def stored_dtype(cut: str, dtype: StoredDtype | None = None, kind: SampleKind = DEFAULT_KIND) -> StoredDtype:
    """Return the dtype that a cut is stored in: embeddings float32, activations float16, pixels uint8, token ids int32."""
    if cut == INPUT:
        return "int32" if kind == "text" else "uint8"
    return dtype or ("float32" if is_embedding(cut) else "float16")


def parse_model_args(pairs: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    """Read ``KEY=VALUE`` pairs for timm, values as JSON where they are JSON, else as text; sorted by key.

    Raises:
        UsageError: a pair has no ``=``.
    """
    import json

    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"`model_args` {pair}: write KEY=VALUE, such as pad_type=same.")
        try:
            parsed[key] = json.loads(text)
        except json.JSONDecodeError:
            parsed[key] = {"True": True, "False": False, "None": None}.get(text, text)
    return freeze_args(parsed)


def freeze_args(args: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return keyword arguments as a sorted tuple of pairs, lists as tuples.

    Raises:
        UsageError: a value is no text, number, truth value or list of them: nothing else has one form in a cache key.
    """
    for key, value in args.items():
        for each in value if isinstance(value, list | tuple) else (value,):
            if not isinstance(each, str | int | float | bool | None) or each != each:  # noqa: PLR0124 - NaN
                raise UsageError(f"model_args: {key}: {each!r:.60}: a text, a number, a truth value or a list is needed.")
    # Sorted, lists as tuples: the same arguments in any order are one cache key.
    return tuple(sorted((key, tuple(value) if isinstance(value, list) else value) for key, value in args.items()))
