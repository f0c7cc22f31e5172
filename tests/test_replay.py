"""Replay: a record is run again from itself alone; what was changed in it is found, what is not the record's is told."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetune_support import GAINS
from support import Run, draw_subtle

from featcache.datasets import open_dataset
from featcache.errors import DataError
from featcache.evaluation.intervals import of_accuracy
from featcache.evaluation.metrics import decode_correct
from featcache.experiments.bench import Places, load_grid, run_bench, run_replay
from featcache.experiments.finetune import FineTuneInputs, Sweep
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.reports import PROTOCOL, RunRecord, append_record, read_records
from featcache.reports.tables import compare_again, compare_with_published
from featcache.specs import BackboneSpec, TransformOverrides

GRID = """
heads = ["logistic"]
unfreeze = ["last:1"]
[[dataset]]
data = "{data}"
[[backbone]]
name = "test_resnet"
random_init = 0
input_size = 32
[finetune]
epochs = 2
batch_size = 8
lr = 1e-3
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sixty images, and the records of a grid of them: a head and a fine-tuning."""
    root = tmp_path_factory.mktemp("replay")
    data = draw_subtle(root / "data" / "subtle")
    (root / "grid.toml").write_text(GRID.format(data=data))
    run_bench(load_grid(root / "grid.toml"), Settings(root / "cache", batch_size=8), root)
    return root


@pytest.fixture
def records(place: Path) -> dict[str, RunRecord]:
    """The records of the grid by their kind."""
    return {record.kind: record for record in read_records([place / "grid.jsonl"])}


@pytest.fixture
def places(place: Path) -> Places:
    """Where the images are."""
    return Places(data_root=place / "data")


def changed(record: RunRecord, path: str, value: Any) -> RunRecord:
    """Return a record with another value at a path such as ``test.accuracy``."""
    name, *inner = path.split(".")
    if not inner:
        return replace(record, **{name: value})
    plain = json.loads(json.dumps(asdict(record)))[name]
    below = plain
    for part in inner[:-1]:
        below = below[part]
    assert below[inner[-1]] != value
    below[inner[-1]] = value
    return replace(record, **{name: plain})


def answered(record: RunRecord, right: str) -> RunRecord:
    """Return a record with other answers, its accuracy and interval as they follow from these."""
    answers = decode_correct(right)
    interval = of_accuracy(answers, None if record.test_groups is None else np.array(record.test_groups))
    scores = {"accuracy": float(answers.mean()), "accuracy_ci": None if interval is None else list(interval)}
    return replace(record, right=right, test=record.test | scores)


def bettered(record: RunRecord) -> RunRecord:
    """Return a record that claims one right answer more."""
    return answered(record, record.right.replace("0", "1", 1))


OF_HEAD: dict[str, Callable[[RunRecord], RunRecord]] = {
    "kind": lambda it: replace(it, kind="fit-labels"),
    "cell": lambda it: replace(it, cell=it.cell[::-1]),
    "dataset": lambda it: replace(it, dataset="others", source=it.source | {"data": "others"}),
    "backbone": lambda it: replace(it, backbone="resnet50"),
    "method": lambda it: replace(it, method="ridge"),
    "cut": lambda it: replace(it, cut="layer3"),
    "seed": lambda it: replace(it, seed=1),
    "feature key": lambda it: replace(it, feature_key=it.feature_key[::-1]),
    "asked backbone": lambda it: changed(it, "request.backbone.random_init", 7),
    "chosen parameter": lambda it: changed(it, "params.C", 123.0),
    "size of a part": lambda it: changed(it, "split.train", 1),
    "test images": lambda it: replace(it, test_items=it.test_items[::-1]),
    "accuracy on validation": lambda it: changed(it, "val.accuracy", 0.999),
    "accuracy on test": lambda it: changed(it, "test.accuracy", 0.999),
    "its interval": lambda it: changed(it, "test.accuracy_ci", [0.9, 0.95]),
    "another score": lambda it: changed(it, "test.log_loss", 0.01),
    "an answer": lambda it: replace(it, right=it.right[::-1] if it.right != it.right[::-1] else it.right[:-1] + "0"),
    "an answer and all that follows": bettered,
    "file": lambda it: replace(it, artefact=it.artefact.replace("logistic", "ridge")),
    "groups": lambda it: replace(it, test_groups=[0] * len(it.right)),
    "copies": lambda it: replace(it, copies={"train and test": 3}),
    "notes": lambda it: replace(it, notes=("all is well",)),
    "source": lambda it: changed(it, "source.items", "0" * 64),
    "protocol": lambda it: replace(it, protocol=0),
}
OF_TUNING: dict[str, Callable[[RunRecord], RunRecord]] = {
    "plan": lambda it: changed(it, "request.plan.epochs", 3),
    "kept epoch": lambda it: changed(it, "params.best_epoch", 9),
    "curve": lambda it: changed(it, "params.curve", it.params["curve"][:1]),
    "probe": lambda it: changed(it, "probe.test.accuracy", 0.1),
    "gap": lambda it: replace(it, gap={"points": 12.0, "ci": [1.0, 20.0], "p_value": 0.01}),
    "answers of a tuned network": bettered,
}


def test_what_was_changed_is_found(records: dict[str, RunRecord], places: Places, tmp_path: Path) -> None:
    """Thirty fields, each changed and sealed again with its checksum: no such record is confirmed, whole ones are."""
    tampered = {name: change(records["fit"]) for name, change in OF_HEAD.items()}
    tampered |= {name: change(records["finetune"]) for name, change in OF_TUNING.items()}
    for record in (*records.values(), *tampered.values()):
        append_record(tmp_path / "records.jsonl", record)
    read = read_records([tmp_path / "records.jsonl"])
    settings = Settings(tmp_path / "none", batch_size=8)

    (*replayed,) = run_replay(read, places, settings).replayed

    assert len(tampered) == 30
    assert len(read) == 32
    assert [each.verdict for each in replayed[:2]] == ["same", "same"], replayed[0].differences + replayed[1].differences
    assert {name for name, each in zip(tampered, replayed[2:], strict=True) if each.agrees} == set()
    assert not (tmp_path / "none").exists()


def test_costs_and_dates_are_told_and_not_compared(records: dict[str, RunRecord]) -> None:
    """Another machine's seconds, memory and date leave a record confirmed."""
    slow = replace(
        records["fit"], seconds={"extract": 99.0, "fit": 99.0}, samples_per_second=1.0, peak_memory_mb=1.0, time=""
    )

    assert compare_again(slow, records["fit"]).verdict == "same"


