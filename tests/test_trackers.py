"""Trackers: what they were told is read back by their own readers; none is told unasked, none can lose a result."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import TINY, Run

from featcache.display import Table, markdown_cell
from featcache.errors import SetupError, UsageError
from featcache.experiments.fit import FitPlan, run_fit
from featcache.extraction.feature_cache import Settings
from featcache.reports import RunRecord, read_records, trackers
from featcache.reports.trackers import Tracker, run_name

TUNING = (*TINY, "--epochs", "2", "--lr", "1e-3", "--train-batch", "8", "--no-refit", "--offline")
ACCURACY, LIVE, KEPT = "test/accuracy", "rate 0.001/validation accuracy", "kept/validation accuracy"


@pytest.fixture
def tune(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], RunRecord]:
    """Fine-tune with a tracker, in a process of its own as users do, and return the record."""
    monkeypatch.setenv("FEATCACHE_CACHE", str(tmp_path / "cache"))
    for name in ("WANDB_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
        (tmp_path / name).mkdir()

    def call(tracker: str) -> RunRecord:
        command = [sys.executable, "-m", "featcache", "finetune", str(folder), *TUNING, "--track", tracker, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=os.environ)
        assert "nothing more is tracked" not in done.stderr, done.stderr
        assert json.loads(done.stdout)["unfreeze"] == "last:1"
        (record,) = read_records([tmp_path / "cache" / "records" / "runs.jsonl"])
        return record

    return call


def kept_accuracies(record: RunRecord) -> list[float]:
    """Return the accuracies on validation of the epochs of the rate that was kept, the start first."""
    return [epoch[3] for epoch in record.params["curve"]]


def test_tensorboard_reads_back_what_it_was_told(tune: Callable[[str], RunRecord], tmp_path: Path) -> None:
    """Scores, the live and the kept curve, the tables, and the record as a file."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = tune("tensorboard:logs")

    (folder,) = (path for path in (tmp_path / "logs").iterdir() if "seed" in path.name)
    (result,) = (path for path in (tmp_path / "logs").iterdir() if path.name.startswith("finetune"))
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()

    def curve(tag: str) -> list[float]:
        return [float(event.tensor_proto.float_val[0]) for event in events.Tensors(tag)]

    assert curve(ACCURACY) == pytest.approx([record.test["accuracy"]])
    assert curve(KEPT) == pytest.approx(kept_accuracies(record))
    assert len(curve(LIVE)) == len(kept_accuracies(record)) - 1
    assert {"config", "record"} <= set(events.Tags()["tensors"])
    assert json.loads((folder / f"record-{record.cell[:8]}.json").read_text())["right"] == record.right
    assert "result" in EventAccumulator(str(result)).Reload().Tags()["tensors"]


def test_mlflow_reads_back_what_it_was_told(tune: Callable[[str], RunRecord], tmp_path: Path) -> None:
    """As above, from the files that need no server."""
    mlflow = pytest.importorskip("mlflow")

    record = tune(f"mlflow:{tmp_path / 'mlruns'}")

    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    runs = client.search_runs([client.get_experiment_by_name("featcache").experiment_id])
    (run,) = (run for run in runs if run.info.run_name == run_name(record))
    number = run.info.run_id
    points = sorted(client.get_metric_history(number, KEPT), key=lambda point: int(point.step))

    assert run.data.metrics[ACCURACY] == record.test["accuracy"]
    assert [point.value for point in points] == kept_accuracies(record)
    assert len(client.get_metric_history(number, LIVE)) == len(points) - 1
    assert {file.path for file in client.list_artifacts(number)} == {
        "config.json",
        "record.md",
        f"record-{record.cell[:8]}.json",
    }
    assert run.info.status == "FINISHED"
    assert "finetune" in {run.info.run_name for run in runs}


def test_a_table_in_markdown_holds_strangers_names_as_text() -> None:
    """No cell becomes two, no line ends early, and neither markup nor link is left: as in the tables of reports."""
    table = Table(("set|x", "told"), [("<script>a</script>|b", "[c](javascript:d)\ne")], "*t*")

    title, _, headers, rule, row = trackers._markdown(table).splitlines()

    assert title == markdown_cell("*t*")
    assert rule == "| --- | --- |"
    assert headers == f"| {markdown_cell('set|x')} | told |"
    assert row == f"| {' | '.join(map(markdown_cell, table.rows[0]))} |"
    assert not re.search(r"(?<!\\)[<\[\]]", row)  # each is escaped


def wandb_messages(content: bytes) -> Iterator[bytes]:
    """Yield the messages of a .wandb file: LevelDB's log format behind seven bytes, in blocks of 32 kB."""
    assert content[:4] == b":W&B"
    place, message = 7, b""
    while place + 7 <= len(content):
        if (room := 32768 - place % 32768) < 7:
            place += room
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        message += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in {1, 4}:  # a whole message, or the last piece of one
            yield message
            message = b""


