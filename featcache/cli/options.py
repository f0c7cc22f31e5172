"""Options that several commands share, what their values are read from, and the help that shows them under headings."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click
from click.shell_completion import CompletionItem

from featcache.heads import HEAD_NAMES
from featcache.specs import MAX_SEED, RUNTIMES, Interpolation, Pool, Precision

if TYPE_CHECKING:
    from featcache.datasets import Dataset
    from featcache.extraction.feature_cache import Settings
    from featcache.specs import BackboneSpec

Glossary = tuple[str, tuple[tuple[str, str], ...]]
DATA_KINDS: Glossary = (
    "DATA is one of",
    (
        (
            "FOLDER",
            "CLASS/IMAGE files, or train|val|test/CLASS/IMAGE; texts as CLASS/TEXT.txt. Splits that are missing are drawn.",
        ),
        (
            "FILE.csv, FILE.parquet",
            "Columns path, label and perhaps split; in Parquet a column image may hold the bytes; texts: text, label.",
        ),
        (
            "FILE.npz, FILE.h5",
            "Arrays images, uint8 (n, h, w[, 3]), and labels, or a pair a split: train_images, train_labels.",
        ),
        ("torchvision:NAME", "One of torchvision's sets, such as torchvision:CIFAR10, below --data-root."),
        ("hf:ORG/NAME", "A set of the Hugging Face hub, or hf:FOLDER for one on disk."),
        ("wds:NAME-{000..009}.tar", "WebDataset shards, read in place."),
        ("sklearn:digits", "1,797 scanned digits that come with scikit-learn."),
        ("sklearn:docstrings", "2,000 paragraphs of its docstrings, by package: texts."),
    ),
)
Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class Command(click.Command):
    """A command whose help shows options under the headings that ``grouped`` gave them.

    ``glossary`` explains what its argument may be: a heading, and names with what they mean. That of DATA comes by itself.
    """

    def __init__(self, *args: Any, glossary: Glossary | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for param in self.params:
            if isinstance(param, click.Option):
                param.show_default = _tells_default(param)
        takes_data = any(isinstance(param, click.Argument) and param.name == "data" for param in self.params)
        self.glossary = DATA_KINDS if takes_data else glossary

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take what was typed; of a second head behind one ``--head`` say how it is asked for."""
        typed = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            heads = _heads_behind_one(typed)
            if not heads or "unexpected extra argument" not in error.message:
                raise
            raise click.UsageError(f"{error.message}: repeat the option for more heads, {_repeated(heads)}.", ctx) from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the glossary, then a section a heading."""
        params = self.get_params(ctx)
        if self.glossary:
            with formatter.section(self.glossary[0]):
                formatter.write_dl(self.glossary[1])
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in params:
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(param, "heading", "Output"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def _tells_default(option: click.Option) -> bool:
    """Tell whether help says what is taken where an option is left out: not of flags that are off, and not of nothing."""
    default = option.default
    if isinstance(default, str | Sequence):
        return bool(default)
    return isinstance(default, int | float) and (not isinstance(default, bool) or bool(option.secondary_opts))


def grouped(heading: str, *options: Callable[[Any], Any]) -> Callable[[Decorated], Decorated]:
    """Return one decorator for several options, in reading order; those without a heading yet come under this one."""

    def decorate(command: Decorated) -> Decorated:
        before = len(getattr(command, "__click_params__", ()))
        for option in reversed(options):  # click shows the last applied first
            command = option(command)
        for param in getattr(command, "__click_params__", ())[before:] if heading else ():
            param.heading = getattr(param, "heading", heading)
        return command

    return decorate


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """A value that a function reads from a text; ``advice`` is what is said where it raises ValueError.

    ``spelt`` turns such a value, as a text of Python, into what is written on the command line.
    """

    def __init__(self, name: str, read: Callable[[str], Any], advice: str, spelt: Callable[[str], str] = str) -> None:
        self.name, self.read, self.advice, self.spelt = name, read, advice, spelt

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value; what is no text is a default, and read already."""
        if not isinstance(value, str):
            return value
        try:
            return self.read(value)
        except ValueError:
            self.fail(f"{value!r}: {self.advice}", param, ctx)


