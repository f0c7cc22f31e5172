"""What a command costs in looks at files: an image is looked at once, read once, decoded once; weights are hashed once."""

import io
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile
from support import TINY, Run, draw_folder, draw_image, draw_subtle

from featcache import backbones, datasets
from featcache.backbones.timm_models import load_backbone
from featcache.datasets import open_dataset
from featcache.datasets.decoding import SIDE, decode, decode_both
from featcache.experiments.fit import FitPlan, run_fit
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.specs import BackboneSpec, Transform, Views
from featcache.store.entry import FeatureStore

QUICK = ("--epochs", "1", "--train-batch", "8", "--lr", "0.01", "--no-refit")
GRID = """
heads = ["ridge", "logistic"]
unfreeze = ["last:1", "last:2"]
[[dataset]]
data = "{images}"
[[backbone]]
name = "test_resnet"
random_init = 0
input_size = 32
[[backbone]]
name = "test_resnet"
random_init = 1
input_size = 32
[finetune]
epochs = 1
lr = [0.01]
batch_size = 8
"""


@dataclass
class Counts:
    """Looks at files and reads of them by their name, and decodings of any image."""

    looks: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    decodings: list[str] = field(default_factory=list)


@contextmanager
def counted(below: Path) -> Iterator[Counts]:
    """Count system calls on files below a folder, and what Pillow decodes, of all threads."""
    counts, plain = Counts(), {"stat": os.stat, "lstat": os.lstat, "open": os.open}
    load, open_file = ImageFile.ImageFile.load, io.open

    def noted(counter: Counter[str], act: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **more: Any) -> Any:
            if isinstance(path, str | Path) and Path(path).is_relative_to(below) and Path(path).suffix:
                counter[str(path)] += 1
            return act(path, *arguments, **more)

        return call

    def loading(image: ImageFile.ImageFile) -> Any:
        counts.decodings += [str(image.format)] if image.tile else []  # there is none left once it is decoded
        return load(image)

    with pytest.MonkeyPatch.context() as patch:
        for name, counter in (("stat", counts.looks), ("lstat", counts.looks), ("open", counts.reads)):
            patch.setattr(os, name, noted(counter, plain[name]))
        patch.setattr(io, "open", noted(counts.reads, open_file))
        patch.setattr(ImageFile.ImageFile, "load", loading)
        yield counts


@pytest.fixture(autouse=True)
def _files_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files of this test be old enough to be recognised by their times."""
    monkeypatch.setattr(datasets, "RACY_NS", 0)
    monkeypatch.setattr(backbones, "_RACY_NS", 0)


def once(folder: Path) -> dict[str, int]:
    """Return what it is to look at every image once."""
    return {str(path): 1 for path in sorted(folder.rglob("*")) if path.is_file()}


COMMANDS = {
    "extract": ("extract", "{images}", *TINY, "--cut", "pooled", "--cut", "layer3"),
    "fit": ("fit", "{images}", *TINY, "--head", "ridge", "--head", "knn", "--head", "logistic"),
    "finetune": ("finetune", "{images}", *TINY, "--unfreeze", "last:1", *QUICK),
    "sweep": ("finetune", "{images}", *TINY, "--sweep", *QUICK),
    "bench": ("bench", "{grid}", "--out", "{out}", "--batch-size", "8"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_hit_looks_at_every_image_once(run: Run, tmp_path: Path, name: str) -> None:
    """However many entries, heads, depths and backbones ask: one look an image, and none is read."""
    folder, grid = draw_subtle(tmp_path / "images", per_class=10), tmp_path / "grid.toml"
    grid.write_text(GRID.format(images=folder))
    command = [word.format(images=folder, grid=grid, out=tmp_path / "out") for word in COMMANDS[name]]
    assert run(*command).code == 0
    for records in (tmp_path / "cache").rglob("*.jsonl"):
        records.unlink()  # else a grid has nothing left to do

    with counted(folder) as counts:
        assert run(*command).code == 0

    assert counts.looks == once(folder)
    assert not counts.reads
    assert not counts.decodings


def test_a_first_fit_reads_and_decodes_every_image_once(run: Run, tmp_path: Path) -> None:
    """The thumbnails that the baselines look at come from the same decoded image as the backbone's pixels."""
    folder = draw_folder(tmp_path / "images")

    with counted(folder) as counts:
        assert run("fit", folder, *TINY, "--head", "ridge").code == 0

    assert counts.looks == counts.reads == once(folder)
    assert counts.decodings == ["PNG"] * 36


