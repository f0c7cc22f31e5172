"""Every file of a cache, damaged in every way: commands end in an error or with the right answer, and verify finds it.

    python tests/faults/mutants.py                     # 2,000 mutants, two processes
    python tests/faults/mutants.py --count 200 --only manifest
    python tests/faults/mutants.py --seed 7 --work /dev/shm/mutants

One process extracts, fits and fine-tunes, and asks every command once. For each mutant the cache is put back as it was, one
file of it is damaged (bits, truncation, zeros, garbage, another file's content, each field of its JSON), and a fork of that
process asks every command again. What ends with 0 must answer as before; what does not must end in one plain error.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import draw_image

PATIENCE = 60  # seconds that all commands together may take
COLOURS = {"blue": (120, 128, 128), "green": (128, 120, 128), "red": (128, 128, 120)}  # so alike that heads make mistakes
BACKBONE = ("-b", "test_resnet", "--input-size", "32")
RUN = ("--batch-size", "8", "--runtime", "torch", "--workers", "1")
CLEAN = {2, 3, 4, 5}


@dataclass(frozen=True)
class Mutant:
    """One damage to one file, by its path below the cache."""

    path: str
    what: str
    content: bytes | None


@dataclass(frozen=True)
class Answer:
    """How a command ended, and what it said that matters."""

    code: int
    said: Any = None


Answers = dict[str, Answer]


@dataclass
class World:
    """Images, a cache as it should be, and the same cache to be damaged: always at one place, which cards name."""

    root: Path
    expected: Answers = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def cache(self) -> Path:
        """Where commands look."""
        return self.root / "cache"

    @property
    def pristine(self) -> Path:
        """The cache as it should be."""
        return self.root / "pristine"

    def restore(self) -> None:
        """Put the cache back as it was."""
        shutil.rmtree(self.cache, ignore_errors=True)
        shutil.copytree(self.pristine, self.cache)


def prepare(root: Path, *, tuned: bool) -> World:
    """Extract two entries of several parts, fit a head and, if asked to, fine-tune; keep what every command answers."""
    from featcache.extraction import extract

    extract.PART_ROWS = 8
    os.environ.update({"FEATCACHE_CACHE": str(root / "cache"), "XDG_DATA_HOME": str(root / "home")})
    world = World(root)
    for number, (name, colour) in enumerate(COLOURS.items()):
        for index in range(11):
            draw_image(root / ("images" if index < 9 else "more") / name / f"{index:02d}.png", colour, 100 * number + index)
    (root / "images" / "red" / "broken.png").write_bytes(b"no image")
    shutil.copy(root / "images" / "red" / "00.png", root / "images" / "red" / "copy.png")
    images = str(root / "images")
    done = [ask("extract", images, *BACKBONE, *RUN, "--random-init", str(seed), "--json")[1] for seed in (0, 1)]
    world.facts["entry"], world.facts["other"] = (json.loads(out)["entry"] for out in done)
    _, out = ask("fit", images, *BACKBONE, *RUN, "--random-init", "0", "--head", "ridge", "--no-baselines", "--json")
    world.facts["head"] = json.loads(out)["heads"][0]["bundle"]
    if tuned:
        command = ("finetune", images, *BACKBONE, *RUN, "--random-init", "0", "--unfreeze", "last:1", "--epochs", "1")
        _, out = ask(*command, "--train-batch", "8", "--json")
        world.facts["tuned head"] = next(str(path) for path in world.cache.glob("*/*/tuned/*.joblib"))
    shutil.copytree(world.cache, world.pristine)
    world.expected = answers(world)
    wrong = [name for name, answer in world.expected.items() if answer.code]
    if wrong:
        raise SystemExit(f"not even whole: {wrong}")
    return world


def ask(*arguments: str) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it said on stdout."""
    from featcache.cli import main

    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(arguments))
        except SystemExit as ended:
            code = ended.code or 0
    if code not in {0, *CLEAN}:
        sys.stderr.write(f"{arguments[0]}: {err.getvalue()[-2000:]}\n")
    return int(code), out.getvalue()


