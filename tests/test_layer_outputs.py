"""Layers and poolings: what is concatenated is what hooks see, averaged over positions and nothing else, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import Outcome
from torch import Tensor, nn

from featcache.backbones.base import Backbone, Normalise
from featcache.backbones.pooling import Layout, TokenCounts, prove_layout
from featcache.backbones.timm_models import load_backbone
from featcache.datasets import open_dataset
from featcache.errors import UsageError
from featcache.experiments.finetune import FineTuneInputs, run_finetune
from featcache.extraction.feature_cache import FeatureCache, Output, Settings
from featcache.finetuning import FineTunePlan, Unfreeze
from featcache.specs import POOLS, BackboneSpec, Pool, TransformOverrides
from featcache.store.entry import FeatureStore

MAP, LAST, TOKENS = "b c h w", "b h w c", "b n c"
SWIN = {"img_size": 56, "depths": (2, 2, 2, 2)}  # shallower than published where that leaves each kind of layer in place
DENSE = {"block_config": (2, 2, 2, 2)}
DEIT = {"img_size": 64, "depth": 4}
LAYERS: list[tuple[str, dict[str, Any], int, dict[str, str | int]]] = [
    ("test_resnet", {}, 32, {"layer1": MAP, "layer2.0.conv1": MAP, "layer4": MAP}),
    ("resnet10t", {}, 64, {"stem": MAP, "layer3": MAP}),
    ("test_convnext", {}, 64, {"stem": MAP, "stages.0": MAP, "stages.1.blocks.0": MAP, "stages.2": MAP, "stages.3": MAP}),
    ("convnext_atto", {}, 64, {"stages.0": MAP, "stages.2": MAP, "stages.2.blocks.0.mlp": MAP}),
    ("swin_tiny_patch4_window7_224", SWIN, 56, {"patch_embed": LAST, "layers.0": LAST, "layers.3": LAST}),
    (
        "densenet121",
        {"block_config": (2, 2, 2, 2)},
        64,
        {"features.denseblock2": MAP, "features.denseblock3": MAP, "features.transition1": MAP},
    ),
    ("vgg11", {"mlp_ratio": 0.0625}, 32, {"features.8": MAP, "features.10": MAP, "features.16": MAP}),
    ("mobilenetv3_small_050", {}, 64, {"stem": MAP, "blocks.1": MAP, "blocks.5": MAP}),
    ("test_nfnet", {}, 64, {"stem": MAP, "stages.1": MAP}),
    ("test_vit", {"img_size": 64}, 64, {"stem": 1, "blocks.2": 1, "blocks.2.mlp": 1, "blocks.5": 1}),
    ("test_vit2", {"img_size": 64}, 64, {"blocks.2": 1}),
    ("deit_tiny_distilled_patch16_224", DEIT, 64, {"blocks.2": 2}),
    ("xcit_nano_12_p16_224", {"depth": 4}, 64, {"blocks.1": 0, "blocks.3": 0}),
    ("mixer_s32_224", {}, 224, {"blocks.3": 0}),
]


def load(name: str, args: dict[str, Any], size: int, pool: Pool = "default") -> Backbone:
    """Return a random backbone."""
    overrides = TransformOverrides(input_size=size)
    return load_backbone(BackboneSpec(name, None, 0, tuple(args.items()), overrides, pool))


def vectors(activations: Tensor, layout: str | int, kind: Pool) -> Tensor:
    """Pool activations of a known layout: that of a map, or how many tokens precede the patches."""
    prefix = layout if isinstance(layout, int) else 0
    tokens = activations.permute(0, 2, 3, 1).flatten(1, 2) if layout == MAP else activations.flatten(1, -2)
    patches = tokens[:, prefix:]
    if kind == "max":
        return patches.max(1).values
    if kind == "gem":
        return (patches.clamp(min=1e-6) ** 3).mean(1) ** (1 / 3)
    return tokens[:, 0] if kind == "cls" else patches.mean(1)


def hooked(backbone: Backbone, name: str, layout: str | int, pixels: Tensor) -> Tensor:
    """Return the average of what a forward hook sees, or a hook before the stage that follows one without a module."""
    found: list[Tensor] = []
    names = [stage.name for stage in backbone.stages]
    modules = dict(backbone.module.named_modules())
    if name in modules:
        hook = modules[name].register_forward_hook(lambda _, __, out: found.append(vectors(out, layout, "avg")))
    else:
        following = modules[names[names.index(name) + 1]]
        hook = following.register_forward_pre_hook(lambda _, given: found.append(vectors(given[0], layout, "avg")))
    with torch.inference_mode():
        backbone.module(Normalise(backbone.transform)(pixels))
    hook.remove()
    return found[0]


@pytest.mark.parametrize(("name", "args", "size", "layers"), LAYERS, ids=[case[0] for case in LAYERS])
def test_layers_are_what_hooks_see(name: str, args: dict[str, Any], size: int, layers: dict[str, str | int]) -> None:
    """Each layer's own output is pooled over its positions, side by side in one pass, whatever follows it in place."""
    backbone = load(name, args, size)
    pixels = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)

    with torch.inference_mode():
        (rows,) = backbone.program(("+".join((*layers, "pooled")),))(pixels)
        (embeddings,) = backbone.program(("pooled",))(pixels)

    right = [*(hooked(backbone, layer, layout, pixels) for layer, layout in layers.items()), embeddings]
    for part, expected in zip(rows.split([one.shape[1] for one in right], 1), right, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "args", "size", "layout"),
    [
        ("test_convnext", {}, 64, MAP),
        ("test_mambaout", {}, 64, LAST),
        ("swin_tiny_patch4_window7_224", SWIN, 56, LAST),
        ("test_vit", {"img_size": 64}, 64, 1),
        ("deit_tiny_distilled_patch16_224", DEIT, 64, 2),
        ("coat_lite_tiny", {}, 224, 1),
        ("xcit_nano_12_p16_224", {"depth": 4}, 64, 1),
        ("mixer_s32_224", {}, 224, 0),
    ],
)
def test_poolings_leave_out_what_is_no_patch(name: str, args: dict[str, Any], size: int, layout: str | int) -> None:
    """Every pooling of the last activations is the one by hand, also where timm declares no class token and there is one."""
    pixels = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)
    kinds: tuple[Pool, ...] = POOLS[1:] if name.startswith("test_") else ("avg",)  # the others take long to trace
    for kind in kinds:
        backbone = load(name, args, size, kind)
        if "cls" in kind and layout in {MAP, LAST, 0}:
            with pytest.raises(UsageError, match="has no class token"):
                _ = backbone.whole
            continue
        with torch.inference_mode():
            last = backbone.module.forward_features(Normalise(backbone.transform)(pixels))  # type: ignore[operator]
            (rows,) = backbone.program(("pooled",))(pixels)
        parts = (
            [vectors(last, layout, one) for one in ("avg", "cls")] if kind == "avg+cls" else [vectors(last, layout, kind)]
        )
        torch.testing.assert_close(rows, torch.cat(parts, 1), rtol=1e-4, atol=1e-5 * float(rows.abs().max()))