def test_a_fit_behind_an_extract_reads_no_image(run: Run, tmp_path: Path) -> None:
    """The thumbnails that its baselines look at are kept beside the rows, when images are decoded anyhow; and estimated."""
    folder = draw_folder(tmp_path / "images")
    estimated = run("extract", folder, *TINY, "--dry-run", "--json").json["dry_run"]["bytes"]
    assert run("extract", folder, *TINY).code == 0

    with counted(folder) as counts:
        fitted = run("fit", folder, *TINY, "--head", "ridge")

    assert "needs no backbone" in fitted.out
    assert not counts.reads
    assert estimated == 36 * (4 * 96 + 3 * SIDE * SIDE)


def test_thumbnails_are_told_of_where_some_are_made(run: Run, tmp_path: Path) -> None:
    """A backbone behind another one finds them; of an entry that has none, only those of new images are made."""
    folder = draw_folder(tmp_path / "images")
    other = ("-b", "test_vit", "--random-init", "0", "--input-size", "32")
    assert "with them" in run("extract", folder, *TINY).err

    assert run("extract", folder, *other, "--dry-run", "--json").json["dry_run"]["bytes"] == 36 * 4 * 64
    told = run("extract", folder, *other).err
    assert "9.2 kB to write (0.3 kB each)" in told
    assert "with them" not in told

    (thumbnails,) = tmp_path.rglob("pixels.*")
    shutil.rmtree(thumbnails)
    draw_image(folder / "red" / "new.png", (200, 50, 40), 77)
    assert run("extract", folder, *TINY, "--dry-run", "--json").json["dry_run"]["bytes"] == 4 * 96 + 3 * SIDE * SIDE
    told = run("extract", folder, *TINY).err
    assert "1 image to compute, 3.5 kB to write (3.5 kB each), thumbnails" in told
    assert "not complete" not in run("store", "ls").out


def test_a_first_finetune_reads_every_image_once(run: Run, tmp_path: Path) -> None:
    """The embeddings and the activations at the cut are one pass; a first batch is read before to say what it takes."""
    folder = draw_subtle(tmp_path / "images")

    with counted(folder) as counts:
        assert run("finetune", folder, *TINY, "--unfreeze", "last:1", *QUICK).code == 0

    assert counts.looks == once(folder)
    assert sorted(counts.reads.values()) == [1] * (len(counts.looks) - 8) + [2] * 8


def test_predict_reads_every_image_once(run: Run, tmp_path: Path) -> None:
    """One look, one read, one decoding; whatever was cached is not asked."""
    folder = draw_folder(tmp_path / "images")
    head = run("fit", folder, *TINY, "--head", "ridge", "--json").json["heads"][0]["bundle"]
    images = sorted(folder.rglob("*.png"))

    with counted(folder) as counts:
        assert run("predict", head, *images).code == 0

    assert counts.reads == once(folder)
    assert len(counts.decodings) == 36