def answers(world: World) -> Answers:
    """Ask every command that reads a cache, those that only look first."""
    images, entry = str(world.root / "images"), Path(world.facts["entry"])
    flags = (*BACKBONE, *RUN, "--random-init", "0")
    found: Answers = {"verify": Answer(ask("store", "verify")[0])}

    def answer(name: str, *arguments: str, keep: Callable[[str], Any]) -> None:
        code, out = ask(*arguments)
        found[name] = Answer(code, keep(out) if code == 0 else None)

    answer("ls", "store", "ls", "--json", keep=lambda out: [_facts(one) for one in json.loads(out)["entries"]])
    answer("info", "store", "info", str(entry), "--json", keep=lambda out: _facts(json.loads(out)))
    for head in ("head", "tuned head"):
        if head in world.facts:
            answer(f"predict with the {head}", "predict", world.facts[head], images, "--json", *RUN, keep=str)
    answer("fit", "fit", images, *flags, "--head", "ridge", "--no-baselines", "--json", keep=_fitted)
    answer("extract", "extract", images, *flags, "--json", keep=lambda _: _table(entry))
    for path in sorted((world.root / "more").rglob("*.png")):
        shutil.copy(path, Path(images) / path.parent.name / path.name)
    try:
        answer("extract more", "extract", images, *flags, "--json", keep=lambda _: _table(entry))
    finally:
        for path in (world.root / "more").rglob("*.png"):
            (Path(images) / path.parent.name / path.name).unlink()
    return found


def _facts(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in {"bytes", "manifest"}}


def _fitted(out: str) -> Any:
    names = ("head", "params", "val", "test")
    return [{name: head[name] for name in names if name in head} for head in json.loads(out)["heads"]]


def _table(entry: Path) -> dict[str, str]:
    """Return the hash of everything in a features.h5."""
    import h5py

    with h5py.File(entry / "features.h5") as file:
        return {name: hashlib.sha256(file[name][:].tobytes()).hexdigest() for name in file}


def mutants(world: World, rng: random.Random) -> Iterator[Mutant]:
    """Yield damages for ever, each kind of file as often as any other."""
    by_kind: dict[str, list[str]] = {}
    for path in sorted(world.pristine.rglob("*")):
        if path.is_file() and not path.is_relative_to(world.pristine / Path(world.facts["other"]).relative_to(world.cache)):
            name = path.relative_to(world.pristine).as_posix()
            by_kind.setdefault(kind_of(name), []).append(name)
    fields: dict[str, list[bytes]] = {}
    while True:
        name = rng.choice(by_kind[rng.choice(sorted(by_kind))])
        content = (world.pristine / name).read_bytes()
        if name.endswith((".json", ".jsonl")) and rng.random() < 0.6:
            if not fields.get(name):
                fields[name] = list(json_edits(content, rng))
                rng.shuffle(fields[name])
            new, what = fields[name].pop(), "a field"
        else:
            what, new = byte_damage(world, name, content, rng)
        if new != content and not _is_older(name, content, new):
            yield Mutant(name, what, new)


def _is_older(name: str, content: bytes, new: bytes | None) -> bool:
    """Tell whether a note has only lost its seal: so it was written before there were seals, and still is believed."""
    if Path(name).name not in {"source.json", "checked.json"} or new is None or not _is_json(content):
        return False
    unsealed = {key: value for key, value in json.loads(content).items() if key != "check"}
    return _is_json(new) and json.loads(new) == unsealed


def kind_of(name: str) -> str:
    """Return what sort of file a path below the cache is."""
    path = Path(name)
    if path.parent.name == "parts":
        return "listing" if name.endswith(".items.h5") else "part"
    if path.name.startswith("manifest"):
        return "manifest"
    return f"{path.parent.name}/*{path.suffix}" if path.parent.name in {"requests", "heads", "tuned"} else path.name


