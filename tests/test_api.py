"""The package's functions and names: what is exported, what they take, how results show themselves."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import featcache
from featcache import api
from featcache.display import Displayed


def test_every_exported_name_is_there() -> None:
    """What a star import, a type checker and ``dir`` promise is found, each where it says."""
    assert sorted(featcache.__all__) == featcache.__all__
    assert set(featcache.__all__) == set(featcache._HOMES)
    assert all(getattr(featcache, name).__module__.startswith("featcache") for name in featcache.__all__)
    assert set(featcache.__all__) <= set(dir(featcache))


def test_importing_the_functions_loads_nothing_heavy() -> None:
    """Signatures of ``featcache.api`` cost neither NumPy nor what computes."""
    code = "import sys, featcache.api; print({'numpy', 'torch', 'sklearn', 'h5py'} & set(sys.modules))"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_heads_are_named_without_a_plan(folder: Path, tiny: featcache.BackboneSpec, settings: featcache.Settings) -> None:
    """They go by their names beside a plan's other values; a list and a plan of heads at once are refused by both names."""
    heads = featcache.fit(folder, tiny, heads=["ridge", "knn"], settings=settings).heads

    assert {head.record.method for head in heads} == {"ridge", "knn"}
    with pytest.raises(featcache.UsageError, match=r"heads.*plan"):
        featcache.fit(folder, tiny, heads=["knn"], plan=featcache.FitPlan(), settings=settings)


def test_settings_without_a_cache_take_the_usual_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever wants another device need not say where the cache is."""
    monkeypatch.setenv("FEATCACHE_CACHE", str(tmp_path))

    assert featcache.Settings(device="cpu").cache == tmp_path


@pytest.mark.parametrize(
    "function", [api.extract, api.extract_cuts, api.estimate, api.fit, api.predict, api.export, api.bench]
)
def test_functions_take_six_arguments_at_most(function: object) -> None:
    """What is more belongs into a value: a spec, a plan, settings."""
    assert callable(function)
    assert len(inspect.signature(function).parameters) <= 6


INPUTS = {  # values that a caller makes: their own text says what they hold
    "BackboneSpec", "Dataset", "FeatureExtractor", "FeatureSpec", "FeatureStore", "FineTunePlan", "FitPlan", "ModelFile",
    "PagePlan", "Places", "RejectPlan", "Settings", "TransformOverrides", "Unfreeze", "Views",
}  # fmt: skip


def test_every_result_shows_itself_in_a_notebook() -> None:
    """Whatever the package exports is a function, an error, what a caller makes, or has a table of its own."""
    exported = {name: getattr(featcache, name) for name in featcache.__all__}
    results = {
        name: value
        for name, value in exported.items()
        if inspect.isclass(value) and not issubclass(value, Exception) and name not in INPUTS
    }

    assert {"FitResult", "GapResult", "AuditResult", "AdviceResult", "RunRecord", "Features"} <= results.keys()
    assert exported.keys() >= INPUTS
    for name, value in results.items():
        assert issubclass(value, Displayed), name
        assert value.table is not Displayed.table, name


def test_values_show_themselves_in_a_few_lines(
    folder: Path, tiny: featcache.BackboneSpec, settings: featcache.Settings
) -> None:
    """Neither bytes of images nor a thousand paths nor weights; notebooks get a table, in which every text is escaped."""
    dataset = featcache.open_dataset(folder)
    result = featcache.fit(dataset, tiny, heads=["ridge"], settings=settings)
    store = result.extracted.store
    shown = [dataset, store, store.features(), result, *result.heads, result.extracted, result.heads[0].record]

    assert all(len(repr(value).splitlines()) <= 20 and len(repr(value)) < 1500 for value in shown)
    assert "36 images, 3 labels" in repr(dataset)
    assert "(36, " in repr(store.features())
    assert "needs no backbone" in repr(result)
    assert all("<table>" in value._repr_html_() for value in shown[2:])
