"""Records of what was run, and what is made from them: tables and plots. No number leaves a stage outside a record."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
import types
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from featcache.display import Displayed, Table, facts_table, logger
from featcache.errors import DataError, StorageError
from featcache.fingerprint import as_named, as_stored, canonical, fingerprint, sha256_of_file
from featcache.specs import LIVE_BATCHNORM

SCHEMA_VERSION = 1
# Of how splits, choices, tests and intervals are made (benchmarks/PROTOCOL.md): raised where the same samples and the same
# request would come to other numbers. Records of before it was numbered have 0.
PROTOCOL = 2
RECORDS = Path("records") / "runs.jsonl"  # of commands, below the cache
# Of how each head is chosen and fitted (its grids, its estimators' parameters, the constants that its functions read), and
# of fine-tuning, as tests/test_recipes.py tells them. What is of another recipe is an old one, and is trained again. They
# stand beside the experiment's key, not in it: published records go on naming the experiments that they are of.
RECIPES = {
    "centroid": "ea3173ac",
    "ridge": "8349cbbd",
    "knn": "a5d18021",
    "logistic": "80d99a06",
    "svm": "d84b9f52",
    "selected": "2a2dbcdd",
    "lda": "f67582aa",
    "rbf": "f4cf2080",
    "mlp": "9cc68c15",
    "boosting": "69f26e78",
    "zeroshot": "59b2b71a",
    "zeroshot-probe": "59b2b71a",
    "tip": "59b2b71a",
    "attentive": "aff6b30a",
    "attentive-latent": "aff6b30a",
    "ensemble": "5dce96cc",
    "finetune": "24d97231",
}
_UNTOLD = frozenset({"boosting"})  # were changed before records told recipes: one that tells none is of another
_METHOD = re.compile(
    r"(?P<head>[a-z-]+)(?: \((?:labels|number)\))?(?: on (?P<layers>\S+))?(?P<best_pool> best pool)?"
    r"(?: (?P<views>\d+) views)?(?: with .+)?"  # columns, which the request names too
)
_DECIDING = (  # libraries whose versions round otherwise
    *("featcache", "torch", "torchvision", "timm", "scikit-learn", "numpy", "scipy", "pillow", "h5py"),
    *("openvino", "onnxruntime"),
)


@dataclass(frozen=True, repr=False)
class RunRecord(Displayed):
    """One trained and tested model: what was asked for, on which samples, what came out, at what cost.

    ``cell`` names the experiment (everything but the outcome); ``right`` tells for each test sample whether the model was
    right, as a text of 0 and 1 in the order that ``test_items`` hashes; ``artefact`` is a path below the cache.

    ``test_groups`` numbers the group of each test sample, in that order, where groups were asked for; ``copies`` counts
    samples that splits or labels take for different although their bytes are equal (see ``splits.copies``). ``source`` is
    what opens the data set again (a path's last part alone: records are passed on), with the number of its samples and the
    hash of their contents and labels; ``protocol`` is how numbers are made. Records of before have none of these.
    """

    kind: str
    cell: str
    dataset: str
    backbone: str
    method: str
    cut: str
    seed: int
    feature_key: str
    request: dict[str, Any]
    params: dict[str, Any]
    split: dict[str, int]
    test_items: str
    val: dict[str, Any]
    test: dict[str, Any]
    right: str
    seconds: dict[str, float]
    samples_per_second: float | None = None
    probe: dict[str, Any] | None = None
    gap: dict[str, Any] | None = None
    artefact: str = ""
    test_groups: list[int] | None = None
    copies: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)
    peak_memory_mb: float = 0.0
    time: str = ""
    schema_version: int = SCHEMA_VERSION
    protocol: int = 0
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def stored(self) -> dict[str, Any]:
        """All of it as plain data, as files have it."""
        return as_stored(asdict(self))

    @property
    def is_current(self) -> bool:
        """Whether the same request comes to the same numbers today: others are made again, never mixed with new ones."""
        # statistics that moved without having been settled first led to worse weights, and to other choices
        was_live = LIVE_BATCHNORM in str(self.params.get("val_by_lr"))
        return self.protocol == PROTOCOL and self._has_recipes and (not was_live or "batchnorm_settled" in self.params)

    @property
    def recipes(self) -> dict[str, str]:
        """Today's recipes of what it tells of: a head, an ensemble's members, a fine-tuning and what it stands beside."""
        asked = head_asked(self.method) if self.kind.startswith("fit") else None
        beside = (self.request.get("members"), (self.probe or {}).get("of"))
        names = [asked.head if asked else self.kind, *(name for each in beside if isinstance(each, list) for name in each)]
        return {name: recipe for name, recipe in RECIPES.items() if name in names}

    @property
    def _has_recipes(self) -> bool:
        recipes = self.environment.get("recipes")
        return not _UNTOLD & self.recipes.keys() if recipes is None else bool(recipes == self.recipes)

    @property
    def short_method(self) -> str:
        """What tables of a sweep call it: ``last:3``, of "last:3 after last:2"."""
        return self.method.partition(" after ")[0]

    def table(self) -> Table:
        """Return what stands in a row of a report, not the thousand answers behind it."""
        scores = {f"{part} {name}": _shown(value) for part in ("val", "test") for name, value in getattr(self, part).items()}
        main = {name: scores[name] for name in scores if name.split()[1] in {"accuracy", "mean_average_precision", "r2"}}
        gap = f"{self.gap['points']:+.1f} points" if self.gap else None
        seconds = ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())
        facts = {"data set": self.dataset, "backbone": self.backbone, "cut": self.cut, "seed": self.seed, **main}
        return facts_table(f"{self.kind} {self.method}", **facts, gap=gap, seconds=seconds)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def stamp() -> dict[str, Any]:
    """Return the fields that every record carries of where and when it was made."""
    return {
        "environment": environment(),
        "peak_memory_mb": round(_peak_memory_mb(), 1),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def environment() -> dict[str, Any]:
    """Return versions, processor count, git revision and what identifies the code, without importing anything heavy."""
    torch = sys.modules.get("torch")
    device = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else "cpu"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "processors": os.cpu_count(),
        "cpu": _processor(),
        "device": device,
        "versions": dict(_versions()),
        "git": _git_revision(),
        "code": _code(),
    }


def append_once(path: Path, record: RunRecord, tracker: Any = None) -> None:
    """Add a record to a file that lacks it, and tell a tracker of it.

    Lacking is this very record, to the second at which it was made; of fine-tuning, its training.

    Raises:
        StorageError: the file cannot be written.
    """
    if not _has(path, record):
        append_record(path, record)
    if tracker is not None:
        tracker.on_record(record)


def _has(path: Path, record: RunRecord) -> bool:
    if record.kind == "finetune":  # one that was killed once its record was written ends again: its epochs' seconds tell
        training = _training(record)
        if any(_training(earlier) == training for earlier in read_records([path], warn=False)):
            return True
    with contextlib.suppress(OSError):  # writing says what is wrong with it
        return path.is_file() and _line(record).strip() in path.read_bytes()
    return False


def _training(record: RunRecord) -> str:
    """Return what tells a training from others of the same experiment."""
    # epochs of small data take as long to the millisecond: compared with other heads it is another one, and is looked for so
    compared = sorted((record.probe or {}).get("of", ()))
    return canonical([record.dataset, record.cell, record.protocol, record.params, record.right, compared])


def append_record(path: Path, record: RunRecord) -> None:
    """Add a record to a JSONL file, as one whole line with a checksum of its own, whatever stands before it.

    Raises:
        StorageError: the file cannot be written.
    """
    line = _line(record)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o644)
        try:
            with contextlib.suppress(OSError):  # some network file systems have no locks: a write is whole there as a rule
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # falls with the descriptor, of a killed process too
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a killed process's half line ends here
                line = b"\n" + line
            while line:  # on a full disk a write takes less than it is given, without an error
                line = line[os.write(descriptor, line) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if not size:
            _sync_new_name(path.parent)
    except OSError as error:
        raise StorageError(f"{path}: the record cannot be written ({error.strerror}).") from error


def read_records(paths: Iterable[Path], *, warn: bool = True) -> list[RunRecord]:
    """Read records; a line that is none, or whose checksum says that it was changed, is left out with a warning.

    Args:
        paths: of JSONL files; one that is not there holds none.
        warn: name what is left out.

    Raises:
        StorageError: a file cannot be read.
    """
    records = []
    for path in paths:
        if not path.exists():
            continue
        if not path.is_file():
            raise StorageError(f"{path}: is no file. Move it away, or write the records elsewhere.")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise StorageError(f"{path}: the records cannot be read ({error.strerror}).") from error
        for number, line in enumerate(content.split(b"\n"), start=1):
            record = _record_or_error(line)
            if isinstance(record, RunRecord):
                records.append(record)
            elif record is not None and warn:
                logger.warning("%s, line %d: left out, not a run record (%s)", path, number, record)
    return records


def broken_lines(path: Path) -> list[str]:
    """Return what is wrong with a file of records, one line each."""
    if not path.is_file():
        return [f"{path}: is no file"]
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror})"]
    read = ((number, _record_or_error(line)) for number, line in enumerate(lines, start=1))
    return [f"{path}, line {number}: not a run record ({error})" for number, error in read if isinstance(error, Exception)]


def _record_or_error(line: bytes) -> RunRecord | Exception | None:
    """Return a line's record, why it holds none, or nothing where it is empty."""
    if not line.strip():
        return None
    try:
        return _parsed_record(line)
    except (DataError, ValueError, RecursionError) as error:
        return error


def _line(record: RunRecord) -> bytes:
    text = json.dumps(json.loads(json.dumps(record.stored)), sort_keys=True)  # keys are texts before they are sorted
    return f'{{"checksum": "{_checksum(text)}", {text[1:]}\n'.encode()


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _parsed_record(line: bytes) -> RunRecord:
    """Return the record of a line; those of before protocols were numbered have no checksum.

    Raises:
        DataError, ValueError: it is none of this version, or was changed since it was written.
    """
    data = json.loads(line.decode())
    if not isinstance(data, dict):
        raise DataError("no JSON object")
    if (version := data.get("schema_version")) != SCHEMA_VERSION:
        raise DataError(f"of version {version!r:.40}, this featcache reads {SCHEMA_VERSION}")
    # A line that was edited by hand is refused, since its numbers are quoted. Checksums are older than numbers of protocols:
    # whoever could leave one out of a numbered record could change all of it.
    has_none = "checksum" not in data and not data.get("protocol")
    if data.pop("checksum", None) != _checksum(json.dumps(data, sort_keys=True)) and not has_none:
        raise DataError("it was changed since it was written: its checksum is another, or missing")
    return record_from(data)


def record_from(data: dict[str, Any]) -> RunRecord:
    """Return the record of JSON's values.

    Raises:
        DataError: a field is missing, unknown, or of another kind.
    """
    data = as_named(data)
    _check_fields(data)
    return RunRecord(**(data | {"notes": tuple(data.get("notes", ()))}))


class HeadAsked(NamedTuple):
    """What the method of a head's record tells: tables call a head by what it is trained on, where that is not the usual."""

    head: str
    layers: tuple[str, ...]
    views: int
    best_pool: bool


def head_asked(method: str) -> HeadAsked | None:
    """Return what a method tells, ``None`` where it is none of a head's."""
    match = _METHOD.fullmatch(method)
    if match is None:
        return None
    layers = tuple(match["layers"].split("+")) if match["layers"] else ()
    return HeadAsked(match["head"], layers, int(match["views"] or 1), match["best_pool"] is not None)


def as_read(record: RunRecord) -> RunRecord:
    """Return a record as a file of records gives it back: keys that are texts, lists for tuples."""
    return record_from(json.loads(json.dumps(record.stored)))


def _check_fields(data: dict[str, Any]) -> None:
    """Refuse what tables could not be made from.

    Raises:
        DataError: a field is missing, unknown, or of another kind.
    """
    for each in fields(RunRecord):
        if each.name not in data:
            if each.default is MISSING and each.default_factory is MISSING:
                raise DataError(f"{each.name} is missing")
            continue
        if not isinstance(data[each.name], _KINDS[each.name]) or isinstance(data[each.name], bool):
            raise DataError(f"{each.name} is {type(data[each.name]).__name__}")
    if unknown := sorted(set(data) - set(_KINDS)):
        raise DataError(f"{unknown[0][:40]!r} is no field of it")
    if data["kind"] in {"fit", "finetune"}:
        _check_cells(data)


def _check_cells(data: dict[str, Any]) -> None:
    """Refuse a record that lacks what stands in a table's row.

    Raises:
        DataError: a number is missing, or none.
    """
    phase = "fit" if data["kind"] == "fit" else "train"
    needed = [(data[name], "accuracy") for name in ("val", "test")] + [
        (data["seconds"], part) for part in ("extract", phase)
    ]
    for of, name in needed:
        if not isinstance(of.get(name), float | int):
            raise DataError(f"{name} is missing")
    interval = data["test"].get("accuracy_ci", ())  # null: too few groups for one
    if interval is not None and (not isinstance(interval, list) or len(interval) != 2):
        raise DataError("accuracy_ci is missing")
    if "backbone" not in data["request"]:
        raise DataError("its backbone is missing")


def _kinds(hint: Any) -> tuple[type, ...]:
    """Return the classes of JSON's values for a field's type."""
    if isinstance(hint, types.UnionType):
        return tuple(kind for part in get_args(hint) for kind in _kinds(part))
    kind = get_origin(hint) or hint
    return {float: (float, int), tuple: (list,)}.get(kind, (kind,))


_KINDS = {name: _kinds(hint) for name, hint in get_type_hints(RunRecord).items()}


def _sync_new_name(folder: Path) -> None:
    """Make a new file's name last; some file systems cannot be asked to, and the record itself is safe there."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _peak_memory_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / (1 << 10)


@functools.cache
def _processor() -> str:
    """Return the processor's name: two of them may round the same sum otherwise."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return platform.processor() or platform.machine()


@functools.cache  # metadata of eleven packages are read and parsed in as many milliseconds: all heads, once
def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in _DECIDING:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return versions


@functools.cache
def _code() -> str:
    """Return what identifies featcache's own code here: a solver that stops a step later rounds otherwise."""
    package = Path(__file__).resolve().parent.parent
    modules = sorted((path.relative_to(package).as_posix(), path) for path in package.rglob("*.py"))
    return fingerprint([(name, sha256_of_file(path)) for name, path in modules])[:16]


def _git_revision() -> str:
    """Return the revision of the checkout that featcache runs from, "" for an installed one."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return ""
    try:
        answer = subprocess.run(  # noqa: S603 - fixed arguments
            ["git", "-C", str(here), "rev-parse", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return answer.stdout.strip()