def byte_damage(world: World, name: str, content: bytes, rng: random.Random) -> tuple[str, bytes | None]:
    """Return a damage to a file's bytes, whatever they mean; ``None`` removes it."""
    kinds = ["bit", "bit", "bits", "truncated", "zeros", "garbage", "longer", "empty", "swapped", "swapped", "missing"]
    what = rng.choice(kinds)
    damaged = bytearray(content)
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice([1, 16, 512, 4096]))
    if what in {"bit", "bits"}:
        for _ in range(1 if what == "bit" else 20):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    elif what == "truncated":
        del damaged[start:]
    elif what == "zeros":
        damaged[start:end] = bytes(end - start)
    elif what == "garbage":
        damaged[start:end] = rng.randbytes(end - start)
    elif what == "longer":
        damaged += rng.randbytes(rng.choice([1, 100, 5000]))
    elif what == "empty":
        damaged.clear()
    elif what == "swapped":
        others = [path for path in sorted(world.pristine.rglob("*")) if path.is_file()]
        alike = [path for path in others if kind_of(path.relative_to(world.pristine).as_posix()) == kind_of(name)]
        damaged = bytearray(rng.choice(alike if rng.random() < 0.5 else others).read_bytes())
    else:
        return what, None
    return what, bytes(damaged)


def json_edits(content: bytes, rng: random.Random) -> Iterator[bytes]:
    """Yield JSON with one value changed, another kind of thing, or left out: every field once each; of lines, in one."""
    lines = content.splitlines()
    which = rng.randrange(len(lines)) if _is_json(lines[0]) and len(lines) > 1 else None
    said = json.loads(content if which is None else lines[which])
    indent = 1 if which is None and b"\n" in content else None
    for place in _places(said):
        for change in ("changed", "another kind", "left out"):
            copy = json.loads(json.dumps(said))
            holder = copy
            for step in place[:-1]:
                holder = holder[step]
            if change == "left out":
                del holder[place[-1]]
            else:
                old = holder[place[-1]]
                holder[place[-1]] = _changed(old, rng) if change == "changed" else rng.choice([None, "x", 7, [], {}, True])
            new = json.dumps(copy, indent=indent).encode()
            yield new if which is None else b"\n".join([*lines[:which], new, *lines[which + 1 :], b""])


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inside:
        yield from _places(part, (*place, name))


