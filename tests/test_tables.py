"""Tables of records: what stands beside what, whatever their names hold, and what is compared with what."""

import csv
import io
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.display import csv_cell
from featcache.evaluation.metrics import paired_gap
from featcache.reports import RunRecord, append_record, read_records
from featcache.reports.tables import COLUMNS, NO_GAIN, compare_with_published, markdown, rows, short_table, to_csv
from featcache.reports.wording import finetune_table


def record_of(kind: str = "fit", method: str = "ridge", val: float = 0.9, right: str = "1" * 40, **facts: Any) -> RunRecord:
    """Return a record as runs write them."""
    accuracy = right.count("1") / len(right)
    base = RunRecord(
        kind=kind,
        cell=facts.pop("cell", method),
        dataset="d",
        backbone="b",
        method=method,
        cut="pooled",
        seed=facts.pop("seed", 0),
        feature_key="",
        request={"backbone": "b"} | facts.pop("request", {}),
        params=facts.pop("params", {}),
        split={"train": 1, "val": 1, "test": len(right)},
        test_items=facts.pop("test_items", "t"),
        val={"accuracy": val},
        test={"accuracy": accuracy, "accuracy_ci": [0.0, 1.0]},
        right=right,
        seconds={"extract": 0.0, "fit": 0.0, "train": 0.0},
    )
    return replace(base, **facts)


def tuned_record(val: float, own: str = "ridge", points: float = 5.0, epoch: int = 2, **facts: Any) -> RunRecord:
    """Return a fine-tuning's record with a gap of its own."""
    probe = {"head": own, "of": ["ridge", "knn", "logistic"], "start": "logistic", "val": {"accuracy": val}, "seconds": {}}
    between = {"points": points, "ci": [points - 1, points + 1], "p_value": 0.01} if epoch else None
    return record_of("finetune", "last:1", probe=probe, gap=between, params={"best_epoch": epoch}, **facts)


def gaps(*records: RunRecord) -> dict[str, str]:
    """Return what the table says of each method's gap."""
    return {row[2]: row[5] for row in rows(records)}


def test_a_row_without_a_gain_says_so() -> None:
    """Where no epoch beat the start there is no gap, interval or p, whatever the table holds; seeds are counted."""
    idle = tuned_record(0.9, epoch=0, right="1" * 30 + "0" * 10)
    assert rows([record_of(), idle])[1][5:8] == [NO_GAIN, "-", "-"]

    second = tuned_record(0.9, points=4.0, seed=1, cell="other")
    assert gaps(idle, second)["last:1"] == "+2.0 (no gain in 1 of 2)"


def test_the_gap_is_to_the_better_of_the_table_and_the_runs_own_probes() -> None:
    """On validation: a grid of one weak head does not make fine-tuning look better than it is."""
    weak, strong = record_of(val=0.5, right="0" * 40), record_of(method="svm", val=0.97, right="1" * 38 + "00")

    assert gaps(weak, tuned_record(0.95))["last:1"] == "+5.0"
    assert gaps(weak, strong, tuned_record(0.95))["last:1"] == "+5.0" == f"{100 * 2 / 40:+.1f}"
    assert gaps(weak, strong, tuned_record(0.95, points=1.0))["last:1"] == "+5.0"
    assert gaps(weak, tuned_record(0.95, test_items="fewer"))["last:1"] == "+5.0"
    assert gaps(strong, tuned_record(0.99, points=-3.0))["last:1"] == "-3.0"


def test_all_gaps_of_a_table_are_to_one_head() -> None:
    """Where a row is as good on validation as a fine-tuning's own probe: the row that the other heads are compared with."""
    best, equal = record_of(method="mlp", val=0.9), record_of(val=0.9, right="1" * 36 + "0" * 4)
    tuned = tuned_record(0.9, points=7.0, right="1" * 38 + "00")

    assert gaps(best, equal, tuned) == {"mlp": "-", "ridge": "-10.0", "last:1": "-5.0"}
    assert gaps(best, equal, replace(tuned, right="")) == {"mlp": "-", "ridge": "-10.0", "last:1": "+7.0"}


def test_a_gap_to_a_head_without_a_row_names_it() -> None:
    """In a terminal, as numbers of a file stay numbers: the row's own probe is better than the table's heads, or alone."""

    def told(*records: RunRecord) -> list[str]:
        return [row[5] for row in short_table(records).rows]

    weak, tuned = record_of(method="knn", val=0.5), tuned_record(0.9)
    seed = tuned_record(0.9, own="logistic", points=4.0, seed=1, cell="other")
    strong = record_of(val=0.95, seed=1, cell="strong")

    assert told(weak, tuned) == ["-", "+5.0 to ridge"]
    assert told(tuned) == ["+5.0 to ridge"]
    assert told(tuned, seed) == ["+4.5 to ridge or logistic"]
    assert told(strong, tuned, seed) == ["-", "+2.5 (1 seed to ridge)"]
    assert told(record_of(val=0.9), tuned) == ["-", "+0.0"]
    assert gaps(weak, tuned)["last:1"] == "+5.0"


