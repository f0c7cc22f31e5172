"""The cut: prefix then suffix is the whole backbone, for every kind of architecture."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featcache.backbones.base import TimmBackbone, stages_of
from featcache.backbones.cut import Cutter, split
from featcache.backbones.timm_models import load_backbone
from featcache.errors import CutError, UsageError
from featcache.specs import BackboneSpec, LoadedBackbone, Pool, Transform, TransformOverrides

FAMILIES: list[tuple[str, dict[str, Any], int]] = [
    ("resnet10t", {}, 64),
    ("test_resnet", {}, 64),
    ("mobilenetv2_035", {}, 64),
    ("mobilenetv3_small_050", {}, 64),
    ("efficientnet_lite0", {}, 64),
    ("convnext_atto", {}, 64),
    ("regnetx_002", {}, 64),
    ("densenet121", {}, 64),
    ("edgenext_xx_small", {}, 64),
    ("mambaout_femto", {}, 64),
    ("test_vit", {"img_size": 64}, 64),
    ("vit_tiny_patch16_224", {"img_size": 64}, 64),
    ("deit_tiny_distilled_patch16_224", {"img_size": 64}, 64),
    ("swin_tiny_patch4_window7_224", {"img_size": 56}, 56),
    ("xcit_nano_12_p16_224", {}, 64),
    ("pvt_v2_b0", {}, 64),
    ("levit_128s", {}, 224),
    ("mixer_s32_224", {}, 224),
    ("efficientvim_m1", {}, 64),
]


def create(name: str, args: dict[str, Any]) -> nn.Module:
    """Return a random backbone whose BatchNorm statistics are not those of a fresh one."""
    torch.manual_seed(0)
    module: nn.Module = timm.create_model(name, num_classes=0, **args)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            layer.running_var.uniform_(0.8, 1.2)  # type: ignore[union-attr]
    return module.eval().requires_grad_(requires_grad=False)


@pytest.mark.parametrize(("name", "args", "size"), FAMILIES, ids=[family[0] for family in FAMILIES])
def test_prefix_and_suffix_are_the_whole(name: str, args: dict[str, Any], size: int) -> None:
    """Exactly so in float32, and within half precision when stored as float16, at the first, middle and last boundary."""
    module = create(name, args)
    stages = stages_of(module)
    images = torch.rand(5, 3, size, size)  # another batch size than traced
    with torch.inference_mode():
        whole = module(images)

    for index in sorted({0, len(stages) // 2, len(stages) - 2} & set(range(len(stages) - 1))):
        behind = {parameter for stage in stages[index + 1 :] for parameter in stage.parameters}
        parts = split(module, behind.__contains__, size)
        with torch.inference_mode():
            stored = parts.prefix(images)
            torch.testing.assert_close(parts.suffix(stored), whole, rtol=1e-5, atol=1e-6)
            halved = parts.suffix(stored.half().float())
        scale = float(whole.abs().max())
        torch.testing.assert_close(halved, whole, rtol=0, atol=2e-2 * scale)
        assert tuple(stored.shape[1:]) == parts.shape


def test_the_suffix_holds_every_trained_parameter_and_no_frozen_one() -> None:
    """What trains is behind the cut, what is frozen before it."""
    module = create("resnet10t", {})
    behind = {name for name, _ in module.named_parameters() if name.startswith("layer4")}

    suffix = split(module, behind.__contains__, 64).suffix

    trained = {id(parameter) for name, parameter in module.named_parameters() if name in behind}
    assert {id(parameter) for parameter in suffix.parameters()} == trained


def test_the_smallest_tensor_is_stored() -> None:
    """Between two frozen layers the cut takes the narrow place, not the last one."""
    module = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Upsample(scale_factor=4), nn.Conv2d(8, 4, 1), nn.Flatten()
    )

    parts = split(module.eval(), lambda name: name.startswith("3"), 8)

    assert parts.shape == (8, 1, 1)


class _TwoScales(nn.Module):
    """Two branches of different sizes that meet only at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 4, 2, stride=2)
        self.coarse = nn.Conv2d(3, 6, 4, stride=4)
        self.last_fine = nn.Conv2d(4, 5, 1)
        self.last_coarse = nn.Conv2d(6, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings (b, 5)."""
        fine, coarse = self.last_fine(self.fine(images)), self.last_coarse(self.coarse(images).transpose(2, 3))
        return fine.view(images.shape[0], 5, -1).mean(2) * coarse.mean((2, 3))  # type: ignore[no-any-return]


def test_several_tensors_are_stored_as_one_row() -> None:
    """Where branches cross the cut, a row holds them all, and gradients behind it are those of the whole backbone."""
    module = _TwoScales().eval()
    images = torch.rand(5, 3, 8, 8)

    parts = split(module, lambda name: name.startswith("last"), 8)
    with torch.inference_mode():
        stored = parts.prefix(images)

    assert parts.tensors == 2
    assert parts.shape == (4 * 4 * 4 + 6 * 2 * 2,)
    assert tuple(stored.shape) == (5, *parts.shape)
    gradients = []
    for part, given in ((parts.suffix, stored.clone()), (module, images)):
        module.zero_grad()
        part(given).pow(2).sum().backward()
        gradients.append(
            [parameter.grad.clone() for name, parameter in module.named_parameters() if name.startswith("last")]
        )
    torch.testing.assert_close(*gradients)


class _Undecided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Choose by value, which no trace can follow."""
        hidden = self.first(images.flatten(1))
        return self.last(hidden if hidden.sum() > 0 else -hidden)  # type: ignore[no-any-return]


def test_what_cannot_be_traced_says_so() -> None:
    """Control flow by value gives an error, not a wrong graph."""
    with pytest.raises(CutError, match="cannot be traced"):
        split(_Undecided().eval(), lambda name: name.startswith("last"), 2)


def test_nothing_to_train_is_no_cut() -> None:
    """A cut behind everything is refused."""
    with pytest.raises(CutError, match="nothing is trained"):
        split(create("test_resnet", {}), lambda _: False, 32)


def test_stage_names_are_the_architectures_own() -> None:
    """Stages are called what their modules are called; the last norm belongs to the last stage."""
    vit, resnet = create("test_vit", {"img_size": 64}), create("resnet10t", {})

    assert [stage.name for stage in stages_of(resnet)] == ["stem", "layer1", "layer2", "layer3", "layer4"]
    assert [stage.name for stage in stages_of(vit)][:2] == ["stem", "blocks.0"]
    assert any(name.startswith(("norm", "fc_norm")) for name in stages_of(vit)[-1].parameters)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("pit_ti_224", ["stem", "transformers.0", "transformers.1", "transformers.2"]), ("rdnet_tiny", None)],
)
def test_backbones_without_coarse_groups_have_stages(name: str, expected: list[str] | None) -> None:
    """Children, or blocks, stand in: each parameter is in one stage, and none of them is next to nothing."""
    module = create(name, {})
    stages = stages_of(module)

    assert len(stages) > 3
    assert expected is None or [stage.name for stage in stages] == expected
    assert sorted(name for stage in stages for name in stage.parameters) == sorted(dict(module.named_parameters()))


