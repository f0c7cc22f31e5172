"""Options that several commands share."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from featcache.specs import MAX_SEED

if TYPE_CHECKING:
    from featcache.datasets.base import Dataset
    from featcache.extraction.feature_cache import Settings
    from featcache.specs import BackboneSpec

SEED = click.IntRange(0, MAX_SEED)
Command = TypeVar("Command", bound=Callable[..., Any])


def several(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Return one decorator for several options, in reading order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def finite(text: Any) -> float:
    """Return a number that can be computed with.

    Raises:
        ValueError: the text is no number, NaN or infinite.
    """
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


class Number(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """A number that is neither NaN nor infinite."""

    name = "NUMBER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        try:
            return finite(value)
        except ValueError:
            self.fail(f"{value!r}: a number is needed.", param, ctx)


NUMBER = Number()


class Three(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """Three numbers with commas between, one a colour channel."""

    name = "R,G,B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the three numbers, or one number three times."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(finite(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r}: write numbers, such as 0.5,0.5,0.5.", param, ctx)
        if len(numbers) == 1:
            numbers *= 3
        if len(numbers) != 3:
            self.fail(f"{value!r}: three numbers are needed.", param, ctx)
        return numbers


class Percent(click.ParamType):  # type: ignore[type-arg]  # as above
    """A percentage, such as ``1%``."""

    name = "P%"

    @staticmethod
    def spelt(share: str) -> str:
        """Return a share as it is written on the command line."""
        return f"{100 * float(share):.1f}%"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a share between 0 and 1."""
        if isinstance(value, float):
            return value
        try:
            share = finite(str(value).removesuffix("%")) / 100
        except ValueError:
            self.fail(f"{value!r}: write a percentage, such as 1%.", param, ctx)
        if not 0 <= share <= 1:
            self.fail(f"{value!r}: between 0% and 100% is needed.", param, ctx)
        return share


class Part(click.ParamType):  # type: ignore[type-arg]  # as above
    """One of several shares, such as ``2/4``."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number of the share, from 1, and how many there are."""
        if isinstance(value, tuple):
            return value
        first, slash, second = str(value).partition("/")
        numbers = first.isdecimal() and second.isdecimal() and max(len(first), len(second)) < 10
        if not (slash and numbers and 1 <= int(first) <= int(second)):
            self.fail(f"{value!r}: write I/N, such as 2/4 for the second of four parts.", param, ctx)
        return int(first), int(second)


class Grid(click.ParamType):  # type: ignore[type-arg]  # as above
    """A parameter's values, such as ``C=0.1,1,10``."""

    name = "NAME=A,B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the name and the values."""
        if isinstance(value, tuple):
            return value
        name, equals, rest = str(value).partition("=")
        try:
            values = tuple(
                int(part) if part.strip().isdecimal() and name == "k" else finite(part) for part in rest.split(",")
            )
        except ValueError:
            values = ()
        if not (name and equals and values):
            self.fail(f"{value!r}: write NAME=VALUE,VALUE, such as C=0.1,1,10.", param, ctx)
        return name.strip(), values


class Numbers(click.ParamType):  # type: ignore[type-arg]  # as above
    """Whole numbers with commas between, such as ``1,2,4``."""

    name = "N,N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the numbers."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and len(part) < 10 and int(part) > 0 for part in parts):
            self.fail(f"{value!r}: write whole numbers above 0, such as 1,2,4.", param, ctx)
        return tuple(int(part) for part in parts)


class Names(click.ParamType):  # type: ignore[type-arg]  # as above
    """Names with commas between."""

    name = "A,B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ARG002 - click's
        """Return the names."""
        return value if isinstance(value, tuple) else tuple(part.strip() for part in str(value).split(",") if part.strip())


class Seconds(click.ParamType):  # type: ignore[type-arg]  # as above
    """A time, such as ``60s`` or ``5m``."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return seconds."""
        if isinstance(value, float):
            return value
        text = str(value).strip()
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text, re.ASCII)
        if found is None:
            self.fail(f"{value!r}: write a time, such as 60s or 5m.", param, ctx)
        return float(found[1]) * {"m": 60.0, "h": 3600.0}.get(found[2], 1.0)


