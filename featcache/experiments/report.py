"""Records, and what lies behind them, into files: a page to send, and tables in Markdown, CSV and LaTeX."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache.datasets import open_dataset
from featcache.datasets.base import Dataset
from featcache.datasets.thumbnails import Sheet, sheet_of, size_of, thumbnail
from featcache.display import Displayed, Table, logger
from featcache.errors import DataError, FeatcacheError, UnreadableSample, UsageError
from featcache.experiments.evidence import WAYS, HeadEvidence, Way, best_head, gather
from featcache.fingerprint import sha256_of_bytes
from featcache.reports import RunRecord, page, read_records, tables
from featcache.reports.shown import DatasetEvidence, Shown
from featcache.resources import cores
from featcache.specs import check_fields
from featcache.store.atomic import make_folder, replace_file

Format = Literal["html", "md", "csv", "tex"]
MOST_SAMPLES = 600  # of a page, all data sets together
_MOST_BYTES = 1_000_000  # of the sheet: a third more in the page, which stays below 2 MB
_LETTERS = 300  # of a text that is shown in place of a sample


def _call(record: RunRecord, data: str) -> str:
    """Return the call of this library that makes a record again, as far as its usual values go."""
    name = {"finetune": "finetune", "gap": "gap"}.get(record.kind, "fit")
    how = {"finetune": f", unfreeze={record.short_method!r}", "fit": f", heads=[{record.method!r}]"}.get(record.kind, "")
    return f"featcache.{name}({data!r}, {record.request.get('backbone', {}).get('name')!r}{how}, seed={record.seed})"


@dataclass(frozen=True)
class PagePlan:
    """What a page shows beside the records.

    Attributes:
        samples: show test samples; without, nothing of any is in the page.
        projection: how embeddings are mapped, ``pca`` or ``tsne``.
        command: tells how a record is made again; by default the call of this library.
    """

    samples: bool = True
    projection: Way = "pca"
    command: Callable[[RunRecord, str], str] = _call

    def __post_init__(self) -> None:
        """Refuse values of the wrong kind."""
        check_fields(self)
        if self.projection not in WAYS:
            raise UsageError(f"`projection` {self.projection!r}: {' or '.join(WAYS)} is needed.")


@dataclass(frozen=True, repr=False)
class Report(Displayed):
    """Records, the texts that were made of them by format, and where these were written."""

    records: tuple[RunRecord, ...]
    texts: Mapping[Format, str]
    paths: Mapping[Format, str]

    def table(self) -> Table:
        """Return the table for a terminal."""
        return tables.short_table(_scored(self.records))

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of ``featcache report``."""
        sizes = {kind: len(text.encode("utf-8", "surrogateescape")) for kind, text in self.texts.items()}
        return {"records": len(self.records), "files": dict(self.paths), "bytes": sizes}


def run_report(
    sources: Sequence[Path], files: Mapping[Format, Path | None], plan: PagePlan, cache: Path, datasets: Sequence[str] = ()
) -> Report:
    """Read records and write reports of them.

    Args:
        sources: JSONL files of records.
        files: what is made, and where it is written; ``None``: nowhere, it is in ``Report.texts``.
        plan: what the page shows.
        cache: the one that the records' heads lie in.
        datasets: only these are reported; all, where none is named.

    Raises:
        DataError: there is no such record.
        StorageError: a file cannot be read or written.
    """
    if absent := [path for path in sources if not path.exists()]:
        raise DataError(f"{absent[0]}: there is no such file of records.")
    every = [record for record in read_records(sources) if record.test]
    records = [record for record in tables.latest_of(every) if not datasets or record.dataset in datasets]
    if not records:
        names, asked = ", ".join(dict.fromkeys(record.dataset for record in every)), ",".join(datasets)
        among = f"; there are {names}" if names and datasets else ""
        raise DataError(f"{', '.join(map(str, sources))}: no record{f' of {asked}' if asked else ''}{among}.")
    makers: dict[Format, Callable[[], str]] = {
        "html": lambda: page_of(records, plan, cache),
        "md": lambda: f"{tables.markdown(_scored(records))}\n",
        "csv": lambda: tables.to_csv(_scored(records)),
        "tex": lambda: f"{tables.latex(_scored(records))}\n",
    }
    texts = {kind: makers[kind]() for kind in files}
    for kind, path in files.items():
        if path is not None:
            make_folder(path.parent)
            replace_file(path, texts[kind].encode("utf-8", "backslashreplace"))
    return Report(tuple(records), texts, {kind: str(path) for kind, path in files.items() if path is not None})