def test_every_parameter_is_in_one_stage() -> None:
    """Stages divide the backbone."""
    module = create("mobilenetv3_small_050", {})
    listed = [name for stage in stages_of(module) for name in stage.parameters]

    assert sorted(listed) == sorted(name for name, _ in module.named_parameters())


def test_unknown_and_last_stages_are_refused() -> None:
    """A cut names a stage that has something behind it."""
    module = create("resnet10t", {})
    backbone = TimmBackbone(BackboneSpec("x"), LoadedBackbone("x", "x", "x"), Transform(), module, torch.device("cpu"))

    with pytest.raises(UsageError, match=r"has the stages stem, layer1"):
        backbone.trained_after("layer9")
    with pytest.raises(UsageError, match="use pooled"):
        backbone.trained_after("layer4")


def test_input_cut_equals_normalised_images() -> None:
    """The suffix of the cut `input` takes pixels."""
    transform = Transform(input_size=32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    backbone = TimmBackbone(
        BackboneSpec("x"), LoadedBackbone("x", "x", "x"), transform, create("test_resnet", {}), torch.device("cpu")
    )
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (transform.mean, transform.std))
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std

    with torch.inference_mode():
        torch.testing.assert_close(backbone.suffix("input")(torch.from_numpy(pixels)), backbone.module(images))


