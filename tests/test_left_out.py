"""What lies in a data set and is not read is said with its number; where a split would be lost it is an error."""

import os
import shutil
from pathlib import Path

import pytest
from support import TINY, Run, draw_image

from featcache.datasets import Dataset, looks_like_split, open_dataset
from featcache.errors import DataError
from featcache.experiments.predict import find_samples


def draw(root: Path, *places: str) -> Path:
    """Write one image at each place; what is called ``*.txt`` is text."""
    for number, place in enumerate(places):
        if Path(place).suffix in {".txt", ".heic", ""}:
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            (root / place).write_text("no image")
        else:
            draw_image(root / place, (9 * number % 256, 90, 200), number)
    return root


def described(source: Dataset) -> list[tuple[str, str, str]]:
    """Return paths, labels and splits."""
    return [(item.path, item.label, item.split) for item in source.samples]


def said(source: Dataset) -> str:
    """Return all notes in one text."""
    return "\n".join(source.notes)


def test_a_linked_test_split_is_read(tmp_path: Path) -> None:
    """A split that is a link to a folder elsewhere counts like any other."""
    draw(tmp_path / "exp", "train/cat/1.png", "train/dog/2.png")
    draw(tmp_path / "shared", "test/cat/3.png", "test/dog/4.png")
    (tmp_path / "exp" / "test").symlink_to(tmp_path / "shared" / "test")

    source = open_dataset(tmp_path / "exp")

    assert [place[2] for place in described(source)] == ["test", "test", "train", "train"]
    assert source.samples[0].path == "test/cat/3.png"
    assert source.read("test/cat/3.png") == (tmp_path / "shared" / "test" / "cat" / "3.png").read_bytes()
    assert not source.notes


def test_linked_classes_and_links_inside_are_read_once(tmp_path: Path) -> None:
    """Links to folders outside are followed; a second link to one folder is not, and is counted."""
    draw(tmp_path / "data", "cat/1.png")
    draw(tmp_path / "far", "dogs/2.png", "dogs/deep/3.png", "more/4.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "far" / "dogs")
    (tmp_path / "data" / "hound").symlink_to(tmp_path / "far" / "dogs")
    (tmp_path / "data" / "cat" / "more").symlink_to(tmp_path / "far" / "more")

    source = open_dataset(tmp_path / "data")

    assert described(source) == [
        ("cat/1.png", "cat", ""), ("cat/more/4.png", "cat", ""), ("dog/2.png", "dog", ""), ("dog/deep/3.png", "dog", "")
    ]  # fmt: skip
    assert "1 link to folders that are read already (hound)" in said(source)
    assert "2 images in folders inside class folders" in said(source)


def test_a_real_folder_wins_over_a_link_to_it(tmp_path: Path) -> None:
    """A link whose name sorts first does not take another class's images."""
    draw(tmp_path, "red/1.png", "zebra/2.png")
    (tmp_path / "alias").symlink_to(tmp_path / "red")

    source = open_dataset(tmp_path)

    assert source.classes == ("red", "zebra")
    assert "(alias)" in said(source)


@pytest.mark.parametrize("target", [".", "..", "../..", "cat", "../cat/loop"])
def test_links_in_a_circle_end(tmp_path: Path, target: str) -> None:
    """Links to oneself, to a parent or to one's own link are not followed, and are counted."""
    draw(tmp_path / "data", "cat/1.png", "dog/2.png")
    (tmp_path / "data" / "cat" / "loop").symlink_to(target)

    source = open_dataset(tmp_path / "data")

    assert len(source.samples) == 2
    assert "1 link " in said(source)


def test_a_folder_of_hidden_content_is_read_through_its_link(tmp_path: Path) -> None:
    """What lies inside DATA, but is not read there, is read through a link (as DVC lays it out)."""
    draw(tmp_path, ".store/x/1.png", "cat/2.png")
    (tmp_path / "dog").symlink_to(tmp_path / ".store" / "x")

    assert open_dataset(tmp_path).classes == ("cat", "dog")


def test_test_linked_to_train_is_refused(tmp_path: Path) -> None:
    """A test split that is the training split is no test split."""
    draw(tmp_path, "train/cat/1.png", "train/dog/2.png")
    (tmp_path / "test").symlink_to(tmp_path / "train")

    with pytest.raises(DataError, match=r"test: this split would be lost: .*already"):
        open_dataset(tmp_path)


def test_a_dead_link_in_the_place_of_a_split_is_refused(tmp_path: Path) -> None:
    """A split whose link goes nowhere is not silently drawn instead; another dead link is counted."""
    draw(tmp_path, "train/cat/1.png", "train/dog/2.png")
    (tmp_path / "train" / "cat" / "old").symlink_to(tmp_path / "gone")

    assert "1 link that goes nowhere (train/cat/old)" in said(open_dataset(tmp_path))

    (tmp_path / "test").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match="test: a link that goes nowhere"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("suffix", [".jfif", ".jpx", ".j2k", ".apng", ".JFIF", ".pjpeg", ".mpo", ".dib", ".j2c"])
def test_every_suffix_of_formats_that_are_decoded_is_read(tmp_path: Path, suffix: str) -> None:
    """A file of a format that is decoded is read, whichever of its suffixes it has."""
    draw(tmp_path, "cat/1.png")
    (tmp_path / "cat" / "1.png").rename(tmp_path / "cat" / f"1{suffix}")

    assert [item.path for item in open_dataset(tmp_path).samples] == [f"cat/1{suffix}"]


def test_other_files_are_counted(tmp_path: Path) -> None:
    """Files with other suffixes are counted by suffix, images outside class folders too; what systems leave is not."""
    draw(tmp_path, "cat/1.png", "cat/a.heic", "cat/b.heic", "dog/2.png", "dog/n.txt", "dog/README", "3.png", "labels.txt")
    draw(tmp_path, "cat/Thumbs.db.txt", "cat/.DS_Store", "__MACOSX/cat/._1.png", ".ipynb_checkpoints/4.png")
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"x")

    source = open_dataset(tmp_path)

    assert source.classes == ("cat", "dog")
    assert "left out: 6 files with other suffixes (.txt 3, .heic 2, none 1)" in said(source)
    assert "1 image outside class folders" in said(source)
    assert "Thumbs" not in said(source)


