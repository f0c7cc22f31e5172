"""Several processes that train one model."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from support import TINY, Outcome

NOTED = """import os, sys
note = open(sys.argv.pop(1) + "." + os.environ["RANK"], "w", buffering=1)
def look(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        note.write(f"{arguments[0]}\\n")
    elif event in {"os.rename", "os.link", "os.remove"}:
        note.write(f"{arguments[0]}\\n")
sys.addaudithook(look)
from featcache.cli import main
main()
"""


def test_two_processes_train_as_one(run: Callable[..., Outcome], subtle: Path, tmp_path: Path) -> None:
    """Started by torchrun, each takes half of every batch; the weights are those of one process, and one alone writes."""
    command = ("finetune", str(subtle), *TINY, "--epochs", "2", "--lr", "1e-3", "--dtype", "float32", "--runtime", "torch")
    script = tmp_path / "noted.py"  # the command line, each process noting which files it opens to write, renames, links
    script.write_text(NOTED)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), str(tmp_path / "note"))

    alone = run(*command, "--cache", tmp_path / "one", "--json")
    together = subprocess.run(
        [*launcher, *command, "--cache", str(tmp_path / "two"), "--json"], capture_output=True, text=True, check=False
    )

    assert alone.code == together.returncode == 0, alone.err + together.stderr
    one, two = (load_file(next((tmp_path / name).glob("*/*/tuned/*.safetensors"))) for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    first, second = (
        {Path(line).parent.name for line in (tmp_path / f"note.{rank}").read_text().splitlines()} for rank in (0, 1)
    )
    assert {"tuned", "heads", "records"} <= first
    assert not {"tuned", "heads", "records"} & second