def test_several_tensors_make_no_layer_of_a_probe() -> None:
    """Rows that hold a stage's branches are for the suffix: pooling them into one vector is refused."""
    backbone = load_backbone(BackboneSpec("efficientvim_m1", random_init=0))

    with pytest.raises(UsageError, match=r"stages\.0: several tensors"):
        backbone.program(("stages.0+pooled",))


def widths_in(part: nn.Module, given: Tensor, layer: nn.Module) -> list[int]:
    """Return how many tokens a layer sees while a part of its network computes."""
    seen: list[int] = []
    hook = layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    part(given)
    hook.remove()
    return seen


def vit(**args: Any) -> nn.Module:
    """Return a small transformer of 16 tokens of images and one of the class."""
    return create("vit_tiny_patch16_224", {"img_size": 64, **args})


def test_tokens_that_nobody_uses_are_not_computed() -> None:
    """Behind the last attention a class token is alone; embeddings and all gradients are the whole network's."""
    module = vit().requires_grad_(requires_grad=True)
    images = torch.rand(5, 3, 64, 64)
    behind = {name for name, _ in module.named_parameters() if name.startswith(("blocks.10", "blocks.11", "norm"))}

    parts = split(module, behind.__contains__, 64)
    with torch.no_grad():
        stored = parts.prefix(images)

    gradients = []
    for part, given in ((parts.suffix, stored.clone()), (module, images)):
        module.zero_grad()
        part(given).pow(2).sum().backward()
        gradients.append([parameter.grad.clone() for name, parameter in module.named_parameters() if name in behind])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert widths_in(parts.suffix, stored, module.blocks[10].mlp.fc1) == [17]
    assert widths_in(parts.suffix, stored, module.blocks[11].attn.qkv) == [17]
    assert widths_in(parts.suffix, stored, module.blocks[11].attn.proj) == [1]
    assert widths_in(parts.suffix, stored, module.blocks[11].mlp.fc1) == [1]


@pytest.mark.parametrize("args", [{"global_pool": "avg", "fc_norm": False}, {"proj_drop_rate": 0.1}])
def test_tokens_that_are_used_are_computed(args: dict[str, Any]) -> None:
    """The mean of all tokens needs all; where dropout draws a number for each, the draws stay as they are."""
    module = vit(**args)
    parts = split(module, lambda name: name.startswith("blocks.11"), 64)

    assert widths_in(parts.suffix, torch.rand(2, *parts.shape), module.blocks[11].mlp.fc1) == [17]


@pytest.mark.parametrize(("name", "boundary", "shape"), [("test_nfnet", 0, (128, 20, 20)), ("test_vit", 0, (26, 64))])
def test_a_weight_that_is_handed_to_a_function_is_the_functions(name: str, boundary: int, shape: tuple[int, ...]) -> None:
    """No frozen parameter lies behind a cut: standardised convolutions and added positions are done before it."""
    module = create(name, {"img_size": 80} if name == "test_vit" else {})
    stages = stages_of(module)
    behind = {parameter for stage in stages[boundary + 1 :] for parameter in stage.parameters}

    parts = split(module, behind.__contains__, 80)

    trained = {id(parameter) for parameter_name, parameter in module.named_parameters() if parameter_name in behind}
    assert {id(parameter) for parameter in parts.suffix.parameters()} <= trained
    assert parts.frozen == ()
    assert parts.shape == shape


