"""The cache key and the checks at the door."""

from dataclasses import fields, replace
from typing import Any

import pytest

from featcache.errors import UsageError
from featcache.finetuning import FineTunePlan, Unfreeze
from featcache.specs import BackboneSpec, FeatureSpec, LoadedBackbone, Transform, parse_model_args, stored_dtype

BACKBONE = LoadedBackbone("resnet18", "a1_in1k", "ab" * 32)
SPEC = FeatureSpec(Transform(), BACKBONE)
OTHER: dict[str, Any] = {
    "input_size": 225,
    "crop_pct": 0.9,
    "crop_mode": "squash",
    "interpolation": "bilinear",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "decoder": "pillow",
    "antialias": False,
    "exif": "apply",
    "alpha": "white",
    "deep": "clip",
    "architecture": "resnet34",
    "tag": "other",
    "weights_sha256": "cd" * 32,
    "model_args": (("pad_type", "same"),),
    "pool": "max",
    "cut": "layer3",
    "compute": "bfloat16",
    "dtype": "float16",
    "views": 2,
    "views_seed": 1,
    "format_version": 2,
}


@pytest.mark.parametrize("name", [field.name for field in fields(Transform)])
def test_every_field_of_the_transform_is_in_the_key(name: str) -> None:
    """Another transform is another key."""
    assert replace(SPEC, transform=replace(SPEC.transform, **{name: OTHER[name]})).key != SPEC.key


@pytest.mark.parametrize("name", [field.name for field in fields(LoadedBackbone)])
def test_every_field_of_the_backbone_is_in_the_key(name: str) -> None:
    """Another backbone, or the same one with other weights, is another key."""
    assert replace(SPEC, backbone=replace(BACKBONE, **{name: OTHER[name]})).key != SPEC.key


@pytest.mark.parametrize(
    "name", [field.name for field in fields(FeatureSpec) if field.name not in {"transform", "backbone"}]
)
def test_every_other_field_is_in_the_key(name: str) -> None:
    """Another cut, dtype or view is another key."""
    assert replace(SPEC, **{name: OTHER[name]}).key != SPEC.key


def test_the_key_is_the_same_in_every_process() -> None:
    """The key of a fixed spec never changes: entries on disk are found by it."""
    assert SPEC.key == "58403de4fb8a916564e9bb18efd75065a4c8938a04d241465331e7953b51f90f"


@pytest.mark.parametrize(
    ("text", "kind", "amount", "stage"),
    [("last:2", "last", 2, ""), ("25%", "share", 0.25, ""), ("blocks.9", "stage", 0, "blocks.9"), ("all", "all", 0, "")],
)
def test_unfreeze_is_read(text: str, kind: str, amount: float, stage: str) -> None:
    """The four ways to say what trains."""
    wish = Unfreeze.parse(text)

    assert (wish.kind, wish.amount, wish.stage) == (kind, amount, stage)


@pytest.mark.parametrize("text", ["last:0", "last:", "0%", "101%", "", "two stages", "-1%"])
def test_nonsense_is_not_unfrozen(text: str) -> None:
    """A wish that says nothing is refused, with the grammar."""
    with pytest.raises(UsageError, match="last:K"):
        Unfreeze.parse(text)


def test_model_args_are_typed() -> None:
    """Values are JSON where they are JSON; False is false."""
    assert parse_model_args(("b=False", "a=3", "pad_type=same", "c=[1,2]")) == (
        ("a", 3),
        ("b", False),
        ("c", (1, 2)),
        ("pad_type", "same"),
    )
    with pytest.raises(UsageError, match="KEY=VALUE"):
        parse_model_args(("pad_type",))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Transform(input_size=0),
        lambda: Transform(crop_pct=1.5),
        lambda: Transform(std=(1.0, 0.0, 1.0)),
        lambda: BackboneSpec(""),
        lambda: BackboneSpec("x", weights="a", random_init=1),
        lambda: FineTunePlan(Unfreeze.parse("all"), epochs=0),
        lambda: FineTunePlan(Unfreeze.parse("all"), lr=(0.0,)),
        lambda: FeatureSpec(Transform(), None, cut="input", dtype="float32"),
    ],
)
def test_impossible_values_are_refused_at_the_door(make: Any) -> None:
    """A spec that cannot be carried out is never made."""
    with pytest.raises(UsageError, match="`"):
        make()


def test_dtype_follows_the_cut() -> None:
    """Embeddings are kept whole, activation maps halved, pixels as bytes."""
    assert [stored_dtype(cut) for cut in ("pooled", "layer3", "input")] == ["float32", "float16", "uint8"]
    assert stored_dtype("layer3", "float32") == "float32"
