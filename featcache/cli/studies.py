"""``featcache advise``, ``audit``, ``next``, ``quickstart``, ``bench`` and ``report``: what to do, and what came of it."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featcache.cli import options
from featcache.display import printable

if TYPE_CHECKING:
    from featcache.experiments.bench import BenchResult
    from featcache.reports import RunRecord
    from featcache.reports.tables import AgainstResult
_TARGET = click.Path(path_type=Path, dir_okay=False, allow_dash=True)
_FAILED = 3
_GRID: options.Glossary = (
    "PIPELINE's keys",
    (
        ("heads, unfreeze", 'Lists of what runs, such as heads = ["logistic", "knn"] and unfreeze = ["last:1"].'),
        ("seeds", "A list of whole numbers, [0] by default: every cell runs once with each."),
        ("name, group", "What records and tables are called; a column that groups every data set that names none."),
        (
            "[[dataset]]",
            "A table for each data set: data, which is any DATA of `featcache fit --help`, and options such as name.",
        ),
        ("[[backbone]]", "A table for each backbone: name, and options such as weights; without any, lite0."),
        ("[finetune]", "How everything in unfreeze trains: epochs, lr, batch_size and so on."),
    ),
)


@click.command("advise", cls=options.Command)
@options.source_options
@options.grouped(
    "Advice",
    click.option(
        "-b",
        "--backbone",
        "backbones",
        multiple=True,
        metavar="NAME[=FILE]",
        help="Try this one too, with the weights of a FILE if one is named; repeat it for more. lite0, mini and those with "
        "rows of DATA in the cache are tried in any case.",
    ),
    click.option(
        "--budget", type=options.SECONDS, help="Begin no further step that would end after this time, such as 10m."
    ),
    options.group_option,
    options.seed_option,
)
@options.run_options
@options.json_option
def advise_command(as_json: bool, backbones: tuple[str, ...], **flags: Any) -> None:  # noqa: FBT001
    """Say which backbone is best for DATA, whether to train its weights, and what more images would bring.

    Measured on samples, which the cache keeps: the test split is not looked at. Each answer comes with its evidence, how
    sure it is, and what the textbook rule says.
    """
    from featcache.api import advise
    from featcache.reports.wording import advice_lines

    specs = [_backbone_of(text) for text in backbones]
    settings, dataset = options.take_settings(flags), options.take_dataset(flags)
    result = advise(dataset, specs, settings=settings, **flags)
    if as_json:
        options.emit(result.summary)
        return
    options.show(advice_lines(result))


def _backbone_of(text: str) -> Any:
    from featcache.specs import BackboneSpec

    # a folder's path may hold an equals sign
    name, equals, weights = (text, "", "") if text.startswith("local-dir:") else text.partition("=")
    if equals and not weights:
        raise click.UsageError(f"--backbone {text}: the file of the weights is missing behind the equals sign.")
    return BackboneSpec(name, weights=weights or None)


@click.command("audit", cls=options.Command)
@options.source_options
@options.grouped(
    "Audit",
    click.option(
        "--beside",
        multiple=True,
        default=("mini",),
        metavar="BACKBONE|none",
        help="Heads on embeddings of this backbone doubt labels too; repeat it for more, none for no other.",
    ),
    options.group_option,
    options.seed_option,
)
@options.backbone_options
@options.run_options
@options.grouped(
    "Output",
    click.option("--csv", "csv_file", type=options.FILE, help="Write all suspects into this CSV."),
    click.option(
        "--fix",
        "fixed",
        type=options.FILE,
        help="Write a CSV manifest of the images without training copies of test images, exact copies and blank images; no "
        "image is touched.",
    ),
)
@options.json_option
def audit_command(
    *, as_json: bool, csv_file: Path | None, fixed: Path | None, beside: tuple[str, ...], **flags: Any
) -> None:
    """Look for copies across splits, likely wrong labels, odd images and shortcuts, and say what they do to test accuracy.

    Copies are found though they are encoded again, resized or mirrored. Nothing is changed.
    """
    from featcache.api import audit
    from featcache.experiments.audit import cleaned
    from featcache.reports.wording import audit_lines, manifest_csv, suspects_csv, write_csv

    spec, settings, dataset = options.take_inputs(flags)
    if fixed is not None:
        cleaned(dataset, {})  # what no manifest can list is refused before anything is computed
    backbones = [name for name in beside if name != "none"]
    result = audit(dataset, spec, beside=backbones, settings=settings, **flags)
    if csv_file is not None:
        write_csv(csv_file, suspects_csv(result.suspects))
    if fixed is not None:
        write_csv(fixed, manifest_csv(cleaned(dataset, result.dropped)))
    if as_json:
        options.emit(result.summary)
        return
    options.show(audit_lines(result), csv_file)
    if fixed is not None:
        click.echo(f"{fixed}: without {len(result.dropped)} images")


@click.command("next", cls=options.Command)
@options.source_options
@options.grouped(
    "Choice",
    click.option("--n", "n", type=options.POSITIVE, default="50", help="Choose so many."),
    click.option(
        "--unlabelled",
        multiple=True,
        metavar="PATH",
        help="Choose from these too: a file, a folder, or a table of paths; repeat it for more.",
    ),
    click.option(
        "--group",
        metavar="COLUMN",
        help="Choose one of each value of this column of a CSV or Parquet, such as patient, before another of it.",
    ),
    options.seed_option,
)
@options.backbone_options
@options.run_options
@options.grouped("Output", click.option("--csv", "csv_file", type=options.FILE, help="Write the choice into this CSV."))
@options.json_option
def next_command(as_json: bool, csv_file: Path | None, **flags: Any) -> None:  # noqa: FBT001
    """Choose what to label next: what stands for most of the rest, and later what a probe is unsure of, too.

    Without a label is a row of a table whose label is empty, an image of a folder without class folders, and what
    --unlabelled names. What the choice is worth is simulated on the labels that are there.
    """
    from featcache.api import next_samples
    from featcache.datasets import open_partly
    from featcache.reports.wording import write_csv

    spec, settings = options.take_spec(flags), options.take_settings(flags)
    names = {name: flags.pop(name) for name in ("data", "name", "data_root", "download", "group")}
    opened = open_partly(**names)
    result = next_samples(opened, spec, settings=settings, **flags)
    if csv_file is not None:
        write_csv(csv_file, result.csv)
    if as_json:
        options.emit(result.summary)
        return
    options.show([result.table().plain()], csv_file)


@click.command("bench", cls=options.Command, glossary=_GRID)
@click.argument("pipeline", type=options.FILE, required=False)
@options.grouped(
    "Grid",
    click.option("--out", type=options.FOLDER, help="Write records and tables to this folder."),
    options.group_option,
    options.max_bad_option,
    click.option(
        "--against",
        type=options.FILE,
        help="Print the rows beside the published ones in this JSONL file of records; rows of other test images, splits, "
        "scores or protocols are refused.",
    ),
)
@options.grouped(
    "Replay",
    click.option(
        "--from-record",
        "recorded",
        type=options.FILE,
        help="Run what this JSONL file records again, in a cache of its own, and compare; PIPELINE may then say where data "
        "sets and backbones are.",
    ),
    click.option("--only", metavar="CELL", default="", help="Run those records alone whose cell begins so."),
    click.option("--data-root", type=options.FOLDER, help="Look in this folder for the data sets that records name."),
    click.option("--checkpoint", type=options.FILE, help="Load this file where a record's backbone was loaded from a file."),
    click.option(
        "--reuse", is_flag=True, help="Let heads and trainings of --cache answer; without it only its features are taken."
    ),
)
@options.run_options
@options.grouped("Output", options.track_option)
@options.json_option
def bench_command(pipeline: Path | None, out: Path | None, against: Path | None, as_json: bool, **flags: Any) -> None:  # noqa: FBT001
    """Run the missing cells of PIPELINE, a TOML file, and write its records and tables.

    A cell is a data set, a backbone, a head or fine-tuning, and a seed. Without --out records and tables go to benchmarks/
    where there is one, else to the current folder. docs/grids.md describes every key. With --from-record recorded cells
    run again instead.
    """
    from featcache.api import bench, compare

    asked, group = _take_replay(flags), flags.pop("group")
    if asked.recorded is not None:
        if against is not None or group is not None:
            raise click.UsageError("--from-record goes without --against and --group: records name their groups.")
        if not _show_replay(pipeline, out, asked, flags, as_json=as_json):
            click.get_current_context().exit(_FAILED)
        return
    if pipeline is None:
        raise click.UsageError("Missing argument 'PIPELINE': a TOML file, or --from-record FILE.")
    settings = options.take_settings(flags)
    result = bench(pipeline, out=out, group=group, settings=settings)
    if result.records and not as_json:
        options.tell_page(Path(result.paths["md"]).stem, settings.cache, Path(result.paths["records"]))
    _show(result, against=None if against is None else compare(result.records, against), as_json=as_json)


@dataclass(frozen=True)
class _ReplayFlags:
    """What was asked of a replay."""

    recorded: Path | None
    only: str
    data_root: Path | None
    checkpoint: Path | None
    reuse: bool


def _take_replay(flags: dict[str, Any]) -> _ReplayFlags:
    """Take a replay's options out of a command's."""
    asked = _ReplayFlags(**{name: flags.pop(name) for name in ("recorded", "only", "data_root", "checkpoint", "reuse")})
    if asked.recorded is None and asked != _ReplayFlags(None, "", None, None, reuse=False):
        raise click.UsageError("--only, --data-root, --checkpoint and --reuse are of --from-record.")
    if asked.reuse and flags["cache"] is None:
        raise click.UsageError("--reuse needs --cache: whose heads and trainings are meant.")
    return asked


def _show_replay(
    pipeline: Path | None, out: Path | None, asked: _ReplayFlags, flags: dict[str, Any], *, as_json: bool
) -> bool:
    """Run records again and print what came out; return whether all of them are confirmed."""
    from featcache.api import replay
    from featcache.cli import spelling
    from featcache.experiments.bench import Places

    assert asked.recorded is not None
    new_records = None if out is None else out / asked.recorded.name
    checkpoint = None if asked.checkpoint is None else str(asked.checkpoint)
    places = Places(pipeline, asked.data_root, checkpoint, flags["cache"], reuse=asked.reuse, out=new_records)
    result = replay(asked.recorded, places, only=asked.only, settings=options.take_settings(flags))
    if as_json:
        options.emit(result.summary)
        return result.agrees
    click.echo(result.table().plain())
    worded = spelling(click.get_current_context())
    options.show(printable(worded(line)) for line in result.lines)
    return result.agrees


def _show(result: "BenchResult", *, against: "AgainstResult | None" = None, as_json: bool) -> None:
    """Print a grid's table or its JSON, beside published records where these are given; end with 3 where a cell failed."""
    from featcache.cli import spelling
    from featcache.reports.tables import short_table

    if as_json:
        options.emit(
            {
                "records": [record.stored for record in result.records],
                "tables": result.paths,
                "failures": list(map(spelling(click.get_current_context()), result.failures)),
                "computed_images": result.computed_samples,
                "computed_cells": result.computed_cells,
            }
            | ({} if against is None else {"against": against.summary})
        )
    else:
        click.echo(short_table(result.records).plain())
        cells = f"{result.computed_cells} cell{'' if result.computed_cells == 1 else 's'} run"
        failed = f", {len(result.failures)} failed" if result.failures else ""
        counts = f"{result.computed_samples} samples computed, {cells}{failed}"
        click.echo(f"{counts}; the table is in {result.paths['md']}, the records are in {result.paths['records']}")
        if against is not None:
            click.echo(f"\n{against.table().plain()}")
    if result.failures:
        click.get_current_context().exit(_FAILED)


