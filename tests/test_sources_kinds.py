"""Every kind of source on real files: ids, labels, splits and bytes come out alike."""

import io
import json
import pickle
import socket
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from support import TINY, Run, draw_image

from featcache.datasets import Dataset, open_dataset
from featcache.datasets.decoding import decode, encode
from featcache.errors import DataError, SetupError, UsageError
from featcache.specs import Transform

LABELS = ["cat", "dog", "cat", "dog", "cat", "dog"]
GREY = np.zeros((2, 4, 4), np.uint8)
SPLITS = ["train", "train", "train", "train", "test", "test"]


def arrays() -> np.ndarray:
    """Six images, uint8 (6, 12, 10, 3)."""
    return np.random.default_rng(0).integers(0, 256, (6, 12, 10, 3), dtype=np.uint8)


def same_pixels(source: Dataset, expected: np.ndarray) -> None:
    """The source's images, in order, are these."""
    transform = Transform(10, decoder="pillow")
    for item, pixels in zip(source.samples, expected, strict=True):
        np.testing.assert_array_equal(decode(source.read(item.path), transform), decode(encode(pixels), transform))


def described(source: Dataset) -> list[tuple[str, str]]:
    """Labels and splits in order."""
    return [(item.label, item.split) for item in source.samples]


EXPECTED = list(zip(LABELS, SPLITS, strict=True))


def write_parquet(path: Path, columns: dict[str, object], metadata: dict[bytes, bytes] | None = None, rows: int = 2) -> Path:
    """Write a Parquet file in row groups of two."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=rows)
    return path


def test_parquet_of_paths(folder: Path) -> None:
    """A Parquet manifest reads like a CSV one."""
    columns = {"path": ["red/00.png", "blue/01.png"], "label": ["red", "blue"], "split": ["train", "test"]}

    source = open_dataset(write_parquet(folder / "list.parquet", columns))

    assert described(source) == [("red", "train"), ("blue", "test")]
    assert source.read("blue/01.png") == (folder / "blue" / "01.png").read_bytes()
    assert source.stat("blue/01.png") is not None


def test_parquet_of_bytes(tmp_path: Path) -> None:
    """A binary column, in any order of reading, across row groups."""
    columns = {"image": [encode(pixels) for pixels in arrays()], "label": LABELS, "split": SPLITS}

    source = open_dataset(write_parquet(tmp_path / "pets.parquet", columns))

    assert described(source) == EXPECTED
    same_pixels(source, arrays())
    assert source.read(source.samples[5].path) == encode(arrays()[5])
    assert source.read(source.samples[0].path) == encode(arrays()[0])
    assert pickle.loads(pickle.dumps(source)).read(source.samples[3].path) == encode(arrays()[3])  # noqa: S301 - our own


def test_parquet_as_the_hub_writes_it(tmp_path: Path) -> None:
    """A struct of bytes and path, and class names in the schema's metadata."""
    structs = [{"bytes": encode(pixels), "path": f"{number}.ppm"} for number, pixels in enumerate(arrays())]
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    metadata = {b"huggingface": json.dumps(features).encode()}
    columns = {"image": structs, "label": [0, 1, 0, 1, 0, 1]}

    source = open_dataset(write_parquet(tmp_path / "pets.parquet", columns, metadata))

    assert [item.label for item in source.samples] == LABELS
    assert source.samples[2].path == "00000002-2.ppm"
    same_pixels(source, arrays())


def test_a_bad_parquet_is_refused(tmp_path: Path) -> None:
    """No Parquet, no such column, no such file: one plain error."""
    (tmp_path / "text.parquet").write_text("path,label")
    for path, match in (
        (tmp_path / "text.parquet", "not a Parquet file"),
        (write_parquet(tmp_path / "other.parquet", {"a": [1]}), "path and label are needed"),
        (tmp_path / "none.parquet", "no such file"),
    ):
        with pytest.raises(DataError, match=match):
            open_dataset(path)


@pytest.mark.parametrize("kind", ["npz", "h5"])
def test_arrays(tmp_path: Path, kind: str) -> None:
    """Images, labels, splits and class names as arrays of one file."""
    path = tmp_path / f"pets.{kind}"
    content = {"images": arrays(), "labels": np.array([0, 1] * 3), "class_names": np.array([b"cat", b"dog"]),
               "splits": np.array([split.encode() for split in SPLITS])}  # fmt: skip
    if kind == "npz":
        np.savez(path, **content)
    else:
        with h5py.File(path, "w") as file:
            file.update(content)

    source = open_dataset(path)

    assert described(source) == EXPECTED
    same_pixels(source, arrays())
    stat = source.stat(source.samples[1].path)
    assert stat is not None
    assert stat.size == path.stat().st_size