def test_a_flat_folder_says_where_its_images_lie(tmp_path: Path) -> None:
    """Images without class folders are not "no image"."""
    draw(tmp_path, *(f"{number}.png" for number in range(5)))

    with pytest.raises(DataError, match="5 images lie outside class folders"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    "places",
    [
        ("val/1.png", "test/2.png"),
        ("val/cat/1.png", "test/cat/2.png"),
        ("train/cat.1.png", "test1/2.png"),
        ("train/1.png", "test/2.png"),
        ("Train/1.png", "TEST/2.png", "Valid/3.png"),
        ("test/cat/1.png", "test/dog/2.png"),
        ("training/1.png", "testing/2.png"),
        ("train_images/1.png", "test_images/2.png"),
        ("trainset/a/1.png", "testset/a/2.png"),
        ("train2017/1.png", "val2017/2.png"),
        ("dev/1.png", "eval/2.png"),
        ("train/1.png", "test/2.png", "extra/3.png"),
        ("pets/train/cat/1.png", "pets/test/cat/2.png"),
        ("seg_train/seg_train/a/1.png", "seg_test/seg_test/a/2.png"),
        ("cat/train/1.png", "cat/test/2.png", "dog/train/3.png", "dog/test/4.png"),
    ],
)
def test_splits_are_never_taken_for_classes(tmp_path: Path, places: tuple[str, ...]) -> None:
    """Where folders are called as splits are and are not laid out as such, that is an error."""
    draw(tmp_path, *places)

    with pytest.raises(DataError, match=r"splits.*train\|val\|test/CLASS/IMAGE"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    "places",
    [
        ("train/1.png", "car/2.png"),
        ("test/1.png", "control/2.png"),
        ("valley/1.png", "hill/2.png"),
        ("bullet_train/1.png", "steam_train/2.png"),
    ],
)
def test_a_class_may_be_called_like_a_split(tmp_path: Path, places: tuple[str, ...]) -> None:
    """Pictures of trains are a class beside pictures of cars."""
    draw(tmp_path, *places)

    assert len(open_dataset(tmp_path).classes) == 2