def test_wandb_reads_back_what_it_wrote_offline(tune: Callable[[str], RunRecord], tmp_path: Path) -> None:
    """The offline files, as wandb's own messages; nothing of the machine's load is in them."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    record = tune("wandb:lab")

    histories: dict[str, list[dict[str, Any]]] = {}
    artifacts, projects = set(), set()
    for path in (tmp_path / "WANDB_DIR").rglob("*.wandb"):
        name = ""
        for data in wandb_messages(path.read_bytes()):
            part = wandb_internal_pb2.Record()
            part.ParseFromString(data)
            if part.HasField("run"):
                name = part.run.display_name
                projects.add(part.run.project)
            if part.HasField("history"):
                items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in part.history.item}
                histories.setdefault(name, []).append(items)
            if part.HasField("artifact") or part.request.HasField("log_artifact"):
                artifacts.add(part.artifact.name or part.request.log_artifact.artifact.name)
            assert not part.HasField("stats")
    history = histories[run_name(record)]

    assert projects == {"lab"}
    assert [row[ACCURACY] for row in history if ACCURACY in row] == [record.test["accuracy"]]
    assert [row[KEPT] for row in history if KEPT in row] == kept_accuracies(record)
    assert len([row for row in history if LIVE in row]) == len(kept_accuracies(record)) - 1
    assert any(key.startswith("record") for row in history for key in row)
    assert f"record-{record.cell[:8]}" in artifacts
    assert any(key.startswith("result") for row in histories["finetune"] for key in row)


def test_trackio_reads_back_what_it_was_told(tune: Callable[[str], RunRecord], tmp_path: Path) -> None:
    """As above, from its local database."""
    pytest.importorskip("trackio", minversion="0.20", exc_type=ImportError)

    record = tune("trackio:lab")

    code = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage as store\n"
        "print(json.dumps([store.get_runs('lab'), store.get_logs('lab', sys.argv[1])], default=str))"
    )
    read = subprocess.run(
        [sys.executable, "-c", code, run_name(record)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    runs, logs = json.loads(read.stdout.splitlines()[-1])

    assert {run_name(record), "finetune"} <= set(runs)
    assert [row[ACCURACY] for row in logs if row.get(ACCURACY) is not None] == [record.test["accuracy"]]
    assert [row[KEPT] for row in logs if row.get(KEPT) is not None] == kept_accuracies(record)
    assert any(f"record-{record.cell[:8]}" in path.name for path in (tmp_path / "TRACKIO_DIR").rglob("*")) or list(
        (tmp_path / "TRACKIO_DIR" / "artifacts").rglob("*")
    )


class FailingRun:
    """A run of a tracker whose server has gone, or whose disk is full."""

    def __init__(self, _name: str, _config: dict[str, Any]) -> None:
        raise ConnectionError("the server\nhas gone")


def test_a_tracker_that_fails_costs_no_result(
    prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and the record is where it belongs."""
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda _: FailingRun)
    tracker = Tracker("wandb")
    settings = Settings(tmp_path / "cache", batch_size=8, tracker=tracker)
    cache = type(prepared.bench)(prepared.bench.dataset, prepared.bench.spec, settings)

    result = run_fit(cache, FitPlan(("ridge", "knn"), baselines=False), records=tmp_path / "records.jsonl")
    tracker.on_result("fit", result.table())

    assert len(read_records([tmp_path / "records.jsonl"])) == 2
    assert [line for line in caplog.messages if "tracked" in line] == [
        "wandb: nothing more is tracked (ConnectionError: the server)"
    ]


def test_what_is_not_installed_is_said_with_its_remedy(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is computed; as is a tracker that nobody knows."""
    monkeypatch.setitem(sys.modules, "trackio", None)
    absent = run("fit", folder, *TINY, "--track", "trackio")
    unknown = run("fit", folder, *TINY, "--track", "paper")

    assert absent.code == SetupError.exit_code
    assert "pip install 'featcache[trackio]'" in absent.err
    assert unknown.code == UsageError.exit_code
    assert "--track 'paper': choose from wandb, trackio, tensorboard, mlflow" in unknown.err
    assert "images to compute" not in absent.err + unknown.err


def test_offline_refuses_an_address(run: Run, folder: Path) -> None:
    """Where nothing may be fetched nothing is sent."""
    pytest.importorskip("mlflow")

    refused = run("fit", folder, *TINY, "--offline", "--track", "mlflow:https://example.org")

    assert refused.code == UsageError.exit_code
    assert "nothing may be sent" in refused.err