def test_a_copy_under_another_name_has_rows_of_its_own() -> None:
    """Its cell is the same, as of all that has the same contents; a rerun replaces rows of its own data set alone."""
    photos, pics = record_of(dataset="photos"), record_of(dataset="pics")
    again = replace(photos, right="1" * 20 + "0" * 20, test={"accuracy": 0.5, "accuracy_ci": [0.0, 1.0]})

    assert [row[0] for row in rows([photos, pics])] == ["photos", "pics"]
    assert [(row[0], row[3]) for row in rows([photos, pics, again])] == [("photos", "50.0"), ("pics", "100.0")]


def test_other_groups_are_another_experiment() -> None:
    """A head that was fitted without groups is no rival of one with, though both are tested on the same images."""
    leaking = record_of(method="svm", val=1.0)
    honest = record_of(val=0.8, request={"group": "patient"}, test_groups=[place // 4 for place in range(40)])
    tuned = tuned_record(0.7, request={"group": "patient"}, right="1" * 36 + "0" * 4, test_groups=honest.test_groups)

    (*_, row) = rows([leaking, honest, tuned])

    expected = paired_gap(np.arange(40) < 36, np.ones(40, bool), groups=np.arange(40) // 4)
    assert expected.ci is not None
    assert row[5] == "-10.0"
    assert row[6] == f"{expected.ci[0]:+.1f} to {expected.ci[1]:+.1f}"


def test_the_latest_record_of_a_cell_counts() -> None:
    """For its row, and as the probe that others are compared with."""
    old, new = record_of(right="1" * 40), record_of(right="1" * 20 + "0" * 20)
    other = record_of(method="knn", val=0.5, right="1" * 30 + "0" * 10)

    table = rows([old, other, new])

    assert [row[3] for row in table] == ["50.0", "75.0"]
    assert table[1][5] == "+25.0"


def test_records_of_before_are_read(tmp_path: Path) -> None:
    """Without groups, copies and what the probe was the best of: their gaps are taken in the table, as they were."""
    probe = {"head": "logistic", "test": {}, "seconds": {}}
    olden = replace(tuned_record(0.9, right="1" * 38 + "00"), probe=probe, gap={"points": 9.0, "ci": [0, 1], "p_value": 1.0})
    append_record(tmp_path / "r.jsonl", olden)
    append_record(tmp_path / "r.jsonl", record_of())
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("checksum", "test_groups", "copies"):
            line.pop(name)
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert gaps(*read_records([tmp_path / "r.jsonl"]))["last:1"] == "-5.0"


def test_seeds_share_a_row() -> None:
    """Mean and deviation of the seeds' accuracies and of their seconds; the longest extraction: others had its rows."""
    seeds = [
        record_of(seed=seed, cell=str(seed), right="1" * right + "0" * (40 - right), seconds={"extract": took, "fit": took})
        for seed, right, took in ((0, 40, 4.0), (1, 38, 0.0), (2, 30, 1.0))
    ]

    (row,) = rows(seeds)

    accuracies = [100.0, 95.0, 75.0]
    assert row[3] == f"{statistics.mean(accuracies):.1f}" == "90.0"
    assert row[4] == f"± {statistics.stdev(accuracies):.2f} (3 seeds)"
    assert row[8:] == ["4.0", "1.7", "-"]


def test_seeds_that_answer_alike_have_the_interval() -> None:
    """A deviation of zero would hide how many test images there are."""
    seeds = [record_of(seed=seed, cell=str(seed), right="1" * 30 + "0" * 10) for seed in range(3)]

    (row,) = rows(seeds)

    low, high = seeds[0].test["accuracy_ci"]
    assert row[4] == f"{100 * low:.1f} to {100 * high:.1f} (3 seeds alike)"


def test_another_request_is_another_row() -> None:
    """A method with other settings is not taken for a seed of the same."""
    usual, wider = record_of(cell="0"), record_of(cell="1", seed=1, request={"grid": [["alpha", [1.0]]]})

    assert len(rows([usual, wider])) == 2
    assert rows([]) == []


def test_other_test_images_are_not_compared() -> None:
    """A gap between two sets of images would be none: the cell stays empty, as where there is one head alone."""
    best, elsewhere = record_of(val=0.9), record_of(method="knn", val=0.8, test_items="others")

    assert gaps(best, elsewhere) == {"ridge": "-", "knn": "-"}
    assert gaps(best, replace(elsewhere, test_items="t", right="1" * 30 + "0" * 10)) == {"ridge": "-", "knn": "-25.0"}


def test_the_best_probe_is_chosen_on_validation() -> None:
    """Not on the test split: a head that was lucky there is compared with the one that was chosen."""
    chosen, lucky = record_of(val=0.9, right="1" * 30 + "0" * 10), record_of(method="knn", val=0.8, right="1" * 40)

    assert gaps(chosen, lucky) == {"ridge": "-", "knn": "+25.0"}


def test_too_few_groups_have_no_interval() -> None:
    """Neither of the accuracy nor of the gap."""
    few = [place // 20 for place in range(40)]
    better = record_of(val=0.9, request={"group": "patient"}, test_groups=few, test={"accuracy": 1.0, "accuracy_ci": None})
    worse = replace(better, method="knn", cell="knn", val={"accuracy": 0.8}, right="1" * 36 + "0" * 4)

    table = rows([better, worse])

    assert [row[4] for row in table] == ["-", "-"]
    assert table[1][5:7] == ["-10.0", "-"]


HOSTILE = ["=cmd|' /C calc'!A1", "a|b", 'quo"te', "comma, here", "+1", "@SUM(A1)", "-x", "größer"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_moves_no_cell(name: str) -> None:
    """CSV gives every cell back, none of them a formula; Markdown's columns are as many as their heads."""
    record = record_of(dataset=name)

    header, line = csv.reader(io.StringIO(to_csv([record])))

    assert tuple(header) == COLUMNS
    assert line == [csv_cell(name), *rows([record])[0][1:]]
    assert line[0][0] not in "=+-@"
    assert all(text.replace("\\|", "").count("|") == len(COLUMNS) + 1 for text in markdown([record]).splitlines())


def test_a_terminal_s_table_has_the_same_cells() -> None:
    """Without the column of p, in the same order; below them stands what a gap is."""
    records = [record_of(), tuned_record(0.9)]

    *lines, note = short_table(records).plain().splitlines()

    assert note.startswith("gap: ")
    assert len(lines) == 2 + len(records)
    for line, row in zip(lines[2:], rows(records), strict=True):
        assert line.split() == " ".join([*row[:7], *row[8:]]).split()


def test_rows_of_one_head_are_told_apart_by_what_was_asked_for() -> None:
    """Only what differs stands behind a name: a grid, folds, a plan's epochs; rows without namesakes keep theirs."""
    records = [
        record_of(cell="1"),
        record_of(cell="2", request={"folds": 0}),
        record_of(cell="3", request={"folds": 3, "grid": [["alpha", [0.1, 1.0]]]}),
        tuned_record(0.9, cell="4", request={"plan": {"epochs": 3, "lr": [0.001, 0.01], "refit": True, "clip": 0.0}}),
        tuned_record(0.9, cell="5", request={"plan": {"epochs": 3, "lr": [0.001], "refit": False, "clip": 0.0}}),
        record_of(method="knn", request={"grid": [["k", [1, 2]]]}),
    ]

    methods = [row[2] for row in rows(records)]

    assert methods == [
        "ridge",
        "ridge (folds 0)",
        "ridge (folds 3, grid alpha=0.1,1)",
        "last:1 (lr 0.001,0.01, refit)",
        "last:1 (lr 0.001, no refit)",
        "knn",
    ]
    assert [row[2] for row in short_table(records).rows] == methods


def test_weights_behind_one_name_tell_rows_apart() -> None:
    """Two contents of one backbone's name are two rows, each with the first digits of its own."""
    records = [record_of(cell=text, request={"backbone": {"content": f"sha256:{text * 64}"}}) for text in "ab"]

    assert [row[2] for row in rows(records)] == ["ridge (content aaaaaaaa)", "ridge (content bbbbbbbb)"]


def test_validation_on_folds_is_no_validation_on_a_part() -> None:
    """A probe that folds judged is marked beside trainings that the val part judged, and a note says what each is of."""
    probe = {"head": "knn", "val": {"accuracy": 0.95}, "test": {"accuracy": 0.9, "accuracy_ci": None}}
    seconds = {"extract": 0.0, "fit": 0.0}
    record = tuned_record(0.95, split={"train": 40, "val": 10, "test": 40})
    record = replace(record, probe=probe | {"seconds": seconds, "of": ["knn"]})

    on_folds, on_part = finetune_table([record], 5), finetune_table([record])

    assert [row[1] for row in on_folds.rows] == ["90.0", "95.0*"]
    assert on_folds.note.startswith("* on 5 folds of train and val, 50 samples; what was trained is judged on the 10 of val")
    assert on_part.rows[1][1] == "95.0"
    assert not on_part.note


def test_published_rows_of_both_kinds_say_what_validation_is() -> None:
    """Where heads and fine-tunings share a column, a note says that they are judged on other samples."""
    head, tuned = record_of(), tuned_record(0.9)

    assert "validation: of fine-tunings on the val part" in compare_with_published([head, tuned], [head, tuned]).table().note
    assert "validation:" not in compare_with_published([head], [head]).table().note