@pytest.mark.parametrize(
    ("places", "match"),
    [
        (("test1/a/3.png",), "test1: looks like the test split"),
        (("test_set/3.png",), "test_set: looks like the test split"),
        (("val2/a/3.png",), "val2: looks like the val split"),
        (("holdout/a/3.png",), "holdout: looks like the test split"),
        (("test/3.png", "test/4.png"), "test: this split would be lost: 2 images lie outside class folders"),
        (("test/a/3.heic",), "test: this split would be lost: 1 file with other suffixes"),
        (("val/labels.txt",), "val: this split would be lost"),
    ],
)
def test_an_official_split_is_never_lost(tmp_path: Path, places: tuple[str, ...], match: str) -> None:
    """A test set that would not be read ends the run, since another would be drawn in its place."""
    draw(tmp_path, "train/a/1.png", "train/b/2.png", *places)

    with pytest.raises(DataError, match=match):
        open_dataset(tmp_path)


@pytest.mark.parametrize(("folder", "split"), [("Test", "test"), ("VALID", "val"), ("testing", "test"), ("dev", "val")])
def test_usual_names_of_splits_are_read(tmp_path: Path, folder: str, split: str) -> None:
    """Splits go by several names, in any case."""
    draw(tmp_path, "Training/a/1.png", f"{folder}/a/2.png")

    assert {item.split for item in open_dataset(tmp_path).samples} == {"train", split}


def test_what_lies_beside_train_is_counted(tmp_path: Path) -> None:
    """Other folders beside the splits, a second test set among them, are named with their images."""
    draw(
        tmp_path, "train/a/1.png", "test/a/2.png", "extras/b/3.png", "extras/4.png", "test_b/a/5.png", "6.png", "test/7.png"
    )

    source = open_dataset(tmp_path)

    assert len(source.samples) == 2
    assert "beside train/ (images: extras 2, test_b 1)" in said(source)
    assert "2 images outside class folders (./ 1, test/ 1)" in said(source)


@pytest.mark.parametrize(
    ("name", "split"),
    [("train", "train"), ("trainval", "train"), ("train_1", "train"), ("Test-Set", "test"), ("val_images", "val"),
     ("validation2", "val"), ("test_a", "test"), ("trains", ""), ("valley", ""), ("testament", ""), ("contest", ""),
     ("training_day", ""), ("vale", ""), ("a", "")],
)  # fmt: skip
def test_names_that_look_like_splits(name: str, split: str) -> None:
    """A number or a word such as set or images makes no other name of it; another word does."""
    assert looks_like_split(name) == split


@pytest.mark.skipif(os.geteuid() == 0, reason="root opens everything")
def test_a_folder_that_cannot_be_opened_is_counted(tmp_path: Path) -> None:
    """A class folder without permission is not silently empty."""
    draw(tmp_path, "cat/1.png", "dog/2.png", "dog/in/3.png")
    (tmp_path / "dog" / "in").chmod(0)

    assert "1 folder that cannot be opened" in said(open_dataset(tmp_path))


def test_predict_reads_a_folder_by_the_same_rule(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Links are followed and other files counted for new images too; a folder without images is said."""
    draw(tmp_path / "new", "1.png", "in/2.png", "x.heic")
    draw(tmp_path / "far", "3.jfif.png")
    (tmp_path / "new" / "more").symlink_to(tmp_path / "far")
    (tmp_path / "empty").mkdir()

    found = [Path(path).name for path in find_samples([str(tmp_path / "new"), str(tmp_path / "empty")])]

    assert found == ["1.png", "2.png", "3.jfif.png"]
    assert "1 file with other suffixes (.heic 1)" in caplog.text
    assert "empty: no image in it" in caplog.text


def test_special_files_end_nothing(folder: Path, run: Run) -> None:
    """A pipe, a socket and a folder with an image's name, and a file of no sane size, are left out with their reasons."""
    os.mkfifo(folder / "red" / "pipe.jpg")
    (folder / "red" / "folder.jpg").mkdir()
    shutil.copy(folder / "red" / "00.png", folder / "red" / "folder.jpg" / "x.png")
    with (folder / "red" / "huge.jpg").open("wb") as file:
        file.truncate(1 << 40)
    (folder / "red" / "null.png").symlink_to("/dev/zero")

    done = run("extract", folder, *TINY, "--json")

    assert done.code == 0
    assert done.json["rows"] == 37
    reasons = {Path(bad["path"]).name: bad["reason"] for bad in done.json["quarantined"]}
    assert set(reasons) == {"pipe.jpg", "huge.jpg", "null.png"}
    assert "pipe, socket or device" in reasons["pipe.jpg"]
    assert "over the limit of 268 MB" in reasons["huge.jpg"]
    again = run("extract", folder, *TINY, "--json").json
    assert (again["computed"], len(again["quarantined"])) == (0, 3)
    assert any("inside class folders" in note for note in again["notes"])
