"""What a label may be: the same in every kind of source."""

import io
import json
import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from support import TINY, Run

from featcache.datasets import Dataset, odd_names, open_dataset
from featcache.datasets.decoding import encode
from featcache.datasets.tables import Labels, labelled
from featcache.errors import DataError

MISSING = (None, "", "  ", math.nan, np.float32("nan"), Decimal("nan"), b"")


@pytest.mark.parametrize(
    ("value", "text"),
    [("cat", "cat"), ("cat ", "cat "), (b"cat", "cat"), (np.str_("cat"), "cat"), (np.bytes_(b"\xff"), "\udcff"), (3, "3"),
     (np.int64(-1), "-1"), (True, "True"), (np.bool_(0), "False"), (2.0, "2"), (0.5, "0.5"), (-0.0, "0"),
     (np.float32(0.5), "0.5"), (Decimal("3.0"), "3"), (Decimal("0.25"), "0.25"), (np.array(7), "7"), (10**20, str(10**20))],
)  # fmt: skip
def test_labels_as_text(value: object, text: str) -> None:
    """Text stays as it is; whole numbers are written as such, whatever type holds them."""
    assert Labels("x").read(value, "row 0") == text


@pytest.mark.parametrize("value", MISSING)
def test_what_is_missing(value: object) -> None:
    """None, NaN and no text are no label, never a class "nan" or "None"."""
    assert Labels("x").read(value, "row 0") is None
    assert Labels("x", ["a", "b"]).read(value, "row 0") is None


@pytest.mark.parametrize(
    "value",
    [math.inf, np.float64("-inf"), {"a": 1}, object(), 1j, np.zeros((2, 2)), np.array((1, 2), "i4,i4")[()], "a\0b", "\ud800",
     "x" * 20_000, ["a", None], ["a;b"], [["a"]], Decimal("inf"), [{"a": 1}]],
)  # fmt: skip
def test_what_is_no_label(value: object) -> None:
    """Anything else is refused with its row."""
    with pytest.raises(DataError, match="here, row 7: "):
        Labels("here").read(value, "row 7")


def test_numbers_of_named_classes() -> None:
    """Where classes have names a number is one of them, below zero missing, beyond them an error."""
    read = Labels("here", ["cat", "dog"])

    assert [read.read(value, "row 0") for value in (1, 0.0, -1, np.int8(-100), "fox")] == ["dog", "cat", None, None, "fox"]
    for value in (2, 0.5):
        with pytest.raises(DataError, match=r"row 3: .* none of the 2 classes"):
            read.read(value, "row 3")


def test_two_classes_of_one_name_are_refused() -> None:
    """Two classes are not merged because they are called alike."""
    with pytest.raises(DataError, match="two classes are called 'cat'"):
        Labels("here", ["cat", "dog", "cat"])


def test_lists_are_several_labels() -> None:
    """A list is one text with ; between, as ``--target labels`` divides it; an empty one means no label at all."""
    read = Labels("here", ["cat", "dog"])

    assert not read.lists
    assert [read.read(value, "row 0") for value in ([0, 1], ("fox",), np.array([1]), [])] == ["cat;dog", "fox", "dog", ""]
    assert read.lists


def test_a_split_without_labels_is_left_out_else_the_row_is_named() -> None:
    """A secret test part costs itself alone, one missing label the run."""
    kept, notes = labelled(["a", None, "b", None], ["train", "test", "train", "test"], "set", "row {}".format)

    assert kept == [0, 2]
    assert notes == ["set: left out: 2 images of the split test, none of which has a label"]
    for labels, splits in (
        (["a", None, "b"], ["", "", ""]),
        (["a", None, "b"], ["train", "train", "test"]),
        ([None], ["test"]),
    ):
        with pytest.raises(DataError, match=r"set, row [01]: no label \(1 such of"):
            labelled(labels, splits, "set", "row {}".format)


@pytest.mark.parametrize(
    "names",
    [("cat", "cat "), ("\u00e9", "e\u0301"), ("nan", "NaN"), ("01", "1"), ("1", "1.0"), ("Cat", "cat"), ("a b", "a\u00a0 b"),
     ("a\u200bb", "ab"), ("\uff21b", "Ab")],
)  # fmt: skip
def test_names_that_look_alike_are_said(names: tuple[str, str]) -> None:
    """White space, Unicode forms, case and leading zeros make two classes, and a note."""
    notes = odd_names([*names, "other"])

    assert any("look alike" in note and all(ascii(name) in note for name in names) for note in notes)


