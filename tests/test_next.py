"""What to label next: the typical before the odd, nothing twice, the same in any order; its worth is simulated."""

import csv
from pathlib import Path

import numpy as np
import pytest
from support import TINY, Run, draw_folder, draw_image

from featcache.datasets import open_partly
from featcache.errors import DataError
from featcache.evaluation.likeness import Crowd, herd, likeness, unit_rows
from featcache.evaluation.splits import units_of
from featcache.experiments.next_samples import USABLE, Samples, choose, doubts, simulate


def unit(rng: np.random.Generator, centre: np.ndarray, count: int, spread: float = 0.1) -> np.ndarray:
    """Return unit rows (count, d) around a centre."""
    rows = centre + rng.normal(0, spread, (count, len(centre)))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clusters(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return unit rows of clusters of these sizes, each around an axis of its own, and which cluster each is of."""
    rng = np.random.default_rng(seed)
    rows = np.concatenate([unit(rng, np.eye(8)[number], size) for number, size in enumerate(sizes)])
    return rows, np.repeat(np.arange(len(sizes)), sizes)


def labelled_samples(per_class: int, spread: float, classes: int = 4, share: tuple[int, ...] = (6, 3, 2, 1)) -> Samples:
    """Return labelled samples of classes of unequal sizes that overlap the more, the greater the spread."""
    rng = np.random.default_rng(3)
    y = np.repeat(np.arange(classes), [per_class * part for part in share])
    X = (np.eye(16)[y] + rng.normal(0, spread, (len(y), 16))).astype(np.float32)
    names = tuple(f"{number:064x}" for number in rng.permutation(len(y)))
    return Samples(names, X, unit_rows(X, X.mean(axis=0)), y, units_of(len(y), list(names)))


def test_the_typical_of_the_largest_cluster_comes_first_and_no_outlier() -> None:
    """Choices go from cluster to cluster by their sizes; a sample like no other waits until all clusters are seen."""
    rows, cluster = clusters([40, 20, 10, 1])

    chosen = cluster[herd(Crowd.of(rows, np.arange(len(rows))), rows[:0], 4)]

    assert chosen[:3].tolist() == [0, 1, 2]
    centre = rows[cluster == 0].mean(axis=0)
    first = herd(Crowd.of(rows, np.arange(len(rows))), rows[:0], 1)[0]
    assert rows[first] @ centre > np.quantile(rows[cluster == 0] @ centre, 0.7)


def test_what_a_labelled_sample_stands_for_is_not_asked_again() -> None:
    """With a label in the largest cluster the next choice is of the second."""
    rows, cluster = clusters([40, 20])

    assert cluster[herd(Crowd.of(rows, np.arange(60)), rows[:1], 1)].tolist() == [1]


def test_bounds_choose_what_measuring_all_would() -> None:
    """The lazy search returns the greedy maximum of coverage at every step, weighted by doubts or not."""
    rng = np.random.default_rng(1)
    rows = unit(rng, np.zeros(6), 300, 1.0)
    doubt = rng.random(300).astype(np.float32)
    crowd = Crowd.of(rows, np.arange(300))
    for weights in (None, doubt):
        like, covered, expected = likeness(rows, rows), np.zeros(300, np.float32), []
        for _ in range(20):
            gain = np.maximum(like - covered[:, None], 0).T @ (np.ones(300) if weights is None else weights)
            gain[expected] = -1
            expected.append(int(gain.argmax()))
            covered = np.maximum(covered, like[:, expected[-1]])

        assert herd(crowd, rows[:0], 20, weights).tolist() == expected


def test_a_group_counts_once_and_gives_one_before_it_gives_another() -> None:
    """A patient with many photographs is no large cluster; the second of one comes when each has given one."""
    rows, cluster = clusters([60, 20, 20])
    units = np.where(cluster == 0, 0, np.arange(len(rows)))
    chosen = herd(Crowd.of(rows, units), rows[:0], 41)

    assert cluster[chosen[:2]].tolist() != [0, 0]
    assert cluster[chosen[0]] != 0
    assert (cluster[chosen] == 0).sum() == 1
    assert len(set(herd(Crowd.of(rows, units), rows[:0], 100).tolist())) == 100


def test_doubts_are_asked_once_there_are_enough_labels() -> None:
    """Below the stated number of labels a class none are returned; above it borders are doubted more than centres."""
    samples = labelled_samples(60, 0.25)
    few = np.concatenate([np.flatnonzero(samples.y == number)[: USABLE - 1] for number in range(4)])
    enough = np.concatenate([np.flatnonzero(samples.y == number)[:USABLE] for number in range(4)])

    assert doubts(samples, few, samples.labelled, 0) is None
    doubt = doubts(samples, enough, samples.labelled, 0)
    assert doubt is not None
    top = np.sort(samples.X[:, :4], axis=1)
    border = top[:, -1] - top[:, -2]
    assert doubt[border < np.quantile(border, 0.2)].mean() > doubt[border > np.quantile(border, 0.8)].mean() + 0.2


def test_the_simulation_finds_the_gain_that_is_there_and_none_where_there_is_none() -> None:
    """Of unequal classes in clusters chosen labels are worth points; where labels are noise the interval holds 0."""
    samples = labelled_samples(20, 0.12, 8, (24, 1, 1, 1, 1, 1, 1, 1))
    shuffled = np.random.default_rng(0).permutation(samples.y)

    clear = simulate(samples, 0)
    noise = simulate(Samples(samples.paths, samples.X, samples.rows, shuffled, samples.units), 0)

    assert clear is not None
    assert clear.is_better
    assert clear.points > 3
    assert (clear.shots, clear.labels) == (5, 40)
    assert noise is not None
    assert not noise.is_better


def test_too_few_labels_simulate_nothing() -> None:
    """Where not twice as many labels are left to choose from as are given, nothing is told."""
    assert simulate(labelled_samples(1, 0.2, share=(2, 2, 1, 1)), 0) is None


def test_the_rule_of_the_simulation_is_that_of_the_choice() -> None:
    """What is chosen without labels is what coverage chooses, in its order."""
    samples = labelled_samples(10, 0.3)
    crowd = Crowd.of(samples.rows, samples.units.numbers)

    assert choose(samples, samples.labelled, 9, 0).tolist() == herd(crowd, samples.rows[:0], 9).tolist()


def write_table(path: Path, rows: list[tuple[str, ...]], header: str = "path,label") -> Path:
    """Write a CSV."""
    lines = [header, *(",".join(row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_rows_without_a_label_are_chosen_and_found_again_once_labelled(folder: Path, run: Run) -> None:
    """Of a table the choice is among empty labels; when they are filled in, no row is computed; a second run is the same."""
    images = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    table = folder / "all.csv"
    rows = [(path, path.split("/")[0] if number % 3 else "") for number, path in enumerate(images)]
    write_table(table, rows)

    first = run("next", table, *TINY, "--n", "4", "--json").json
    write_table(table, rows[::-1])
    again = run("next", table, *TINY, "--n", "4", "--json").json

    chosen = [sample["path"] for sample in first["samples"]]
    assert len(set(chosen)) == 4
    assert set(chosen) <= {path for path, label in rows if not label}
    assert (first["labelled"], first["unlabelled"], first["rule"]) == (24, 12, "coverage")
    assert again == first
    write_table(table, [(path, path.split("/")[0]) for path in images])
    assert run("extract", table, *TINY, "--json").json["computed"] == 0


def test_no_copy_of_a_test_sample_nor_of_a_labelled_one_is_chosen(tmp_path: Path, run: Run) -> None:
    """What would leak into training, or is labelled already, is no choice; copies in the pool are one."""
    draw_folder(tmp_path / "data" / "train")
    draw_folder(tmp_path / "data" / "test", 4, first_seed=500)
    pool = tmp_path / "pool"
    draw_image(pool / "leak.png", (30, 40, 200), 500)
    draw_image(pool / "known.png", (30, 40, 200), 0)
    for name in ("new.png", "twin.png"):
        draw_image(pool / name, (90, 90, 90), 9000)

    told = run("next", tmp_path / "data", "--unlabelled", pool, *TINY, "--json").json

    assert (tmp_path / "data/test/blue/00.png").read_bytes() == (pool / "leak.png").read_bytes()
    assert told["unlabelled"] == 1
    assert [Path(sample["path"]).name for sample in told["samples"]] == ["new.png"]


def test_a_folder_without_classes_is_all_unlabelled(tmp_path: Path, run: Run) -> None:
    """Without any label the typical come, and nothing is said of their worth."""
    for number in range(9):
        draw_image(tmp_path / "new" / f"{number}.png", (20 * number, 90, 90), number)

    outcome = run("next", tmp_path / "new", *TINY, "--n", "3", "--csv", tmp_path / "next.csv")

    with (tmp_path / "next.csv").open(newline="") as file:
        assert [len(row) for row in csv.reader(file)] == [3, 3, 3, 3]
    assert "0 labelled images" in outcome.out
    assert "cannot be simulated" in outcome.out


def test_names_are_inert(tmp_path: Path, run: Run) -> None:
    """A file that is called as a formula, or moves a terminal's cursor, does neither."""
    for number, name in enumerate(("=1+1.png", "\x1b[31mred.png")):
        draw_image(tmp_path / "new" / name, (40, 90, 90), number)

    outcome = run("next", tmp_path / "new", *TINY, "--csv", tmp_path / "next.csv")

    assert "\x1b" not in outcome.out
    assert "'=1+1.png" in (tmp_path / "next.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--unlabelled", "nowhere"), "--unlabelled nowhere: there is no such file or folder"),
        ((), "there is nothing to label"),
        (("--group", "patient"), "--group patient: "),
    ],
)
def test_what_cannot_be_chosen_from_is_said(folder: Path, run: Run, arguments: tuple[str, ...], message: str) -> None:
    """A pool that is not there, labels everywhere, groups without a table: an error with the remedy."""
    outcome = run("next", folder, *TINY, *arguments)

    assert outcome.code == 3
    assert message in outcome.err


def test_a_table_of_texts_is_no_pool_of_images(folder: Path, tmp_path: Path) -> None:
    """Samples of another kind are refused by name."""
    texts = write_table(tmp_path / "texts.csv", [("hello",)], "text")

    with pytest.raises(DataError, match="holds texts"):
        open_partly(folder).beside([texts])


def test_groups_stand_in_the_table(folder: Path, run: Run) -> None:
    """Of each value of the column one is chosen before another."""
    images = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    rows = [(path, "", str(number % 5)) for number, path in enumerate(images)]
    patient = {path: group for path, _, group in rows}
    write_table(folder / "all.csv", rows, "path,label,patient")

    told = run("next", folder / "all.csv", *TINY, "--group", "patient", "--n", "5", "--json").json

    assert sorted(patient[sample["path"]] for sample in told["samples"]) == list("01234")
