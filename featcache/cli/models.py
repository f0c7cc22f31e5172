"""``featcache extract``, ``fit``, ``finetune``, ``gap``, ``predict`` and ``export``: a model is made, and used."""

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from featcache.cli import options
from featcache.finetuning import OPTIMISERS, RATES, FineTunePlan, Unfreeze
from featcache.heads import ALL, ATTENTIVE, ZEROSHOT, in_order
from featcache.specs import Precision

if TYPE_CHECKING:
    from featcache.experiments.predict import Prediction
    from featcache.heads.bundle import Bundle
    from featcache.heads.rejection import RejectPlan
    from featcache.reports import RunRecord

_TRAINING = tuple(field.name for field in fields(FineTunePlan) if field.name not in {"unfreeze", "batch_size", "precision"})


@click.command("extract", cls=options.Command)
@options.source_options
@options.grouped(
    "What is stored",
    click.option(
        "--cut",
        "cuts",
        metavar="CUT",
        multiple=True,
        default=["pooled"],
        help="Store the activations at this cut: pooled, tokens (what is pooled), a stage's name, or input; repeat it: all "
        "come from one pass.",
    ),
    click.option(
        "--layers", metavar="A,B", help="Store the pooled activations of these layers side by side, instead of --cut."
    ),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float16"]),
        help="Store rows as this; by default embeddings are float32 and activations of a stage float16.",
    ),
    click.option(
        "--views",
        type=options.POSITIVE,
        default=1,
        help="Store so many views of each image: the usual one first, then seeded augmentations.",
    ),
    click.option("--views-seed", type=options.SEED, default=0, help="Draw augmentations from this seed."),
)
@options.backbone_options
@options.run_options
@options.grouped(
    "Computing",
    click.option(
        "--part", type=options.PART, help="Compute this share only, such as 2/4: several processes may fill one entry."
    ),
    click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        help="Compute on this machine, or on the Ray cluster that it belongs to.",
    ),
    click.option("--dry-run", is_flag=True, help="Say what would be computed and written and how long it takes, and stop."),
)
@options.json_option
def extract_command(as_json: bool, dry_run: bool, **flags: Any) -> None:  # noqa: FBT001
    """Compute the features of DATA once and keep them; run again, only new and changed images are computed."""
    from featcache.api import estimate, extract_cuts
    from featcache.reports.wording import extract_lines
    from featcache.specs import Views

    spec, settings, dataset = options.take_inputs(flags)
    cuts, layers = flags.pop("cuts"), flags.pop("layers")
    if layers:
        from featcache.specs import cut_of_layers

        cuts = (cut_of_layers(layers.split(",")),)
    flags["views"] = Views(flags.pop("views"), flags.pop("views_seed"))
    if dry_run:
        _print_estimate(estimate(dataset, spec, cuts=cuts, settings=settings, **flags), as_json=as_json)
        return
    results = extract_cuts(dataset, spec, cuts=cuts, settings=settings, **flags)
    if as_json:
        summaries = [result.summary for result in results]
        options.emit(summaries[0] if len(summaries) == 1 else {"extracts": summaries})
        return
    options.show(line for result in results for line in extract_lines(result))


def _print_estimate(estimate: Any, *, as_json: bool) -> None:
    from dataclasses import asdict

    from featcache.display import bytes_text

    if as_json:
        options.emit({"dry_run": asdict(estimate)})
        return
    click.echo(
        f"{estimate.images} images, {estimate.to_compute} to compute: {bytes_text(estimate.bytes)} to write, "
        f"about {estimate.seconds:.0f} s (without a faster runtime)"
    )


_IN_ALL = in_order([ALL])
_HEADS = (
    f"Train this head; repeat it for more, the cheapest is trained first. There are {', '.join(_IN_ALL)}, and all, which is "
    f"each of these. Left out by all, to be named: {', '.join(ZEROSHOT)} (which need a clip: backbone), "
    f"{', '.join(ATTENTIVE)} (which train on tokens)."
)
_PLAN = (
    "heads",
    "layers",
    "views",
    "grid",
    "folds",
    "budget",
    "target",
    "group",
    "columns",
    "prompts",
    "shots",
    "curve",
    "baselines",
    "format",
)


