"""Runtimes give what PyTorch gives, or are not used; pools, layers, several cuts and views in one pass."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import TINY, Run
from torch import Tensor, nn

from featcache.backbones.timm_models import load_backbone
from featcache.datasets import open_dataset
from featcache.datasets.decoding import decode
from featcache.errors import SetupError, UsageError
from featcache.extraction import runtimes
from featcache.extraction.extract import Runtime, Workers
from featcache.extraction.feature_cache import FeatureCache, Output, Settings
from featcache.extraction.runtimes import Machine, TorchRuntime, select_runtime
from featcache.specs import BackboneSpec, Transform, TransformOverrides, Views

CPU = torch.device("cpu")
VIT = BackboneSpec("test_vit", random_init=0)


def pixels(size: int, count: int = 4) -> np.ndarray:
    """Random images, uint8 (count, size, size, 3)."""
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def chosen(spec: BackboneSpec, cuts: tuple[str, ...], wish: runtimes.RuntimeName, images: int = 10**6) -> Runtime:
    """Choose a runtime for a backbone's frozen part."""
    backbone = load_backbone(spec)
    first = pixels(backbone.transform.input_size)
    return select_runtime(backbone.program(cuts), first, images, wish, Machine(CPU, "float32", Workers(2, 1)))


@pytest.mark.parametrize("name", ["openvino", "onnx", "compile"])
@pytest.mark.parametrize("spec", [BackboneSpec("test_resnet", random_init=0), VIT], ids=["convolutions", "tokens"])
def test_every_runtime_agrees_with_torch(name: runtimes.RuntimeName, spec: BackboneSpec) -> None:
    """Embeddings and a stage in one pass, within a thousandth of the greatest activation, on other images too."""
    if not runtimes.is_installed(name):
        pytest.skip(f"{name} is not installed")
    backbone = load_backbone(spec)
    cuts = ("pooled", backbone.stages[-2].name)
    other = pixels(backbone.transform.input_size)[::-1].copy()

    runtime = chosen(spec, cuts, name)

    assert runtime.name == name
    for got, expected in zip(runtime.run(other), TorchRuntime(backbone.program(cuts), CPU, "float32")(other), strict=True):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max())


