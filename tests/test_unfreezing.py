"""What is asked for becomes the stages that train, the parameters in them, and the cut before them."""

from dataclasses import replace
from pathlib import Path

import pytest
from finetune_support import PLAN, Prepared, moved, tuned
from torch import nn

from featcache.backbones.base import Stage
from featcache.backbones.timm_models import load_backbone
from featcache.errors import UsageError
from featcache.extraction.feature_cache import Settings
from featcache.finetuning import Unfreeze, depths
from featcache.finetuning.model import select_trainable
from featcache.specs import BackboneSpec

STAGES = tuple(Stage(name, (name,), size) for name, size in (("stem", 10), ("one", 20), ("two", 30), ("three", 40)))


VIT = BackboneSpec("test_vit", random_init=0)


@pytest.mark.parametrize(
    ("wish", "first", "cut"),
    [
        ("last:1", "three", "two"),
        ("last:4", "stem", "input"),
        ("all", "stem", "input"),
        ("one", "one", "stem"),
        ("40%", "three", "two"),
        ("41%", "two", "one"),
        ("1%", "three", "two"),
        ("100%", "stem", "input"),
    ],
)
def test_wishes_become_stages(wish: str, first: str, cut: str) -> None:
    """Whole stages train, from the end of the network."""
    trainable = select_trainable(STAGES, Unfreeze.parse(wish))

    assert (trainable.stages[0].name, trainable.stages[-1].name, trainable.cut) == (first, "three", cut)


@pytest.mark.parametrize("wish", ["last:5", "layer9"])
def test_stages_that_are_not_there(wish: str) -> None:
    """The error lists the stages."""
    with pytest.raises(UsageError, match="stem, one, two, three"):
        select_trainable(STAGES, Unfreeze.parse(wish))


def test_nothing_of_that_kind(folder: Path, settings: Settings) -> None:
    """A backbone without biases in the stage says so."""
    prepared = Prepared(folder, BackboneSpec("test_resnet", random_init=0), settings)
    stages = [replace(stage, parameters=("weight",)) for stage in prepared.backbone.stages]

    with pytest.raises(UsageError, match="nothing of that kind"):
        select_trainable(stages, Unfreeze.parse("bias:last:1"), nn.Linear(2, 2, bias=False))


@pytest.mark.parametrize("wish", ["norm:", "lora", "lora:0", "lora:4:", "norm:last:0", "lora:x"])
def test_wishes_that_mean_nothing(wish: str) -> None:
    """They are refused in words."""
    with pytest.raises(UsageError, match="unfreeze"):
        Unfreeze.parse(wish)


def test_depths_of_long_backbones_double() -> None:
    """Each depth of a short one, powers of two of a long one, and all of it."""
    stages = load_backbone(VIT).stages

    assert [wish.text for wish in depths(len(stages))][-1] == "all"
    assert [wish.text for wish in depths(3 * len(stages))][:3] == ["last:1", "last:2", "last:4"]


@pytest.mark.parametrize("wish", ["norm", "bias", "norm:last:2", "bias:layer3"])
def test_norms_or_biases_alone_train(prepared: Prepared, wish: str) -> None:
    """Of the thawed stages only the parameters of that kind move."""
    prepared.probe = replace(prepared.probe, weights=0 * prepared.probe.weights)  # there is something to learn then
    before = prepared.backbone.module.state_dict()
    plan = replace(PLAN, unfreeze=Unfreeze.parse(wish), epochs=4, label_smoothing=0.0)

    changed = moved(before, tuned(prepared, plan))

    stages = ("layer3", "layer4") if ":" in wish else ("",)
    assert changed
    assert all(name.startswith(stages) for name in changed)
    assert all("bn" in name or "downsample" in name or name.startswith("conv1.") for name in changed)
    if "bias" in wish:
        assert all(name.endswith("bias") for name in changed)