def test_other_names_are_not_said() -> None:
    """Different names, single letters of both cases among them, get no note; a mark for a missing label does."""
    assert odd_names(["cat", "dog", "a", "A", "1", "2", "10", "class1", "class10"]) == []
    assert "often a mark for a missing label" in odd_names(["cat", "None"])[0]


def pixels(count: int = 6) -> np.ndarray:
    """Return so many images."""
    return np.random.default_rng(0).integers(0, 256, (count, 9, 8, 3), dtype=np.uint8)


def as_npz(path: Path, labels: list[Any], **more: Any) -> Dataset:
    """Write and open a .npz."""
    np.savez(path / "x.npz", images=pixels(len(labels)), labels=np.array(labels), **more)
    return open_dataset(path / "x.npz")


def as_hdf5(path: Path, labels: list[Any], **more: Any) -> Dataset:
    """Write and open an HDF5 file."""
    with h5py.File(path / "x.h5", "w") as file:
        file["images"] = pixels(len(labels))
        file["labels"] = labels
        file.update(more)
    return open_dataset(path / "x.h5")


def as_parquet(path: Path, labels: list[Any], **more: Any) -> Dataset:
    """Write and open a Parquet file of bytes, with class names as the hub notes them."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"image": [encode(image) for image in pixels(len(labels))], "label": labels})
    if more:
        features = {
            "info": {
                "features": {"label": {"names": [str(name, "utf-8") for name in more["class_names"]], "_type": "ClassLabel"}}
            }
        }
        table = table.replace_schema_metadata({b"huggingface": json.dumps(features).encode()})
    pq.write_table(table, path / "x.parquet")
    return open_dataset(path / "x.parquet")


def as_csv(path: Path, labels: list[Any], **_: Any) -> Dataset:
    """Write and open a CSV file; a missing value is an empty cell, as pandas writes it."""
    cells = ("" if one is None or np.isnan(one) else one for one in labels)
    (path / "x.csv").write_text("path,label\n" + "".join(f"{n}.png,{one}\n" for n, one in enumerate(cells)))
    return open_dataset(path / "x.csv")


def as_hub(path: Path, labels: list[Any], **more: Any) -> Dataset:
    """Write and open a folder for ``datasets``."""
    D = pytest.importorskip("datasets")
    names = more.get("class_names")
    kind = (
        D.ClassLabel(names=list(names))
        if names is not None
        else D.Value("int64" if isinstance(labels[0], int) else "float64")
    )
    images = [{"bytes": encode(image), "path": None} for image in pixels(len(labels))]
    (path / "h").mkdir()
    D.Dataset.from_dict({"image": images, "label": labels}, D.Features({"image": D.Image(), "label": kind})).to_parquet(
        path / "h" / "train-00000-of-00001.parquet"
    )
    return open_dataset(f"hf:{path / 'h'}")


KINDS = [as_npz, as_hdf5, as_parquet, as_csv, as_hub]


@pytest.fixture(autouse=True)
def _own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep ``datasets`` from writing beside the user's sets."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


@pytest.mark.parametrize("kind", KINDS)
def test_floats_are_whole_classes_in_every_kind(tmp_path: Path, kind: Callable[..., Dataset]) -> None:
    """A column that pandas made of floats, for a missing value once, has the classes 0 and 1."""
    source = kind(tmp_path, [0.0, 1.0, 0.0, 1.0] if kind is not as_csv else [0, 1, 0, 1])

    assert [item.label for item in source.samples] == ["0", "1", "0", "1"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_label_names_its_row_in_every_kind(tmp_path: Path, kind: Callable[..., Dataset]) -> None:
    """NaN is an error with its row, never a class."""
    with pytest.raises(DataError, match=r"(row 3|line 5).*: no label \(1 such of 6\)"):
        kind(tmp_path, [0.0, 1.0, 0.0, math.nan, 1.0, 0.0])


@pytest.mark.parametrize("kind", [as_npz, as_hdf5, as_parquet, as_hub])
def test_minus_one_of_named_classes_is_missing(tmp_path: Path, kind: Callable[..., Dataset]) -> None:
    """-1 beside class names is no class, and does not make the names go away."""
    with pytest.raises(DataError, match=r"row 2: no label"):
        kind(tmp_path, [0, 1, -1, 1], class_names=np.array([b"cat", b"dog"]) if kind is not as_hub else ["cat", "dog"])


@pytest.mark.parametrize("kind", [as_npz, as_hdf5, as_parquet])
def test_duplicate_class_names_are_refused(tmp_path: Path, kind: Callable[..., Dataset]) -> None:
    """Two classes of one name are not merged."""
    names = np.array([b"cat", b"cat"])
    with pytest.raises(DataError, match="two classes are called"):
        kind(tmp_path, [0, 1, 0, 1], class_names=names)


def hub(path: Path, **splits: dict[str, Any]) -> Dataset:
    """Write and open a set for ``datasets``: per split columns, with their features under ``_``."""
    D = pytest.importorskip("datasets")
    (path / "h").mkdir()
    for split, columns in splits.items():
        kinds = columns.pop("_")
        D.Dataset.from_dict(columns, D.Features(kinds)).to_parquet(path / "h" / f"{split}-00000-of-00001.parquet")
    return open_dataset(f"hf:{path / 'h'}")


def images(count: int, *, broken: int | None = None) -> list[Any]:
    """Return a column of images, one of them null."""
    return [None if row == broken else {"bytes": encode(one), "path": None} for row, one in enumerate(pixels(count))]


def test_a_hub_test_part_without_labels_is_left_out(tmp_path: Path) -> None:
    """A secret test part (-1 everywhere) costs itself alone, and is counted."""
    D = pytest.importorskip("datasets")
    kinds = {"image": D.Image(), "label": D.ClassLabel(names=["cat", "dog"])}

    source = hub(
        tmp_path,
        train={"image": images(4), "label": [0, 1, 0, 1], "_": kinds},
        test={"image": images(3), "label": [-1] * 3, "_": dict(kinds)},
    )

    assert [item.label for item in source.samples] == ["cat", "dog", "cat", "dog"]
    assert any("left out: 3 images of the split test" in note for note in source.notes)


def test_a_null_image_of_the_hub_is_left_out_with_its_reason(tmp_path: Path, run: Run) -> None:
    """One null image costs itself alone, as in plain Parquet."""
    D = pytest.importorskip("datasets")
    kinds = {"image": D.Image(), "label": D.ClassLabel(names=["cat", "dog"])}
    hub(tmp_path, train={"image": images(6, broken=2), "label": [0, 1] * 3, "_": kinds})

    done = run("extract", f"hf:{tmp_path / 'h'}", *TINY, "--json")

    assert done.code == 0
    assert done.json["rows"] == 5
    assert [bad["reason"] for bad in done.json["quarantined"]] == ["cannot be read (row 2 holds no image)"]


def test_label_goes_before_other_columns_of_labels(tmp_path: Path) -> None:
    """Of several label columns ``label`` is read, and the others are named."""
    D = pytest.importorskip("datasets")
    kinds = {"image": D.Image(), "coarse_label": D.ClassLabel(names=["animal"]), "label": D.ClassLabel(names=["cat", "dog"])}

    source = hub(tmp_path, train={"image": images(4), "coarse_label": [0] * 4, "label": [0, 1] * 2, "_": kinds})

    assert source.classes == ("cat", "dog")
    assert any("the column label is read, not coarse_label" in note for note in source.notes)


def test_lists_train_several_labels_and_nothing_else(tmp_path: Path, run: Run) -> None:
    """Lists of labels are an error for one class an image, and what ``--target labels`` takes."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = {"image": [encode(image) for image in pixels(40)], "label": [["a"], ["a", "b"], ["b"], ["b", "c"]] * 10}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")

    refused = run("fit", tmp_path / "x.parquet", *TINY, "--head", "ridge")
    tuned = run("finetune", tmp_path / "x.parquet", *TINY)
    fitted = run("fit", tmp_path / "x.parquet", *TINY, "--target", "labels", "--json")

    assert (refused.code, tuned.code, fitted.code) == (3, 3, 0)
    assert "--target labels" in refused.err
    assert fitted.json["heads"][0]["target"] == "labels"


