"""The command line's last border: one line and an exit code, whatever happened."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from support import Outcome

from featcache.cli import ended_by, main
from featcache.cli.models import _columns
from featcache.display import printable
from featcache.errors import DataError


def abort(cause: BaseException) -> click.Abort:
    """Return what click makes of an interrupt or of a file that ended too soon."""
    error = click.Abort()
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (abort(KeyboardInterrupt()), 130, "interrupted"),
        (abort(EOFError("no data left in file")), 1, "unexpected EOFError: no data left in file"),
        (RecursionError("too deep"), 1, "unexpected RecursionError"),
        (MemoryError(), 5, "not enough memory"),
        (OSError(28, "No space left on device", "x.h5"), 4, "x.h5: No space left on device"),
        (DataError("bad\x1b]0;title\x07\nerror: forged"), 3, r"bad\x1b]0;title\x07\nerror: forged"),
        (click.UsageError("no \x1b[31m such"), 2, "no "),
    ],
)
def test_whatever_ends_a_command_is_one_line_and_a_code(
    error: BaseException, code: int, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No traceback, no escape sequence, and a file that ended too soon is no interrupt."""
    monkeypatch.delenv("FEATCACHE_TRACEBACK", raising=False)
    assert ended_by(error) == code
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said
    assert "\x1b" not in said


def test_a_traceback_is_there_for_who_asks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """FEATCACHE_TRACEBACK shows where an unforeseen error came from."""
    monkeypatch.setenv("FEATCACHE_TRACEBACK", "1")
    ended_by(ValueError("odd"))
    assert "ValueError: odd" in capsys.readouterr().err.split("error: unexpected")[0]


@pytest.mark.parametrize("text", ["plain ä 漢", "a b", ""])
def test_printable_text_is_left_alone(text: str) -> None:
    """Letters of any script and spaces stay."""
    assert printable(text) == text


def test_a_file_that_is_no_archive_is_a_data_error(run: Callable[..., Outcome], tmp_path: Path) -> None:
    """An empty .npz is bad data, not an interrupt."""
    (tmp_path / "empty.npz").write_bytes(b"")
    outcome = run("extract", tmp_path / "empty.npz")
    assert outcome.code != 130
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("fit", "x", "--seed", "8589934592"),
        ("fit", "x", "--mean", "nan"),
        ("fit", "x", "--std", "inf"),
        ("fit", "x", "--crop-pct", "nan"),
        ("fit", "x", "--grid", "C=nan"),
        ("fit", "x", "--shots", "99999999999999999999"),
        ("fit", "x", "--budget", "nan"),
        ("fit", "x", "--budget", "-5s"),
        ("fit", "x", "--max-bad", "nan%"),
        ("finetune", "x", "--lr", "nan"),
        ("finetune", "x", "--head-lr", "inf"),
        ("finetune", "x", "--price", "nan"),
        ("finetune", "x", "--cache-budget", "9" * 30),
        ("extract", "x", "--part", "1/99999999999999999999"),
        ("extract", "x", "--views-seed", "8589934592"),
        ("extract", "x", "--random-init", "8589934592"),
    ],
    ids=" ".join,
)
def test_odd_numbers_are_usage_errors(run: Callable[..., Outcome], arguments: tuple[str, ...]) -> None:
    """NaN, infinite and enormous numbers are refused by the option's name."""
    outcome = run(*arguments)
    assert outcome.code == 2
    assert arguments[2] in outcome.err


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    """Whoever reads only the first line of a long output sees no error, and the command ends with 0."""
    code = "import sys; sys.argv[0] = 'featcache'; from featcache.__main__ import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "store", "ls", "--cache", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(60) == 0
    assert said == b""


def test_a_command_loads_libraries_without_their_documentation() -> None:
    """What heads need of SciPy and scikit-learn loads without docstrings, which SciPy would else write anew for long."""
    code = (
        "import inspect, sys; from featcache.__main__ import main; sys.argv = ['featcache', '--version']\n"
        "try:\n    main()\nfinally:\n    assert inspect.getdoc(len) is None; import featcache.heads.search, scipy.signal"
    )
    ended = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_main_leaves_unforeseen_errors_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of a kind that nobody thought of ends with 1 and asks for a report."""

    def broken(*_: object, **__: object) -> None:
        raise LookupError("nobody thought of it")

    monkeypatch.setattr("featcache.extraction.entry_folders", broken)
    with pytest.raises(SystemExit) as ended:
        main(["store", "ls"])
    assert ended.value.code == 1
    assert "unexpected LookupError: nobody thought of it" in capsys.readouterr().err


def test_a_class_called_like_a_column_keeps_its_own() -> None:
    """Probabilities of classes named ``path`` or ``reason`` stand in columns that nothing else is called."""
    assert _columns(("cat", "dog")) == ["cat", "dog"]
    assert _columns(("path", "reason")) == ["p(path)", "p(reason)"]
