"""``featcache finetune``, ``bench`` and ``quickstart``."""

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from featcache.cli import options
from featcache.cli.replay import replay_options, show_replay, take_replay
from featcache.finetuning.plan import OPTIMISERS, RATES, FineTunePlan
from featcache.specs import Precision

if TYPE_CHECKING:
    from featcache.experiments.bench import BenchResult
    from featcache.reports.comparison import AgainstResult
    from featcache.reports.records import RunRecord


_PLAN = tuple(field.name for field in fields(FineTunePlan) if field.name not in {"unfreeze", "batch_size", "precision"})


@click.command("finetune", cls=options.Command)
@options.source_options
@options.grouped(
    "What trains",
    click.option(
        "--unfreeze",
        metavar="PART",
        default="last:1",
        show_default=True,
        help="Train this part: last:K stages, P% of the parameters, a stage and all behind it, or all; norm, bias or lora:R "
        "train those alone, with :last:K behind of the last K stages.",
    ),
    click.option(
        "--sweep", "at_every_depth", is_flag=True, help="Train at every depth instead, from the last stage to all."
    ),
    click.option(
        "--train-batchnorm/--no-train-batchnorm",
        default=None,
        help="Let BatchNorm statistics of the trained part move, or not; by default validation chooses where images have "
        "another size than in pretraining.",
    ),
    click.option(
        "--dtype", type=click.Choice(["float32", "float16"]), help="Store activations as this; by default as float16."
    ),
    options.cache_budget_option,
    click.option(
        "--refit/--no-refit",
        default=True,
        show_default=True,
        help="Train once more on train and validation together, as long as the best epoch on validation.",
    ),
)
@options.grouped(
    "Optimisation",
    click.option("--epochs", type=options.POSITIVE, default=10, show_default=True, help="Train so many epochs at most."),
    click.option(
        "--patience",
        type=options.POSITIVE,
        default=3,
        show_default=True,
        help="End a training after so many epochs without gain on validation.",
    ),
    click.option(
        "--train-batch", type=options.POSITIVE, default=32, show_default=True, help="Train on so many images at a time."
    ),
    click.option(
        "--accumulate",
        type=options.POSITIVE,
        default=1,
        show_default=True,
        help="Add up the gradients of so many batches before each step.",
    ),
    click.option(
        "--lr",
        "--lr-sweep",
        multiple=True,
        type=options.NUMBER,
        default=RATES,
        show_default=True,
        help="Try this rate for the last stage; repeat it: the best on validation is kept.",
    ),
    click.option("--head-lr", type=options.NUMBER, default=1e-3, show_default=True, help="Train the head at this rate."),
    click.option(
        "--layer-decay",
        type=options.NUMBER,
        default=0.75,
        show_default=True,
        help="Multiply the rate by this from each stage to the one before it.",
    ),
    click.option("--optimiser", type=click.Choice(OPTIMISERS), default="adamw", show_default=True, help="Step with this."),
    click.option(
        "--weight-decay", type=options.NUMBER, default=0.05, show_default=True, help="Decay weight matrices by this."
    ),
    click.option(
        "--warmup",
        type=options.NUMBER,
        default=0.1,
        show_default=True,
        help="Let rates rise over this share, from 0 to 1, of all steps.",
    ),
    click.option(
        "--clip", type=options.NUMBER, default=0.0, show_default=True, help="Clip gradients to this norm; 0 does not."
    ),
    click.option(
        "--ema", type=options.NUMBER, default=0.0, show_default=True, help="Average weights with this decay; 0 does not."
    ),
    click.option(
        "--train-precision",
        type=click.Choice([*get_args(Precision), "auto"]),
        help="Train in this precision; by default bfloat16 on GPUs that have it, else float32; auto: on CPUs, if faster.",
    ),
)
@options.grouped(
    "Regularisation",
    click.option(
        "--label-smoothing", type=options.NUMBER, default=0.1, show_default=True, help="Smooth labels by this in training."
    ),
    click.option(
        "--mixup", type=options.NUMBER, default=0.0, show_default=True, help="Mix pairs with this alpha; 0 does not."
    ),
    click.option(
        "--drop-path",
        type=options.NUMBER,
        default=0.0,
        show_default=True,
        help="Leave out the last residual branch this often; 0 never does.",
    ),
    click.option(
        "--views",
        type=options.POSITIVE,
        default=1,
        show_default=True,
        help="Store so many views of each image, the plain one and augmentations; every epoch draws one of them.",
    ),
    click.option("--augment", is_flag=True, help="Flip and shift stored pixels as they are read (with --unfreeze all)."),
)
@options.grouped(
    "Comparison",
    click.option(
        "--probe",
        "probes",
        multiple=True,
        type=options.Head(),
        help="Compare with this head too: the gap is to the best on validation of ridge, knn, logistic and these.",
    ),
    options.group_option,
    options.seed_option,
)
@options.backbone_options
@options.run_options
@options.grouped(
    "Output",
    options.price_option,
    options.track_option,
    click.option("--plot", type=options.FILE, help="Draw loss, accuracy and costs into this file: .png, .svg or .pdf."),
)
@options.json_option
def finetune_command(as_json: bool, at_every_depth: bool, price: float | None, plot: Path | None, **flags: Any) -> None:  # noqa: FBT001
    """Train the last part of a backbone from cached activations and print the gap to the best probe."""
    from dataclasses import replace

    from featcache.api import finetune, sweep
    from featcache.finetuning.plan import Unfreeze
    from featcache.reports.tables import draw_records, require_picture
    from featcache.reports.wording import finetune_lines

    if plot is not None:
        require_picture(plot)
    plan = FineTunePlan(
        Unfreeze.parse(flags.pop("unfreeze")),
        batch_size=flags.pop("train_batch"),
        precision=flags.pop("train_precision"),
        **{name: flags.pop(name) for name in _PLAN},
    )
    spec, settings, dataset = options.take_inputs(flags)
    settings = replace(settings, budget=flags.pop("cache_budget"))
    result = (sweep if at_every_depth else finetune)(dataset, spec, plan=plan, settings=settings, **flags)
    if int(os.environ.get("RANK", "0")):  # of several processes one speaks
        return
    records = [job.record for job in result.jobs]
    if plot is not None:
        draw_records(records, plot)
    money = [_money(record, price) for record in records] if price else []
    if as_json:
        options.emit(result.summary | ({"money": money} if price else {}))
        return
    for line in finetune_lines(records):
        click.echo(line)
    for name, cost in zip((record.short_method for record in records), money, strict=False):
        click.echo(f"{name}: price {cost['tuned']:.4f}, of the probe {cost['probe']:.4f}")
    for job in result.jobs:
        click.echo(f"{job.record.short_method} is kept in {job.checkpoint}, its head in {job.bundle}.")
    if plot is not None:
        click.echo(str(plot))
    options.tell_page(records[0].dataset, settings.cache)