def test_another_rounding_may_move_a_little(records: dict[str, RunRecord]) -> None:
    """Where a library is of another version two images may be answered otherwise, and no more; elsewhere none."""
    record = records["fit"]
    elsewhere = replace(record, environment=changed(record, "environment.versions.torch", "1.0").environment)
    worse = answered(elsewhere, record.right.replace("1", "0", 3))

    assert compare_again(bettered(record), record).verdict == "differs"
    assert compare_again(bettered(elsewhere), record).verdict == "within tolerance"
    assert compare_again(bettered(elsewhere), record).elsewhere == (
        "torch 1.0, here " + record.environment["versions"]["torch"],
    )
    assert compare_again(worse, record).verdict == "differs"


def test_a_record_of_other_code_may_round_otherwise(records: dict[str, RunRecord]) -> None:
    """What featcache's own files held is recorded; of other code, or where a record does not say, digits may move."""
    record = records["fit"]
    other = replace(record, environment=changed(record, "environment.code", "0" * 16).environment)
    silent = replace(record, environment={name: told for name, told in record.environment.items() if name != "code"})

    assert len(record.environment["code"]) == 16
    assert compare_again(bettered(other), record).elsewhere == (f"code {'0' * 16}, here {record.environment['code']}",)
    assert compare_again(bettered(silent), record).elsewhere == ("code not recorded",)
    assert compare_again(bettered(silent), record).verdict == "within tolerance"
    assert compare_again(answered(other, record.right.replace("1", "0", 3)), record).verdict == "differs"


def test_depths_that_go_on_from_others_are_run_again(place: Path, places: Places, tmp_path: Path) -> None:
    """A sweep's second depth is run behind the first, at its rate: to the same record; alone it says what is lacking."""
    spec = BackboneSpec("test_resnet", random_init=0, overrides=TransformOverrides(input_size=32))
    cache = FeatureCache(open_dataset(place / "data" / "subtle"), spec, Settings(tmp_path / "cache", batch_size=8))
    sweep = Sweep(FineTuneInputs(cache), GAINS)
    first = sweep.take(0).record
    sweep.keep(0)
    second = sweep.take(1).record
    assert second.method == "last:2 after last:1"
    for record in (first, second):
        append_record(tmp_path / "records.jsonl", record)
    read = read_records([tmp_path / "records.jsonl"])

    whole = run_replay(read, places, Settings(batch_size=8))
    (alone,) = run_replay(read[1:], places, Settings(batch_size=8)).replayed

    assert [each.verdict for each in whole.replayed] == ["same", "same"], whole.lines
    assert (alone.verdict, "give the records of all depths" in alone.differences[0]) == ("not run", True)


