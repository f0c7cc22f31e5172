"""The library names fields, the command line names flags: one text, spelt for whoever reads it."""

import ast
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import click
import pytest
from support import Outcome

import featcache
from featcache import api, open_dataset
from featcache.cli import cli, spelling
from featcache.errors import DataError, UsageError
from featcache.experiments.bench import Places
from featcache.experiments.fit import FitPlan
from featcache.experiments.report import PagePlan
from featcache.extraction.feature_cache import Settings
from featcache.finetuning import FineTunePlan, Unfreeze
from featcache.heads.rejection import RejectPlan
from featcache.specs import BackboneSpec, FeatureSpec, TransformOverrides, Views

ROOT = Path(featcache.__file__).parent
LIBRARY = [path for path in sorted(ROOT.rglob("*.py")) if "cli" not in path.relative_to(ROOT).parts]
VALUES = (
    Settings,
    FitPlan,
    FineTunePlan,
    BackboneSpec,
    FeatureSpec,
    TransformOverrides,
    Views,
    Places,
    PagePlan,
    RejectPlan,
)
FUNCTIONS = (
    api.extract,
    api.extract_cuts,
    api.fit,
    api.predict,
    api.export,
    api.finetune,
    api.bench,
    api.replay,
    api.advise,
    api.audit,
    api.next_samples,
    open_dataset,
)


def spelt(command: str, text: str) -> str:
    """Return a text as a command prints it."""
    root = click.Context(cli)
    root.invoked_subcommand = command
    return spelling(root)(text)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_field_that_a_text_names_is_there_to_be_set(path: Path) -> None:
    """Each single word in backticks is a field of a public value, or a parameter of a public function."""
    public = {field.name for value in VALUES for field in fields(value)}
    public |= {f"{value.__name__}.{field.name}" for value in VALUES for field in fields(value)}
    public |= {name for function in FUNCTIONS for name in inspect.signature(function).parameters}
    texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    named = {
        name for text in texts if isinstance(text, str) for name in re.findall(r"(?<!`)`([\w.]+)(?:=[^`]*)?`(?!`)", text)
    }

    assert not named - public


@pytest.mark.parametrize(
    ("command", "text", "printed"),
    [
        ("extract", "allow it with `max_bad=0.306`.", "allow it with --max-bad 30.6%."),
        ("extract", "use another `cache` or a later `cut`", "use another --cache or a later --cut"),
        ("fit", "use another `cache` or a later `cut`", "use another --cache or a later cut"),
        ("fit", "`heads` forest: choose", "--head forest: choose"),
        ("finetune", "`heads` forest: choose", "--probe forest: choose"),
        ("bench", "`heads` forest: choose", "heads forest: choose"),
        ("fit", "a larger `budget`", "a larger --budget"),
        ("finetune", "a larger `budget`", "a larger --cache-budget"),
        ("finetune", "`FineTunePlan.batch_size` or `batch_size`", "--train-batch or --batch-size"),
        ("bench", "`FineTunePlan.batch_size` or `batch_size`", "batch_size or --batch-size"),
        ("bench", "`BackboneSpec.name`, `group`", "name, group"),
        ("predict", "say `trust=True`, give `weights=FILE`", "say --trust, give --weights FILE"),
        ("fit", "Use `backbone='lite0'`", "Use --backbone lite0"),
        ("finetune", "`refit=False`", "--no-refit"),
        ("fit", "`pip install openvino`, ``weights`` and `featcache store info`", None),
        ("store", "another `cache`", "another --cache"),
    ],
)
def test_a_field_is_printed_as_the_running_command_s_flag(command: str, text: str, printed: str | None) -> None:
    """Names, values and units are those of the command's own options; what it has no flag for is named bare."""
    assert spelt(command, text) == (printed or text)


def test_one_error_two_readers(run: Callable[..., Outcome], folder: Path, tmp_path: Path) -> None:
    """From Python an error names the field, from a shell the flag, from a pipeline file its key."""
    absent = str(tmp_path / "absent.pth")
    with pytest.raises(DataError, match=r"^`weights` .*absent.pth: there is no such file"):
        featcache.fit(folder, BackboneSpec(weights=absent), settings=Settings(tmp_path / "cache"))
    pipeline = tmp_path / "grid.toml"
    pipeline.write_text(f"heads = ['knn']\n[[dataset]]\ndata = '{folder}'\n[[backbone]]\nweights = '{absent}'\n")

    assert run("fit", folder, "--weights", absent).err.endswith(f"error: --weights {absent}: there is no such file.\n")
    bench = run("bench", pipeline, "--out", tmp_path, "--json")
    assert f": weights {absent}: there is no such file." in bench.err
    assert json.loads(bench.out)["failures"] == [f"{folder} x lite0: weights {absent}: there is no such file."]


def test_a_plan_s_error_names_key_or_flag(run: Callable[..., Outcome], folder: Path, tmp_path: Path) -> None:
    """A rate of 0 is refused with the name that its writer knows it by."""
    with pytest.raises(UsageError, match=r"^`lr` and `head_lr`: a rate above 0 is needed"):
        FineTunePlan(Unfreeze.parse("all"), head_lr=0.0)
    pipeline = tmp_path / "grid.toml"
    pipeline.write_text(f"unfreeze = ['all']\n[[dataset]]\ndata = '{folder}'\n[finetune]\nhead_lr = 0\n")

    assert run("finetune", folder, "--head-lr", "0").err == "error: --lr and --head-lr: a rate above 0 is needed.\n"
    assert run("bench", pipeline).err == f"error: {pipeline}: lr and head_lr: a rate above 0 is needed.\n"
    pipeline.write_text(pipeline.read_text().replace("head_lr = 0", "batch_size = 'x'"))
    assert run("bench", pipeline).err == f"error: {pipeline}: batch_size: 'x': a whole number is needed.\n"


def test_notes_name_flags_too(run: Callable[..., Outcome], folder: Path) -> None:
    """What is noted on the way is spelt as errors are."""
    outcome = run("fit", folder, "--head", "knn", "--head", "ridge", "--budget", "0s", "--no-baselines")

    assert "--budget 0 s is spent: without" in outcome.err
