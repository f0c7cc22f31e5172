"""What is said of results: tables that neither a name nor a file can forge, the winner by validation alone."""

from pathlib import Path

from support import TINY, Run, draw_image

from featcache.display import Table


def draw_grey(root: Path) -> Path:
    """Write two classes of the same grey: whatever is learned of them is wrong half of the time."""
    for number in range(40):
        draw_image(root / "ab"[number % 2] / f"{number}.png", (110, 110, 110), number)
    return root


def test_fit_says_first_what_it_has_found(run: Run, folder: Path) -> None:
    """Images, classes, splits and backbone stand before anything that is computed; quiet, nothing is said."""
    lines = run("fit", folder, *TINY, "--head", "ridge").err.splitlines()

    assert lines[0] == "images: 36 images, 3 classes; no split given; backbone test_resnet.random0"
    assert next(line for line in lines if line.startswith("split:")).startswith("split: 24 train, 6 val, 6 test")
    assert run("fit", folder, *TINY, "--head", "ridge", "--quiet").err == ""


def test_fit_prints_one_table_sorted_by_validation(run: Run, tmp_path: Path) -> None:
    """Heads and baselines are its rows, those without a backbone marked; the best head on validation is named."""
    shown = run("fit", draw_grey(tmp_path / "grey"), *TINY, "--head", "ridge", "--head", "knn").out.splitlines()
    header, _, *rows = shown[: shown.index("")]
    scores = [float(row[row.index("  ") :].split()[0]) for row in rows]
    marked = [row.split("  ")[0] for row in rows if row.endswith("needs no backbone")]
    heads = [row.split()[0] for row in rows if not row.endswith("needs no backbone")]

    assert header.split("  ")[0] == "head"
    assert scores == sorted(scores, reverse=True)
    assert set(marked) == {"majority class", "image statistics + kNN", "16 x 16 pixels + logistic"}
    assert set(heads) == {"ridge", "knn"}
    assert f"{heads[0]} is the best of 2 heads on validation" in "\n".join(shown)


def test_mistakes_are_printed_as_files_that_are_there(run: Run, tmp_path: Path) -> None:
    """Each line names an image that can be opened, its class, what it was taken for and how sure the head was."""
    folder = draw_grey(tmp_path / "grey")
    command = ("fit", folder, *TINY, "--head", "knn", "--no-baselines", "--mistakes", "2", "--per-class")
    shown = run(*command).out
    listed = run(*command, "--json").json["heads"][0]["mistakes"]
    rows = [line for line in shown.splitlines() if line.startswith(str(folder))]

    assert len(rows) == len(listed) == 2
    assert [Path(row.split()[0]) for row in rows] == [folder / mistake["path"] for mistake in listed]
    assert "class by class" in shown
    assert "Confusion" in shown


def test_mistakes_are_of_classes(run: Run, folder: Path) -> None:
    """Neither a number nor several labels an image are taken for another class: asked for, that is an error."""
    refused = run("fit", folder, *TINY, "--target", "number", "--mistakes", "3")

    assert refused.code == 2
    assert "--mistakes" in refused.err


def test_tables_for_notebooks_escape_every_text() -> None:
    """A class or a file may be called like a script; a terminal's cursor is not moved either."""
    evil = "<script>alert(1)</script>\x1b[2J"
    table = Table((evil, "b"), [(evil, "1")], title=evil, note=evil)

    assert "<script" not in table.html()
    assert table.html().count("&lt;script&gt;") == 4
    assert "\x1b" not in table.plain()


def test_names_stand_left_and_numbers_right() -> None:
    """A class that is called 007 keeps its zeros."""
    lines = Table(("class", "n"), [("007", "1"), ("cat", "10")]).plain().splitlines()

    assert lines[2].split() == ["007", "1"]
    assert lines[2].startswith("007")
    assert lines[2].endswith(" 1")