def _money(record: "RunRecord", price: float | None) -> dict[str, float]:
    """Return what fine-tuning and the probe have cost."""
    probe = record.probe or {"seconds": {}}
    # extraction is part of the price of both, each counted as if it had been alone
    return {
        name: round(sum(seconds.values()) / 3600 * (price or 0), 6)
        for name, seconds in (("tuned", record.seconds), ("probe", probe["seconds"]))
    }


FAILED = 3
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
@replay_options
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

    asked, group = take_replay(flags), flags.pop("group")
    if asked.recorded is not None:
        if against is not None or group is not None:
            raise click.UsageError("--from-record goes without --against and --group: records name their groups.")
        if not show_replay(pipeline, out, asked, flags, as_json=as_json):
            click.get_current_context().exit(FAILED)
        return
    if pipeline is None:
        raise click.UsageError("Missing argument 'PIPELINE': a TOML file, or --from-record FILE.")
    settings = options.take_settings(flags)
    result = bench(pipeline, out=out, group=group, settings=settings)
    if result.records and not as_json:
        options.tell_page(Path(result.paths["md"]).stem, settings.cache, Path(result.paths["records"]))
    show(result, against=None if against is None else compare(result.records, against), as_json=as_json)


def show(result: "BenchResult", *, against: "AgainstResult | None" = None, as_json: bool) -> None:
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
        click.echo("gap: points of test accuracy to the head that is best on validation, on the same images")
        cells = f"{result.computed_cells} cell{'' if result.computed_cells == 1 else 's'} run"
        failed = f", {len(result.failures)} failed" if result.failures else ""
        counts = f"{result.computed_samples} images computed, {cells}{failed}"
        click.echo(f"{counts}; the table is in {result.paths['md']}, the records are in {result.paths['records']}")
        if against is not None:
            click.echo(f"\n{against.table().plain()}")
    if result.failures:
        click.get_current_context().exit(FAILED)


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
    from featcache.cli.report import command_of
    from featcache.experiments.report import PagePlan

    result = quickstart(cache, text=text, plan=PagePlan(command=command_of))
    show(result, as_json=as_json)
    if not as_json:
        click.echo(f"One page to send of this is {result.paths.get('html', 'not written: there is no record')}.")
        hint = "texts: featcache fit TABLE.csv -b text:NAME" if text else "images: featcache fit FOLDER"
        click.echo(f"Now your own {hint} --head logistic --head knn")
