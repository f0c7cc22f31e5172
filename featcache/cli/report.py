"""``featcache report``, and how a record is told as the command that makes it again."""

import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featcache.cli import options

if TYPE_CHECKING:
    from featcache.reports.records import RunRecord

_FILE = click.Path(path_type=Path, dir_okay=False, allow_dash=True)


@click.command("report", cls=options.Command)
@click.argument("records", nargs=-1, type=options.FILE)
@options.grouped(
    "Files",
    click.option("--html", type=_FILE, help="Write one page to send into this file: it holds all that it shows."),
    click.option("--md", type=_FILE, help="Write the table in Markdown into this file, or with - to stdout."),
    click.option("--csv", type=_FILE, help="Write the table as CSV into this file, or with - to stdout."),
    click.option("--tex", type=_FILE, help="Write the table in LaTeX, for the package booktabs, or with - to stdout."),
)
@options.grouped(
    "Content",
    click.option(
        "--dataset", "datasets", metavar="NAME", multiple=True, help="Report this data set alone; repeat it for more."
    ),
    click.option("--images/--no-images", default=True, show_default=True, help="Show images on the page."),
    click.option(
        "--map",
        "projection",
        type=click.Choice(["pca", "tsne"]),
        default="pca",
        show_default=True,
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
    from featcache.finetuning.plan import FineTunePlan, Unfreeze

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
    from featcache.reports.records import HeadAsked, head_asked

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