def test_arrays_in_parts(tmp_path: Path) -> None:
    """One pair of arrays a split, labels as a column, as MedMNIST has them."""
    path = tmp_path / "med.npz"
    grey = arrays()[..., 0]
    np.savez(path, train_images=grey[:4], train_labels=[[0], [1], [0], [1]], test_images=grey[4:], test_labels=[[0], [1]])

    source = open_dataset(path)

    assert described(source) == [(str(int(label == "dog")), split) for label, split in EXPECTED]
    same_pixels(source, grey)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.float32), "labels": np.zeros(2)}, "must be uint8"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(3)}, "one label each"),
        (
            {"train_images": GREY, "train_labels": np.zeros(2), "valid_images": GREY, "valid_labels": np.zeros(2)},
            "would be lost",
        ),
        ({"images": GREY, "labels": np.zeros(2), "test_images": GREY, "test_labels": np.zeros(2)}, "images would be lost"),
        ({"images": GREY, "labels": np.zeros(2), "test1_images": GREY}, "test1_images would be lost"),
        ({"weights": np.zeros(2)}, "images and labels are needed"),
    ],
)
def test_bad_arrays_are_refused(tmp_path: Path, content: dict[str, np.ndarray], match: str) -> None:
    """Other dtypes, other lengths, other names: one plain error, from both formats."""
    np.savez(tmp_path / "bad.npz", **content)
    with h5py.File(tmp_path / "bad.h5", "w") as file:
        file.update(content)

    for path in (tmp_path / "bad.npz", tmp_path / "bad.h5"):
        with pytest.raises(DataError, match=match):
            open_dataset(path)