@pytest.mark.parametrize(("name", "size"), [("coat_tiny", 224), ("efficientvim_m1", 64), ("pit_ti_224", 224)])
def test_a_pooling_that_cannot_be_told_is_refused(name: str, size: int) -> None:
    """Several tensors, or a class token alone, are no activations to pool: the error says so and what to do."""
    with pytest.raises(UsageError, match=rf"`pool` avg: the last activations of {name}.*Leave `pool` out"):
        _ = load(name, {}, size, "avg").whole


@pytest.mark.parametrize(
    ("name", "size", "layer", "reason"),
    [
        ("efficientvim_m1", 64, "stages.0", "several tensors"),
        ("test_resnet", 32, "layer9", "has the stages stem, layer1, layer2, layer3, layer4, and no layer of that name"),
        ("xcit_nano_12_p16_224", 64, "cls_attn_blocks.0", "cannot be proved"),
    ],
)
def test_a_layer_that_makes_no_one_vector_is_refused(name: str, size: int, layer: str, reason: str) -> None:
    """The error names the layer and the reason."""
    with pytest.raises(UsageError, match=rf"`layers` {layer}: .*({reason})"):
        load(name, {}, size).program((f"{layer}+pooled",))


@pytest.mark.parametrize(
    ("shape", "prefixes", "expected"),
    [
        ((6, 5, 5), (0,), Layout(4, 1)),
        ((5, 5, 5), (0,), Layout(4, 1)),
        ((16, 6), (0, 1), Layout(3, 2)),
        ((17, 6), (0, 1), Layout(3, 2, 1, class_token=True)),
        ((17, 17), (0, 1), Layout(3, 2, 1, class_token=True)),
        ((9, 6), (0, 5), Layout(3, 2, 5, class_token=True)),
        ((6,), (0,), Layout(2, 1)),
    ],
)
def test_a_layout_is_told_by_what_a_channel_changes(
    shape: tuple[int, ...], prefixes: tuple[int, ...], expected: Layout
) -> None:
    """Sizes alone need not tell the axes; grids must divide the image where several numbers of tokens would fit."""
    channels = expected.channels
    bias = nn.Parameter(torch.zeros(shape[channels - 1]))
    base = torch.randn(1, *shape)
    counts = TokenCounts(64, prefixes, class_token=len(prefixes) > 1)

    def run() -> Tensor:
        return base + bias.reshape([-1 if axis == channels else 1 for axis in range(base.dim())])

    assert prove_layout("x", run, [bias], counts, instead="") == expected
    assert not bias.any()


def test_a_layout_is_told_where_weights_are_standardised() -> None:
    """A constant added to such a row changes nothing, so that something else is added."""
    weight = nn.Parameter(torch.randn(6, 3, 1, 1))
    images = torch.rand(1, 3, 5, 5)

    def run() -> Tensor:
        rows = weight.flatten(1)
        standardised = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
        return torch.nn.functional.conv2d(images, standardised.reshape(weight.shape))

    assert prove_layout("x", run, [weight], TokenCounts(64), instead="") == Layout(4, 1)


