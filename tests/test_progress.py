"""How far a job is: lines where no bar can be drawn, a bar that goes where one can, silence where it was asked for."""

import io
import sys
import time
from collections.abc import Iterator

import pytest

from featcache import display
from featcache.display import progress, set_up_notes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands until it is set."""
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture(autouse=True)
def _not_silent() -> Iterator[None]:
    """Let what was quiet in one test say nothing of the next."""
    yield
    display._silent.set(False)


def work(clock: list[float], seconds: float, steps: int = 100) -> None:
    """Go through a job that takes so long."""
    with progress(steps * 10, "extract photos", "image") as bar:
        for _ in range(steps):
            clock[0] += seconds / steps
            bar.update(10)


def test_without_a_terminal_lines_say_how_far_it_is(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """After two seconds a line says how much is done and what is left, then one every ten seconds, one in the end."""
    set_up_notes()

    work(clock, 40)

    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "extract photos: 50 of 1,000 images (5 %) in 2.0 s, about 38 s to go"
    assert lines[-1] == "extract photos: 1,000 images in 40 s (25 a second)"
    assert len(lines) == 5


def test_hours_do_not_fill_a_log(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Lines come rarer as a job gets longer: ten hours have less than two hundred."""
    set_up_notes()

    work(clock, 36_000, steps=36_000)

    assert 50 < len(capsys.readouterr().err.splitlines()) < 200


def test_what_is_short_or_quiet_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Below two seconds there is no line, and with ``--quiet`` there is none at all."""
    set_up_notes()
    work(clock, 1)
    set_up_notes(quiet=True)
    work(clock, 60)

    assert capsys.readouterr().err == ""


def test_what_ends_early_counts_what_was_done(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Epochs that were left out are no work, and what follows is told of the rest."""
    set_up_notes()

    with progress(1000, "finetune last:1") as bar:
        clock[0] = 30.0  # most of it went by before the first step, and tells nothing of the others
        bar.update(100)
        bar.tell("val 80.0 %")
        bar.skip(700)
        clock[0] = 40.0
        bar.update(100)
        clock[0] = 50.0
        bar.update(100)

    first, last = capsys.readouterr().err.splitlines()
    assert first == "finetune last:1: 200 of 300 samples (67 %) in 40 s, about 10 s to go; val 80.0 %"
    assert last == "finetune last:1: 300 samples in 50 s (6 a second)"


def test_a_bar_goes_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the bar is wiped, and no line stays of what was short."""
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(display, "_WORTH_A_LINE", 1e9)
    set_up_notes()

    with progress(10, "extract photos", "image") as bar:
        time.sleep(1.1)  # a bar comes after a second
        bar.update(5)
        assert "50%" in terminal.getvalue()
        bar.update(5)

    *_, shown, after = terminal.getvalue().split("\r")
    assert not shown.strip()
    assert not after