def mixed(folder: Path) -> Path:
    """Write photographs of several formats and sizes, copies, and files that are no image or a broken one."""
    draw_folder(folder, per_class=4)
    rng = np.random.default_rng(0)
    for number, (wide, high) in enumerate([(31, 40), (64, 64), (65, 300), (640, 480), (1200, 900)]):
        pixels = rng.integers(0, 256, (high // 4 + 1, wide // 4 + 1, 3), np.uint8)
        image = Image.fromarray(pixels).resize((wide, high))
        image.save(folder / "red" / f"large{number}.jpg")
        image.convert("CMYK").save(folder / "blue" / f"large{number}.jpg")
        image.convert("L").save(folder / "green" / f"large{number}.jpg")
    shutil.copy(folder / "red" / "large4.jpg", folder / "red" / "copy.jpg")
    (folder / "red" / "broken.jpg").write_bytes((folder / "red" / "large3.jpg").read_bytes()[:2000])
    (folder / "red" / "empty.png").write_bytes(b"")
    return folder


def test_thumbnails_that_ride_along_are_those_of_a_pass_of_their_own(
    tmp_path: Path, tiny: BackboneSpec, settings: Settings
) -> None:
    """Byte for byte, under the same key, where libjpeg shrinks an image for one of the two only as well."""
    folder = mixed(tmp_path / "images")
    alone = FeatureCache(open_dataset(folder), tiny, Settings(tmp_path / "alone", max_bad=1.0)).thumbnails(SIDE)
    cache = FeatureCache(open_dataset(folder), tiny, Settings(settings.cache, 8, max_bad=1.0))

    with counted(folder) as counts:
        run_fit(cache, FitPlan(heads=("ridge",)))
        beside = cache.thumbnails(SIDE)

    assert (beside.store.key, beside.store.path.name) == (alone.store.key, alone.store.path.name)
    assert (beside.store.path / "features.h5").read_bytes() == (alone.store.path / "features.h5").read_bytes()
    assert beside.store.manifest.quarantined == alone.store.manifest.quarantined
    assert not beside.store.verify()
    unusable = {str(folder / image.path) for image in beside.report.quarantined}
    assert {path for path, reads in counts.reads.items() if reads > 1} == unusable  # a pass of their own says why


@pytest.mark.parametrize("size", [24, 32, 33, 64, 160])
def test_two_transforms_of_one_image_are_as_if_alone(tmp_path: Path, size: int) -> None:
    """Decoded once where that gives the same, else twice: of a JPEG that is shrunk for one of them."""
    transform, other, decodings = Transform(size), Transform(SIDE, crop_mode="squash", interpolation="bilinear"), set()
    for path in sorted(mixed(tmp_path / "images").rglob("*.*g")):
        if path.stem in {"broken", "empty"}:
            continue
        content = path.read_bytes()
        with counted(tmp_path) as counts:
            pixels, beside = decode_both(content, transform, Views(), other)

        np.testing.assert_array_equal(pixels, decode(content, transform))
        assert beside is not None
        np.testing.assert_array_equal(beside, decode(content, other))
        decodings.add((path.suffix, len(counts.decodings)))
    assert (".png", 1) in decodings
    assert (".jpg", 1) in decodings
    assert {number for _, number in decodings} <= {1, 2}


def test_weights_are_hashed_once(run: Run, tmp_path: Path, tiny: BackboneSpec) -> None:
    """Four heads, their cards and records, and the guard against files that change: one read, beside the loader's own."""
    from safetensors.torch import save_file

    weights = tmp_path / "weights" / "net.safetensors"
    weights.parent.mkdir()
    save_file({name: value.contiguous() for name, value in load_backbone(tiny).module.state_dict().items()}, weights)
    folder = draw_folder(tmp_path / "images")
    heads = ("--head", "ridge", "--head", "knn", "--head", "logistic", "--head", "centroid")
    backbone = ("-b", "test_resnet", "--weights", weights, "--input-size", "32")

    for _ in range(2):  # a first run, and a hit
        backbones._hashed.clear()
        with counted(weights.parent) as counts:
            assert run("fit", folder, *backbone, *heads).code == 0
        assert counts.reads == {str(weights): 1}


def test_an_entry_answers_alike_to_the_end_of_a_command(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """What was extracted once is not scanned again; what was computed is told once."""
    cache = FeatureCache(open_dataset(folder), tiny, settings)
    first = cache.extracted()
    shutil.rmtree(folder)

    again = cache.extracted()

    assert (first.report.computed, again.report.computed) == (36, 0)
    assert again.report.rows == 36
    assert FeatureStore.open(again.store.path).features().X.shape[0] == 36