@click.command("quickstart", cls=options.Command)
@options.grouped("Data", click.option("--text", is_flag=True, help="On texts, by a tiny encoder that is made on the spot."))
@options.cache_option
@options.notes_options
@options.json_option
def quickstart_command(cache: Path | None, text: bool, as_json: bool) -> None:  # noqa: FBT001
    """Run probes and fine-tuning on scikit-learn's 1,797 scanned digits with the bundled backbone, and print the table.

    With --text on 2,000 paragraphs of scikit-learn's docstrings, by package, with an encoder of random weights: it shows the
    road, not what an encoder that knows a language reaches. Needs no network. Run again, everything comes from the cache.
    """
    from featcache.api import quickstart
    from featcache.experiments.report import PagePlan

    result = quickstart(cache, text=text, plan=PagePlan(command=command_of))
    _show(result, as_json=as_json)
    if not as_json:
        click.echo(f"One page to send of this is {result.paths.get('html', 'not written: there is no record')}.")
        hint = "texts: featcache fit TABLE.csv -b text:NAME" if text else "images: featcache fit FOLDER"
        click.echo(f"Now your own {hint} --head logistic --head knn")


@click.command("report", cls=options.Command)
@click.argument("records", nargs=-1, type=options.FILE)
@options.grouped(
    "Files",
    click.option("--html", type=_TARGET, help="Write one page to send into this file: it holds all that it shows."),
    click.option("--md", type=_TARGET, help="Write the table in Markdown into this file, or with - to stdout."),
    click.option("--csv", type=_TARGET, help="Write the table as CSV into this file, or with - to stdout."),
    click.option("--tex", type=_TARGET, help="Write the table in LaTeX, for the package booktabs, or with - to stdout."),
)
@options.grouped(
    "Content",
    click.option(
        "--dataset", "datasets", metavar="NAME", multiple=True, help="Report this data set alone; repeat it for more."
    ),
    click.option("--images/--no-images", default=True, help="Show images on the page."),
    click.option(
        "--map",
        "projection",
        type=click.Choice(["pca", "tsne"]),
        default="pca",
        help="Map embeddings by their principal components, or by t-SNE, which takes longer.",
    ),
)
@options.cache_option
@options.notes_options
@options.json_option
def report_command(records: tuple[Path, ...], as_json: bool, cache: Path | None, **flags: Any) -> None:  # noqa: FBT001
    """Make a page to send, or tables, of RECORDS: files that `featcache bench` wrote; by default all of the cache.

    The page has the answer, sortable tables, charts, confusions and mistakes with their images, a map of the embeddings, the
    environment and the commands, in one file that loads nothing. Without a file to write, the table is printed.
    """
    from featcache.api import report
    from featcache.experiments.report import PagePlan

    targets = {kind: flags[kind] for kind in ("html", "md", "csv", "tex") if flags[kind] is not None}
    files: dict[Any, Path | None] = {kind: None if str(path) == "-" else path for kind, path in targets.items()}
    if as_json and None in files.values():
        raise click.UsageError("--json prints an object on stdout: write the others to files.")
    plan = PagePlan(flags["images"], flags["projection"], command_of)
    result = report(records, files, plan=plan, datasets=flags["datasets"], cache=cache)
    if as_json:
        options.emit(result.summary)
        return
    for kind, path in files.items():
        click.echo(str(path) if path is not None else result.texts[kind].rstrip("\n"))
    if not files:
        click.echo(result.table().plain())


