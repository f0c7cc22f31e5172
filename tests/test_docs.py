"""The documentation says what the code does: the reference is the options' own, every key of a grid is described."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest

from featcache.errors import UsageError
from featcache.experiments.bench import load_grid

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
SECTIONS = {  # of docs/grids.md: a file whose unknown key makes the loader name those that it knows
    "The file itself": "unknown = 1",
    "`[[dataset]]`": "[[dataset]]\nunknown = 1",
    "`[[backbone]]`": '[[dataset]]\ndata = "x"\n[[backbone]]\nunknown = 1',
    "`[finetune]`": "[finetune]\nunknown = 1",
}


def test_the_reference_is_that_of_the_commands() -> None:
    """``python docs/generate.py`` writes docs/commands.md as it stands."""
    generated = runpy.run_path(str(ROOT / "docs" / "generate.py"))["reference"]()

    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == generated


@pytest.mark.parametrize("section", list(SECTIONS))
def test_every_key_of_a_grid_is_described(section: str, tmp_path: Path) -> None:
    """What the loader takes stands in docs/grids.md, and nothing else does."""
    (tmp_path / "grid.toml").write_text(SECTIONS[section])
    with pytest.raises(UsageError, match=r"it takes .*") as refused:
        load_grid(tmp_path / "grid.toml")
    taken = set(re.search(r"it takes ([\w, ]+)", str(refused.value))[1].split(", "))  # type: ignore[index]
    (text,) = re.findall(
        rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", (ROOT / "docs" / "grids.md").read_text(), re.MULTILINE | re.DOTALL
    )
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]

    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == taken


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "grids.md"], ids=lambda page: page.name)
def test_grids_in_the_documentation_are_read(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever copies one has a grid of two data sets and two backbones."""
    monkeypatch.setenv("SCANS", str(tmp_path))
    (block,) = re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "grid.toml").write_text(block)
    grid = load_grid(tmp_path / "grid.toml")

    assert (len(grid.data), len(grid.backbones), len(grid.heads), len(grid.plans)) == (2, 2, 3, 1)
    assert tomllib.loads(block)["seeds"] == list(grid.seeds) == [0, 1, 2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    """A page that was moved takes its links with it."""
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8"))

    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_gives_the_figures_of_the_records() -> None:
    """Each figure of its table is the one that ``featcache bench pipelines/lab-lite0.toml`` gave, rounded to a tenth."""
    tables = {}
    for line in (ROOT / "benchmarks" / "lab-lite0.md").read_text().splitlines()[2:]:
        dataset, _, method, accuracy, spread = (cell.strip() for cell in line.split("|")[1:6])
        deviation = () if "alike" in spread else (float(spread.split()[1]),)
        tables[dataset, method] = (float(accuracy), *deviation)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w-]+) \| (\d+\.\d.*\d) \|$", text, re.MULTILINE)

    assert len(rows) == len({dataset for dataset, _ in tables})
    for dataset, cells in rows:
        for method, cell in zip(("knn", "logistic", "last:1"), cells.split(" | "), strict=True):
            figures = tuple(map(float, cell.split(" ± ")))
            assert figures == pytest.approx(tables[dataset, method], abs=0.0501), f"{dataset} {method}"
