"""Columns of a manifest beside the images: what they add, how they become numbers, and where they are asked for again."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Outcome, Run, draw_image

from featcache.datasets.tables import open_unlabelled
from featcache.errors import DataError, UsageError
from featcache.evaluation import CodedColumn, ColumnCoder, Columns, alone
from featcache.store import LazyRows, beside

MINI = ("-b", "mini", "--batch-size", "16")
SHADES = ((200, 50, 40), (30, 40, 200))


def write(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    """Write a CSV file."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def drawn(root: Path, count: int) -> list[str]:
    """Draw so many images, the even ones red, the others blue, and return their paths."""
    for number in range(count):
        draw_image(root / f"{number}.png", SHADES[number % 2], number)
    return [f"{number}.png" for number in range(count)]


def split_of(number: int, count: int) -> str:
    """Return the part of an image: half train, a quarter each val and test."""
    return "train" if number < count // 2 else "val" if number < 3 * count // 4 else "test"


@pytest.fixture
def exclusive_or(tmp_path: Path) -> Path:
    """A manifest of 240 images whose label is whether colour and side differ; each says nothing of it alone."""
    count, rng = 240, np.random.default_rng(0)
    rows = [
        (
            path,
            "ab"[number % 2 ^ number // 2 % 2],
            split_of(number, count),
            "LR"[number // 2 % 2],
            f"{rng.normal(50, 9):.1f}",
        )
        for number, path in enumerate(drawn(tmp_path, count))
    ]
    return write(tmp_path / "x.csv", ("path", "label", "split", "side", "age"), rows)


def by_head(outcome: Outcome) -> dict[str, float]:
    """Return the test accuracy of every head and baseline."""
    assert outcome.code == 0, outcome.err
    heads = {head["head"]: head["test"]["accuracy"] for head in outcome.json["heads"]}
    return heads | {each["control"]: each["test"]["accuracy"] for each in outcome.json["controls"]}


def test_image_and_column_together_tell_what_neither_does(exclusive_or: Path, run: Run) -> None:
    """Neighbours of image and column have an exclusive-or right, those of images alone, and of columns alone, do not."""
    images = by_head(run("fit", exclusive_or, *MINI, "--head", "knn", "--json"))
    joined = run("fit", exclusive_or, *MINI, "--head", "knn", "--head", "logistic", "--with", "side", "--json")

    assert images["knn"] <= 0.6
    assert by_head(joined)["knn with side"] >= 0.95
    assert by_head(joined)["columns + logistic"] <= 0.6
    assert by_head(joined)["logistic with side"] <= 0.6  # no line parts it
    assert [column["control"] for column in joined.json["columns"]] == ["side"]
    assert "alone reaches" not in joined.err


def test_only_training_images_say_how_a_column_is_scaled() -> None:
    """Mean, spread, categories and whether values are missing come of them; what others have beside is zero."""
    values = [("1", "x"), ("3", "y"), ("", "x"), ("1000", "z"), ("nan", "")]
    coder = Columns(("age", "site"), values).coder(np.array([0, 1, 2]))

    np.testing.assert_array_equal(
        coder.encode(values), [[-1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [998, 0, 0, 0], [0, 1, 0, 0]]
    )
    assert ColumnCoder.of_card(json.loads(json.dumps(coder.card))) == coder


def test_columns_weigh_as_much_as_the_embedding() -> None:
    """However the embedding is scaled, all columns together vary as much as it does."""
    rng = np.random.default_rng(0)
    columns = Columns(("a", "b"), [(f"{a:.3f}", "xyz"[b]) for a, b in zip(rng.normal(size=90), rng.integers(3, size=90))])  # noqa: B905
    train = np.arange(60)

    for scale in (1e-2, 1e3):
        X = scale * rng.normal(size=(60, 30)).astype(np.float32)
        coded = columns.coder(train).weighted(X, columns, train).encode(columns.values)[train]
        assert coded.var(axis=0).sum() == pytest.approx(X.var(axis=0).sum(), rel=1e-4)


def test_numbers_may_be_names() -> None:
    """Hospital 3 is not three times hospital 1 where that is said."""
    values = [("1",), ("3",), ("1",), ("3",)]

    assert Columns(("site",), values).coder(np.arange(4)).columns[0].kind == "number"
    (column,) = Columns(("site:category",), values).coder(np.arange(4)).columns
    assert (column.name, column.kind, column.categories) == ("site", "category", ("1", "3"))


def test_a_column_alone_may_bend() -> None:
    """Tenths beside the number let a linear head follow a curve."""
    numbers = np.linspace(-1, 1, 41)
    (column,) = Columns(("a",), [(str(number),) for number in numbers]).coder(np.arange(41)).columns

    coded = alone(column, [str(number) for number in numbers], np.arange(41))

    assert np.linalg.matrix_rank(coded) > 5
    assert coded.shape == (41, 11)


@pytest.mark.parametrize(
    ("asked", "values", "message"),
    [(("a",), ["1", "inf"], "`columns` a: 'inf' is too great"), (("a",), ["", "nan"], "`columns` a: it says nothing"),
     (("a",), ["x1", "x2", "x3"], "`columns` a: 3 different values of 3"),
     (("a:category",), [str(number) for number in range(1200)] * 2, "`columns` a: 1200 different values of 2400")],
)  # fmt: skip
def test_columns_that_cannot_be_trained_on(asked: tuple[str, ...], values: list[str], message: str) -> None:
    """Infinite numbers, empty columns and names of single images are refused by the column's name."""
    with pytest.raises(DataError, match=message):
        Columns(asked, [(value,) for value in values]).coder(np.arange(len(values)))


def test_a_head_is_another_where_a_value_is(exclusive_or: Path, run: Run) -> None:
    """The key has the columns' values: one changed value trains anew, and without columns nothing is named otherwise."""
    first = run("fit", exclusive_or, *MINI, "--with", "side", "--json").json["heads"][0]["bundle"]
    assert run("fit", exclusive_or, *MINI, "--with", "side", "--json").json["heads"][0]["bundle"] == first
    card = json.loads(Path(f"{first}.json").read_text())
    assert card["columns"]["columns"][0]["categories"] == ["L", "R"]
    assert card["record"]["request"]["columns"] == ["side"]

    exclusive_or.write_text(exclusive_or.read_text().replace(",R,", ",L,", 1))

    assert run("fit", exclusive_or, *MINI, "--with", "side", "--json").json["heads"][0]["bundle"] != first


def test_a_head_asks_for_its_columns_again(exclusive_or: Path, run: Run) -> None:
    """Predict reads them from a manifest, and says which are needed where there is none; export refuses by their names."""
    fitted = run("fit", exclusive_or, *MINI, "--head", "knn", "--with", "side", "--json").json["heads"][0]
    lines = list(csv.reader(io.StringIO(exclusive_or.read_text())))[1:]
    test = [(path, side) for path, _, split, side, _ in lines if split == "test"]
    new = write(exclusive_or.parent / "new.csv", ("side", "path"), [(side, path) for path, side in test])

    predicted = run("predict", fitted["bundle"], new)

    assert predicted.code == 0, predicted.err
    answers = {row["path"]: row["label"] for row in csv.DictReader(io.StringIO(predicted.out))}
    right = [answers[path] == label for path, label, split, *_ in lines if split == "test"]
    assert np.mean(right) == fitted["test"]["accuracy"]
    flipped = write(
        exclusive_or.parent / "flipped.csv", ("side", "path"), [("LR"[side == "L"], path) for path, side in test]
    )
    assert {
        row["label"] != answers[row["path"]]
        for row in csv.DictReader(io.StringIO(run("predict", fitted["bundle"], flipped).out))
    } == {True}

    bare = write(exclusive_or.parent / "bare.csv", ("path",), [(test[0][0],)])
    for given, reason in (
        (bare, "side: bare.csv has no such column"),
        (exclusive_or.parent / "0.png", "columns side beside"),
    ):
        refused = run("predict", fitted["bundle"], given)
        assert (refused.code, reason in refused.err) == (3, True), refused.err
    exported = run("export", fitted["bundle"], exclusive_or.parent / "x.onnx")
    assert (exported.code, "needs the columns side" in exported.err) == (2, True), exported.err


def test_a_column_that_tells_the_label_is_told_of(tmp_path: Path, run: Run) -> None:
    """A ward that only sick people lie in is warned of; an age that says nothing is not."""
    count, rng = 80, np.random.default_rng(0)
    rows = [
        (path, "ab"[number % 2], f"{rng.normal():.2f}", f"ward {number % 2}\x1b[31m")
        for number, path in enumerate(drawn(tmp_path, count))
    ]
    path = write(tmp_path / "x.csv", ("path", "label", "age", "ward\x1b[31m"), rows)

    told = run("fit", path, *MINI, "--with", "age,ward\x1b[31m")

    assert told.code == 0
    assert r"the column 'ward\x1b[31m' alone reaches 100.0 % (majority class" in told.err
    assert "'age'" not in told.err
    assert "\x1b" not in told.out + told.err
    assert "columns + logistic" in told.out


def test_columns_are_refused_before_anything_is_computed(exclusive_or: Path, run: Run, tmp_path: Path) -> None:
    """A column that is not there, is asked for twice or lists the images ends the command at once, as does a folder."""
    for names, code, reason in (
        ("sides", 3, "sides: x.csv has no such column"),
        ("side,side", 2, "each once"),
        ("label", 2, "lists the samples"),
    ):
        refused = run("fit", exclusive_or, *MINI, "--with", names)
        assert (refused.code, reason in refused.err) == (code, True), refused.err
    assert "--with" in run("fit", exclusive_or, *MINI, "--with", "sides").err
    folder = run("fit", draw_two(tmp_path / "folder"), *MINI, "--with", "side")
    assert (folder.code, "is no manifest" in folder.err) == (3, True)
    tokens = run("fit", exclusive_or, *MINI, "--with", "side", "--head", "attentive")
    assert (tokens.code, "trains on tokens" in tokens.err) == (2, True)
    assert not list((tmp_path / "cache").glob("*/*/parts/*"))


def draw_two(root: Path) -> Path:
    """Write a folder of two images in two classes."""
    for number, name in enumerate("ab"):
        draw_image(root / name / "0.png", SHADES[number], number)
    return root


def test_numbers_and_views_take_columns_too(exclusive_or: Path, run: Run) -> None:
    """A number to tell is told from a column; every view of an image has its columns, from a manifest too."""
    lines = list(csv.reader(io.StringIO(exclusive_or.read_text())))[1::4]
    rows = [(row[0], f"{2 * float(row[4]):.1f}", row[2], row[4]) for row in lines]
    path = write(exclusive_or.parent / "numbers.csv", ("path", "label", "split", "age"), rows)

    fitted = run("fit", path, *MINI, "--target", "number", "--head", "knn", "--views", "2", "--with", "age", "--json")

    assert "columns + ridge reaches R2 1.000 without a backbone" in fitted.err
    (head,) = fitted.json["heads"]
    answers = {row["path"]: row["label"] for row in csv.DictReader(io.StringIO(run("predict", head["bundle"], path).out))}
    pairs = np.array([(float(row[1]), float(answers[row[0]])) for row in rows if row[2] == "test"])
    r2 = 1 - np.square(pairs[:, 0] - pairs[:, 1]).sum() / np.square(pairs[:, 0] - pairs[:, 0].mean()).sum()
    assert head["test"]["r2"] == pytest.approx(r2, abs=1e-4)


def test_columns_stand_beside_rows_that_are_read_from_disk() -> None:
    """Rows too many for memory get theirs as they are read."""
    rng = np.random.default_rng(0)
    X, columns = rng.normal(size=(20, 3)).astype(np.float32), rng.normal(size=(20, 2)).astype(np.float32)
    order = rng.permutation(20)

    lazy = beside(LazyRows(X.__getitem__, 3, order), columns)

    np.testing.assert_array_equal(lazy[np.array([4, 2])], np.concatenate([X[order[[4, 2]]], columns[[4, 2]]], axis=1))
    np.testing.assert_array_equal(lazy.only(np.array([5]))[:], beside(X[order], columns)[5:6])


def test_a_parquet_brings_images_and_columns(tmp_path: Path) -> None:
    """Its bytes are what is labelled, without a label; a column of images is no column to train on."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"image": [b"one", b"two"], "age": [1.5, None], "site": ["x", None]}), tmp_path / "x.parquet")

    source, values = open_unlabelled(tmp_path / "x.parquet", ("site", "age"))

    assert values == [("x", "1.5"), ("", "")]
    assert [source.read(sample.path) for sample in source.samples] == [b"one", b"two"]
    with pytest.raises(DataError, match=r"image: this column of x\.parquet holds the images"):
        open_unlabelled(tmp_path / "x.parquet", ("image",))


def test_a_card_that_says_nothing_of_columns_is_refused() -> None:
    """What a card says of its columns is believed only where it can be computed with."""
    for facts in ({}, {"columns": [{"name": "a"}], "weight": 1.0}, {"columns": [], "weight": "x"}):
        with pytest.raises(DataError, match="fit again"):
            ColumnCoder.of_card(facts)
    with pytest.raises(UsageError, match="spread"):
        CodedColumn("a", "number", spread=0.0)
