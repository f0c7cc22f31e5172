"""A small sample of damaged files: no command is silently wrong, crashes, hangs or ends in a traceback."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "faults" / "mutants.py"


def test_no_damage_is_silent(tmp_path: Path) -> None:
    """A dozen mutants of an entry's files, drawn from a seed; the script alone draws as many as one likes."""
    command = [sys.executable, str(SCRIPT), "--count", "12", "--jobs", "1", "--seed", "3", "--without-tuning"]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--work", str(tmp_path)], capture_output=True, text=True, check=False, env=environment)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-2].split() == ["12", "0", "0", "0", "0", "0", "all"]
