"""Folders, manifests and digits."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import draw_image

from featcache.datasets import Sample, open_dataset
from featcache.errors import DataError, UsageError


def test_flat_folder(folder: Path) -> None:
    """The folders of images are the classes, no split is given."""
    source = open_dataset(folder)

    assert source.name == "images"
    assert source.classes == ("blue", "green", "red")
    assert len(source.samples) == 36
    assert source.samples[0] == Sample("blue/00.png", "blue", "")


def test_split_folder_and_what_is_beside_it(tmp_path: Path) -> None:
    """train, val and test are splits by any usual name; another folder beside them is named, not read."""
    for place in ("train/a", "train/b", "Validation/a", "test/b", "extras/c"):
        draw_image(tmp_path / place / "1.png", (9, 9, 9), 1)

    source = open_dataset(tmp_path)

    found = sorted((item.label, item.split) for item in source.samples)
    assert found == [("a", "train"), ("a", "val"), ("b", "test"), ("b", "train")]
    assert any("extras" in note for note in source.notes)


def test_a_class_called_train(tmp_path: Path) -> None:
    """A folder `train` full of pictures of trains is a class."""
    for name in ("car", "train"):
        draw_image(tmp_path / name / "1.png", (9, 9, 9), 1)

    assert open_dataset(tmp_path).classes == ("car", "train")


def test_hidden_files_links_to_folders_and_other_files_are_skipped(folder: Path) -> None:
    """Only visible image files count, each once."""
    (folder / "red" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "linked").symlink_to(folder / "red", target_is_directory=True)
    draw_image(folder / "red" / "._00.png", (0, 0, 0), 5)
    draw_image(folder / ".hidden" / "00.png", (0, 0, 0), 6)
    (folder / "red" / "notes.txt").write_text("no image")

    assert len(open_dataset(folder).samples) == 36


def test_an_empty_class_is_reported(folder: Path) -> None:
    """A class folder without images is said, and no class."""
    (folder / "yellow").mkdir()

    source = open_dataset(folder)

    assert source.classes == ("blue", "green", "red")
    assert any("yellow" in note and "no image" in note for note in source.notes)


def test_class_numbers_sort_as_numbers(tmp_path: Path) -> None:
    """class10 comes after class2."""
    for name in ("class10", "class2", "class1"):
        draw_image(tmp_path / name / "1.png", (1, 1, 1), 1)

    assert open_dataset(tmp_path).classes == ("class1", "class2", "class10")


def test_manifest(folder: Path) -> None:
    """A CSV names paths relative to itself, labels and splits."""
    (folder / "list.csv").write_text("path,label,split\nred/00.png,warm,train\nblue/00.png,cold,TEST\n")

    source = open_dataset(folder / "list.csv")

    assert source.samples == (Sample("red/00.png", "warm", "train"), Sample("blue/00.png", "cold", "test"))
    assert source.read("red/00.png") == (folder / "red" / "00.png").read_bytes()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("file,label\na,b\n", "columns path and label"),
        ("path,label\n,b\n", "line 2: path and label"),
        ("path,label,split\na,b,dev\n", "line 2: split 'dev'"),
        ("path,label\na,b\na,c\n", "listed more than once"),
        ("path,label,split\na,b,train\nc,d,\n", "some rows have a split"),
        ("path,label\n", "columns|no image"),
    ],
)
def test_a_bad_manifest_is_refused(tmp_path: Path, text: str, match: str) -> None:
    """The error names the file and the line."""
    (tmp_path / "list.csv").write_text(text)

    with pytest.raises(DataError, match=match):
        open_dataset(tmp_path / "list.csv")


def test_digits_are_images() -> None:
    """scikit-learn's digits come as image files in memory, the values those of the data set."""
    from sklearn.datasets import load_digits

    source = open_dataset("sklearn:digits")
    first = np.asarray(Image.open(io.BytesIO(source.read(source.samples[0].path))))

    assert len(source.samples) == 1797
    np.testing.assert_array_equal(np.round(first / 255 * 16), load_digits().images[0])


def test_what_is_no_source(tmp_path: Path) -> None:
    """Absent, empty and unknown sources are told apart."""
    with pytest.raises(DataError, match="no such folder"):
        open_dataset(tmp_path / "absent")
    with pytest.raises(DataError, match="no image found"):
        open_dataset(tmp_path)
    with pytest.raises(UsageError, match="digits"):
        open_dataset("sklearn:iris")
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(UsageError, match="not a folder"):
        open_dataset(tmp_path / "x.zip")


def test_absolute_paths_in_a_manifest(tmp_path: Path) -> None:
    """An image may lie anywhere."""
    draw_image(tmp_path / "far" / "a.png", (200, 0, 0), 0)
    draw_image(tmp_path / "here" / "b.png", (0, 0, 200), 1)
    manifest = tmp_path / "here" / "list.csv"
    manifest.write_text(f"path,label\n{tmp_path / 'far' / 'a.png'},red\nb.png,blue\n")

    source = open_dataset(manifest)

    assert all(source.read(item.path) for item in source.samples)
    assert all(source.stat(item.path) is not None for item in source.samples)