class Head(click.ParamType):  # type: ignore[type-arg]  # as above
    """A head's name; the library says which there are, the shell completes them."""

    name = "HEAD"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002 - click's signature
        """Return the heads that begin so."""
        return [CompletionItem(name) for name in HEAD_NAMES if name.startswith(incomplete)]

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse several at once: other programs' options take lists, this one is repeated."""
        if len(names := [name.strip() for name in value.split(",")]) > 1:
            self.fail(f"{value!r} is a list: repeat the option, {_repeated(names)}.", param, ctx)
        return value


def _heads_behind_one(arguments: Sequence[str]) -> list[str]:
    """Return the heads that stand behind a ``--head``, where there are several."""
    places = [place for place, argument in enumerate(arguments) if argument == "--head"]
    heads = [name for place in places for name in takewhile(HEAD_NAMES.__contains__, arguments[place + 1 :])]
    return heads if len(heads) > len(places) else []


def _repeated(heads: Iterable[str]) -> str:
    return " ".join(f"--head {name}" for name in heads)


class HeadArgument(click.Path):
    """The file of a head."""

    def get_missing_message(self, *_: Any, **__: Any) -> str:
        """Say where one comes from; versions of click differ in what they hand over."""
        return "It is the file that `featcache fit` prints at its end; `featcache store heads` lists those that are kept."


def finite(text: str) -> float:
    """Return a number that can be computed with.

    Raises:
        ValueError: the text is no number, NaN or infinite.
    """
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _three(text: str) -> tuple[float, ...]:
    numbers = tuple(map(finite, text.split(",")))
    if len(numbers) not in {1, 3}:
        raise ValueError(text)
    return numbers if len(numbers) == 3 else numbers * 3


def _share(text: str) -> float:
    share = finite(text.removesuffix("%")) / 100
    if not 0 <= share <= 1:
        raise ValueError(text)
    return share


def _part(text: str) -> tuple[int, int]:
    first, second = map(_count, text.split("/"))
    if first > second:
        raise ValueError(text)
    return first, second


def _price(text: str) -> float:
    if (price := finite(text)) < 0:
        raise ValueError
    return price


def _natural(text: str) -> int:
    if not re.fullmatch(r"\s*\d{1,15}\s*", text, re.ASCII):  # int() itself takes 1_000, and Arabic digits
        raise ValueError(text)
    return int(text)


def _count(text: str) -> int:
    if (number := _natural(text)) < 1:
        raise ValueError(text)
    return number


def _seed(text: str) -> int:
    if (number := _natural(text)) > MAX_SEED:
        raise ValueError(text)
    return number


def _candidates(text: str) -> tuple[str, tuple[float, ...]]:
    name, equals, rest = text.partition("=")
    if not (name and equals):
        raise ValueError(text)
    # a number of neighbours is whole: 5.0 would be another parameter in a record
    return name.strip(), tuple(
        int(part) if part.strip().isdecimal() and name == "k" else finite(part) for part in rest.split(",")
    )


def _quantity(text: str, units: dict[str, float]) -> float:
    match = re.fullmatch(rf"(\d{{1,15}}(?:\.\d+)?)\s*({'|'.join(units)})", text.strip().lower(), re.ASCII)
    if match is None:
        raise ValueError(text)
    return float(match[1]) * units[match[2]]


_TIMES = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZES = {f"{unit}{end}": 1000.0**power for power, unit in enumerate(("", "k", "m", "g", "t")) for end in ("", "b")}
SEED = Parsed("SEED", _seed, f"a whole number from 0 to {MAX_SEED} is needed.")
POSITIVE = Parsed("N", _count, "a whole number above 0 is needed.")
NATURAL = Parsed("N", _natural, "a whole number from 0 is needed.")
NUMBER = Parsed("NUMBER", finite, "a number is needed.")
RGB = Parsed("R,G,B", _three, "write three numbers, such as 0.5,0.5,0.5.")
PERCENT = Parsed("P%", _share, "write a percentage from 0% to 100%, such as 1%.", lambda share: f"{100 * float(share):.1f}%")
PART = Parsed("I/N", _part, "write I/N, such as 2/4 for the second of four parts.")
GRID = Parsed("NAME=A,B", _candidates, "write NAME=VALUE,VALUE, such as C=0.1,1,10.")
COUNTS = Parsed("N,N", lambda text: tuple(map(_count, text.split(","))), "write whole numbers above 0, such as 1,2,4.")
NAMES = Parsed("A,B", lambda text: tuple(filter(None, map(str.strip, text.split(",")))), "write names with commas between.")
SECONDS = Parsed("TIME", lambda text: _quantity(text, _TIMES), "write a time, such as 60s or 5m.")
BYTES = Parsed("SIZE", lambda text: int(_quantity(text, _SIZES)), "write a size, such as 500MB or 20GB.")
PRICE = Parsed("NUMBER", _price, "a number from 0 is needed.")
FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)


