"""The example notebook runs from a fresh kernel, and results show themselves there as tables."""

import os
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "docs" / "example.ipynb"


def test_the_example_runs_and_shows_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell ends without an error; those that showed a table when it was committed show one now."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("FEATCACHE_FETCH", "never")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLE.parent.parent), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(EXAMPLE, as_version=4)
    nbformat.validate(notebook)
    committed = [_has_table(cell) for cell in notebook.cells]

    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    assert [_has_table(cell) for cell in notebook.cells] == committed
    assert sum(committed) == 4
    assert "same" in str(notebook.cells[-2])


def _has_table(cell: object) -> bool:
    return "<table>" in str(getattr(cell, "outputs", ""))
