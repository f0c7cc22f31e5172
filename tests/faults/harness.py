"""Every call that changes a file, killed: what is left opens, and the next run ends as if nothing had been.

    python tests/faults/harness.py                          # extract, fit, finetune, bench: killed before every call
    python tests/faults/harness.py finetune --fault half    # killed amid every write
    python tests/faults/harness.py bench --fault full       # the disk is full from a call on
    python tests/faults/harness.py --without links          # on a file system without hard links
    python tests/faults/harness.py extract --every 7        # a sample

One process imports everything, and runs the command once; each point is a fork of it, with a shim (``shim.c``, compiled
with gcc, loaded before libc) that counts writes, syncs, renames, links, unlinks and creations below one folder, and at one
of them ends the process. Then, in another fork: the entries verify, the heads load, the records are read, and the same
command runs again. Compared with a run without a fault are its numbers, ``features.h5`` byte for byte, the names of all
files, the cells in the records, and the work: no committed row is computed again, at most one epoch is trained again.
"""

import argparse
import ctypes
import faulthandler
import hashlib
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from typing import Any

HERE = Path(__file__).resolve().parent
FAULTS = ("count", "kill", "half", "short", "full", "broken")
WRITES = {"write", "pwrite", "writev"}
LACKS = {"": 0, "links": 1, "rename2": 3}
PATIENCE = 120  # seconds
COLOURS = ((124, 128, 128), (128, 124, 128), (128, 128, 124))  # so alike that training gains on the probe, and is refitted
GRID = """
heads = ["ridge"]
unfreeze = ["last:1"]
[[dataset]]
data = "{images}"
[[backbone]]
name = "test_resnet"
random_init = 0
input_size = 32
[finetune]
epochs = 2
lr = [0.001, 0.01]
batch_size = 8
"""
BACKBONE = ("-b", "test_resnet", "--random-init", "0", "--input-size", "32")
RUN = ("--batch-size", "8", "--runtime", "torch", "--workers", "1", "--json")
COMMANDS = {
    "extract": ("extract", "{images}", *BACKBONE, *RUN),
    "fit": ("fit", "{images}", *BACKBONE, *RUN, "--head", "ridge", "--head", "logistic"),
    "finetune": (
        *("finetune", "{images}", *BACKBONE, *RUN, "--unfreeze", "last:1", "--epochs", "2", "--train-batch", "8"),
        *("--lr", "0.001", "--lr", "0.01"),
    ),
    "bench": ("bench", "{grid}", "--out", "{root}/out", *RUN),
}
STARTS_FROM: dict[str, tuple[str, ...]] = {  # cuts: extraction is killed by itself
    "extract": (),
    "fit": ("pooled",),
    "finetune": ("pooled", "layer3"),
    "bench": ("pooled", "layer3"),
}
NOT_COMPARED = {"seconds", "images_per_second", "computed", "reused", "computed_images", "computed_cells", "environment"} | {
    *("peak_memory_mb", "time", "curve", "extract", "runtime", "runtime_difference", "bundle")
}


@dataclass
class State:
    """What a folder holds: names of all files, hashes of the tables, committed rows, cells in the records."""

    names: list[str]
    tables: dict[str, str]
    rows: int
    cells: list[str]
    unlisted: int
    problems: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """How a forked command ended, and what it did."""

    code: int
    out: str
    err: str
    calls: int
    rows: int
    epochs: int

    @property
    def numbers(self) -> Any:
        """What it printed, without what may differ between two runs."""
        return _stripped(json.loads(self.out)) if self.code == 0 else None


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _stripped(part) for name, part in value.items() if name not in NOT_COMPARED}
    if isinstance(value, list):
        return [_stripped(part) for part in value]
    return value