def _changed(value: Any, rng: random.Random) -> Any:
    """Return another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice([value + 1, -value - 1, value * 2 + 3])
    if isinstance(value, str):
        return rng.choice([value[:-1], f"{value}x", value.swapcase(), value[::-1]])
    if isinstance(value, list):
        return rng.choice([value[::-1], value[1:], [*value, *value]])
    return {} if isinstance(value, dict) else 0


def judge(world: World, mutant: Mutant) -> list[str]:
    """Damage the cache, ask every command in a fork, and return what went wrong: "silent", "traceback", "signal", "hang"."""
    world.restore()
    path = world.cache / mutant.path
    if mutant.content is None:
        path.unlink()
    else:
        path.write_bytes(mutant.content)
    code, found = _forked(world)
    if code < 0:
        return ["hang" if -code == signal.SIGALRM else f"signal {-code}"]
    if found is None:
        return ["traceback: outside of a command"]
    wrong = []
    older = kind_of(mutant.path) == "manifest" and mutant.content is None  # the version before stands then, and is shown
    unasked = {"verify", *(("ls", "info") if older else ())}
    for name, answer in found.items():
        if answer.code not in {0, *CLEAN}:
            wrong.append(f"traceback: {name}")
        elif answer.code == 0 and name not in unasked and not _as_expected(answer.said, world.expected[name].said, name):
            wrong.append(f"silent: {name}")
    if found["verify"].code == 0 and mutant.content is not None:
        wrong.append("unseen by verify")
    return wrong


def _as_expected(said: Any, expected: Any, name: str) -> bool:
    if name == "ls":  # of the entries that are whole: a broken one ends the command with 4
        return all(one in expected for one in said)
    return bool(said == expected)


def _forked(world: World) -> tuple[int, Answers | None]:
    """Return how a fork of this process ended (a negative number: by a signal), and what its commands answered."""
    target = world.root / "answers.json"
    target.unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(PATIENCE)
            found = answers(world)
            target.write_text(json.dumps({name: [one.code, one.said] for name, one in found.items()}))
            code = 0
        except BaseException:  # noqa: BLE001 - it is printed, and counted
            traceback.print_exc()
        finally:
            os._exit(code)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if ended:
        return ended, None
    said = json.loads(target.read_text())
    return 0, {name: Answer(code, one) for name, (code, one) in said.items()}


def as_json(world: World) -> None:
    """Let what is expected be what JSON makes of it."""
    world.expected = {name: Answer(one.code, json.loads(json.dumps(one.said))) for name, one in world.expected.items()}


def run(root: Path, count: int, seed: int, *, only: str = "", tuned: bool = True) -> dict[str, Counter[str]]:
    """Judge mutants; return, by kind of file, how many there were and how many went wrong in which way."""
    world = prepare(root, tuned=tuned)
    as_json(world)
    rng, counted = random.Random(seed), dict[str, Counter[str]]()  # noqa: S311 - of tests
    chosen = (mutant for mutant in mutants(world, rng) if only in kind_of(mutant.path))
    for number, mutant in zip(range(count), chosen, strict=False):
        wrong = judge(world, mutant)
        tally = counted.setdefault(kind_of(mutant.path), Counter())
        tally["mutants"] += 1
        tally.update({problem.split(":")[0].split(" ")[0] for problem in wrong})
        for problem in wrong:
            sys.stdout.write(f"seed {seed}, number {number}: {mutant.path}: {mutant.what}: {problem}\n")
            sys.stdout.flush()
        if wrong:
            kept = root / "wrong" / str(number)
            kept.mkdir(parents=True, exist_ok=True)
            (kept / Path(mutant.path).name).write_bytes(mutant.content or b"")
    return counted


def main() -> None:
    """Run as a script; end with 1 where a mutant was silent, crashed, hung or ended in a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="Files of this kind, such as manifest or heads.")
    parser.add_argument("--without-tuning", action="store_true", help="No checkpoint and no tuned head: sooner ready.")
    parser.add_argument("--work", type=Path, default=None, help="A folder for all of it; temporary by default.")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="mutants-"))
    started, children = time.monotonic(), []
    for job in range(options.jobs):
        child = os.fork()
        if child == 0:
            import torch

            torch.set_num_threads(1)
            root = work / str(job)
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir(parents=True)
            share = options.count // options.jobs + (job < options.count % options.jobs)
            counted = run(root, share, options.seed + job, only=options.only, tuned=not options.without_tuning)
            (work / f"{job}.json").write_text(json.dumps(counted))
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    total: dict[str, Counter[str]] = {}
    for job in range(options.jobs):
        for kind, tally in json.loads((work / f"{job}.json").read_text()).items():
            total.setdefault(kind, Counter()).update(tally)
    columns = ("mutants", "silent", "traceback", "signal", "hang", "unseen")
    table = ["".join(f"{name:>11}" for name in columns) + "  file"]
    for kind, tally in [*sorted(total.items()), ("all", sum(total.values(), Counter[str]()))]:
        table.append("".join(f"{tally[name]:>11}" for name in columns) + f"  {kind}")
    sys.stdout.write("\n".join([*table, f"{time.monotonic() - started:.0f} s", ""]))
    bad = sum(sum(tally[name] for name in columns[1:5]) for tally in total.values())
    sys.exit(1 if bad or any(codes) else 0)


if __name__ == "__main__":
    main()