def command_of(record: "RunRecord", data: str) -> str:
    """Return the command that makes a record again, its data set at ``data``; what is as usual is left out."""
    command = {"finetune": "finetune", "gap": "gap"}.get(record.kind, "fit")
    words = ["featcache", command, data, *_backbone_words(record.request.get("backbone"))]
    asked = record.request
    plan = asked.get("plan")
    if isinstance(plan, dict):
        words += _plan_words(plan, command, is_swept=" after " in record.method)
    if command == "fit":
        words += _head_words(record)
    if asked.get("group"):
        words += ["--group", str(asked["group"])]
    if record.seed:
        words += ["--seed", str(record.seed)]
    return shlex.join(words)


def _backbone_words(backbone: Any) -> Iterator[str]:
    """Yield the options that name a backbone; weights that are a file are told by their hash, since it may lie elsewhere."""
    if not isinstance(backbone, dict):
        return
    yield from ("-b", str(backbone.get("name")))
    for name in ("weights", "random_init", "pool", "precision"):
        if backbone.get(name) is not None:
            yield from (f"--{name.replace('_', '-')}", str(backbone[name]))
    for key, value in backbone.get("model_args") or []:
        yield from ("--model-arg", f"{key}={value}")
    overrides = backbone.get("overrides") or {}
    for name, value in overrides.items() if isinstance(overrides, dict) else ():
        if name == "decoder":
            yield from ("--decode", "exact" if value == "pillow" else "scaled")
        else:
            yield from (f"--{name.replace('_', '-')}", ",".join(map(str, value)) if isinstance(value, list) else str(value))


