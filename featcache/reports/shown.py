"""What a page shows: a gap's steps, read back from its record; samples, confusions, a map, a data set's card."""

import math
import re
from dataclasses import dataclass

from featcache.display import Table
from featcache.fingerprint import as_named
from featcache.reports.records import RunRecord

_ORDER = {"linear": 0, "pooling": 1, "layers": 2, "attentive": 3}


@dataclass(frozen=True)
class Bin:
    """Test samples whose confidence lies in one range: how many, their mean confidence and accuracy, in percent."""

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Learned:
    """A head's test score on so many training samples: mean and standard deviation over draws, in percent."""

    samples: int
    mean: float
    std: float


@dataclass(frozen=True)
class Shown:
    """A sample as a page shows it; ``tile`` is its place in the sheet of thumbnails, ``text`` what it is, if a text."""

    path: str
    label: str
    predicted: str = ""
    confidence: float | None = None
    tile: int | None = None
    text: str = ""
    note: str = ""

    @property
    def caption(self) -> str:
        """What is said of it, in words."""
        sure = "" if self.confidence is None else f", {100 * self.confidence:.0f} % sure"
        taken = f", taken for {self.predicted}" if self.predicted not in {"", self.label} else ""
        return f"{self.label}{taken}{sure}: {self.path}{f'; {self.note}' if self.note else ''}"


@dataclass(frozen=True)
class Cell:
    """Test samples of one class that a head takes for one class: how many, and some of them."""

    label: str
    predicted: str
    count: int
    shown: tuple[Shown, ...]


@dataclass(frozen=True)
class Confusion:
    """A head on the test samples: ``cells`` by true class (rows) and predicted class (columns); ``None``: no sample."""

    cells: tuple[tuple[Cell | None, ...], ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Scatter:
    """Samples on a plane (n, 2), and how they got there; ``total`` are all that there are."""

    places: tuple[tuple[float, float], ...]
    shown: tuple[Shown, ...]
    classes: tuple[str, ...]
    how: str
    total: int


@dataclass(frozen=True)
class Suspicion:
    """Suspects of one kind of an audit: how many, and some of them."""

    kind: str
    count: int
    shown: tuple[Shown, ...]


@dataclass(frozen=True)
class DatasetEvidence:
    """What lies behind a data set's records; what could not be read is empty, and ``remarks`` say why."""

    head: str = ""
    confusion: Confusion | None = None
    per_class: Table | None = None
    mistakes: tuple[Shown, ...] = ()
    mistakes_total: int = 0
    bins: tuple[Bin, ...] = ()
    learned: tuple[tuple[str, tuple[Learned, ...]], ...] = ()
    suspicions: tuple[Suspicion, ...] = ()
    scatter: Scatter | None = None
    counts: Table | None = None
    facts: tuple[tuple[str, str], ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    left_out_total: int = 0
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """A step of a gap, as its record has it; accuracy in percent."""

    name: str
    changes: str
    accuracy: float
    is_kept: bool
    samples: int


def steps_of(record: RunRecord) -> list[Step]:
    """Return the steps of a gap in the order in which they were taken; none where the record's are not as they are written.

    A record's JSON has its keys sorted, so that the order is made again: heads first, then weights by their depth.
    """
    told = record.params.get("steps")
    if record.kind != "gap" or not isinstance(told, dict):
        return []
    try:
        steps = [
            Step(str(name), str(step["changes"]), 100 * float(step["test"]), bool(step["kept"]), int(step["samples"]))
            for name, step in ((name, as_named(step)) for name, step in told.items())
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        return []
    return sorted(steps, key=lambda step: (_ORDER.get(step.name, 4), depth_of(step.name)))


def depth_of(name: str) -> float:
    """Return how deep an unfreezing by stages goes, NaN of any other."""
    if name.partition(":")[0] == "all":
        return math.inf
    match = re.fullmatch(r"last:(\d{1,4})", name)
    return float(match[1]) if match else math.nan