@pytest.mark.parametrize("shape", [(5, 4, 3), (7, 6), (2, 3, 4, 5)])
def test_a_layout_that_is_no_square_is_refused(shape: tuple[int, ...]) -> None:
    """Rectangles, odd numbers of tokens and windows are not pooled."""
    bias = nn.Parameter(torch.zeros(shape[-1]))
    base = torch.randn(1, *shape)

    with pytest.raises(UsageError, match=r"x: beside .* neither a square"):
        prove_layout("x", lambda: base + bias, [bias], TokenCounts(64), instead="")


def test_a_token_that_alone_is_worked_on_is_no_channel() -> None:
    """Where every row of a parameter moves the same place, that place is a token."""
    bias = nn.Parameter(torch.zeros(16))
    base = torch.randn(1, 17, 16)

    def run() -> Tensor:
        mixed = base.clone()
        mixed[:, 0] = (base[:, 0] + bias) @ torch.ones(16, 16)
        return mixed

    with pytest.raises(UsageError, match="cannot be proved"):
        prove_layout("x", run, [bias], TokenCounts(64, (0, 1), class_token=True), instead="")


def test_rows_of_another_tensor_have_another_key() -> None:
    """Entries of layers that were right stay; what was pooled otherwise before is not taken for the layer."""
    resnet, convnext = load("test_resnet", {}, 32), load("test_convnext", {}, 64)
    volo, vit = load("coat_lite_tiny", {}, 224, "avg"), load("test_vit", {"img_size": 64}, 64, "avg")

    assert resnet.format_version("layer2+layer3+layer4") == resnet.format_version("stem+pooled") == 1
    assert convnext.format_version("stages.1+stages.2") == convnext.format_version("stages.2+pooled") == 2
    assert (volo.format_version("pooled"), vit.format_version("pooled")) == (2, 1)
    assert load("test_vit", {"img_size": 64}, 64).format_version("blocks.2+blocks.3") == 1


def test_an_old_request_does_not_lead_to_rows_of_another_tensor(folder: Path, settings: Settings) -> None:
    """Flags that were remembered for pixels at a stage are not believed; those of a right cut find their entry."""
    for name, cut, computed in (("test_nfnet", "stem", 36), ("test_resnet", "layer2", 0)):
        spec = BackboneSpec(name, random_init=0, overrides=TransformOverrides(input_size=32))
        bench = FeatureCache(open_dataset(folder), spec, settings)
        store = bench.extracted(cut).store
        old = store.path.with_name(f"{name}.old")
        store.path.rename(old)  # as version 1 left it: under its own key, and its flags remembered without a version
        text = (old / "spec.json").read_text()
        (old / "spec.json").write_text(text.replace('"format_version": 2', '"format_version": 1'))
        for request in (old / "requests").glob("*.json"):
            request.write_text(request.read_text().replace(' "format": 2,\n', ""))
        if not computed:
            old.rename(store.path)

        again = FeatureCache(open_dataset(folder), spec, settings).extracted(cut)

        assert again.report.computed == computed
        assert again.store.spec["format_version"] == (2 if computed else 1)
        assert FeatureCache(open_dataset(folder), spec, settings).extracted(cut).report.computed == 0


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_layers_and_tuning_with_another_pooling(folder: Path, tiny: BackboneSpec, settings: Settings, pool: Pool) -> None:
    """Layers are extracted and a stage is tuned from its stored activations, not from pixels."""
    bench = FeatureCache(open_dataset(folder), BackboneSpec(**{**vars(tiny), "pool": pool}), settings)

    layers, own = bench.features([Output("layer2+layer3"), Output("pooled")])
    tuned = run_finetune(FineTuneInputs(bench), FineTunePlan(Unfreeze.parse("last:1"), epochs=1, lr=(1e-3,)))

    assert layers.store.features().X.shape == (36, 96 + 144)
    assert own.store.features().X.shape[1] == 96
    assert tuned.record.cut == "layer3"
    assert not any("runs again" in note for note in tuned.record.notes)


def test_one_layer_is_pooled_as_several_are(folder: Path, run: Any) -> None:
    """A single name gives vectors that heads train on; a name twice, or none, is refused."""
    tiny = ("-b", "test_resnet", "--random-init", "0", "--input-size", "32")

    alone = run("extract", folder, *tiny, "--layers", "layer2", "--json").json
    head = run("fit", folder, *tiny, "--layers", "layer2", "--head", "knn", "--no-baselines", "--json")

    assert FeatureStore.open(alone["entry"]).features().X.shape == (36, 48)
    assert head.code == 0
    for nothing in ("layer2,layer2", ","):
        assert run("extract", folder, *tiny, "--layers", nothing).code == 2


def test_the_command_line_says_what_is_refused(folder: Path, run: Any) -> None:
    """A refusal is one line and code 2."""
    outcome: Outcome = run("extract", folder, "-b", "coat_tiny", "--random-init", "0", "--pool", "avg")

    assert outcome.code == 2
    assert "a list of 3 comes out" in outcome.err
    assert "Traceback" not in outcome.err
