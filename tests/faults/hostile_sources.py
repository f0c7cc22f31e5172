"""Hostile data sets of every kind: each is opened, listed, read and decoded in a process of its own that is watched.

    python tests/faults/hostile_sources.py                 # all of them, and some through the command line
    python tests/faults/hostile_sources.py --only hdf5 --verbose

None may end in anything but an answer or a plain error of featcache, take 20 s, or take 2 GB.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from hostile_cases import CANARY, CASES

PATIENCE = 20  # seconds
MOST_BYTES = 2 << 30


@dataclass(frozen=True)
class Outcome:
    """How a case ended: ``code`` 0, 2, 3, 4 or 5; 1 is a traceback, below zero a signal, -9 of the watch too."""

    name: str
    code: int
    said: str
    seconds: float
    bytes: int

    @property
    def is_clean(self) -> bool:
        """Whether it may end so."""
        return self.code in {0, 2, 3, 4, 5} and self.bytes < MOST_BYTES and self.seconds < PATIENCE


def look_at(data: str, root: Path) -> str:
    """Open a data set, and read and decode all of it as an extraction does."""
    from featcache.datasets import open_dataset
    from featcache.datasets.decoding import ImagePreprocess
    from featcache.extraction.files import BatchReader, DatasetFiles
    from featcache.specs import Transform, Views

    source, seen, bad = open_dataset(data, data_root=root), 0, 0
    reader = BatchReader(
        DatasetFiles(source), range(min(len(source.samples), 5000)), ImagePreprocess(Transform(32)), Views()
    )
    while len(batch := reader.fill(64)):
        seen, bad = seen + len(batch), bad + len(batch.bad)
    "".join(source.table.labels).encode("utf-8", "surrogateescape")
    return f"{len(source.samples)} images, {bad} left out of {seen}; {'; '.join(source.notes)}"


def watched(name: str, folder: Path) -> Outcome:
    """Write a case in one process, and look at it in another: neither leaves anything in this one."""
    folder.mkdir(parents=True)
    made = _forked(name, lambda: CASES[name](folder))
    assert made.code == 0, made.said
    return _forked(name, lambda: _limit() or look_at(made.said, folder))


def _forked(name: str, work: Callable[[], str]) -> Outcome:
    started = time.monotonic()
    with tempfile.TemporaryFile() as told:
        child = os.fork()
        if not child:
            code, said = 1, ""
            try:
                said, code = work(), 0
            except Exception as error:  # noqa: BLE001 - it is what is looked for
                code = getattr(error, "exit_code", 1)
                said = str(error) if code != 1 else traceback.format_exc()
            finally:
                told.write(said.encode("utf-8", "surrogatepass"))
                told.flush()
                os._exit(code)
        status, usage = _end_of(child)
        told.seek(0)
        said = told.read().decode("utf-8", "surrogatepass")
    return Outcome(name, os.waitstatus_to_exitcode(status), said, time.monotonic() - started, usage.ru_maxrss * 1024)


def _limit() -> None:
    """Let the memory that this process may take end where the watch would call it too much."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        most = pages * resource.getpagesize() + MOST_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _end_of(child: int) -> tuple[int, Any]:
    ends = time.monotonic() + PATIENCE
    while time.monotonic() < ends:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            return status, usage
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    return status, usage


def warm_up() -> None:
    """Import once what every case needs, so that a process for each costs little."""
    import datasets
    import pyarrow.parquet  # noqa: F401 - for what its import costs

    datasets.disable_progress_bars()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def through_the_command_line(name: str, folder: Path) -> tuple[int, str]:
    """Run ``featcache extract`` on a case as a user does, and return its exit code and stderr."""
    folder.mkdir(parents=True)
    data = CASES[name](folder)
    how = ["-b", "test_resnet", "--random-init", "0", "--input-size", "32", "--runtime", "torch", "--max-bad", "100%"]
    command = [sys.executable, "-m", "featcache", "extract", data, "--cache", str(folder / "cache"), *how]
    if name.startswith("torchvision"):
        command += ["--data-root", str(folder)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    return done.returncode, done.stderr.decode("utf-8", "replace")


PROCESSES = (
    "npz of 0 bytes",
    "hdf5 a terabyte of labels",
    "tar a surrogate for a label",
    "tar billions in braces",
    "csv NUL in a path",
    "csv devices",
    "files a pipe",
    "files names of control characters",
    "files a bomb in an icon",
    "files 49 megapixels in colour with alpha",
    "parquet bytes that are a number",
    "torchvision USPS of nonsense",
    "hf folder with a pipe",
)


def main() -> None:
    """Run all cases, print those that ended badly, and a summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--keep", type=Path, help="a folder that keeps the data sets")
    parser.add_argument("--verbose", action="store_true", help="print every case")
    given = parser.parse_args()
    warm_up()
    chosen = [name for name in CASES if name.startswith(given.only)]
    with tempfile.TemporaryDirectory() as temporary:
        work = given.keep or Path(temporary)
        outcomes = []
        for number, name in enumerate(chosen):
            outcome = watched(name, work / f"{number:03d}")
            outcomes.append(outcome)
            if given.verbose or not outcome.is_clean:
                print(f"{'' if outcome.is_clean else 'BAD '}{name}: {outcome.code}, {outcome.seconds:.1f} s, "
                      f"{outcome.bytes / 1e6:.0f} MB: {outcome.said!a}")  # fmt: skip
        bad = [outcome for outcome in outcomes if not outcome.is_clean]
        for name in PROCESSES if not given.only else ():
            code, said = through_the_command_line(name, work / f"cli-{name.replace(' ', '-')}")
            is_bad = code not in {0, 2, 3, 4, 5} or "Traceback" in said or "\x1b" in said
            print(f"{'BAD ' if is_bad else ''}featcache extract, {name}: {code}: {said.strip().splitlines()[-1:]}")
            bad += [Outcome(name, code, said, 0, 0)] * is_bad
    kinds = {name.split()[0] for name in chosen}
    codes = dict(sorted(Counter(outcome.code for outcome in outcomes).items()))
    most = max(outcomes, key=lambda outcome: outcome.bytes)
    slow = max(outcomes, key=lambda outcome: outcome.seconds)
    canary = CANARY.exists()
    print(json.dumps({
        "cases": len(outcomes), "kinds": sorted(kinds), "bad": len(bad), "codes": codes, "code ran": canary,
        "most MB": [round(most.bytes / 1e6), most.name], "slowest s": [round(slow.seconds, 1), slow.name],
    }))  # fmt: skip
    sys.exit(bool(bad) or canary)


if __name__ == "__main__":
    main()
