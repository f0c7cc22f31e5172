"""The door: no value of the wrong kind gets past it, from Python or from a pipeline file."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featcache
from featcache.errors import UsageError
from featcache.experiments.bench import load_grid
from featcache.experiments.fit import FitPlan
from featcache.extraction.feature_cache import Output, Settings
from featcache.finetuning import FineTunePlan, Unfreeze
from featcache.heads import ALL, ATTENTIVE, ENSEMBLE, HEAD_NAMES, ZEROSHOT
from featcache.heads.search import HEADS
from featcache.specs import MAX_SEED, BackboneSpec, FeatureSpec, Transform, TransformOverrides, Views, check_seed

NEEDED: dict[type, dict[str, Any]] = {
    Transform: {},
    TransformOverrides: {},
    BackboneSpec: {},
    Views: {},
    FeatureSpec: {"transform": Transform(), "backbone": None},
    FineTunePlan: {"unfreeze": Unfreeze.parse("all")},
    FitPlan: {},
    Settings: {"cache": Path("cache")},
    Output: {},
}
ODD: tuple[tuple[type, dict[str, Any]], ...] = (
    (Transform, {"interpolation": "cubic"}),
    (Transform, {"input_size": 0}),
    (Transform, {"input_size": 10**9}),
    (Transform, {"input_size": 64.5}),
    (Transform, {"crop_pct": float("inf")}),
    (Transform, {"mean": (0.5, 0.5)}),
    (Transform, {"mean": (0.5, float("nan"), 0.5)}),
    (Transform, {"std": (0.5, 0.0, 0.5)}),
    (TransformOverrides, {"crop_pct": -1}),
    (TransformOverrides, {"std": (0, 0, 0)}),
    (BackboneSpec, {"name": ""}),
    (BackboneSpec, {"name": "resnet18\x1b[2J"}),
    (BackboneSpec, {"random_init": 2**33}),
    (BackboneSpec, {"random_init": True}),
    (BackboneSpec, {"pool": "average"}),
    (Views, {"count": 10**9}),
    (Views, {"seed": -1}),
    (FeatureSpec, {"dtype": "float63"}),
    (FineTunePlan, {"precision": "bf16"}),
    (FineTunePlan, {"dtype": "int3"}),
    (FineTunePlan, {"lr": ()}),
    (FineTunePlan, {"lr": (float("nan"),)}),
    (FineTunePlan, {"lr": "fast"}),
    (FineTunePlan, {"lr": (0.0,)}),
    (FineTunePlan, {"epochs": 1e400}),
    (FineTunePlan, {"epochs": 10**400}),
    (FineTunePlan, {"ema": 1}),
    (FineTunePlan, {"clip": -1.0}),
    (FineTunePlan, {"views": 0}),
    (FineTunePlan, {"warmup": 2}),
    (FitPlan, {"target": "lables"}),
    (FitPlan, {"views": 0}),
    (FitPlan, {"folds": -3}),
    (FitPlan, {"heads": "logistic"}),
    (FitPlan, {"heads": ()}),
    (FitPlan, {"shots": (0,)}),
    (FitPlan, {"budget": float("nan")}),
    (FitPlan, {"grid": (("C", ()),)}),
    (FitPlan, {"grid": (("C", (float("nan"),)),)}),
    (FitPlan, {"format": "pickle"}),
    (Settings, {"batch_size": 0}),
    (Settings, {"batch_size": 10**12}),
    (Settings, {"workers": 10**6}),
    (Settings, {"max_bad": 2.0}),
    (Settings, {"part": (3, 2)}),
    (Settings, {"part": (1, 2, 3)}),
    (Settings, {"runtime": "tpu"}),
    (Settings, {"engine": "spark"}),
    (Output, {"cut": 5}),
)
TOML = """heads = ["logistic"]
unfreeze = ["last:1"]
{top}
[[dataset]]
data = "sklearn:digits"
{data}
[[backbone]]
name = "mini"
{backbone}
[finetune]
{finetune}
"""


FIELDS = [(kind, field.name) for kind in NEEDED for field in fields(kind)]


@pytest.mark.parametrize(
    ("kind", "name"),
    FIELDS,
    ids=lambda part: getattr(part, "__name__", part),
)
def test_no_field_takes_a_value_of_another_kind(kind: Callable[..., Any], name: str) -> None:
    """Whatever field is given an object that nothing is, the error names the field."""
    with pytest.raises(UsageError, match=name):
        kind(**(NEEDED[kind] | {name: object()}))  # type: ignore[index]


@pytest.mark.parametrize(("kind", "odd"), ODD, ids=[f"{kind.__name__}-{str(odd)[:40]}" for kind, odd in ODD])
def test_an_odd_value_is_refused_where_it_is_made(kind: Callable[..., Any], odd: dict[str, Any]) -> None:
    """Wrong choices, bounds, NaN, infinite and enormous numbers end in a usage error and nothing else."""
    with pytest.raises(UsageError, match=r"needed|possible|exclude|from 0 up to|above 0|list"):
        kind(**(NEEDED[kind] | odd))  # type: ignore[index]


def test_what_python_and_toml_write_otherwise_is_made_to_fit() -> None:
    """Lists become tuples, whole numbers floats, texts paths: the values are those of the command line."""
    assert Transform(mean=[0, 0, 0]) == Transform(mean=(0.0, 0.0, 0.0))  # type: ignore[arg-type]
    assert type(Transform(crop_pct=1).crop_pct) is float
    assert Settings("cache").cache == Path("cache")  # type: ignore[arg-type]
    assert FitPlan(heads=["knn"], folds=np.int64(3)) == FitPlan(heads=("knn",), folds=3)  # type: ignore[arg-type]
    assert type(FitPlan(grid=(("k", (5,)),)).grid[0][1][0]) is int


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 2**80, 1.5, True, "1", None, float("nan")])
def test_a_seed_is_a_whole_number_that_every_generator_takes(seed: Any) -> None:
    """What NumPy would refuse in the middle of a run is refused before it."""
    with pytest.raises(UsageError, match=r"seed: .* a whole number from 0 to 4294967295 is needed"):
        check_seed(seed)


@pytest.mark.parametrize(
    "call",
    [
        lambda: featcache.fit("sklearn:digits", plan={"heads": ["knn"]}),  # type: ignore[arg-type]
        lambda: featcache.fit("sklearn:digits", seed=2**33),
        lambda: featcache.fit("sklearn:digits", settings="cache"),  # type: ignore[arg-type]
        lambda: featcache.fit("sklearn:digits", backbone=18),  # type: ignore[arg-type]
        lambda: featcache.fit(12),  # type: ignore[arg-type]
        lambda: featcache.extract("sklearn:digits", cut=3),  # type: ignore[arg-type]
        lambda: featcache.fit("sklearn:digits", heads="knn"),
        lambda: featcache.fit("sklearn:digits", heads=[]),
        lambda: featcache.finetune("sklearn:digits", unfreeze=1),  # type: ignore[arg-type]
        lambda: featcache.finetune("sklearn:digits", probes="logistic"),
        lambda: featcache.sweep("sklearn:digits", plan=3),  # type: ignore[arg-type]
    ],
)
def test_a_function_refuses_an_argument_of_another_kind(call: Callable[[], Any]) -> None:
    """The functions of the package check their arguments before they compute anything."""
    with pytest.raises(UsageError, match="is needed"):
        call()


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("top", 'name = "../elsewhere"'),
        ("top", 'name = "/elsewhere"'),
        ("top", 'name = ""'),
        ("top", "name = 3"),
        ("top", 'name = ".."'),
        ("top", 'name = "a\\u001b[2J"'),
        ("top", "seeds = [true]"),
        ("top", "seeds = [99999999999999999999999]"),
        ("top", "seeds = [1.5]"),
        ("top", "seeds = []"),
        ("data", "name = 3"),
        ("backbone", "weights = 3"),
        ("backbone", 'random_init = "x"'),
        ("backbone", "random_init = -1"),
        ("backbone", 'interpolation = "cubic"'),
        ("backbone", 'mean = "grey"'),
        ("backbone", "std = [0, 0, 0]"),
        ("backbone", "crop_pct = nan"),
        ("backbone", "input_size = 999999999"),
        ("backbone", "model_args = []"),
        ("backbone", "model_args = {x = 2020-01-01}"),
        ("backbone", "model_args = {x = {y = 1}}"),
        ("backbone", "model_args = {x = nan}"),
        ("finetune", 'lr = "x"'),
        ("finetune", "lr = nan"),
        ("finetune", "lr = [1e-3, -inf]"),
        ("finetune", "lr = []"),
        ("finetune", "epochs = 1.5"),
        ("finetune", "epochs = inf"),
        ("finetune", 'precision = "bf16"'),
        ("finetune", 'dtype = "int3"'),
        ("finetune", "train_batchnorm = 1"),
        ("finetune", "views = 1000000000"),
    ],
)
def test_a_pipeline_file_cannot_say_what_nothing_can_do(tmp_path: Path, where: str, line: str) -> None:
    """Values of the wrong kind, out of bounds, or leading out of the output folder are refused."""
    parts = dict.fromkeys(("top", "data", "backbone", "finetune"), "") | {where: line}
    (tmp_path / "grid.toml").write_text(TOML.format(**parts))

    with pytest.raises(UsageError, match=r"grid\.toml: "):
        load_grid(tmp_path / "grid.toml")


@pytest.mark.parametrize(
    "text", ["heads = 3", 'backbone = [3]\nheads = ["knn"]', 'heads = ["nope"]', "dataset = 3", "\x00", "[" * 9000]
)
def test_a_file_that_is_no_pipeline_is_refused(tmp_path: Path, text: str) -> None:
    """Tables of another shape, unknown heads and what is no TOML end in a usage error."""
    (tmp_path / "grid.toml").write_text(text)

    with pytest.raises(UsageError, match=r"grid\.toml: "):
        load_grid(tmp_path / "grid.toml")


def test_the_names_of_heads_are_the_heads() -> None:
    """The names that are known without scikit-learn are those of the families."""
    assert (*HEADS, *ZEROSHOT, *ATTENTIVE, ENSEMBLE, ALL) == HEAD_NAMES