class _Handed(nn.Module):
    """A network whose layers' weights are handed to functions, plain and standardised, and that grows in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 3, 1, 1))
        self.second = nn.Parameter(torch.randn(5, 4))
        self.shared = nn.Parameter(torch.randn(5))
        self.last = nn.Parameter(torch.randn(2, 5))

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings (b, 2)."""
        weight = (self.first - self.first.mean()) / self.first.std()
        hidden = F.linear(F.conv2d(images, weight).flatten(2).transpose(1, 2), self.second)
        return F.linear(hidden + self.shared, self.last * self.shared).mean(1)


@pytest.mark.parametrize(
    ("trained", "shape", "frozen"),
    [({"last"}, (16, 5), ("shared",)), ({"shared", "last"}, (16, 5), ()), ({"second", "shared", "last"}, (4, 16), ())],
)
def test_functions_without_modules_are_cut_where_their_weights_begin(
    trained: set[str], shape: tuple[int, ...], frozen: tuple[str, ...]
) -> None:
    """The cut lies behind the last frozen function; what a trained function reads besides is named."""
    parts = split(_Handed().eval(), trained.__contains__, 4)

    assert sorted(parts.shape) == sorted(shape)
    assert parts.frozen == frozen


def test_a_cut_that_moved_is_told() -> None:
    """Where an earlier version stored pixels the cut says so, and where it did not it does not."""
    standardised, plain = create("test_nfnet", {}), create("test_resnet", {})

    assert Cutter(standardised, 64).has_moved(lambda name: not name.startswith("stem"))
    assert not Cutter(standardised, 64).has_moved(lambda name: name.startswith("stages.3"))
    assert not Cutter(plain, 64).has_moved(lambda name: name.startswith("layer2"))


def test_a_backbone_that_answers_with_no_numbers_says_so() -> None:
    """Weights that hold NaN are an error of the backbone, not of its trace."""
    module = create("test_resnet", {})
    module.conv1[0].weight.data[0, 0, 0, 0] = torch.nan

    with pytest.raises(CutError, match="NaN or infinity"):
        split(module, lambda name: name.startswith("layer4"), 32)


@pytest.mark.parametrize("kind", ["avg", "max", "gem"])
def test_another_pooling_can_be_cut(kind: Pool) -> None:
    """A backbone whose last activations are pooled otherwise is split, and its layers are read, as any other."""
    backbone = load_backbone(
        BackboneSpec("test_resnet", random_init=0, pool=kind, overrides=TransformOverrides(input_size=32))
    )
    images = torch.rand(3, 3, 32, 32)

    with torch.inference_mode():
        stored = backbone.prefix("layer2")(images)
        torch.testing.assert_close(backbone.suffix("layer2")(stored), backbone.whole(images), rtol=1e-5, atol=1e-6)
    assert stored.shape[2:] == (4, 4)


def test_a_class_token_belongs_to_the_stage_that_reads_it() -> None:
    """ConViT joins its class token ten blocks behind the stem: no cut leaves it frozen behind itself."""
    backbone = load_backbone(BackboneSpec("convit_tiny", random_init=0))
    stages = {name: stage.name for stage in backbone.stages for name in stage.parameters}

    assert {name: stages[name] for name in ("cls_token", "pos_embed")} == {"cls_token": "blocks.10", "pos_embed": "stem"}
    for cut in ("stem", "blocks.8"):
        is_trained = backbone.trained_after(cut)
        behind = {id(value) for name, value in backbone.module.named_parameters() if is_trained(name)}
        assert all(id(value) in behind for value in backbone.suffix(cut).parameters())