def test_an_hdf5_file_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    """Links and external storage would read any file of this machine."""
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(range(48)))
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["images"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/x")
    with h5py.File(tmp_path / "outside.h5", "w") as file:
        file.create_dataset("images", (1, 4, 4, 3), "u1", external=[(str(secret), 0, 48)])

    for name, match in (("link.h5", "is a link"), ("outside.h5", "another file")):
        with pytest.raises(DataError, match=match):
            open_dataset(tmp_path / name)


def test_a_pickle_in_an_npz_is_not_loaded(tmp_path: Path) -> None:
    """Objects in an array file are refused, not run."""
    np.savez(tmp_path / "evil.npz", images=np.array([print], dtype=object))

    with pytest.raises(DataError, match="plain arrays"):
        open_dataset(tmp_path / "evil.npz")


def write_shard(path: Path, samples: dict[str, bytes]) -> None:
    """Write a tar file."""
    with tarfile.open(path, "w") as archive:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_shards_are_read_in_place(tmp_path: Path) -> None:
    """Samples from several shards, labels from .cls and .json, splits from the shards' names; nothing is extracted."""
    pixels = [encode(one) for one in arrays()]
    write_shard(
        tmp_path / "train-000.tar", {"a/0.ppm": pixels[0], "a/0.cls": b"cat\n", "a/1.ppm": pixels[1], "a/1.cls": b"dog"}
    )
    write_shard(
        tmp_path / "train-001.tar",
        {"2.ppm": pixels[2], "2.json": b'{"label": "cat"}', "3.json": b'{"label": "dog"}', "3.ppm": pixels[3]},
    )
    write_shard(tmp_path / "test-000.tar", {"../x.ppm": pixels[4], "../x.cls": b"cat", "5.ppm": pixels[5], "5.cls": b"dog"})

    source = open_dataset(f"wds:{tmp_path}/train-{{000..001}}.tar")
    test = open_dataset(f"wds:{tmp_path}/{{test,}}-000.tar".replace(",", ""))

    assert described(source) + described(test) == EXPECTED
    same_pixels(source, arrays()[:4])
    same_pixels(test, arrays()[4:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test-000.tar", "train-000.tar", "train-001.tar"]
    assert pickle.loads(pickle.dumps(test)).read(test.samples[0].path) == pixels[4]  # noqa: S301 - our own


def test_bad_shards_are_refused(tmp_path: Path) -> None:
    """Absent, compressed and unlabelled ones are told apart."""
    write_shard(tmp_path / "plain.tar", {"0.ppm": encode(arrays()[0])})
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.add(tmp_path / "plain.tar")

    for name, match in (("none.tar", "no such shard"), ("packed.tar", "uncompressed"), ("plain.tar", "no label")):
        with pytest.raises(DataError, match=match):
            open_dataset(f"wds:{tmp_path}/{name}")


def write_mnist(root: Path) -> None:
    """Write images in MNIST's own format, 28x28, four to train and two to test."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    grey = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    for prefix, rows in (("train", slice(0, 4)), ("t10k", slice(4, 6))):
        images = grey[rows]
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            b"\0\0\x08\x03" + np.array([len(images), 28, 28], ">i4").tobytes() + images.tobytes()
        )
        labels = np.arange(len(images), dtype=np.uint8)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + np.array([len(images)], ">i4").tobytes() + labels.tobytes()
        )


def test_torchvision_arrays(tmp_path: Path) -> None:
    """A set that torchvision holds in memory, with its own split."""
    write_mnist(tmp_path)

    source = open_dataset("torchvision:MNIST", data_root=tmp_path)

    assert [item.split for item in source.samples] == ["train"] * 4 + ["test"] * 2
    assert source.samples[1].label == "1 - one"
    assert decode(source.read(source.samples[5].path), Transform(28)).shape == (1, 28, 28, 3)
    assert len({item.path for item in source.samples}) == 6


def test_torchvision_files(tmp_path: Path, folder: Path) -> None:
    """A set that torchvision holds as files is read as files."""
    (tmp_path / "eurosat").mkdir()
    folder.rename(tmp_path / "eurosat" / "2750")

    source = open_dataset("torchvision:EuroSAT", data_root=tmp_path)

    assert source.classes == ("blue", "green", "red")
    assert source.samples[0].path == "blue/00.png"
    assert source.stat("blue/00.png") is not None


def test_torchvision_train_and_val_are_not_read_twice(tmp_path: Path) -> None:
    """FGVCAircraft has train, val and trainval, which is both: each image is in one part, and val has its own."""
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    parts = {"train": range(4), "val": range(4, 8), "trainval": range(8), "test": range(8, 12)}
    for number in range(12):
        draw_image(data / "images" / f"{number:03d}.jpg", (20 * number, 90, 90), number)
    (data / "variants.txt").write_text("A\nB\n")
    for part, numbers in parts.items():
        lines = [f"{number:03d} {'AB'[number % 2]}\n" for number in numbers]
        (data / f"images_variant_{part}.txt").write_text("".join(lines))

    source = open_dataset("torchvision:FGVCAircraft", data_root=tmp_path)

    held = {
        part: {Path(item.path).name for item in source.samples if item.split == part} for part in ("train", "val", "test")
    }
    assert {part: len(names) for part, names in held.items()} == {"train": 4, "val": 4, "test": 4}
    assert len(source.samples) == 12
    assert not held["train"] & held["val"]


def test_torchvision_trainval_trains_where_there_is_nothing_else(tmp_path: Path) -> None:
    """OxfordIIITPet has trainval and test alone: val is then drawn from trainval, by featcache."""
    base = tmp_path / "oxford-iiit-pet"
    (base / "annotations" / "trimaps").mkdir(parents=True)
    lines = []
    for number in range(8):
        name = f"{('Abyssinian', 'beagle')[number % 2]}_{number}"
        draw_image(base / "images" / f"{name}.jpg", (20 * number, 90, 90), number)
        lines.append(f"{name} {number % 2 + 1} {number % 2 + 1} 1\n")
    (base / "annotations" / "trainval.txt").write_text("".join(lines[:6]))
    (base / "annotations" / "test.txt").write_text("".join(lines[6:]))

    source = open_dataset("torchvision:OxfordIIITPet", data_root=tmp_path)

    assert sorted(item.split for item in source.samples) == ["test"] * 2 + ["train"] * 6
    assert len({Path(item.path).name for item in source.samples}) == 8


def test_what_says_where_a_set_was_opens_it_again(tmp_path: Path) -> None:
    """A source's location, as a head's card keeps it, opens torchvision's sets and shards."""
    write_mnist(tmp_path)
    write_shard(tmp_path / "a.tar", {"0.ppm": encode(arrays()[0]), "0.cls": b"cat"})

    for source in (open_dataset("torchvision:MNIST", data_root=tmp_path), open_dataset(f"wds:{tmp_path}/a.tar")):
        assert open_dataset(source.location).samples == source.samples


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("CocoDetection", UsageError, "needs annFile"),
        ("Kinetics", UsageError, "needs frames_per_clip"),
        ("DatasetFolder", UsageError, "needs loader"),
        ("EMNIST", DataError, "its splits are balanced, .*none is train, val or test"),
        ("SBDataset", DataError, "or damaged"),
        ("MovingMNIST", DataError, "or damaged"),
    ],
)
def test_torchvision_sets_that_cannot_be_one(tmp_path: Path, name: str, error: type[Exception], match: str) -> None:
    """A set that needs other arguments, or has no such splits, says so."""
    with pytest.raises(error, match=match):
        open_dataset(f"torchvision:{name}", data_root=tmp_path)


def test_torchvision_says_what_is_missing(tmp_path: Path) -> None:
    """Nothing is downloaded unasked."""
    for text, root, error, match in (
        ("torchvision:CIFAR10", tmp_path, DataError, "`download=True`"),
        ("torchvision:CIFAR10", None, UsageError, "`data_root`"),
        ("torchvision:Nothing", tmp_path, UsageError, "no such data set"),
    ):
        with pytest.raises(error, match=match):
            open_dataset(text, data_root=root)
    assert not list(tmp_path.iterdir())


def test_hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set that ``datasets`` loads, here from Parquet files with splits, images not decoded by it."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    names = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    (tmp_path / "pets").mkdir()
    for split, rows in (("train", slice(0, 4)), ("test", slice(4, 6))):
        structs = [{"bytes": encode(pixels), "path": "image.ppm"} for pixels in arrays()[rows]]
        columns = {"image": structs, "label": [0, 1] * (len(structs) // 2)}
        write_parquet(tmp_path / "pets" / f"{split}-0.parquet", columns, {b"huggingface": json.dumps(names).encode()})

    source = open_dataset(f"hf:{tmp_path / 'pets'}")

    assert sorted(described(source)) == sorted(EXPECTED)
    pixels = {source.read(item.path) for item in source.samples}
    assert pixels == {encode(one) for one in arrays()}
    with pytest.raises(DataError, match="cannot be loaded"):
        open_dataset(f"hf:{tmp_path / 'absent'}")


def test_the_hub_is_not_asked_unless_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --download there is no request at all, with it there are some."""
    pytest.importorskip("datasets")
    asked: list[Any] = []

    def refuse(*where: Any, **_: Any) -> None:
        asked.append(where)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(time, "sleep", lambda _: None)

    with pytest.raises(DataError, match=r"hf:nobody/nothing: cannot be loaded .*`download=True` lets it be fetched"):
        open_dataset("hf:nobody/nothing")
    assert not asked
    with pytest.raises(DataError, match="hf:nobody/nothing: cannot be loaded"):
        open_dataset("hf:nobody/nothing", download=True)
    assert asked


def test_a_missing_library_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library the error says what to install."""
    for name, text in (("pyarrow", str(tmp_path / "x.parquet")), ("datasets", "hf:a/b")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(SetupError, match="pip install 'featcache"):
            open_dataset(text)


def test_every_kind_is_extracted_and_recognised(tmp_path: Path, run: Run) -> None:
    """The same images from different kinds give the same rows; a second run computes nothing."""
    np.savez(tmp_path / "pets.npz", images=arrays(), labels=LABELS)
    write_shard(
        tmp_path / "pets.tar",
        {f"{n}.{suffix}": content for n, (label, one) in enumerate(zip(LABELS, arrays(), strict=True))
         for suffix, content in (("ppm", encode(one)), ("cls", label.encode()))},
    )  # fmt: skip
    columns = {"image": [encode(pixels) for pixels in arrays()], "label": LABELS}
    kinds = [f"{tmp_path}/pets.npz", f"wds:{tmp_path}/pets.tar", str(write_parquet(tmp_path / "pets.parquet", columns))]

    rows = []
    for kind in kinds:
        first, second = (run("extract", kind, *TINY, "--json").json for _ in range(2))
        assert (first["computed"], second["computed"]) == (6, 0)
        with h5py.File(Path(first["entry"]) / "features.h5") as file:
            rows.append(file["features"][:])

    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[0], rows[2])
