"""Run records: appended whole whatever stands before them, and read past everything that is none."""

import json
import multiprocessing
import os
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from featcache.errors import StorageError
from featcache.reports import PROTOCOL, RunRecord, append_once, append_record, as_read, broken_lines, read_records

RECORD = RunRecord(
    kind="fit",
    cell="0",
    dataset="photos",
    backbone="mini",
    method="ridge",
    cut="pooled",
    seed=0,
    feature_key="key",
    request={"backbone": {"name": "mini"}},
    params={"alpha": 1.0, "by size": {10: 1, 9: 2}},
    split={"train": 3, "val": 1, "test": 1},
    test_items="items",
    val={"accuracy": 0.5},
    test={"accuracy": 0.25, "accuracy_ci": [0.0, 1.0]},
    right="1",
    seconds={"extract": 1.5, "fit": 0.25},
    notes=("größer",),
)

ROOT = Path(__file__).parent.parent


def test_a_copy_s_training_is_recorded_under_its_own_name(tmp_path: Path) -> None:
    """The same training of the same contents is one record under one name, and another under another."""
    tuned = replace(RECORD, kind="finetune", params={"lr": 0.1}, seconds={"extract": 1.5, "train": 0.25})
    for record in (tuned, replace(tuned, time="later"), replace(tuned, dataset="pics")):
        append_once(tmp_path / "r.jsonl", record)

    assert [record.dataset for record in read_records([tmp_path / "r.jsonl"])] == ["photos", "pics"]


def numbered(cell: int) -> RunRecord:
    """Return one of several experiments."""
    return replace(RECORD, cell=str(cell))


def cells(path: Path) -> list[str]:
    """Return the names of the experiments that a file is read to hold."""
    return [record.cell for record in read_records([path])]


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    """All fields of it; numbers that were keys are texts, as JSON has them."""
    append_record(tmp_path / "new" / "runs.jsonl", RECORD)

    (back,) = read_records([tmp_path / "new" / "runs.jsonl", tmp_path / "absent.jsonl"])

    assert asdict(back) == asdict(RECORD) | {"params": {"alpha": 1.0, "by size": {"10": 1, "9": 2}}}


def test_a_records_file_calls_things_as_before(tmp_path: Path) -> None:
    """Speed is under the name that scripts have read it by since images were all there was; both names are read."""
    append_record(tmp_path / "runs.jsonl", replace(RECORD, samples_per_second=12.5))

    stored = json.loads((tmp_path / "runs.jsonl").read_text())

    assert stored["images_per_second"] == 12.5
    assert "samples_per_second" not in stored
    assert read_records([tmp_path / "runs.jsonl"])[0].samples_per_second == 12.5


