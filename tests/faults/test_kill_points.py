"""A sample of the calls at which `harness.py` kills the commands; all of them take it half an hour."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parent / "harness.py"
needs_shim = pytest.mark.skipif(
    shutil.which("gcc") is None or sys.platform != "linux", reason="a shim is compiled for Linux with gcc"
)


def explore(*arguments: str) -> list[str]:
    """Run the harness and return its last line for each command."""
    done = subprocess.run([sys.executable, str(HARNESS), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "bad" in line]


@needs_shim
def test_killed_anywhere_the_next_run_ends_as_if_nothing_had_been() -> None:
    """Same numbers, same files, nothing committed computed again, at most one epoch trained again, no litter.

    Several grids at once write whole lines.
    """
    lines = explore("--every", "60", "--first", "29", "--together", "3")

    names = [line.split(":")[0] for line in lines]
    assert names == ["extract", "fit", "finetune", "bench", "bench"]
    assert all(" 0 bad" in line for line in lines)