def _scored(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the records that a table of accuracies has a row for."""
    return [record for record in records if "accuracy" in record.test]


def page_of(records: Sequence[RunRecord], plan: PagePlan, cache: Path) -> str:
    """Return the page of some records."""
    evidence: dict[str, DatasetEvidence] = {}
    looks: dict[str, _Look] = {}
    heads: dict[str, HeadEvidence] = {}
    for name in dict.fromkeys(record.dataset for record in records):
        head, remarks = best_head([record for record in records if record.dataset == name], cache)
        if head is None:
            evidence[name] = DatasetEvidence(
                remarks=(f"No samples and no map: {remarks[0]}." if remarks else "No head was fitted.",)
            )
            continue
        heads[name] = head
        evidence[name] = gather(head, plan.projection)
        if plan.samples:
            looks[name] = _Look.at(head)
    sheet = _tiled(evidence, looks) if plan.samples else None
    places = {name: str(head.card["data"]) for name, head in heads.items()}
    return page.render(
        records, evidence, sheet, lambda record: plan.command(record, places.get(record.dataset, record.dataset))
    )


@dataclass(frozen=True)
class _Glance:
    """What a sample shows: a tile or the beginning of a text, its width and height and bytes."""

    tile: NDArray[np.uint8] | None = None
    text: str = ""
    size: tuple[int, int] = (0, 0)
    bytes: int = 0


@dataclass(frozen=True)
class _Look:
    """A data set that was opened again, as its head's card says; ``dataset`` is ``None`` where that cannot be done."""

    head: HeadEvidence
    dataset: Dataset | None
    problem: str = ""

    @classmethod
    def at(cls, head: HeadEvidence) -> "_Look":
        try:
            return cls(head, open_dataset(head.card["data"]))
        except FeatcacheError as error:
            return cls(head, None, str(error))

    def glances(self, paths: Sequence[str]) -> dict[str, _Glance]:
        """Return what some samples show, those alone that are still the ones that were seen, by their SHA-256."""
        if self.dataset is None:
            return {}
        place = {path: number for number, path in enumerate(self.head.features.paths)}
        with ThreadPoolExecutor(cores()) as pool:
            seen = pool.map(lambda path: self._glance(path, self.head.features.sha256[place[path]]), paths)
            return {path: glance for path, glance in zip(paths, seen, strict=True) if glance is not None}

    def _glance(self, path: str, sha256: str) -> _Glance | None:
        assert self.dataset is not None
        try:
            content = self.dataset.read(path)
            if sha256_of_bytes(content) != sha256:
                return None
            if "input_size" not in self.head.store.spec["transform"]:
                return _Glance(text=content.decode("utf-8", "replace")[:_LETTERS], bytes=len(content))
            return _Glance(thumbnail(content), size=size_of(content), bytes=len(content))
        except (OSError, KeyError, UnreadableSample, FeatcacheError) as error:
            logger.debug("%s: not shown (%s)", path, error)
            return None


def _tiled(evidence: dict[str, DatasetEvidence], looks: Mapping[str, _Look]) -> Sheet | None:
    """Put samples into evidence, in place, and return the sheet that holds them; data sets get equal numbers."""
    asked = {name: worth_showing(evidence[name]) for name in looks}
    turns = zip_longest(*([(name, path) for path in paths] for name, paths in asked.items()))
    chosen = list(islice((pair for turn in turns for pair in turn if pair is not None), MOST_SAMPLES))
    tiles: list[NDArray[np.uint8]] = []
    for name, look in looks.items():
        paths = [path for of, path in chosen if of == name]
        glances = look.glances(paths)
        places = {
            path: len(tiles) + place for place, path in enumerate(path for path in glances if glances[path].tile is not None)
        }
        tiles += [glance.tile for glance in glances.values() if glance.tile is not None]
        texts = {path: glance.text for path, glance in glances.items()}
        evidence[name] = replace(
            with_tiles(evidence[name], places, texts),
            facts=_size_facts(list(glances.values())),
            remarks=(*evidence[name].remarks, *_remarks(look, len(paths), len(glances))),
        )
    return sheet_of(tiles, _MOST_BYTES) if tiles else None


def _remarks(look: _Look, asked: int, seen: int) -> tuple[str, ...]:
    if look.dataset is None:
        return (f"The samples cannot be read any more, so that none is shown: {look.problem}",)
    if seen < asked:
        noun = f"{look.dataset.kind}s"
        return (f"{asked - seen} of {asked} {noun} that had a place here cannot be read any more, or have changed since.",)
    return ()


def _size_facts(glances: Sequence[_Glance]) -> tuple[tuple[str, str], ...]:
    """Return sizes in words: of the samples that were read for the page alone, since reading all would take too long."""
    sizes = np.array([glance.size for glance in glances if all(glance.size)])
    facts = []
    if len(sizes):
        (low_x, low_y), (x, y), (high_x, high_y) = (np.percentile(sizes, percent, axis=0) for percent in (0, 50, 100))
        facts.append(
            ("width x height", f"{x:.0f} x {y:.0f} (median; {low_x:.0f} to {high_x:.0f} x {low_y:.0f} to {high_y:.0f})")
        )
    if glances:
        median = float(np.median([glance.bytes for glance in glances]))
        facts.append(("bytes of a file", f"{median / 1000:.1f} kB (median)"))
        facts.append(("these are of", f"the {len(glances)} samples that were read for this page"))
    return tuple(facts)


def worth_showing(evidence: DatasetEvidence) -> list[str]:
    """Return the paths of the samples that a page has a place for, what matters most first, each once."""
    cells = [cell for row in (evidence.confusion.cells if evidence.confusion else ()) for cell in row if cell is not None]
    cells.sort(key=lambda cell: cell.label == cell.predicted)  # confusions before what is right
    shown = [
        *evidence.mistakes,
        *(each for suspicion in evidence.suspicions for each in suspicion.shown),
        *(each for cell in cells for each in cell.shown),
        *(evidence.scatter.shown if evidence.scatter else ()),
    ]
    return list(dict.fromkeys(each.path for each in shown))


def with_tiles(evidence: DatasetEvidence, tiles: Mapping[str, int], texts: Mapping[str, str]) -> DatasetEvidence:
    """Return evidence whose samples know their place in the sheet, or whose texts are there to be read."""

    def placed(shown: tuple[Shown, ...]) -> tuple[Shown, ...]:
        return tuple(replace(each, tile=tiles.get(each.path), text=texts.get(each.path, "")) for each in shown)

    matrix, scatter = evidence.confusion, evidence.scatter
    if matrix is not None:
        rows = (
            tuple(cell if cell is None else replace(cell, shown=placed(cell.shown)) for cell in row) for row in matrix.cells
        )
        matrix = replace(matrix, cells=tuple(rows))
    return replace(
        evidence,
        mistakes=placed(evidence.mistakes),
        suspicions=tuple(replace(each, shown=placed(each.shown)) for each in evidence.suspicions),
        confusion=matrix,
        scatter=scatter if scatter is None else replace(scatter, shown=placed(scatter.shown)),
    )
