"""What a head is made of is told beside it: a stored head of another recipe is trained again, never taken for today's."""

import dis
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import BaseEstimator

from featcache.datasets import open_dataset
from featcache.experiments.fit import FitPlan, run_fit
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.finetuning import attentive, finetuner, loop
from featcache.fingerprint import fingerprint
from featcache.heads import ATTENTIVE, ENSEMBLE, PARAMETERS, ZEROSHOT, linear, nonlinear, search, zeroshot
from featcache.heads.base import HeadFamily
from featcache.reports import RECIPES
from featcache.specs import BackboneSpec

# of rooms whose constants choose: solvers have their stated distance from the optimum instead
HEADS = ("heads.base", "heads.linear", "heads.nonlinear", "heads.search", "heads.zeroshot")
TRAININGS = ("finetuning.attentive", "finetuning.finetuner", "finetuning.loop", "finetuning.model")
ROOMS = {f"featcache.{name}" for name in HEADS + TRAININGS}
# constants that decide how fast, or what is remarked, not what comes out
INDIFFERENT = ("_ROWS", "_BYTES", "_AT_ONCE", "_SECONDS", "_RISE", "_SLIGHT", "_AHEAD")


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a function's code with that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def is_global(instruction: dis.Instruction) -> bool:
    """Tell whether an instruction reads a module's name: attributes may be called the same."""
    return instruction.opname in {"LOAD_GLOBAL", "LOAD_NAME"}


def constants(function: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield the named constants that a function reads, and those of the rooms' functions and classes that it names."""
    if isinstance(function, partial):
        yield from constants(function.func, seen)
        return
    if id(function) in seen or getattr(function, "__module__", None) not in ROOMS:
        return
    seen.add(id(function))
    if isinstance(function, type):
        for member in vars(function).values():
            inside = (getattr(member, name, None) for name in ("fget", "func", "__func__"))
            yield from constants(next(filter(None, inside), member), seen)
        return
    inner = getattr(inspect.unwrap(function), "__code__", None)
    if inner is None:
        return
    for cell in function.__closure__ or ():
        yield from constants(cell.cell_contents, seen)
    for name in sorted({each.argval for code in codes(inner) for each in dis.get_instructions(code) if is_global(each)}):
        value = function.__globals__.get(name)
        if name.isupper() and isinstance(value, int | float | str | tuple | list) and not name.endswith(INDIFFERENT):
            yield name, value
        elif callable(value):
            yield from constants(value, seen)


def plain(value: Any) -> Any:
    """Return an estimator's parameter as JSON has it: of estimators those that are not scikit-learn's own defaults."""
    if isinstance(value, BaseEstimator):
        usual = {name: each.default for name, each in inspect.signature(type(value)).parameters.items()}
        given = value.get_params(deep=False).items()
        return [type(value).__name__, {name: plain(each) for name, each in given if each is not usual[name]}]
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if callable(value):  # such as a density's method: its scale is told by the constant that it comes from
        return getattr(value, "__qualname__", type(value).__name__)
    return value if isinstance(value, int | float | str | None) else type(value).__name__


def recipe(head: str) -> str:
    """Return a head's recipe: its grids, its estimators' parameters, and the constants that its functions read."""
    rng, parts, seen = np.random.default_rng(0), list[Any](), set[int]()
    X, y = rng.standard_normal((40, 8)).astype(np.float32), np.arange(40) % 2
    targets: dict[str, Any] = {"label": y, "labels": np.eye(2, dtype=bool)[y], "number": X[:, 0].astype(np.float64)}
    for kind, families in search.FAMILIES.items():
        family: HeadFamily | None = families.get(head)
        if family is None:
            continue
        grids = [family.grid(count) for count in (1, 100, 10_000)]
        estimator, _ = family.fit(grids[1][0], X, targets[kind], 0)
        parts += [kind, grids, family.coarse, family.by_loss, plain(estimator)]
        # not the race, which comes to what these come to, sooner
        roads = (family.grid, family.evaluate_grid, family.fit, *([linear.first_near] if family.by_loss else []))
        parts += [[name, plain(value)] for road in roads for name, value in constants(road, seen)]
    return fingerprint(parts)[:8]


def recipe_of_road(*roads: Callable[..., Any]) -> str:
    """Return the recipe of a head that is no family's: the constants that its functions read."""
    seen = set[int]()
    return fingerprint([[name, plain(value)] for road in roads for name, value in constants(road, seen)])[:8]


def told_recipes() -> dict[str, str]:
    """Return the recipes of all heads, as they are today."""
    recipes = {head: recipe(head) for head in PARAMETERS}
    recipes |= dict.fromkeys(ZEROSHOT, recipe_of_road(zeroshot.fit_zeroshot))
    recipes |= dict.fromkeys(ATTENTIVE, recipe_of_road(attentive.AttentiveTraining))
    return recipes | {ENSEMBLE: recipe_of_road(search.ensemble), "finetune": recipe_of_road(finetuner.Finetuner, loop.Trial)}


def test_recipes_are_told() -> None:
    """What is told of each head is what it is made of: a change of one of them is a change of the other."""
    today = told_recipes()

    changed = {head: name for head, name in today.items() if RECIPES.get(head) != name}
    assert not changed, f"heads are made otherwise than RECIPES tells: put {changed} there, and they are trained again"
    assert today.keys() == RECIPES.keys()


@pytest.mark.parametrize("name", ["_BINS", "_COMPONENTS"])
def test_a_constant_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is greater than anything of the small set that parameters are told of."""
    before = recipe("boosting")

    monkeypatch.setattr(nonlinear, name, 63)

    assert recipe("boosting") != before


def test_a_head_of_another_recipe_is_fitted_again(
    folder: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies under the same name; what was made of it, an ensemble, is made anew too, and other heads answer from files."""
    plan = FitPlan(("knn", "mlp", "ensemble"), baselines=False)
    run = partial(run_fit, FeatureCache(open_dataset(folder), tiny, settings), plan)
    first = run().heads
    before = [head.bundle.stat().st_mtime_ns for head in first]
    assert [head.bundle.stat().st_mtime_ns for head in run().heads] == before

    monkeypatch.setitem(RECIPES, "mlp", "another")
    again = run().heads

    assert [head.bundle for head in again] == [head.bundle for head in first]
    told = zip([head.record.method for head in again], again, before, strict=True)
    assert {name for name, head, time in told if head.bundle.stat().st_mtime_ns > time} == {"mlp", "ensemble"}


def test_a_record_tells_its_recipes(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """A grid's cell runs again where they are others; those of before tell none, and are of today's but for trees."""
    plan = FitPlan(("knn", "boosting"), baselines=False)
    knn, trees = (head.record for head in run_fit(FeatureCache(open_dataset(folder), tiny, settings), plan).heads)

    before = [replace(record, environment={}) for record in (knn, trees)]
    others = [replace(record, environment={"recipes": {record.method: "another"}}) for record in (knn, trees)]

    assert [record.is_current for record in (knn, trees, *before, *others)] == [True, True, True, False, False, False]
