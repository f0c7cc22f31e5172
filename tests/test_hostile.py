"""Hostile data sets end in an answer or in a plain error; ``faults/hostile_sources.py`` watches memory and time as well."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.hostile_cases import CANARY, CASES
from faults.hostile_sources import look_at
from support import TINY, Run

from featcache.errors import DataError, SetupError, UsageError

# What takes long to write or to decode, or loads a library for itself, is left to the script.
HEAVY = ("49 megapixels", "60 ", "400 megapixels", "200 MB", "gigabytes of zeros", "one long text", "a terabyte of zeros",
         "three million", "one image a hundred", "ten thousand", "a bomb")  # fmt: skip
QUICK = [name for name in CASES if not name.startswith(("torchvision", "hf")) and not any(word in name for word in HEAVY)]
NAMED = [name for name in CASES if name.startswith("torchvision") and "empty" not in name]


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    """Let what hangs fail."""

    def late(*_: Any) -> None:
        raise KeyboardInterrupt("it hangs")  # what no border takes for an error of the data

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", [*QUICK, *NAMED])
@pytest.mark.filterwarnings("ignore")  # of libraries, on what is broken
def test_a_hostile_set_ends_in_an_answer_or_a_plain_error(name: str, tmp_path: Path) -> None:
    """Nothing hangs, nothing is a traceback, no code runs; an error is one of the data, of usage or of a missing library."""
    data = CASES[name](tmp_path)

    try:
        said = look_at(data, tmp_path)
    except (DataError, UsageError, SetupError) as error:
        said = str(error)

    assert said
    assert not CANARY.exists()


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("npz of 0 bytes", 3, "not a .npz"),
        ("tar a surrogate for a label", 3, "no text that UTF-8 can write"),
        ("csv NUL in a path", 3, "line 2: a path has a NUL"),
        ("files names of control characters", 0, r"\x1b[2J\x1b]0;x\x07\n.png: left out"),
        ("csv control characters", 0, r"a\x1b[2J\n.png: left out"),
        ("files a pipe that is a npz", 3, "a pipe, socket or device, not a file"),
        ("hdf5 names of control characters", 3, "row 3: no label"),
    ],
)
def test_the_command_line_ends_with_its_code(name: str, code: int, said: str, tmp_path: Path, run: Run) -> None:
    """A user sees one plain line, and nothing that moves the cursor."""
    done = run("extract", CASES[name](tmp_path), *TINY, "--runtime", "torch", "--max-bad", "100%")

    assert done.code == code
    assert said in done.err
    assert "\x1b" not in done.err + done.out
    assert "Traceback" not in done.err
