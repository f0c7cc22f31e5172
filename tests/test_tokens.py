"""What is pooled is stored once: poolings and attention train from it, with no further pass over the images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import featcache
from featcache.backbones.pooling import Layout
from featcache.backbones.timm_models import load_backbone
from featcache.datasets import open_dataset
from featcache.errors import UsageError
from featcache.evaluation import Task
from featcache.experiments.fit import FitPlan
from featcache.experiments.poolings import judge
from featcache.extraction.feature_cache import FeatureCache, Output, Settings
from featcache.specs import POOLED, TOKENS, BackboneSpec, Pool, TransformOverrides

VIT = {"img_size": 32, "patch_size": 8, "depth": 2}
REGISTERS = VIT | {"reg_tokens": 4, "global_pool": "avg"}
# the number of tokens that precede the patches, whether the first is a class token, and the shape of a row
NETWORKS: list[tuple[str, dict[str, Any], int, Layout, tuple[int, ...]]] = [
    ("resnet10t", {}, 64, Layout(4, 1), (512, 2, 2)),
    ("convnext_atto", {}, 64, Layout(4, 1), (320, 2, 2)),
    ("vit_tiny_patch16_224", VIT, 32, Layout(3, 2, 1, class_token=True), (17, 192)),
    (
        "vit_tiny_patch16_224",
        VIT | {"reg_tokens": 4, "global_pool": "avg"},
        32,
        Layout(3, 2, 5, class_token=True),
        (21, 192),
    ),
    ("deit_tiny_distilled_patch16_224", VIT, 32, Layout(3, 2, 2, class_token=True), (18, 192)),
]


def spec_of(name: str, args: dict[str, Any], size: int, pool: Pool = "default") -> BackboneSpec:
    """Return a backbone of random weights."""
    return BackboneSpec(name, None, 0, tuple(args.items()), TransformOverrides(input_size=size), pool)


@pytest.mark.parametrize(("name", "args", "size", "layout", "shape"), NETWORKS, ids=lambda value: str(value)[:24])
def test_tokens_are_what_the_backbone_pools(
    name: str, args: dict[str, Any], size: int, layout: Layout, shape: tuple[int, ...]
) -> None:
    """Alone or beside other cuts, they are timm's own activations, and it is known which of them are no patches."""
    backbone = load_backbone(spec_of(name, args, size))
    pixels = torch.randint(0, 256, (3, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    with torch.inference_mode():
        (alone,) = backbone.program((TOKENS,))(pixels)
        pooled, beside = backbone.program((POOLED, TOKENS))(pixels)
        expected = backbone.module.forward_features(backbone.program((TOKENS,)).normalise(pixels))  # type: ignore[operator,union-attr]

    assert (backbone.token_layout, alone.shape[1:]) == (layout, shape)
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(beside, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(backbone.poolings()(alone.numpy())["default"], pooled, rtol=1e-4, atol=1e-5)


def test_the_default_backbone_has_tokens() -> None:
    """Its last activations are cut off at 0 and at 6: which axis holds the channels is proved all the same."""
    assert load_backbone(BackboneSpec()).token_layout == Layout(4, 1)


@pytest.mark.parametrize(("name", "args", "size", "pool"), [("resnet10t", {}, 64, "max"), (*NETWORKS[3][:3], "avg+cls")])
def test_rows_pooled_from_stored_tokens_are_those_of_the_pooled_cut(
    name: str, args: dict[str, Any], size: int, pool: Pool, folder: Path, settings: Settings
) -> None:
    """To what float16 keeps of a number, its eleven binary digits; the entry serves every pooling."""
    dataset = open_dataset(str(folder))
    direct = FeatureCache(dataset, spec_of(name, args, size, pool), settings).extracted().store.features().X
    cache = FeatureCache(dataset, spec_of(name, args, size), settings)
    own, tokens = (entry.store.features().X for entry in cache.features([Output(POOLED), Output(TOKENS)]))

    again = FeatureCache(dataset, spec_of(name, args, size, pool), settings).extracted(TOKENS)
    poolings = cache.backbone.poolings()

    assert (tokens.dtype, again.report.computed) == (np.float16, 0)
    for rows, kind in ((direct, pool), (own, "default")):
        pooled = poolings(tokens)[kind]
        np.testing.assert_allclose(pooled, rows, rtol=2**-10, atol=2**-10 * float(np.abs(tokens).max()))


def test_a_backbone_of_several_last_activations_has_no_tokens() -> None:
    """It is refused before anything is computed."""
    with pytest.raises(UsageError, match="list of 2 comes out"):
        load_backbone(spec_of("crossvit_tiny_240", {}, 240)).program((TOKENS,))


def test_validation_alone_chooses_the_pooling(folder: Path, settings: Settings) -> None:
    """The pooling whose probe knows most is chosen whatever the test images' rows are; of equals it is the first."""
    features = FeatureCache(open_dataset(str(folder)), BackboneSpec("mini"), settings).extracted().store.features()
    task = Task(features)
    split = task.split(0)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(len(task.y), 8)).astype(np.float32)
    telling = noise + 3 * np.eye(8, dtype=np.float32)[task.y]
    rows: dict[Pool, NDArray[np.float32]] = {"default": noise, "max": telling, "gem": telling.copy()}
    for X in rows.values():
        X[split.test] = np.nan

    kind, searches = judge(rows, task, split, 0)
    val = {pool: search.val for pool, search in searches.items()}

    assert kind == "max"
    assert list(val) == ["default", "max", "gem"]
    assert val["max"] == val["gem"] != val["default"]


@pytest.mark.parametrize("heads", [("logistic",), ("knn", "logistic", "ensemble")], ids=len)
def test_a_head_answers_with_the_pooling_that_was_chosen(
    heads: tuple[str, ...], folder: Path, settings: Settings, tmp_path: Path
) -> None:
    """Record, card, ``predict`` and ``export`` name and use it; the next command finds head and choice."""
    spec, plan = spec_of(*NETWORKS[3][:3]), FitPlan(heads, best_pool=True)
    result = featcache.fit(str(folder), spec, plan=plan, settings=settings)
    again = featcache.fit(str(folder), spec, plan=plan, settings=settings)
    (*_, head), choice = result.heads, result.pooling
    assert choice is not None

    bundle, predictions = featcache.predict(head.bundle, [folder], settings=settings)
    written = featcache.export(head.bundle, tmp_path / "model.onnx", settings=settings)
    by_path = {Path(image.path).relative_to(folder).as_posix(): image.label for image in predictions}
    answers = [by_path[head.task.features.paths[index]] for index in head.split.test]

    assert set(choice.val) == {"default", "avg", "max", "cls", "avg+cls", "gem"}
    named = (head.record.params["pool"], bundle.card["backbone"]["pool"], bundle.card["cut"])
    assert named == (choice.kind, choice.kind, POOLED)
    assert answers == [head.classes[number] for number in head.fitted.tested.predicted]
    assert written.difference < 1e-4
    assert (again.heads[-1].record.time, again.pooling) == (head.record.time, choice)
    assert again.extracted.report.computed == 0


def test_layers_have_poolings_of_their_own() -> None:
    """What would not be used is refused."""
    with pytest.raises(UsageError, match="`best_pool` is of the last activations"):
        FitPlan(layers=("layer3",), best_pool=True)
