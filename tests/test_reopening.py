"""A head's card says how its images are opened again, from anywhere, whatever kind of source they came from."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from support import draw_image
from test_sources_kinds import write_mnist

from featcache import api
from featcache.datasets import Dataset, Sample, open_dataset
from featcache.errors import DataError
from featcache.evaluation import Task
from featcache.experiments.experiment import Experiment
from featcache.experiments.fit import FitPlan, run_fit
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.specs import BackboneSpec


def _shards(folder: Path) -> str:
    for number in range(2):
        with tarfile.open(f"set-{number}.tar", "w") as archive:
            for path in sorted(folder.rglob("*.png"))[number::2]:
                stem = f"{path.parent.name}{path.stem}"
                for name, content in ((f"{stem}.png", path.read_bytes()), (f"{stem}.cls", path.parent.name.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return "wds:set-{0..1}.tar"


def _one_shard(folder: Path) -> str:
    _shards(folder)
    return "wds:set-0.tar"


def _csv(folder: Path) -> str:
    lines = ["path,label", *(f"{path},{path.parent.name}" for path in sorted(folder.rglob("*.png")))]
    Path("list.csv").write_text("\n".join(lines) + "\n")
    return "list.csv"


def _pixels(folder: Path) -> tuple[np.ndarray, list[str]]:
    paths = sorted(folder.rglob("*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in paths]), [path.parent.name for path in paths]


def _npz(folder: Path) -> str:
    images, labels = _pixels(folder)
    np.savez("set.npz", images=images, labels=labels)
    return "set.npz"


def _hdf5(folder: Path) -> str:
    images, labels = _pixels(folder)
    with h5py.File("set.h5", "w") as file:
        file["images"], file["labels"] = images, np.array(labels, dtype="S")
    return "set.h5"


def _parquet(folder: Path) -> str:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    paths = sorted(folder.rglob("*.png"))
    table = {"image": [path.read_bytes() for path in paths], "label": [path.parent.name for path in paths]}
    pq.write_table(pa.table(table), "set.parquet")
    return "set.parquet"


def _hub(folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    paths = sorted(folder.rglob("*.png"))
    columns = {"image": [{"bytes": path.read_bytes(), "path": None} for path in paths], "label": [1] * len(paths)}
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    Path("hub").mkdir()
    datasets.Dataset.from_dict(columns, kinds).to_parquet("hub/train-00000-of-00001.parquet")
    return "hf:hub"


def _folder(folder: Path) -> str:
    shutil.copytree(folder, "photos")
    return "photos"


KINDS: dict[str, Callable[[Path], str]] = {
    "folder": _folder,
    "csv": _csv,
    "shards": _shards,
    "shard": _one_shard,
    "npz": _npz,
    "hdf5": _hdf5,
    "parquet": _parquet,
    "hub": _hub,
    "digits": lambda _: "sklearn:digits",
}


def reopened(source: Dataset, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings) -> Dataset:
    """Return what the text in a card opens in another working folder."""
    done = FeatureCache(source, BackboneSpec("test_resnet", random_init=0), settings)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    card = json.loads(json.dumps(done.dataset.reopens or done.dataset.location))
    return open_dataset(card)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_opens_again(
    kind: str, folder: Path, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened by a relative name in one folder, a set is opened again by its card in another: images, labels, bytes."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    source = open_dataset(KINDS[kind](folder))
    first = source.read(source.samples[0].path)

    again = reopened(source, tmp_path / "there", monkeypatch, settings)

    assert again.location == source.location or kind == "hub"
    assert [(item.path, item.label) for item in again.samples] == [(item.path, item.label) for item in source.samples]
    assert again.read(again.samples[0].path) == first


def test_torchvisions_sets_open_again(tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their root is in the card."""
    (tmp_path / "root").mkdir()
    write_mnist(tmp_path / "root")
    monkeypatch.chdir(tmp_path)
    source = open_dataset("torchvision:MNIST", data_root=Path("root"))

    assert reopened(source, tmp_path / "there", monkeypatch, settings).samples == source.samples


def test_a_card_has_that_text(
    folder: Path, tiny: BackboneSpec, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a card says is what opens the source again."""
    monkeypatch.chdir(tmp_path)
    bench = FeatureCache(open_dataset(_shards(folder)), tiny, settings)

    entry = bench.extracted()
    experiment = Experiment(bench, Task(entry.store.labelled()), "logistic", {}, 0)
    assert experiment.card(entry)["data"] == f"wds:{tmp_path}/set-{{0..1}}.tar"


def test_export_compares_on_the_images_of_then(
    folder: Path, tiny: BackboneSpec, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ``--check`` a head's own shards are opened, from another folder; one that cannot be read is passed over."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    broken = folder / "blue" / "00.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (folder / "blue" / "000.png").write_bytes(b"no image")
    source = open_dataset(_shards(folder))
    head = run_fit(FeatureCache(source, tiny, settings), FitPlan(("ridge",), baselines=False)).heads[0].bundle
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    assert api.export(head, tmp_path / "model.onnx", settings=settings).samples == 16


def test_images_in_memory_cannot_be_opened_again(
    tiny: BackboneSpec, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source of a program's own is said to need ``--check``."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    blobs = {}
    for number in range(12):
        draw_image(tmp_path / "one.png", (200 * (number % 2), 40, 40), number)
        blobs[f"{number}.png"] = (tmp_path / "one.png").read_bytes()
    from featcache.datasets import MemoryReader

    source = Dataset(
        "mine", "a program's own", tuple(Sample(path, str(int(path[:-4]) % 2)) for path in blobs), MemoryReader(blobs)
    )
    head = run_fit(FeatureCache(source, tiny, settings), FitPlan(("ridge",), baselines=False)).heads[0].bundle

    with pytest.raises(DataError, match="`check`"):
        api.export(head, tmp_path / "model.onnx", settings=settings)