def _set_up_notes(ctx: click.Context, param: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's signature
    if value:
        from featcache.cli import spelling
        from featcache.display import set_up_notes

        set_up_notes(quiet=param.name == "quiet", verbose=param.name == "verbose", wording=spelling(ctx))


def _complete_data(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001 - click's signature
    kinds = [CompletionItem(kind) for kind, _ in DATA_KINDS[1] if ":" in kind and incomplete and kind.startswith(incomplete)]
    return kinds or [CompletionItem(incomplete, type="file")]


data_argument = click.argument("data", shell_complete=_complete_data)
cache_option = grouped(
    "Cache",
    click.option("--cache", type=FOLDER, help="Use this cache instead of $FEATCACHE_CACHE or the platform's cache folder."),
)
notes_options = grouped(
    "Output",
    click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=_set_up_notes, help="Say nothing but errors on stderr."
    ),
    click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=_set_up_notes, help="Say more on stderr."),
)
json_option = grouped(
    "Output", click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of text.")
)
seed_option = click.option("--seed", type=SEED, default=0, help="Draw splits, and train, from this seed.")
price_option = click.option(
    "--price", type=PRICE, help="Tell costs in money too, given the price of an hour on this machine."
)
track_option = click.option(
    "--track",
    "tracker",
    metavar="TRACKER",
    help="Tell curves, tables and records to wandb, trackio, tensorboard or mlflow; a project or folder may follow a colon.",
)
cache_budget_option = click.option(
    "--cache-budget",
    type=BYTES,
    help="Store at most so many activations, such as 20GB; what needs more is computed again in every epoch.",
)
group_option = click.option(
    "--group",
    metavar="COLUMN",
    help="Keep images of one value of this column of a CSV or Parquet, such as patient, in one part.",
)
max_bad_option = click.option(
    "--max-bad", type=PERCENT, default="1%", help="End the run where a greater share of images is unusable."
)
source_options = grouped(
    "Data",
    data_argument,
    click.option(
        "--name", metavar="NAME", help="Call the data set so in the cache; under its name a moved one is found again."
    ),
    click.option("--data-root", type=FOLDER, help="Look for torchvision: sets in this folder."),
    click.option("--download", is_flag=True, help="Allow a torchvision: or hf: set to be downloaded."),
    max_bad_option,
)
_NETWORK = (
    click.option(
        "-b",
        "--backbone",
        default="lite0",
        metavar="NAME",
        help="Take this backbone: lite0 (comes along), mini (a toy), a timm name, hf-hub:ORG/REPO or local-dir:PATH; of "
        "texts text:ORG/NAME or text:FOLDER.",
    ),
    click.option(
        "--weights",
        type=click.Path(path_type=Path),
        help="Load this checkpoint (.safetensors, or a plain .pth) instead of the published weights.",
    ),
    click.option(
        "--random-init", type=SEED, metavar="SEED", help="Draw random weights from this seed: nothing is pretrained."
    ),
    click.option(
        "--model-arg", "model_args", multiple=True, metavar="KEY=VALUE", help="Pass this to timm; repeat it for more."
    ),
    click.option(
        "--input-size",
        type=POSITIVE,
        help="Scale images to so many pixels a side, not to the backbone's own; end texts after so many tokens.",
    ),
    click.option("--crop-pct", type=NUMBER, help="Keep this share, from 0 to 1, of the scaled short side."),
    click.option(
        "--interpolation",
        type=click.Choice(get_args(Interpolation)),
        help="Resample images so, not in the backbone's own way.",
    ),
    click.option("--mean", type=RGB, help="Subtract these from pixels in 0..1 instead of the backbone's own means."),
    click.option("--std", type=RGB, help="Divide by these instead of the backbone's own standard deviations."),
    click.option(
        "--decode",
        type=click.Choice(["scaled", "exact"]),
        help="Let libjpeg shrink large JPEGs as it decodes (scaled, the default), or decode every pixel.",
    ),
)
_PRECISION = click.option(
    "--precision", type=click.Choice(get_args(Precision)), default="float32", help="Compute the backbone in this precision."
)