def test_the_command_confirms_or_ends_with_three(place: Path, run: Run, tmp_path: Path) -> None:
    """``bench`` on records prints both scores; one that was changed, and one whose images lie nowhere, end it with 3."""
    asked = ("bench", "--from-record", place / "grid.jsonl", "--batch-size", "8")
    head, tuned = read_records([place / "grid.jsonl"])
    append_record(tmp_path / "false.jsonl", changed(head, "test.log_loss", 0.5))

    whole = run(*asked, "--data-root", place / "data", "--only", head.cell[:8], "--out", tmp_path / "again", "--json")
    by_grid = run("bench", place / "grid.toml", "--from-record", tmp_path / "false.jsonl", "--batch-size", "8")
    nowhere = run(*asked, "--only", tuned.cell)

    assert (whole.code, whole.json["agrees"], whole.json["counts"]) == (0, True, {"same": 1})
    assert [record.cell for record in read_records([tmp_path / "again" / "grid.jsonl"])] == [head.cell]
    assert by_grid.code == 3
    assert "test.log_loss: 0.5 recorded" in by_grid.out
    assert nowhere.code == 3
    assert "say where it is (--data-root)" in nowhere.out
    assert run(*asked, "--only", "none").code == 3
    assert run("bench", "--only", head.cell).code == 2
    assert run("bench").code == 2


def test_heads_that_lie_in_a_cache_answer_only_if_asked(place: Path, records: dict[str, RunRecord], tmp_path: Path) -> None:
    """A cache gives its features; what was trained from them is trained anew, unless it is wanted back."""
    record = records["fit"]
    (bundle,) = (place / "cache").glob("*/*/heads/logistic-seed0-*.joblib")
    settings = Settings(tmp_path / "none", batch_size=8)
    stored = Places(data_root=place / "data", features=place / "cache")

    (anew,) = run_replay([record], stored, settings).replayed
    (back,) = run_replay([record], replace(stored, reuse=True), settings).replayed

    assert (anew.verdict, back.verdict) == ("same", "same")
    assert anew.again is not None
    assert back.again is not None
    assert anew.again.time > record.time or anew.again.seconds != record.seconds
    assert back.again == record
    assert bundle.exists()


def test_a_stranger_s_request_is_one_plain_reason(records: dict[str, RunRecord], places: Places) -> None:
    """What a record asks for may be anything: it is not run, the others are."""
    strange = [
        changed(records["finetune"], "request.plan.unfreeze", {"no": "such"}),
        changed(records["finetune"], "request.plan.lr", "fast"),
        replace(records["fit"], request={"backbone": []}),
        replace(records["fit"], kind="audit"),
        replace(records["fit"], method="logistic of my own"),
        replace(records["fit"], source={"data": "../../../etc"}, dataset=".."),
    ]

    result = run_replay([*strange, records["fit"]], places, Settings(batch_size=8))

    assert [each.verdict for each in result.replayed] == ["not run"] * len(strange) + ["same"]
    assert all(len(each.differences) == 1 for each in result.replayed[:-1])


def test_own_rows_stand_beside_published_ones_of_the_same_key(place: Path, run: Run, tmp_path: Path) -> None:
    """The gap is image by image to the published row that is best on validation; rows of another protocol are refused."""
    head, tuned = read_records([place / "grid.jsonl"])
    append_record(tmp_path / "published.jsonl", head)
    append_record(tmp_path / "older.jsonl", replace(head, protocol=0, source={}))

    beside = compare_with_published([head, tuned], [head])
    printed = run("bench", place / "grid.toml", "--out", place, "--against", tmp_path / "published.jsonl", "--json")
    refused = run("bench", place / "grid.toml", "--out", place, "--against", tmp_path / "older.jsonl")
    points = 100 * (tuned.test["accuracy"] - head.test["accuracy"])

    assert [between and round(between.points, 6) for between in map(beside.gap, beside.records)] == [0.0, round(points, 6)]
    assert sorted(row[0] for row in beside.table().rows) == ["own", "own", "published"]
    assert [row["published_cell"] for row in printed.json["against"]["compared"]] == [head.cell] * 2
    assert refused.code == 3
    assert f"other protocol (0, own {PROTOCOL})" in refused.err


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda it: replace(it, test_items="0"), "other test samples"),
        (lambda it: changed(it, "split.train", 1), "other split"),
        (lambda it: replace(it, test={"r2": 0.5, "r2_ci": None}), "other metric (accuracy, own r2)"),
        (lambda it: replace(it, protocol=PROTOCOL + 1), f"other protocol ({PROTOCOL}, own {PROTOCOL + 1})"),
    ],
)
def test_unlike_keys_are_refused(
    records: dict[str, RunRecord], change: Callable[[RunRecord], RunRecord], reason: str
) -> None:
    """Each part of the key alone keeps a row from standing beside a published one."""
    unlike = change(records["fit"])

    with pytest.raises(DataError, match="nothing is comparable") as refused:
        compare_with_published([unlike], [records["fit"]])

    assert reason in str(refused.value)
    assert compare_with_published([unlike, records["fit"]], [records["fit"]]).refused == (f"subtle: {reason}",)