def test_numbers_stay_targets(tmp_path: Path, run: Run) -> None:
    """Fractions, whole numbers and numbers below zero are regression targets from arrays too."""
    values = np.linspace(-2, 2, 41)[:40]
    np.savez(tmp_path / "x.npz", images=pixels(40), labels=values)

    done = run("fit", tmp_path / "x.npz", *TINY, "--target", "number", "--head", "ridge", "--json")

    assert done.code == 0
    assert {float(item.label) for item in open_dataset(tmp_path / "x.npz").samples} == set(values.tolist())


def test_a_group_that_is_missing_names_its_row(tmp_path: Path) -> None:
    """An empty group is no group of its own; rows of a split without labels have none."""
    from featcache.datasets.tables import read_column

    (tmp_path / "x.csv").write_text("path,label,split,who\na,x,train,1\nb,y,train,2\nc,,test,\n")
    assert read_column(str(tmp_path / "x.csv"), "who") == ["1", "2"]
    assert len(open_dataset(tmp_path / "x.csv").samples) == 2

    (tmp_path / "x.csv").write_text("path,label,who\na,x,1\nb,y,\n")
    with pytest.raises(DataError, match="line 3 has none"):
        read_column(str(tmp_path / "x.csv"), "who")


def test_a_path_with_a_comma_is_not_cut(tmp_path: Path) -> None:
    """A row with more cells than columns is refused: its label would be a piece of the path."""
    (tmp_path / "x.csv").write_text("path,label\na,b.png,cat\n")

    with pytest.raises(DataError, match="line 2: more cells than columns"):
        open_dataset(tmp_path / "x.csv")