@click.command("fit", cls=options.Command)
@options.source_options
@options.grouped(
    "Heads",
    click.option("--head", "heads", multiple=True, type=options.Head(), default=["logistic"], help=_HEADS),
    click.option("--layers", type=options.NAMES, help="Train on these layers side by side, such as layer3,layer4."),
    click.option(
        "--prompt",
        "prompts",
        multiple=True,
        metavar="TEXT",
        help="Let zero-shot heads read a class so, {} standing for it, as in 'a photo of a {}.'; repeat it to average.",
    ),
    click.option(
        "--with",
        "columns",
        type=options.NAMES,
        help="Train on these columns of a CSV or Parquet beside each image, such as age,site; site:category takes numbers "
        "for names.",
    ),
    click.option(
        "--views",
        type=options.POSITIVE,
        default=1,
        help="Train on so many augmented views of each image, and average the answers over them.",
    ),
    click.option(
        "--target",
        type=click.Choice(["label", "labels", "number"]),
        default="label",
        help="Take labels for this: a class, several labels with ; between, or a number.",
    ),
    click.option(
        "--format",
        type=click.Choice(["joblib", "skops"]),
        default="joblib",
        help="Write heads in this format; skops files run no code when they are loaded.",
    ),
    click.option("--budget", type=options.SECONDS, help="Begin no further head after this time, such as 60s or 5m."),
)
@options.grouped(
    "Choice and evaluation",
    click.option(
        "--grid", multiple=True, type=options.GRID, help="Choose from these values, such as C=0.1,1,10, for one head."
    ),
    click.option(
        "--folds",
        type=options.NATURAL,
        help="Choose by cross-validation over so many folds, by the val split with 0; by default 5 below 1000 images.",
    ),
    options.group_option,
    options.seed_option,
    click.option("--shots", type=options.COUNTS, help="Also train on so many images a class, such as 1,2,4,8,16."),
    click.option("--curve", is_flag=True, help="Also train on 1% to 100% of the training images."),
    click.option(
        "--baselines/--no-baselines",
        default=True,
        help="Also train methods that need no backbone: what it is worth is what it adds to them.",
    ),
)
@options.fitted_backbone_options
@options.run_options
@options.grouped(
    "Output",
    click.option(
        "--per-class", "show_classes", is_flag=True, help="Show the best head's scores class by class and its confusions."
    ),
    click.option(
        "--mistakes",
        type=options.NATURAL,
        default=0,
        metavar="N",
        help="Show the N most confident mistakes of the best head on the test split.",
    ),
)
@options.grouped("Output", options.track_option)
@options.json_option
def fit_command(as_json: bool, show_classes: bool, mistakes: int, **flags: Any) -> None:  # noqa: FBT001
    """Train heads on the features of DATA, extracted first if needed.

    Parameters are chosen on the validation split or by cross-validation, the head is refitted on train and validation, the
    test split is read once.
    """
    from dataclasses import asdict

    from featcache.api import fit
    from featcache.experiments.fit import FitPlan
    from featcache.reports.wording import fit_lines, mistake_lines, per_class_lines

    best_pool = flags["pool"] == "auto"
    flags |= {"pool": "default"} if best_pool else {}
    flags |= {name: flags[name] or () for name in ("layers", "columns", "shots")}
    flags["prompts"] = flags["prompts"] or FitPlan.prompts
    plan = FitPlan(best_pool=best_pool, **{name: flags.pop(name) for name in _PLAN})
    if plan.target != "label" and (show_classes or mistakes):
        raise click.UsageError(f"--per-class and --mistakes are of one class an image, not of --target {plan.target}.")
    spec, settings, dataset = options.take_inputs(flags, plan.target)
    result = fit(dataset, spec, plan=plan, settings=settings, **flags)
    if as_json:
        summary = result.summary
        for head, described in zip(result.heads, summary["heads"], strict=True):
            described.update({"mistakes": [asdict(mistake) for mistake in head.mistakes(mistakes)]} if mistakes else {})
        options.emit(summary)
        return
    lines = [*fit_lines(result)]
    if result.best is not None:
        lines += per_class_lines(result.best) if show_classes else ()
        lines += mistake_lines(result.best, mistakes, dataset.location) if mistakes else ()
        lines += ("", options.predicting(result.best.bundle, "TABLE.csv" if plan.columns else "FOLDER"))
    options.show(lines)
    options.tell_page(result.heads[0].record.dataset, settings.cache)