@pytest.mark.parametrize("kept", [1, 300, -50, -1])
def test_what_follows_a_half_line_is_whole(tmp_path: Path, kept: int, caplog: pytest.LogCaptureFixture) -> None:
    """A writer was killed after some bytes: the next line starts anew, and only the half one is lost, with a word."""
    path = tmp_path / "runs.jsonl"
    append_record(path, numbered(0))
    append_record(path, numbered(1))
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:kept])

    append_record(path, numbered(2))
    append_record(path, numbered(3))

    assert cells(path) == (["0", "1", "2", "3"] if kept == -1 else ["0", "2", "3"])
    assert [f"{path}, line 2: left out" in text for text in caplog.messages] == ([] if kept == -1 else [True])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda line: line.replace(b"0.25", b"0.75", 1), "changed since"),
        (lambda line: line.replace(b'"cell": "1"', b'"cell": "7"'), "changed since"),
        (lambda line: line.replace(b'"seed": 0', b'"sead": 0'), "changed since"),
        (lambda line: line.replace(b'"schema_version": 1', b'"schema_version": 2'), "of version 2"),
        (lambda line: b"\xff\xfe" + line, "utf-8"),
        (lambda _: b"[" * 100_000, "recursion"),
        (lambda _: b"[]", "no JSON object"),
        (lambda _: b'"schema_version"', "no JSON object"),
        (lambda _: b"\0" * 4096, "Expecting value"),
        (lambda _: b'{"schema_version": 1}', "kind is missing"),
        (lambda line: line[:200] + line, "delimiter|Expecting|Extra"),
    ],
)
def test_a_line_that_is_no_record_is_left_out(
    tmp_path: Path, damage: Callable[[bytes], bytes], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named by file and line; those before and behind it are read."""
    path = tmp_path / "runs.jsonl"
    for number in range(3):
        append_record(path, numbered(number))
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage(lines[1]), lines[2]]) + b"\n")

    assert cells(path) == ["0", "2"]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"{path}, line 2: left out")
    assert re.search(said, caplog.messages[0])


@pytest.mark.parametrize(
    "change",
    [
        {"val": 5},
        {"seed": "0"},
        {"seed": True},
        {"right": None},
        {"notes": "none"},
        {"test": {}},
        {"test": {"accuracy": 1.0}},
        {"seconds": {"extract": 1.0}},
        {"request": {}},
        {"speed": 1},
    ],
)
def test_a_field_of_another_kind(tmp_path: Path, change: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    """A line without a checksum, of which no table could be made, is left out as well."""
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(asdict(RECORD) | change) + "\n")

    assert cells(path) == []
    assert "line 1: left out" in caplog.text


def test_lines_of_before_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They have no checksum; one that an editor has ended otherwise, or parted by empty lines, is a record still."""
    path = tmp_path / "runs.jsonl"
    path.write_bytes(b"\r\n\n".join(json.dumps(asdict(numbered(number))).encode() for number in range(3)))

    append_record(path, numbered(3))

    assert cells(path) == ["0", "1", "2", "3"]
    assert not caplog.messages


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a record as a line has it, a field taken out."""
    return {key: value for key, value in record.items() if key != name}


@pytest.mark.parametrize("name", ["checksum", *sorted(as_read(RECORD).stored)])
def test_no_field_changes_unseen(tmp_path: Path, name: str) -> None:
    """Another value, one of another kind, none and no such field: the line is refused, the checksum's own field too."""
    path = tmp_path / "runs.jsonl"
    append_record(path, replace(RECORD, protocol=PROTOCOL))
    (line,) = map(json.loads, path.read_text().splitlines())
    others = [value for value in (None, 7, "x", [0], {"k": 1}, True) if value != line[name]]
    changed = [line | {name: value} for value in others] + [without(line, name), without(line, name) | {f"{name}_": 0}]

    for each in changed:
        path.write_text(json.dumps(each) + "\n")
        assert len(broken_lines(path)) == 1, each.get(name)


PUBLISHED = sorted(  # grids have a pipeline; other tables of the folder hold no run records
    path for path in (ROOT / "benchmarks").glob("*.jsonl") if (ROOT / "pipelines" / f"{path.stem}.toml").exists()
)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_the_records_that_are_published_are_read(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every line of them."""
    assert len(cells(path)) == len(path.read_text().splitlines())
    assert not caplog.messages


def test_a_write_that_takes_less_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system takes seven bytes at a time: the lines are whole."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:7]))

    for number in range(2):
        append_record(tmp_path / "runs.jsonl", numbered(number))

    assert cells(tmp_path / "runs.jsonl") == ["0", "1"]


def test_where_no_records_can_be_kept(tmp_path: Path) -> None:
    """A full disk (the system's own) and a folder in the file's place are said."""
    (tmp_path / "runs.jsonl").mkdir()

    with pytest.raises(StorageError, match="cannot be written"):
        append_record(tmp_path / "runs.jsonl", RECORD)
    with pytest.raises(StorageError, match="is no file"):
        read_records([tmp_path / "runs.jsonl"])
    if Path("/dev/full").exists():
        (tmp_path / "full.jsonl").symlink_to("/dev/full")
        with pytest.raises(StorageError, match="No space left"):
            append_record(tmp_path / "full.jsonl", RECORD)


def append_many(path: Path, first: int, size: int) -> None:
    """Append twenty records of some size."""
    for number in range(first, first + 20):
        append_record(path, replace(numbered(number), right="1" * size))


def test_several_writers_do_not_tear_lines(tmp_path: Path) -> None:
    """Four processes append lines of half a megabyte at once: all of them are whole."""
    path, size = tmp_path / "runs.jsonl", 500_000
    writers = [multiprocessing.get_context("fork").Process(target=append_many, args=(path, 20 * n, size)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    assert sorted(map(int, cells(path))) == list(range(80))


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"val_by_lr": {"0.001": 0.9}}, True),
        ({"val_by_lr": {"0.001": 0.9, "0.001 with live BatchNorm": 0.8}}, False),
        ({"val_by_lr": {"0.001 with live BatchNorm": 0.8}, "batchnorm_settled": True}, True),
        ({"val_by_lr": None}, True),
    ],
)
def test_trainings_of_unsettled_statistics_are_made_again(params: dict[str, Any], *, expected: bool) -> None:
    """Statistics that moved from where pretraining had left them led elsewhere: such a training is none of today's."""
    assert replace(RECORD, protocol=PROTOCOL, params=params).is_current is expected
    assert not replace(RECORD, protocol=PROTOCOL - 1, params=params).is_current