def test_openvino_reports_nothing_to_its_makers(tmp_path: Path) -> None:
    """By itself it would send what it converts, and keep a number for the user in their home."""
    if not runtimes.is_installed("openvino"):
        pytest.skip("openvino is not installed")
    code = (
        "import sys, numpy as np, torch\n"
        "from featcache.extraction.extract import Workers\nfrom featcache.extraction.runtimes import _openvino\n"
        "model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))\n"
        "_openvino(model, np.zeros((1, 3, 2, 2), np.float32), Workers(1, 1))\n"
        "assert sys.modules['openvino_telemetry'] is None"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_auto_compiles_only_what_pays() -> None:
    """A few images are left to PyTorch."""
    assert chosen(VIT, ("pooled",), "auto", images=8).name == "torch"


@pytest.mark.parametrize("fault", ["differs", "fails", "not finite"])
def test_a_runtime_that_disagrees_is_dropped(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named in a warning, and PyTorch computes."""

    def broken(program: nn.Module, first: np.ndarray, workers: Workers) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:  # noqa: ARG001
        if fault == "fails":
            raise RuntimeError("no such operation")
        run = TorchRuntime(program, CPU, "float32")
        return lambda images: tuple(rows * (1.01 if fault == "differs" else np.nan) for rows in run(images))

    monkeypatch.setattr(runtimes, "_openvino", broken)
    monkeypatch.setattr(runtimes, "is_installed", lambda name: name == "openvino")
    monkeypatch.setattr(runtimes.logger, "propagate", True)
    with caplog.at_level(logging.WARNING, "featcache"):
        runtime = chosen(VIT, ("pooled",), "auto", images=10**7)

    assert runtime.name == "torch"
    assert "openvino: left out" in caplog.text


@dataclass
class _Clock:
    """Seconds that have passed, and those in which was computed: the machine's own depend on what else it does."""

    passed: float = 0.0
    computed: float = 0.0

    def perf_counter(self) -> float:
        """As ``time`` has it."""
        return self.passed

    def thread_time(self) -> float:
        """As ``time`` has it."""
        return self.computed


@dataclass
class _Takes:
    """Computes what PyTorch computes, in seconds of waiting, each call's from a list, and of computing."""

    run: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    clock: _Clock
    waits: list[float]
    works: float
    calls: int = 0

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, ...]:
        """Wait as others' work lets it, then work."""
        self.clock.passed += self.waits[min(self.calls, len(self.waits) - 1)] + self.works
        self.clock.computed += self.works
        self.calls += 1
        return self.run(images)


def decided(
    monkeypatch: pytest.MonkeyPatch, eager: list[float], other: list[float], works: tuple[float, float]
) -> tuple[str, int]:
    """Return the runtime that is chosen where both meet such waits, and how often PyTorch ran."""
    real, made, clock = TorchRuntime, list[_Takes](), _Clock()

    def slow(program: nn.Module, device: torch.device, precision: str) -> _Takes:
        made.append(_Takes(real(program, device, precision), clock, eager, works[0]))  # type: ignore[arg-type]
        return made[-1]

    def build(program: nn.Module, first: np.ndarray, workers: Workers) -> _Takes:  # noqa: ARG001
        return _Takes(real(program, CPU, "float32"), clock, other, works[1])

    monkeypatch.setattr(runtimes, "TorchRuntime", slow)
    monkeypatch.setattr(runtimes, "_openvino", build)
    monkeypatch.setattr(runtimes, "is_installed", lambda name: name == "openvino")
    monkeypatch.setattr(runtimes, "time", clock)
    name = chosen(VIT, ("pooled",), "auto", images=10**6).name
    return name, made[0].calls


def test_a_busy_moment_of_torch_is_no_gain_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch waits for others while it is measured, and is as fast as the other one by turns: it stays."""
    assert decided(monkeypatch, [0.5, 0.0], [0.0], (0.1, 0.1))[0] == "torch"


def test_a_busy_moment_of_another_hides_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that waits for others while it is measured is taken where it is faster by turns."""
    assert decided(monkeypatch, [0.0], [0.5, 0.0], (0.2, 0.05))[0] == "openvino"


def test_a_clear_gain_costs_no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is in doubt PyTorch runs as often as its own measuring takes."""
    name, calls = decided(monkeypatch, [0.0], [0.0], (0.5, 0.05))

    assert name == "openvino"
    assert calls == 1


def test_a_wish_that_cannot_be_met_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not installed, or asked for in half precision."""
    backbone = load_backbone(VIT)
    first = pixels(backbone.transform.input_size)
    monkeypatch.setattr(runtimes, "find_spec", lambda _: None)

    with pytest.raises(SetupError, match="featcache\\[openvino\\]"):
        chosen(VIT, ("pooled",), "openvino")
    monkeypatch.undo()
    monkeypatch.setattr(runtimes, "is_installed", lambda _: True)
    with pytest.raises(UsageError, match="float32 only"):
        select_runtime(backbone.program(("pooled",)), first, 9, "openvino", Machine(CPU, "bfloat16", Workers(1, 1)))


class _Hungry(nn.Module):
    """Needs more memory than there is for more than two images."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return each image's mean."""
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return (images.float().mean((1, 2, 3))[:, None],)


def test_out_of_memory_halves_the_batch() -> None:
    """The batch is computed in pieces, from then on too; one image that does not fit is an error."""
    images = pixels(8, count=8)
    eager = TorchRuntime(_Hungry(), CPU, "float32")

    (rows,) = eager(images)

    np.testing.assert_allclose(rows[:, 0], images.mean((1, 2, 3)), rtol=1e-6)
    assert eager._piece == 2
    with pytest.raises(SetupError, match="one image"):
        TorchRuntime(_Never(), CPU, "float32")(images)


class _Never(nn.Module):
    """Never fits."""

    def forward(self, _: Tensor) -> tuple[Tensor, ...]:
        """Run out of memory."""
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("kind", ["avg", "max", "cls", "avg+cls", "gem"])
def test_pools_of_tokens(kind: str) -> None:
    """Against the formulas, on the backbone's own last tokens."""
    backbone = load_backbone(replace(VIT, pool=kind))
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        tokens = backbone.module.forward_features(images)
        got = backbone.whole(images)
    patches = tokens[:, backbone.module.num_prefix_tokens :]

    expected = {
        "avg": patches.mean(1),
        "max": patches.amax(1),
        "cls": tokens[:, 0],
        "avg+cls": torch.cat([patches.mean(1), tokens[:, 0]], 1),
        "gem": patches.clamp(min=1e-6).pow(3).mean(1).pow(1 / 3),
    }[kind]
    torch.testing.assert_close(got, expected)


def test_pools_of_maps(tiny: BackboneSpec) -> None:
    """A convolutional map pooled by its average is what the backbone gives by itself; its maximum is not."""
    images = torch.randn(2, 3, 96, 96)
    own, average, greatest = (load_backbone(replace(tiny, pool=kind)).whole(images) for kind in ("default", "avg", "max"))

    torch.testing.assert_close(average, own)
    assert (greatest >= own).all()
    assert (greatest > own).any()
    with pytest.raises(UsageError, match="no class token"):
        _ = load_backbone(replace(tiny, pool="cls")).whole


def test_layers_are_the_pooled_stages(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Several layers in one pass are their maps' averages side by side, the last one the embedding itself."""
    bench = FeatureCache(open_dataset(folder), tiny, settings)
    layers, stage, embedding = bench.features(
        [Output("layer2+layer3+layer4"), Output("layer2", "float32"), Output("pooled")]
    )

    joined = layers.store.features().X
    maps = stage.store.features().X
    width = maps.shape[1]
    np.testing.assert_allclose(joined[:, :width], maps.mean((2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(joined[:, -embedding.store.features().X.shape[1] :], embedding.store.features().X, rtol=1e-4)


def test_one_pass_fills_every_entry(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Several cuts at once give what each gives alone, also where one has some rows already."""
    alone = FeatureCache(open_dataset(folder), tiny, replace(settings, cache=settings.cache / "alone"))
    bench = FeatureCache(open_dataset(folder), tiny, settings)
    removed = folder / "red" / "00.png"
    content = removed.read_bytes()
    removed.unlink()
    FeatureCache(open_dataset(folder), tiny, settings).extracted("layer2")
    removed.write_bytes(content)
    bench = FeatureCache(open_dataset(folder), tiny, settings)

    several = bench.features([Output("pooled"), Output("layer2"), Output("input")])

    assert [done.report.computed for done in several] == [36, 1, 36]
    for done in several:
        expected = alone.extracted(done.cut).store.features()
        assert done.store.features().paths == expected.paths
        np.testing.assert_allclose(done.store.features().X, expected.X, rtol=1e-3, atol=1e-4)


def test_views_are_aligned_and_seeded(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """View 0 is the usual row; the others depend on the image and the seed alone, not on the run or the name."""
    plain = FeatureCache(open_dataset(folder), tiny, settings).extracted().store.features()
    viewed = FeatureCache(open_dataset(folder), tiny, settings).extracted(views=Views(3)).store
    other_cache = replace(settings, cache=settings.cache / "other", batch_size=5)
    again = FeatureCache(open_dataset(folder), tiny, other_cache).extracted(views=Views(3)).store.features()
    seeded = FeatureCache(open_dataset(folder), tiny, settings).extracted(views=Views(3, seed=1)).store.features()

    features = viewed.features()
    assert features.X.shape == (36, 3, plain.X.shape[1])
    np.testing.assert_allclose(features.X[:, 0], plain.X, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(again.X, features.X, rtol=1e-4, atol=1e-6)
    assert np.abs(features.X[:, 1] - features.X[:, 2]).max() > 1e-2
    assert np.abs(features.X[:, 1] - seeded.X[:, 1]).max() > 1e-2


def test_views_of_pixels_are_flipped_crops(folder: Path) -> None:
    """Augmentations keep to the image, and some are flipped."""
    content = (folder / "red" / "00.png").read_bytes()
    views = decode(content, Transform(16), Views(40))

    assert views.shape == (40, 16, 16, 3)
    assert len({view.tobytes() for view in views}) == 40
    np.testing.assert_array_equal(views[0], decode(content, Transform(16))[0])


def test_large_jpegs_are_decoded_small_unless_told_otherwise() -> None:
    """The scaled decode stays close to the exact one; "pillow" is Pillow's result; small images are the same in both."""
    import io

    from PIL import Image

    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(
        (1600, 1200), Image.Resampling.BICUBIC
    )
    for size, differs in ((1600, True), (300, False)):
        buffer = io.BytesIO()
        smooth.resize((size, size * 3 // 4)).save(buffer, "JPEG", quality=95)
        scaled, exact = (
            decode(buffer.getvalue(), Transform(160, decoder=decoder))[0].astype(int)
            for decoder in ("pillow-scaled", "pillow")
        )
        image = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
        side = image.height
        left = round((int(160 * image.width / side) - 160) / 2) * image.width / int(160 * image.width / side)
        box = (left, 0, left + 160 * image.width / int(160 * image.width / side), side)
        np.testing.assert_array_equal(exact, np.asarray(image.resize((160, 160), Image.Resampling.BICUBIC, box=box)))
        assert bool((scaled != exact).any()) == differs
        assert np.abs(scaled - exact).mean() < 2


def test_half_precision_is_another_entry(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """bfloat16 rows are close to float32 ones, and never mistaken for them."""
    full = FeatureCache(open_dataset(folder), tiny, settings).extracted()
    half = FeatureCache(open_dataset(folder), replace(tiny, precision="bfloat16"), settings).extracted()

    assert half.store.path != full.store.path
    one, other = full.store.features().X, half.store.features().X
    assert 0 < np.abs(one - other).max() < 0.1 * np.abs(one).max()


def test_the_command_line_reaches_all_of_it(run: Run, folder: Path) -> None:
    """Cuts, layers, views, pools, decoders and a dry run from flags; every one is an entry of its own."""
    dry = run("extract", folder, *TINY, "--dry-run", "--json").json["dry_run"]
    several = run("extract", folder, *TINY, "--cut", "pooled", "--cut", "layer2", "--json").json["extracts"]
    flags = [
        ("--layers", "layer3,layer4"),
        ("--views", "2"),
        ("--pool", "max"),
        ("--decode", "exact"),
        ("--runtime", "torch"),
    ]
    singles = [run("extract", folder, *TINY, *flag, "--json").json for flag in flags]

    assert (dry["images"], dry["to_compute"], dry["bytes"]) == (36, 36, 36 * (4 * 96 + 3 * 32 * 32))
    assert dry["seconds"] > 0
    assert [one["cut"] for one in several] == ["pooled", "layer2"]
    assert [one["computed"] for one in singles] == [36, 36, 36, 36, 0]
    assert run("extract", folder, *TINY, "--dry-run").out.startswith("36 images, 0 to compute")
    assert run("extract", folder, *TINY, "--part", "5/4").code == 2
    assert run("extract", folder, *TINY, "--views", "0").code == 2
    small = TransformOverrides(input_size=32)
    assert BackboneSpec("test_resnet", overrides=small).overrides.given() == {"input_size": 32}