class Machine:
    """Forks commands whose file system fails at one call."""

    def __init__(self, root: Path) -> None:
        self.root, self.child = root, 0
        self._shared = mmap.mmap(-1, 24)
        self._numbers = (ctypes.c_long * 3).from_buffer(self._shared)  # calls, rows computed, epochs trained
        self._arm = ctypes.CDLL(None).fault_arm
        self._watch()

    def _watch(self) -> None:
        """Count the work, and make what goes by the clock go by the batch."""
        from featcache import datasets
        from featcache.extraction import extract
        from featcache.finetuning.loop import Trial
        from featcache.store import disk as stamps

        compute, epoch, numbers = extract.compute, Trial._epoch, self._numbers

        def counted(batch: Any, *arguments: Any) -> Any:
            numbers[1] += len(batch.fresh)
            return compute(batch, *arguments)

        def trained(trial: Any, *arguments: Any) -> None:
            epoch(trial, *arguments)
            numbers[2] += 1

        extract.compute = counted
        Trial._epoch = trained  # type: ignore[method-assign]
        extract.MIN_PART_SECONDS = extract.MAX_PART_SECONDS = 0.0
        datasets.RACY_NS = stamps._RACY_NS = 0  # else the calls depend on how many seconds a run takes

    def run(self, act: Callable[[], None], *, at: int = 0, fault: str = "count", lacks: str = "", log: str = "") -> Outcome:
        """Run something in a fork, the fault armed, and wait for its end."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            code = self.wait(self.start(act, out.fileno(), err.fileno(), at, fault, lacks, log))
            out.seek(0), err.seek(0)
            calls, rows, epochs = self._numbers
            return Outcome(code, out.read().decode(), err.read().decode(errors="replace"), calls, rows, epochs)

    def start(self, act: Callable[[], None], out: int, err: int, at: int, fault: str, lacks: str, log: str) -> int:
        """Fork, leave the fork at its work, and return its number."""
        for number in range(3):
            self._numbers[number] = 0
        child = self.child = os.fork()
        if not child:
            os.dup2(out, 1), os.dup2(err, 2)
            calls = ctypes.byref(self._numbers)
            noted = os.fsencode(log) if log else None
            self._arm(os.fsencode(self.root), at, FAULTS.index(fault), LACKS[lacks], calls, noted)
            faulthandler.dump_traceback_later(PATIENCE - 10)  # where it hangs
            os._exit(_code_of(act))
        return child

    def wait(self, child: int) -> int:
        """Return the exit code of a fork, minus the signal that ended it; -1000 where it hung."""
        ends = time.monotonic() + PATIENCE
        while time.monotonic() < ends:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return -1000


def _code_of(act: Callable[[], None]) -> int:
    try:
        act()
        code: Any = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:  # noqa: BLE001 - a traceback is what is looked for
        traceback.print_exc()
        code = 99
    sys.stdout.flush(), sys.stderr.flush()
    return code if isinstance(code, int) else 98


class Scenario:
    """A command, where it starts from, and what it comes to without a fault."""

    def __init__(self, name: str, machine: Machine, work: Path, lacks: str = "") -> None:
        self.name, self.machine, self.lacks = name, machine, lacks
        self.root, self.base = machine.root, work / f"base-{name}"
        images, grid = work / "images", work / "grid.toml"
        grid.write_text(GRID.format(images=images))
        fill = {"images": images, "grid": grid, "root": self.root}
        self.command = [part.format(**fill) for part in COMMANDS[name]]
        self.restore()
        for cut in STARTS_FROM[name]:
            before = [part.format(**fill) for part in (*COMMANDS["extract"], "--cut", cut)]
            self._check(machine.run(lambda before=before: _main(before)))  # type: ignore[misc]
        shutil.copytree(self.root, self.base)
        self.restore()  # as before every fault: copies have other inodes, and are hashed again
        self.log = work / f"{name}.calls"
        self.reference = machine.run(lambda: _main(self.command), lacks=lacks, log=str(self.log))
        self._check(self.reference)
        self.missed = 0
        self.goal = look(self.root)
        self.calls = self.log.read_text().splitlines()

    def _check(self, outcome: Outcome) -> None:
        if outcome.code:
            raise RuntimeError(f"{self.name} fails without a fault: {outcome.err}")

    def restore(self) -> None:
        """Put back what the command starts from."""
        shutil.rmtree(self.root, ignore_errors=True)
        if self.base.exists():
            shutil.copytree(self.base, self.root)
        else:
            (self.root / "cache").mkdir(parents=True)

    def try_at(self, number: int, fault: str) -> list[str]:
        """Let a call fail, run again, and return what is wrong then."""
        self.restore()
        there = look(self.root).rows
        first = self.machine.run(lambda: _main(self.command), at=number, fault=fault, lacks=self.lacks)
        if first.calls < number:
            self.missed += 1
        problems = self._ended(first, fault, self.calls[number - 1].split()[1]) if first.calls >= number else []
        return problems + self._recovers(first, there)

    def interrupt(self, after: float, number: signal.Signals) -> list[str]:
        """Send a signal some seconds after the start, run again, and return what is wrong then."""
        self.restore()
        there = look(self.root).rows
        sender = Timer(after, lambda: os.kill(self.machine.child, number))
        sender.start()
        first = self.machine.run(lambda: _main(self.command))
        sender.cancel()
        if first.code == 0:  # it had ended, or Python dropped the interrupt inside a destructor: the run is a whole one
            self.missed += 1
            return []
        problems = [f"{word} at the signal" for word in _cries(first.err)]
        if first.code != 130:
            problems.append(f"at the signal it ended with {first.code}: {first.err[-300:]}")
        problems += [f"it left {name}" for name in look(self.root).names if ".tmp-" in name]
        return problems + self._recovers(first, there)

    def together(self, many: int) -> list[str]:
        """Run several at once, and return what is wrong then."""
        self.restore()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            children = [
                self.machine.start(lambda: _main(self.command), out.fileno(), err.fileno(), 0, "count", "", "")
                for _ in range(many)
            ]
            codes = [self.machine.wait(child) for child in children]
            err.seek(0)
            problems = _cries(err.read().decode(errors="replace"))
        lines = [line for path in self.root.glob("out/*.jsonl") for line in path.read_text().splitlines()]
        state = look(self.root, closely=True)
        if codes != [0] * many:
            problems.append(f"they ended with {codes}")
        if state.cells != self.goal.cells or len([line for line in lines if line.endswith("}")]) != len(lines):
            problems.append(f"{len(lines)} lines, cells {state.cells}")
        if len(lines) > many * len(state.cells) or len(_whole(self.root)) != len(lines):
            problems.append(f"{len(lines)} lines, of which {len(_whole(self.root))} are whole")
        if state.names != self.goal.names:
            problems.append(f"its files are others: {sorted(set(state.names) ^ set(self.goal.names))}")
        return problems + state.problems

    def _recovers(self, first: Outcome, there: int) -> list[str]:
        problems: list[str] = []
        report = self.root.parent / "seen.json"
        report.unlink(missing_ok=True)
        again = self.machine.run(lambda: self._again(report), lacks=self.lacks)
        seen = json.loads(report.read_text()) if report.exists() else {"problems": ["nothing could be looked at"]}
        problems += seen["problems"] + [f"{word} in the second run" for word in _cries(again.err)]
        if again.code:
            return [*problems, f"the second run ended with {again.code}: {again.err[-3000:]}"]
        return problems + self._compared(again, first, seen, there)

    def _ended(self, first: Outcome, fault: str, call: str) -> list[str]:
        problems = [f"{word} in the run with the fault" for word in _cries(first.err)]
        right = {"kill": {-9}, "half": {-9}, "short": {0}, "full": {0, 4}, "broken": {0, 4}}[fault]
        if first.code not in right:
            problems.append(f"the run with the fault ended with {first.code}: {first.err[-300:]}")
        if fault in {"full", "broken"} and first.code == 4 and first.err.strip().count("error: ") != 1:
            problems.append(f"no one error is said: {first.err[-300:]}")
        if (
            call != "unlink"
            and fault in {"full", "broken", "short"}
            and [name for name in look(self.root).names if ".tmp-" in name]
        ):
            problems.append(f"a process that ended itself ({first.code}) left temporary files: {first.err[-300:]}")
        return problems

    def _again(self, report: Path) -> None:
        """Look at what is there, then run the command."""
        report.write_text(json.dumps(vars(look(self.root, closely=True))))
        _main(self.command)

    def _compared(self, again: Outcome, first: Outcome, seen: dict[str, Any], there: int) -> list[str]:
        now, problems = look(self.root), []
        if again.numbers != self.reference.numbers:
            problems.append("its numbers are others")
        if now.tables != self.goal.tables:
            problems.append("features.h5 is another")
        if now.names != self.goal.names:
            problems.append(f"its files are others: {sorted(set(now.names) ^ set(self.goal.names))}")
        if now.cells != self.goal.cells:
            problems.append(f"{len(now.cells)} cells in the records instead of {len(self.goal.cells)}")
        if again.rows != self.reference.rows - (seen["rows"] - there):
            problems.append(f"{again.rows} rows computed though {seen['rows'] - there} of {self.reference.rows} were there")
        if first.code and first.epochs + again.epochs > self.reference.epochs + 1:  # one that has ended is trained anew
            problems.append(f"{first.epochs} + {again.epochs} epochs instead of {self.reference.epochs}")
        return problems


def _cries(err: str) -> list[str]:
    return [word for word in ("Traceback", "Error in sys", "not a head", "begins again") if word in err]


def _main(command: list[str]) -> None:
    from featcache.cli import main

    main(command)


def look(root: Path, *, closely: bool = False) -> State:
    """Return what lies below a folder; ``closely``: verify all entries and load all heads."""
    from featcache.errors import FeatcacheError
    from featcache.reports import read_records
    from featcache.store.entry import FeatureStore

    names, tables, rows, problems, unlisted = [], {}, 0, [], 0
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = path.relative_to(root).as_posix()
        if path.name == "features.h5":
            tables[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        names.append(re.sub(r"manifest-\d+|[0-9a-f]{16}(?=\.h5|\.items\.h5)", "N", name))
    for path in sorted((root / "cache").glob("*/*/spec.json")):
        try:
            store = FeatureStore.open(path.parent)
            rows += 0 if path.parent.name.startswith("pixels.") else store.manifest.rows  # thumbnails come beside rows
            listed = {part.name for part in store.manifest.parts}
            unlisted += len([one for one in (path.parent / "parts").glob("[!.]*.h5") if one.name not in listed])
            problems += store.verify() if closely else []
        except FeatcacheError as error:
            problems.append(str(error))
    if closely:
        problems += list(_heads(root))
    records = sorted({*root.glob("cache/records/*.jsonl"), *root.glob("out/*.jsonl")})
    cells = sorted({record.cell for record in read_records(records, warn=False)})
    return State(sorted(set(names)), tables, rows, cells, unlisted, problems)


def _whole(root: Path) -> list[str]:
    from featcache.reports import read_records

    return [record.cell for record in read_records(sorted(root.glob("out/*.jsonl")), warn=False)]


def _heads(root: Path) -> Iterator[str]:
    from featcache.errors import FeatcacheError
    from featcache.heads import bundle

    for path in root.rglob("*.joblib"):
        try:
            bundle.load(path)
        except FeatcacheError as error:
            yield str(error)


def compile_shim(folder: Path) -> Path:
    """Compile the shim and return where it is."""
    shim = folder / "shim.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", str(shim), str(HERE / "shim.c"), "-ldl"], check=True)
    return shim


def start_again_with(shim: Path, work: Path) -> None:
    """Replace this process by one with the shim loaded before libc, of one thread, its home in the work folder."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    own = {"LD_PRELOAD": str(shim), "FAULTS_WORK": str(work), "XDG_DATA_HOME": str(work / "root" / "home")}
    cache = {"FEATCACHE_CACHE": str(work / "root" / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | single | own | cache)  # noqa: S606 - itself


def _asked_for(scenario: Scenario, asked: argparse.Namespace) -> Iterator[tuple[str, Callable[[], tuple[int, int]]]]:
    yield asked.fault, lambda: explore(scenario, asked.fault, asked.every, asked.first)
    if asked.signals:
        yield "SIGINT, SIGTERM", lambda: interrupt(scenario, asked.signals)
    if asked.together and scenario.name == "bench":
        tries = max(1, 10 // asked.every)
        yield (
            f"{asked.together} at once",
            lambda: (tries, sum(_said("at once", scenario.together(asked.together)) for _ in range(tries))),
        )


def explore(scenario: Scenario, fault: str, every: int, first: int) -> tuple[int, int]:
    """Try a fault at every call, or at a sample; print what was wrong at which, return how many of each."""
    numbers = [
        number
        for number, line in enumerate(scenario.calls, start=1)
        if (fault not in {"half", "short"} or line.split()[1] in WRITES) and (number - first) % every == 0
    ]
    wrong = [number for number in numbers if _said(scenario.calls[number - 1], scenario.try_at(number, fault))]
    return len(numbers), len(wrong)


def interrupt(scenario: Scenario, many: int) -> tuple[int, int]:
    """Send signals at times spread over a run; print what was wrong when, return how many of each."""
    began = time.monotonic()
    scenario.restore()
    scenario.machine.run(lambda: _main(scenario.command))
    length = time.monotonic() - began
    times = [(length * (part + 0.5) / many, number) for part in range(many) for number in (signal.SIGINT, signal.SIGTERM)]
    wrong = [_said(f"{number.name} after {after:.2f} s", scenario.interrupt(after, number)) for after, number in times]
    return len(times), sum(wrong)


def _said(what: str, problems: list[str]) -> bool:
    if problems:
        print(f"  {what}", *problems, sep="\n    ", flush=True)
    return bool(problems)


def main() -> None:
    """Run what the command line asks for; end with 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="COMMAND", help=f"of {', '.join(COMMANDS)}; all by default")
    parser.add_argument("--fault", choices=FAULTS[1:], default="kill")
    parser.add_argument("--without", choices=list(LACKS), default="", help="what the file system does not know")
    parser.add_argument("--signals", type=int, default=0, help="also so many SIGINT and SIGTERM, spread over each run")
    parser.add_argument("--together", type=int, default=0, help="also so many processes of bench at once, ten times")
    parser.add_argument("--every", type=int, default=1, help="try every so many calls")
    parser.add_argument("--first", type=int, default=1, help="the first call that is tried, with --every")
    asked = parser.parse_args()
    if "FAULTS_WORK" not in os.environ:
        work = Path(tempfile.mkdtemp(prefix="faults-"))
        start_again_with(compile_shim(work), work)
    work = Path(os.environ.pop("FAULTS_WORK"))
    try:
        wrong = run(asked, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    sys.exit(1 if wrong else 0)


def run(asked: argparse.Namespace, work: Path) -> int:
    """Draw images, import everything, and explore; return at how many calls something was wrong."""
    sys.path.insert(0, str(HERE.parent))
    from support import draw_image

    for number, colour in enumerate(COLOURS):
        for index in range(8):
            draw_image(work / "images" / str(number) / f"{index}.png", colour, 1000 * number + index)
    machine, wrong = Machine(work / "root"), 0
    warm_up(machine, work)
    for name in asked.scenarios or COMMANDS:
        scenario = Scenario(name, machine, work, asked.without)
        done, where = scenario.reference, f" without {asked.without}" if asked.without else ""
        print(
            f"{name}{where}: {done.calls} calls, {done.rows} rows, {done.epochs} epochs, {len(scenario.goal.cells)} cells",
            flush=True,
        )
        for what, act in _asked_for(scenario, asked):
            started = time.monotonic()
            tried, bad = act()
            wrong += bad
            print(
                f"{name}{where}: {what}: {tried} tried, {scenario.missed} not reached, {bad} bad, "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
    return wrong


def warm_up(machine: Machine, work: Path) -> None:
    """Run every kind of command once in this process, so that the forks need to import nothing."""
    fill = {"images": work / "images", "grid": work / "grid.toml", "root": machine.root}
    (work / "grid.toml").write_text(GRID.format(**fill))
    machine.root.mkdir()
    silent = os.open(os.devnull, os.O_WRONLY)
    kept = os.dup(1)
    os.dup2(silent, 1)
    for name in ("fit", "bench"):
        _code_of(lambda name=name: _main([part.format(**fill) for part in COMMANDS[name]]))
    os.dup2(kept, 1)
    shutil.rmtree(machine.root)


if __name__ == "__main__":
    main()