def test_one_file_by_two_spellings_is_listed_twice(tmp_path: Path) -> None:
    """``im/../a.png`` is ``a.png``, with one label."""
    (tmp_path / "x.csv").write_text("path,label\na.png,cat\nim/../a.png,dog\n")

    with pytest.raises(DataError, match="listed more than once"):
        open_dataset(tmp_path / "x.csv")


def shard(path: Path, members: list[tuple[str, bytes]]) -> str:
    """Write a tar file, and return its address."""
    import tarfile

    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return f"wds:{path}"


def test_the_order_of_members_decides_nothing(tmp_path: Path) -> None:
    """.cls counts before .json before .txt, one image of several by its format, in any order of members."""
    image, other = encode(pixels(2)[0]), encode(pixels(2)[1])
    members = [("0.txt", b"a caption"), ("0.json", b'{"label": "from json"}'), ("0.cls", b"cat"), ("0.ppm", image),
               ("0.jpg", other), ("1.txt", b"a caption"), ("1.json", b'{"label": "dog"}'), ("1.ppm", image),
               ("2.txt", b"fox"), ("2.json", b'{"height": 3}'), ("2.png", other)]  # fmt: skip
    expected = [("0.jpg", "cat"), ("1.ppm", "dog"), ("2.png", "fox")]

    for order in (members, members[::-1], sorted(members), sorted(members, key=lambda one: one[0][::-1])):
        source = open_dataset(shard(tmp_path / "x.tar", order))
        assert sorted((item.path.split("/")[1], item.label) for item in source.samples) == expected
        assert any("1 image beside another of the same sample" in note for note in source.notes)


def test_members_that_are_not_read_are_counted(tmp_path: Path) -> None:
    """Masks, arrays, labels without an image and links in a shard are counted; one name twice is refused."""
    image = encode(pixels(1)[0])
    members = [
        ("0.ppm", image),
        ("0.cls", b"cat"),
        ("0.seg.png", image),
        ("0.npy", b"x"),
        ("9.cls", b"dog"),
        ("._0.jpg", b""),
    ]

    source = open_dataset(shard(tmp_path / "x.tar", members))

    assert len(source.samples) == 1
    assert "left out: 3 members of shards (.seg.png 1, .npy 1, labels without an image 1)" in source.notes[0]
    for twice in (("0.ppm", image), ("./0.PPM", image), ("0.cls", b"dog")):
        with pytest.raises(DataError, match="is there twice"):
            open_dataset(shard(tmp_path / "y.tar", [*members, twice]))


def test_splits_in_the_middle_of_shards_names(tmp_path: Path) -> None:
    """Where no shard's name begins with a split, the one in it counts if there are several; a secret split is left out."""
    image = encode(pixels(1)[0])
    for name, more in (("pets-train-0", [("0.cls", b"a")]), ("pets-val-0", [("0.cls", b"a")]), ("pets-test-0", [])):
        shard(tmp_path / f"{name}.tar", [("0.ppm", image), *more])

    source = open_dataset(f"wds:{tmp_path}/pets-{{train,val,test}}-0.tar")

    assert [item.split for item in source.samples] == ["train", "val"]
    for number, split in enumerate(("train", "test")):
        (tmp_path / split).mkdir()
        shard(tmp_path / split / f"{number}.tar", [("0.ppm", image), ("0.cls", b"a")])
    assert [item.split for item in open_dataset(f"wds:{tmp_path}/{{train/0,test/1}}.tar").samples] == ["train", "test"]
    assert any("1 images of the split test" in note or "1 image" in note for note in source.notes)
