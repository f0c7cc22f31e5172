"""One page to send: records, and what lies behind them, as one HTML file that asks nothing of anyone."""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from markupsafe import Markup

from featcache.datasets.thumbnails import TILE, Sheet
from featcache.display import printable
from featcache.reports import charts
from featcache.reports.answer import Answer, answer_of
from featcache.reports.records import RunRecord
from featcache.reports.shown import DatasetEvidence, Scatter
from featcache.reports.svg import COLOURS, Chart, Dot, map_chart
from featcache.reports.tables import NAMES, groups_of_seeds, short_table

Command = Callable[[RunRecord], str]


@dataclass(frozen=True)
class Section:
    """A data set's part of the page."""

    key: str
    answer: Answer
    evidence: DatasetEvidence
    drawings: tuple[tuple[str, Markup, str], ...]
    map: Markup | None
    colours: tuple[tuple[int, str], ...] = field(default=())


def render(
    records: Sequence[RunRecord],
    evidence: Mapping[str, DatasetEvidence],
    sheet: Sheet | None,
    commands: Command,
) -> str:
    """Return the page.

    Jinja escapes what the template prints, and what cannot be seen is spelt out before. A policy in the page's head lets
    nothing be loaded, and nothing run but the one script, known by its hash.

    Args:
        records: of one or several data sets; of a cell the latest counts.
        evidence: by data set.
        sheet: the thumbnails that ``Shown.tile`` means, ``None`` for a page without samples.
        commands: tells how a record is made again.
    """
    assets = resources.files("featcache") / "assets"
    template, style, script = ((assets / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    style += _tile_rules(sheet)
    datasets = list(dict.fromkeys(record.dataset for record in records))
    return _filled(
        template,
        style=Markup(style),  # noqa: S704 - of the package, and numbers
        script=Markup(script),  # noqa: S704 - of the package
        style_hash=_policy_hash(style),
        script_hash=_policy_hash(script),
        sections=[_section(f"d{number}", name, records, evidence) for number, name in enumerate(datasets)],
        table=short_table([record for record in records if "accuracy" in record.test]),
        texts=NAMES,
        tiles=sheet is not None,
        environments=_environments(records),
        runs=_runs(records, commands),
        title=f"featcache: {', '.join(datasets)}",
        made=max((record.time for record in records), default=""),
    )


def _filled(template: str, **values: object) -> str:
    """Return a template with its values: every text is spelt out where it cannot be seen, and escaped."""
    from jinja2 import Environment, StrictUndefined  # 0.15 s that nothing else pays

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_finalized, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["tiles"] = values["tiles"]  # macros see no other values
    return environment.from_string(template).render(**values)


def _finalized(value: Any) -> Any:
    """Return what a template prints; jinja escapes it after this."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)


def _policy_hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _tile_rules(sheet: Sheet | None) -> str:
    """Return the sheet and each tile's place as rules of the style: its policy allows no style at an element."""
    if sheet is None:
        return ""
    rules = [f".t,#hover .picture{{{sheet.style}}}\n"]
    for tile in range(sheet.count):
        x, y = sheet.place(tile)
        rules.append(f".t{tile}{{background-position:-{x}px -{y}px}}\n")
    return f"{''.join(rules)}.t,#hover .picture{{width:{TILE}px;height:{TILE}px}}\n"


def _section(key: str, name: str, every: Sequence[RunRecord], behind: Mapping[str, DatasetEvidence]) -> Section:
    records = [record for record in every if record.dataset == name]
    evidence = behind.get(name, DatasetEvidence())
    groups = [group for group in groups_of_seeds(records) if "accuracy" in group[0].test]
    plain = [group for group in groups if group[0].kind in {"fit", "finetune"}]
    drawings = [
        ("Accuracy against cost", charts.costs(plain, f"{key}-cost"), _COST),
        *(
            ("Where the gap comes from", charts.gap_chart(group[-1], f"{key}-gap{number}"), _GAP)
            for number, group in enumerate(groups)
            if group[0].kind == "gap"
        ),
        ("Accuracy by depth", charts.depths_chart(plain, f"{key}-depth"), _DEPTH),
        ("Accuracy by epoch", charts.epochs_chart(charts.tuned_records(plain), f"{key}-epochs"), _EPOCHS),
        *(
            (f"Accuracy by training samples: {name}", charts.learning_chart(points, name, f"{key}-learn{number}"), "")
            for number, (name, points) in enumerate(evidence.learned)
        ),
    ]
    if evidence.bins:
        drawings.append(("Reliability", charts.reliability_chart(evidence.bins, evidence.head, f"{key}-bins"), _BINS))
    return Section(
        key,
        answer_of(records),
        evidence,
        tuple((name, drawing, note) for name, drawing, note in drawings if drawing is not None),
        _map(key, evidence.scatter),
        _colours(evidence.scatter),
    )


_COST = "Bars are 95 % intervals, of several seeds their mean; the dotted line is the best that so many seconds buy."
_GAP = "Each step from what was kept before it; crosses were not better on validation and are not kept."
_DEPTH = "From the last stage to the whole backbone, each with its 95 % interval."
_EPOCHS = "Validation chooses the epoch; where none is better than the start, the start is kept."
_BINS = "Larger dots are of more test samples. Where a head is as often right as it says they lie on the dotted line."


def _map(key: str, scatter: Scatter | None) -> Markup | None:
    if scatter is None:
        return None
    number = _class_colours(scatter)
    dots = [
        Dot(x, y, number[shown.label], shown.caption, shown.tile, is_wrong=shown.predicted not in {"", shown.label})
        for (x, y), shown in zip(scatter.places, scatter.shown, strict=True)
    ]
    about = f"{len(dots)} of {scatter.total} samples by their embeddings, on {scatter.how}; ringed ones are test mistakes."
    return map_chart(Chart(f"{key}-map", "Map of the embeddings", about, "", ""), dots)


def _class_colours(scatter: Scatter) -> dict[str, int]:
    """Return each class's colour; beyond those that can be told apart, all share the last."""
    return {name: min(place, COLOURS - 1) for place, name in enumerate(scatter.classes)}


def _colours(scatter: Scatter | None) -> tuple[tuple[int, str], ...]:
    if scatter is None:
        return ()
    names = list(scatter.classes)
    if len(names) > COLOURS:
        names = [*names[: COLOURS - 1], f"{len(names) - COLOURS + 1} more classes"]
    return tuple(enumerate(names))


def _environments(records: Sequence[RunRecord]) -> list[list[tuple[str, str]]]:
    """Return where records were made, each place once."""
    places: dict[str, list[tuple[str, str]]] = {}
    for record in records:
        told = record.environment
        versions = told.get("versions")
        facts = [(name, str(told[name])) for name in ("platform", "python", "processors", "device", "git") if told.get(name)]
        facts += [(str(name), str(version)) for name, version in versions.items()] if isinstance(versions, dict) else []
        places.setdefault(repr(facts), facts)
    return [facts for facts in places.values() if facts]


def _runs(records: Sequence[RunRecord], commands: Command) -> list[tuple[str, str]]:
    """Return the commands that make the records again, with what each makes."""
    runs: dict[str, list[str]] = {}
    for record in records:
        runs.setdefault(commands(record), []).append(f"{record.dataset}, {record.method}, seed {record.seed}")
    return [(command, "; ".join(dict.fromkeys(made))) for command, made in runs.items()]