def _backbone_options(pools: Sequence[str], auto: str) -> Callable[[Decorated], Decorated]:
    pool = click.option(
        "--pool",
        type=click.Choice(pools),
        default="default",
        help=f"Pool the last activations so, without norms or layers that follow; default is the backbone's own way{auto}.",
    )
    return grouped("Backbone", *_NETWORK, pool, _PRECISION)


backbone_options = _backbone_options(get_args(Pool), "")
fitted_backbone_options = _backbone_options([*get_args(Pool), "auto"], ", auto what does best on validation")


def _set_offline(ctx: click.Context, _: click.Parameter, is_offline: bool) -> None:  # noqa: FBT001 - click calls it so
    """Let this command, and what it starts, ask no network; what the environment said before holds again behind it."""
    import os

    from featcache.resources import FETCH

    if is_offline:
        before = os.environ.get(FETCH)
        os.environ[FETCH] = "never"
        ctx.call_on_close(lambda: os.environ.pop(FETCH) if before is None else os.environ.update({FETCH: before}))


offline_option = click.option(
    "--offline",
    is_flag=True,
    expose_value=False,
    callback=_set_offline,
    help="Ask nothing of a network, as with FEATCACHE_FETCH=never in the environment: what is not here is an error.",
)
compute_options = grouped(
    "Computing",
    click.option(
        "--batch-size", type=POSITIVE, help="Compute so many images at a time; by default it depends on the device."
    ),
    click.option(
        "--device", metavar="DEVICE", help="Compute on cpu, cuda, cuda:1, ...; by default on the first GPU, else on the CPU."
    ),
    click.option(
        "--runtime",
        type=click.Choice(RUNTIMES),
        default="auto",
        help="Run the backbone on a CPU with this; auto takes the fastest installed one that agrees with torch and pays.",
    ),
    click.option("--workers", type=POSITIVE, help="Decode and compute in so many threads; by default one a core."),
    offline_option,
    notes_options,
)
run_options = grouped("", cache_option, compute_options)


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
    from featcache.extraction import default_cache
    from featcache.extraction.feature_cache import Settings

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
        tracker=_open_tracker(options.pop("tracker", None)),
    )


def _open_tracker(tracker: str | None) -> Any:
    if tracker is None:
        return None
    from featcache.reports.trackers import Tracker

    return Tracker(tracker)


def take_inputs(options: dict[str, Any], target: str = "label") -> "tuple[BackboneSpec, Settings, Dataset]":
    """Take what several commands begin with out of a command's options: the backbone, the settings, the data set, opened.

    What the data set holds, and the backbone, is said on stderr, before anything is computed.
    """
    from featcache.display import logger

    # the data set last: to list a million files takes longer than to find a contradiction between flags
    spec, settings = take_spec(options), take_settings(options)
    dataset = take_dataset(options)
    logger.info("%s; backbone %s", dataset.overview(target), spec.label)
    return spec, settings, dataset


def take_dataset(options: dict[str, Any]) -> "Dataset":
    """Take the data set's options out of a command's and return it, opened."""
    from featcache.datasets import open_dataset

    data, name = options.pop("data"), options.pop("name")
    return open_dataset(data, name, data_root=options.pop("data_root"), download=options.pop("download"))


def tell_page(name: str, cache: Path, records: Path | None = None) -> None:
    """Say on stderr which command makes a page of what was just recorded: of a data set's records, or of a file of them."""
    import shlex

    from featcache.display import logger
    from featcache.extraction import default_cache

    of = [str(records)] if records is not None else ["--dataset", name]
    where = [] if cache.resolve() == default_cache().resolve() else ["--cache", str(cache)]
    logger.info("One page to send of this: %s", shlex.join(["featcache", "report", *of, "--html", f"{name}.html", *where]))


def predicting(head: Path, samples: str) -> str:
    """Return the command that labels others by a head, whole: to be copied."""
    import shlex

    return f"To label others: {shlex.join(['featcache', 'predict', str(head), samples])}"


def emit(value: dict[str, Any]) -> None:
    """Print one JSON object with its schema version."""
    import json

    from featcache.reports import SCHEMA_VERSION

    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **value}))


def show(lines: Iterable[str], *written: Path | None) -> None:
    """Print lines, then which files were written besides."""
    for line in lines:
        click.echo(line)
    for path in written:
        if path is not None:
            click.echo(str(path))