def _plan_words(plan: dict[str, Any], command: str, *, is_swept: bool) -> Iterator[str]:
    """Yield the options of a fine-tuning that are not as usual."""
    from featcache.finetuning import FineTunePlan, Unfreeze

    usual = FineTunePlan(Unfreeze.parse("last:1"))
    # a depth that goes on from another is made by a sweep alone, which takes its rate over from that one too
    skipped = {"unfreeze", "lr"} if is_swept else {"unfreeze"}
    if command == "finetune":
        yield from ("--sweep",) if is_swept else ("--unfreeze", str(plan.get("unfreeze", {}).get("text")))
    renamed = {"batch_size": "train-batch", "precision": "train-precision"}
    for name in (field.name for field in fields(FineTunePlan) if field.name not in skipped):
        value, default = plan.get(name), getattr(usual, name)
        if value is None or value == default or (isinstance(value, list) and tuple(value) == default):
            continue
        flag = f"--{renamed.get(name, name.replace('_', '-'))}"
        if isinstance(value, bool):
            yield flag if value else flag.replace("--", "--no-", 1)
        elif isinstance(value, list):
            yield from (word for each in value for word in (flag, f"{each:g}"))
        else:
            yield from (flag, f"{value:g}" if isinstance(value, float) else str(value))


def _head_words(record: "RunRecord") -> Iterator[str]:
    """Yield the options of a head, from what tables call it and what was asked for."""
    from featcache.reports import HeadAsked, head_asked

    # a stranger's record may be called anything
    asked = head_asked(record.method) or HeadAsked(record.method.partition(" ")[0], (), 1, best_pool=False)
    for name in record.request.get("members") or []:
        yield from ("--head", str(name))
    yield from ("--head", asked.head)
    if asked.layers:
        yield from ("--layers", ",".join(asked.layers))
    if asked.best_pool:
        yield from ("--pool", "auto")
    if asked.views > 1:
        yield from ("--views", str(asked.views))
    if record.kind != "fit":
        yield from ("--target", record.kind.removeprefix("fit-"))
    if record.request.get("columns"):
        yield from ("--with", ",".join(map(str, record.request["columns"])))
    if record.request.get("folds") is not None:
        yield from ("--folds", str(record.request["folds"]))
    for name, values in record.request.get("grid") or []:
        yield from ("--grid", f"{name}={','.join(f'{value:g}' for value in values)}")