head_options = options.grouped(
    "Head",
    click.option("--weights", help="Look for the backbone's weights file here, if it has moved."),
    click.option("--trust", is_flag=True, help="Load a head that somebody else made: it can run any code."),
)


reject_options = options.grouped(
    "I don't know",
    click.option(
        "--reject",
        is_flag=True,
        help="Say, too, which classes may be true, how familiar an image is, and whether that is one answer.",
    ),
    click.option(
        "--coverage",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        default=0.9,
        help="Make sets of classes that hold the true one this often, with --reject.",
    ),
    click.option(
        "--sets",
        type=click.Choice(["lac", "aps"]),
        default="lac",
        help="Make the smallest sets on average, or ones whose sizes follow how hard an image is, with --reject.",
    ),
    click.option("--of-group", "group", help="Take images as of this group that the head was calibrated on, with --reject."),
)


def take_reject_plan(flags: dict[str, Any]) -> "RejectPlan | None":
    """Take what was asked about not knowing out of a command's flags."""
    from featcache.heads.rejection import RejectPlan

    asked = flags.pop("reject")
    plan = RejectPlan(**{name: flags.pop(name) for name in ("coverage", "sets", "group")})
    if not asked and plan != RejectPlan():
        raise click.UsageError("--coverage, --sets and --of-group go with --reject.")
    return plan if asked else None


