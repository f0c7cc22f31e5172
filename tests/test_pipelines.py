"""The pipelines that come with the project: each can be read, and the recipes of fine-tuning run from start to end."""

from pathlib import Path

import pytest

from featcache.experiments.bench import load_grid, run_bench
from featcache.extraction.feature_cache import Settings

PIPELINES = Path(__file__).parent.parent / "pipelines"
RECIPES = ("two-phase", "last-stage", "half-unfrozen")


@pytest.mark.parametrize("path", sorted(PIPELINES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_pipeline_can_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is the file's, its header gives the command."""
    for name in ("FEATCACHE_LAB", "FEATCACHE_LAB_WEIGHTS", "FEATCACHE_DATA"):
        monkeypatch.setenv(name, "somewhere")

    assert load_grid(path).name == path.stem
    assert path.stem in path.read_text().splitlines()[0]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_run(name: str, folder: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell gives a record, tuned ones with a gap or why there is none; the recipe's rates are those that were used."""
    monkeypatch.setenv("FEATCACHE_DATA", str(folder))
    grid = load_grid(PIPELINES / f"{name}.toml")

    result = run_bench(grid, settings, tmp_path / "out")

    assert not result.failures
    assert [record.method for record in result.records] == [*grid.heads, *(plan.unfreeze.text for plan in grid.plans)]
    for record, plan in zip(result.records[len(grid.heads) :], grid.plans, strict=True):
        assert record.gap is not None or "no gain on validation" in " ".join(record.notes)
        assert record.params["lr"] in plan.lr
        assert record.request["plan"]["optimiser"] == plan.optimiser
