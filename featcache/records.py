"""Run records: no number leaves a stage outside one."""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from featcache.errors import DataError, StorageError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RunRecord:
    """One trained and tested model: what was asked for, on which images, what came out, at what cost.

    ``cell`` names the experiment (everything but the outcome); ``right`` tells for each test image whether the model was
    right, as a text of 0 and 1 in the order that ``test_items`` hashes; ``artefact`` is a path below the cache.
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
    images_per_second: float | None = None
    probe: dict[str, Any] | None = None
    gap: dict[str, Any] | None = None
    artefact: str = ""
    notes: tuple[str, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)
    peak_memory_mb: float = 0.0
    time: str = ""
    schema_version: int = SCHEMA_VERSION


def stamp() -> dict[str, Any]:
    """Return the fields that every record carries of where and when it was made."""
    return {
        "environment": environment(),
        "peak_memory_mb": round(_peak_memory_mb(), 1),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def environment() -> dict[str, Any]:
    """Return versions, processor count and git revision, without importing anything heavy."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("featcache", "torch", "torchvision", "timm", "scikit-learn", "numpy", "pillow", "h5py"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    torch = sys.modules.get("torch")
    device = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else "cpu"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "processors": os.cpu_count(),
        "device": device,
        "versions": versions,
        "git": _git_revision(),
    }


def append_record(path: Path, record: RunRecord) -> None:
    """Add a record to a JSONL file in one write, so that writers do not tear each other's lines.

    Raises:
        StorageError: the file cannot be written.
    """
    line = json.dumps(asdict(record), sort_keys=True) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
        try:
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(f"{path}: the record cannot be written ({error.strerror}).") from error


def read_records(paths: Iterable[Path]) -> list[RunRecord]:
    """Read records, a torn last line left out.

    Raises:
        DataError: a line is no record of this version.
    """
    records = []
    for path in paths:
        if not path.exists():
            continue
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                data = json.loads(line)
                if data["schema_version"] != SCHEMA_VERSION:
                    raise DataError(f"{path}, line {number}: a record of version {data['schema_version']}.")
                records.append(RunRecord(**(data | {"notes": tuple(data["notes"])})))
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines):
                    continue
                raise DataError(f"{path}, line {number}: not a run record ({error}).") from error
    return records


def _peak_memory_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / (1 << 10)


def _git_revision() -> str:
    """Return the revision of the checkout that featcache runs from, "" for an installed one."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return ""
    try:
        found = subprocess.run(  # noqa: S603 - fixed arguments
            ["git", "-C", str(here), "rev-parse", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return found.stdout.strip()