class Bytes(click.ParamType):  # type: ignore[type-arg]  # as above
    """A number of bytes, such as ``20GB``."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return bytes."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([kmgt]?)b?", str(value).strip().lower(), re.ASCII)
        if found is None:
            self.fail(f"{value!r}: write a size, such as 500MB or 20GB.", param, ctx)
        return int(float(found[1]) * 1000 ** ("kmgt".index(found[2]) + 1 if found[2] else 0))


def _notes(ctx: click.Context, param: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's signature
    if value:
        from featcache.cli.border import spelling
        from featcache.progress import set_up_notes

        set_up_notes(quiet=param.name == "quiet", verbose=param.name == "verbose", wording=spelling(ctx))


notes_options = several(
    click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_notes, help="Errors only on stderr."),
    click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=_notes, help="More notes on stderr."),
)
data_argument = click.argument("data")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
seed_option = click.option("--seed", type=SEED, default=0, show_default=True, help="Of drawn splits, heads, training.")
backbone_options = several(
    click.option("-b", "--backbone", default="mini", show_default=True, help="`mini` (bundled) or a timm name."),
    click.option("--weights", type=click.Path(path_type=Path), help="A checkpoint: .safetensors or a plain .pth state."),
    click.option("--random-init", type=SEED, metavar="SEED", help="Random weights: nothing is pretrained."),
    click.option("--model-arg", "model_args", multiple=True, metavar="KEY=VALUE", help="Passed to timm; may be repeated."),
    click.option("--input-size", type=click.IntRange(min=1), help="Pixels; default: the backbone's own."),
    click.option("--crop-pct", type=Number(), help="Share of the scaled short side that is kept."),
    click.option("--interpolation", type=click.Choice(["nearest", "bilinear", "bicubic", "lanczos"]), help="Resampling."),
    click.option("--mean", type=Three(), help="Subtracted from pixels in 0..1."),
    click.option("--std", type=Three(), help="Divides what is left."),
    click.option(
        "--decode",
        type=click.Choice(["scaled", "exact"]),
        help="Let libjpeg shrink large JPEGs as it decodes (default), or decode every pixel.",
    ),
    click.option(
        "--pool",
        type=click.Choice(["default", "avg", "max", "cls", "avg+cls", "gem"]),
        default="default",
        show_default=True,
        help="Pool the last activations so, without what follows them (norms, layers); default: the backbone's own way.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        default="float32",
        show_default=True,
        help="What is computed in.",
    ),
)
compute_options = several(
    click.option("--batch-size", type=click.IntRange(min=1), help="Images at a time; default: by device and image size."),
    click.option("--device", help="cpu, cuda, cuda:1, ...; default: the first GPU, else the CPU."),
    click.option(
        "--runtime",
        type=click.Choice(["auto", "torch", "compile", "openvino", "onnx"]),
        default="auto",
        show_default=True,
        help="What computes on the CPU; auto: the fastest that is installed, pays, and agrees with torch.",
    ),
    click.option("--workers", type=click.IntRange(min=1), help="Threads that decode and compute; default: by the cores."),
    notes_options,
)
run_options = several(
    click.option("--name", help="The data set's name in the cache; a moved one is recognised by it."),
    click.option("--cache", type=click.Path(path_type=Path, file_okay=False), help="Where entries go ($FEATCACHE_CACHE)."),
    click.option("--max-bad", type=Percent(), default="1%", show_default=True, help="More unusable images end the run."),
    compute_options,
)


group_option = click.option("--group", help="A manifest's column, such as patient: its values are never in two parts.")
source_options = several(
    data_argument,
    click.option("--data-root", type=click.Path(path_type=Path, file_okay=False), help="Where torchvision: data sets lie."),
    click.option("--download", is_flag=True, help="Allow a torchvision: or hf: data set to be downloaded."),
)


def take_spec(options: dict[str, Any]) -> "BackboneSpec":
    """Take the backbone's options out of a command's and return them as one value."""
    from featcache.specs import BackboneSpec, TransformOverrides, parse_model_args

    names = ("input_size", "crop_pct", "interpolation", "mean", "std")
    weights, decode = options.pop("weights"), options.pop("decode")
    decoder: Any = {"scaled": "pillow-scaled", "exact": "pillow", None: None}[decode]
    return BackboneSpec(
        name=options.pop("backbone"),
        weights=str(weights) if weights is not None else None,
        random_init=options.pop("random_init"),
        model_args=parse_model_args(options.pop("model_args")),
        overrides=TransformOverrides(**{name: options.pop(name) for name in names}, decoder=decoder),
        pool=options.pop("pool"),
        precision=options.pop("precision"),
    )


def take_settings(options: dict[str, Any]) -> "Settings":
    """Take the options that change no number out of a command's and return them as one value; ``name`` stays."""
    from featcache.extraction.feature_cache import Settings
    from featcache.extraction.lookup import default_cache

    return Settings(
        cache=options.pop("cache", None) or default_cache(),
        batch_size=options.pop("batch_size"),
        device=options.pop("device"),
        max_bad=options.pop("max_bad", 0.0),
        rebind=options.get("name") is not None,
        runtime=options.pop("runtime"),
        workers=options.pop("workers"),
        part=options.pop("part", None),
        engine=options.pop("engine", "local"),
    )


def take_source(options: dict[str, Any]) -> "Dataset":
    """Take the options that say where images come from out of a command's and open the source."""
    from featcache.datasets import open_dataset

    return open_dataset(
        options.pop("data"), options.pop("name"), data_root=options.pop("data_root"), download=options.pop("download")
    )


def announce(source: "Dataset", spec: "BackboneSpec") -> None:
    """Say on stderr what was found, before anything is computed: images, classes, splits, backbone."""
    from featcache.progress import logger
    from featcache.reports.wording import overview

    logger.info(overview(source, spec))


def emit(value: dict[str, Any]) -> None:
    """Print one JSON object with its schema version."""
    import json

    from featcache.reports.records import SCHEMA_VERSION

    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **value}))