@click.command("predict", cls=options.Command)
@click.argument("head", type=options.HeadArgument(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path())
@reject_options
@head_options
@options.compute_options
@options.grouped(
    "Output",
    click.option("--to", "target", type=click.Path(path_type=Path), help="Write to this file instead of to stdout."),
    click.option("--json", "as_json", is_flag=True, help="Write one JSON object a line instead of CSV."),
)
def predict_command(head: Path, images: tuple[str, ...], target: Path | None, as_json: bool, **flags: Any) -> None:  # noqa: FBT001
    """Label IMAGES (files, folders, or - for a list on stdin) with a HEAD that `featcache fit` wrote.

    A head that was trained on columns takes CSV or Parquet files that have path and these columns.

    CSV with path, label and the probability of each class; an image that cannot be read gets a row with its reason. With
    --reject also the set of classes that holds the true one as often as --coverage says, the share of training images that
    are at most as familiar, and a verdict: sure (one class), unsure (several), none, or unfamiliar (a share up to 0.05).
    """
    from featcache.api import predict

    plan = take_reject_plan(flags)
    paths = [line.rstrip("\n") for line in sys.stdin if line.strip()] if images == ("-",) else list(images)
    settings = options.take_settings(flags)
    bundle, predictions = predict(
        head, paths, reject=plan, settings=settings, weights=flags["weights"], trust=flags["trust"]
    )
    how = {"as_json": as_json, "judged": plan is not None}
    if target is None:
        _write(sys.stdout, bundle, predictions, **how)
        return
    # paths that are no UTF-8 go out as the bytes they came in
    with target.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        _write(file, bundle, predictions, **how)


def _write(file: Any, bundle: "Bundle", predictions: "Iterator[Prediction]", *, as_json: bool, judged: bool) -> None:
    if as_json:
        from featcache.reports import SCHEMA_VERSION

        for image in predictions:
            numbers = image.probabilities
            shares = None if numbers is None else dict(zip(bundle.classes, numbers.tolist(), strict=True))
            facts: dict[str, Any] = {
                "path": image.path,
                "label": image.label,
                "probabilities": shares,
                "reason": image.reason,
            }
            facts |= {"set": image.candidates, "familiar": image.familiar, "verdict": image.verdict} if judged else {}
            file.write(json.dumps({"schema_version": SCHEMA_VERSION, **facts}) + "\n")
        return
    from featcache.display import csv_cell, printable

    writer = csv.writer(file, lineterminator="\n")
    shown = printable if file.isatty() else str  # a terminal obeys what stands in a file's name; a file keeps it
    columns = _columns(bundle.classes, _JUDGED if judged else ()) if hasattr(bundle.estimator, "predict_proba") else []
    writer.writerow(["path", "label", *map(csv_cell, columns), *(_JUDGED if judged else ()), "reason"])
    for image in predictions:
        numbers = image.probabilities
        cells = [""] * len(columns) if numbers is None else [f"{number:.6g}" for number in numbers][: len(columns)]
        path, label, reason = (shown(csv_cell(text or "")) for text in (image.path, image.label, image.reason))
        writer.writerow([path, label, *cells, *(map(shown, _judgement(image)) if judged else ()), reason])


_JUDGED = ("set", "familiar", "verdict")


def _judgement(image: "Prediction") -> tuple[str, str, str]:
    """Return the cells of what is said of an image's certainty; classes stand with ; between."""
    from featcache.display import csv_cell

    classes = "" if image.candidates is None else csv_cell(";".join(image.candidates))
    return classes, "" if image.familiar is None else f"{image.familiar:.3f}", image.verdict or ""


def _columns(classes: Sequence[str], beside: Sequence[str] = ()) -> list[str]:
    """Return what the columns of probabilities are called: classes' names, marked where one is a column's name already."""
    clash = not {"path", "label", "reason", *beside}.isdisjoint(classes)
    return [f"p({name})" if clash else name for name in classes]


@click.command("export", cls=options.Command)
@click.argument("head", type=options.HeadArgument(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@reject_options
@head_options
@options.grouped(
    "Head",
    click.option(
        "--check", metavar="DATA", help="Compare on these images; by default on those that the head was trained on."
    ),
)
@options.compute_options
@options.json_option
def export_command(head: Path, out: Path, as_json: bool, **flags: Any) -> None:  # noqa: FBT001
    """Write a HEAD with its backbone as one ONNX model, OUT, after it has agreed with them on real images.

    With --reject the model also says which classes may be true (set) and how familiar an image is (familiar).
    """
    from featcache.api import export
    from featcache.experiments.export import ModelFile

    file = ModelFile(out, take_reject_plan(flags))
    settings = options.take_settings(flags)
    model = export(head, file, check=flags["check"], weights=flags["weights"], trust=flags["trust"], settings=settings)
    if as_json:
        summary = {"model": str(model.path), "difference": model.difference, "images": model.samples}
        options.emit(summary | {"notes": list(model.notes)})
        return
    click.echo(f"{model.path}: scores differ by at most {model.difference:.1g} on {model.samples} images")


@click.command("finetune", cls=options.Command)
@options.source_options
@options.grouped(
    "What trains",
    click.option(
        "--unfreeze",
        metavar="PART",
        default="last:1",
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
        help="Train once more on train and validation together, as long as the best epoch on validation.",
    ),
)
@options.grouped(
    "Optimisation",
    click.option("--epochs", type=options.POSITIVE, default=10, help="Train so many epochs at most."),
    click.option(
        "--patience",
        type=options.POSITIVE,
        default=3,
        help="End a training after so many epochs without gain on validation.",
    ),
    click.option("--train-batch", type=options.POSITIVE, default=32, help="Train on so many images at a time."),
    click.option(
        "--accumulate", type=options.POSITIVE, default=1, help="Add up the gradients of so many batches before each step."
    ),
    click.option(
        "--lr",
        "--lr-sweep",
        multiple=True,
        type=options.NUMBER,
        default=RATES,
        help="Try this rate for the last stage; repeat it: the best on validation is kept.",
    ),
    click.option("--head-lr", type=options.NUMBER, default=1e-3, help="Train the head at this rate."),
    click.option(
        "--layer-decay",
        type=options.NUMBER,
        default=0.75,
        help="Multiply the rate by this from each stage to the one before it.",
    ),
    click.option("--optimiser", type=click.Choice(OPTIMISERS), default="adamw", help="Step with this."),
    click.option("--weight-decay", type=options.NUMBER, default=0.05, help="Decay weight matrices by this."),
    click.option(
        "--warmup", type=options.NUMBER, default=0.1, help="Let rates rise over this share, from 0 to 1, of all steps."
    ),
    click.option("--clip", type=options.NUMBER, default=0.0, help="Clip gradients to this norm; 0 does not."),
    click.option("--ema", type=options.NUMBER, default=0.0, help="Average weights with this decay; 0 does not."),
    click.option(
        "--train-precision",
        type=click.Choice([*get_args(Precision), "auto"]),
        help="Train in this precision; by default bfloat16 on GPUs that have it, else float32; auto: on CPUs, if faster.",
    ),
)
@options.grouped(
    "Regularisation",
    click.option("--label-smoothing", type=options.NUMBER, default=0.1, help="Smooth labels by this in training."),
    click.option("--mixup", type=options.NUMBER, default=0.0, help="Mix pairs with this alpha; 0 does not."),
    click.option(
        "--drop-path", type=options.NUMBER, default=0.0, help="Leave out the last residual branch this often; 0 never does."
    ),
    click.option(
        "--views",
        type=options.POSITIVE,
        default=1,
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
    from featcache.api import finetune, sweep
    from featcache.reports.tables import draw_records, require_picture
    from featcache.reports.wording import finetune_lines

    if plot is not None:
        require_picture(plot)
    plan = FineTunePlan(
        Unfreeze.parse(flags.pop("unfreeze")),
        batch_size=flags.pop("train_batch"),
        precision=flags.pop("train_precision"),
        **{name: flags.pop(name) for name in _TRAINING},
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
    options.show(finetune_lines(records, result.jobs[0].folds))
    for name, cost in zip((record.short_method for record in records), money, strict=False):
        click.echo(f"{name}: price {cost['tuned']:.4f}, of the probe {cost['probe']:.4f}")
    options.show(
        (f"{job.record.short_method} is kept in {job.checkpoint}, its head in {job.bundle}." for job in result.jobs), plot
    )
    options.tell_page(records[0].dataset, settings.cache)


def _money(record: "RunRecord", price: float | None) -> dict[str, float]:
    """Return what fine-tuning and the probe have cost."""
    probe = record.probe or {"seconds": {}}
    # extraction is part of the price of both, each counted as if it had been alone
    return {
        name: round(sum(seconds.values()) / 3600 * (price or 0), 6)
        for name, seconds in (("tuned", record.seconds), ("probe", probe["seconds"]))
    }


@click.command("gap", cls=options.Command)
@options.source_options
@options.grouped(
    "Steps",
    click.option(
        "--budget", type=options.SECONDS, help="Begin no further step after this time, such as 10m; a second run goes on."
    ),
    click.option("--epochs", type=options.POSITIVE, default=10, help="Train so many epochs at most."),
    options.cache_budget_option,
    options.group_option,
    options.seed_option,
)
@options.backbone_options
@options.run_options
@options.grouped(
    "Output",
    options.price_option,
    options.track_option,
    click.option("--plot", type=options.FILE, help="Draw the steps as a waterfall into this file: .png, .svg or .pdf."),
)
@options.json_option
def gap_command(as_json: bool, price: float | None, plot: Path | None, epochs: int, **flags: Any) -> None:  # noqa: FBT001
    """Take the gap between a linear probe and the whole network tuned apart: pooling, other layers, attention, weights.

    Every step is tested on the same images, and kept where it is better on validation than all before it: what the kept ones
    add adds up to the whole gap. What was fitted or trained before is taken from the cache.
    """
    from featcache.api import gap
    from featcache.reports.tables import require_picture
    from featcache.reports.wording import draw_gap, gap_lines

    if plot is not None:
        require_picture(plot)
    spec, settings, dataset = options.take_inputs(flags)
    settings = replace(settings, budget=flags.pop("cache_budget"))
    plan = FineTunePlan(Unfreeze.parse("all"), epochs=epochs)
    result = gap(dataset, spec, plan=plan, settings=settings, **flags)
    if plot is not None:
        draw_gap(result, plot)
    if as_json:
        money = [round(step.seconds / 3600 * price, 6) for step in result.steps] if price else []
        options.emit(result.summary | ({"money": money} if price else {}))
        return
    options.show(gap_lines(result, price), plot)
    options.tell_page(result.steps[0].record.dataset, settings.cache)
