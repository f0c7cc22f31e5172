"""Experiment trackers as sinks of records: each record becomes a run of wandb, trackio, TensorBoard or MLflow.

Nothing is told to a tracker that was not asked for by name. Where nothing may be fetched nothing is sent either: wandb
writes its offline files, and an address on a network is refused. A tracker that fails is left with a warning: the result of
a run is in its record.
"""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from featcache.display import Table, logger, markdown_cell
from featcache.errors import SetupError, UsageError
from featcache.reports import RunRecord
from featcache.resources import may_fetch

_PROJECT = "featcache"
_NOT_ASKED = ("right", "val", "test", "seconds", "test_groups", "notes", "probe", "gap")  # what came out, not what was asked
_CURVE = ("train loss", "train accuracy", "validation log-loss", "validation accuracy", "seconds")


class TrackedRun(Protocol):
    """One run of a tracker."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add points to curves."""

    def table(self, name: str, table: Table) -> None:
        """Add a table."""

    def file(self, path: Path) -> None:
        """Add a file."""

    def end(self) -> None:
        """Write what is left."""


class Tracker:
    """What a command tells a tracker: epochs as they end, records as they are finished, tables and files at its end.

    Args:
        asked: the tracker's name, and behind a colon a project (wandb, trackio), a folder (TensorBoard) or a folder or
            address (MLflow).

    Raises:
        UsageError: there is no such tracker, or it would send something although nothing may be fetched.
        SetupError: it is not installed.
    """

    def __init__(self, asked: str) -> None:
        kind, _, where = asked.partition(":")
        if kind not in TRACKERS:
            raise UsageError(f"`tracker` {asked!r:.60}: choose from {', '.join(TRACKERS)}.")
        try:
            self._open = TRACKERS[kind](where)
        except ImportError as error:
            raise SetupError(
                f"tracking by {kind} needs it installed ({error}): `pip install 'featcache[{kind}]'`."
            ) from error
        self.kind = kind
        self.is_broken = False
        self._run: TrackedRun | None = None
        self._cell = ""
        self._told: set[str] = set()

    def on_epoch(self, name: str, cell: str, rate: float, facts: Mapping[str, Any]) -> None:
        """Tell of an epoch that has ended, while its training goes on.

        Args:
            name: of the run.
            cell: of the experiment; its record ends the run.
            rate: of the trial.
            facts: numbers of the epoch, with its ``number``.
        """
        self._guarded(self._epoch, name, cell, rate, facts)

    def on_record(self, record: RunRecord) -> None:
        """Tell of a finished record: scores, the curve that was kept, a table, and the record itself as a file."""
        if record.cell not in self._told:  # a command may meet a record twice
            self._told.add(record.cell)
            self._guarded(self._record, record)

    def on_result(self, name: str, table: Table, *files: Path) -> None:
        """Tell what a command came to: its table, and files such as a page."""
        self._guarded(self._result, name, table, files)

    def _guarded(self, act: Callable[..., None], *arguments: Any) -> None:
        if self.is_broken:
            return
        try:
            with redirect_stdout(sys.stderr):  # trackio greets on stdout, where results are
                act(*arguments)
        except Exception as error:  # noqa: BLE001 - other libraries raise anything, and the result must not be lost to them
            self.is_broken = True
            reason = next(iter(str(error).strip().splitlines()), "")
            logger.warning("%s: nothing more is tracked (%s: %s)", self.kind, type(error).__name__, reason)

    def _epoch(self, name: str, cell: str, rate: float, facts: Mapping[str, Any]) -> None:
        run = self._opened(name, cell, {"cell": cell})
        run.scalars({f"rate {rate:g}/{key}": value for key, value in facts.items() if key != "number"}, facts["number"])

    def _record(self, record: RunRecord) -> None:
        plain = json.loads(json.dumps(record.stored))
        run = self._opened(run_name(record), record.cell, {key: plain[key] for key in plain if key not in _NOT_ASKED})
        for number, epoch in enumerate(record.params.get("curve", ())):
            values = {f"kept/{key}": value for key, value in zip(_CURVE, epoch, strict=False) if value is not None}
            run.scalars(values, number)
        run.scalars(dict(_scores_by_path(plain)), 0)
        run.table("record", record.table())
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"record-{record.cell[:8]}.json"
            path.write_text(json.dumps(plain, indent=1, sort_keys=True), encoding="utf-8")
            run.file(path)
            self._end()  # before the file is gone: some trackers copy it as they end

    def _result(self, name: str, table: Table, files: tuple[Path, ...]) -> None:
        run = self._opened(name, "", {})
        run.table("result", table)
        for path in files:
            run.file(path)
        self._end()

    def _opened(self, name: str, cell: str, config: dict[str, Any]) -> TrackedRun:
        if self._run is not None and self._cell != cell:  # a training that was left has no record
            self._end()
        if self._run is None:
            self._run, self._cell = self._open(name, config), cell
        return self._run

    def _end(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.end()


def run_name(record: RunRecord) -> str:
    """Return what a record's run is called."""
    return f"{record.dataset} {record.backbone} {record.method} seed {record.seed}"


def _scores_by_path(plain: Mapping[str, Any]) -> "list[tuple[str, float]]":
    """Return the scores, intervals, gap and costs of a record, each by its path."""
    pairs = []
    for part in ("val", "test", "gap", "seconds"):
        for name, value in (plain[part] or {}).items():
            if isinstance(value, list) and len(value) == 2:
                pairs += [(f"{part}/{name}_low", value[0]), (f"{part}/{name}_high", value[1])]
            elif isinstance(value, int | float):
                pairs.append((f"{part}/{name}", float(value)))
    return pairs


def _safe(name: str) -> str:
    """Return a name that every tracker, and every file system, takes; names of data sets are a stranger's."""
    return re.sub(r"[^\w .:/+=-]", "_", name, flags=re.ASCII).strip() or "run"


_Opened = Callable[[str, dict[str, Any]], TrackedRun]


def _wandb(project: str) -> _Opened:
    import wandb

    class Run:
        def __init__(self, name: str, config: dict[str, Any]) -> None:
            # nothing but what is logged here: neither code, nor what is printed, nor the machine's load
            settings = wandb.Settings(console="off", disable_git=True, disable_code=True, x_disable_stats=True)
            mode: Any = None if may_fetch() else "offline"
            self.run = wandb.init(project=project or _PROJECT, name=name, config=config, mode=mode, settings=settings)
            self.run.define_metric("*", step_metric="epoch")

        def scalars(self, values: Mapping[str, float], step: int) -> None:
            self.run.log({**values, "epoch": step})

        def table(self, name: str, table: Table) -> None:
            self.run.log({name: wandb.Table(columns=list(table.headers), data=[list(row) for row in table.rows])})

        def file(self, path: Path) -> None:
            artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", path.stem), type="featcache")
            artifact.add_file(str(path))
            self.run.log_artifact(artifact)

        def end(self) -> None:
            self.run.finish()

    return Run


def _trackio(project: str) -> _Opened:
    import trackio

    if not may_fetch() and any(os.environ.get(name) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")):
        raise UsageError("`tracker` trackio: TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set, and nothing may be sent.")

    class Run:
        def __init__(self, name: str, config: dict[str, Any]) -> None:
            self.run = trackio.init(project or _PROJECT, name=name, config=config, embed=False, auto_log_gpu=False)

        def scalars(self, values: Mapping[str, float], step: int) -> None:
            trackio.log(dict(values), step=step)

        def table(self, name: str, table: Table) -> None:
            trackio.log({name: trackio.Markdown(_markdown(table))})

        def file(self, path: Path) -> None:
            trackio.log_artifact(path, name=path.stem)

        def end(self) -> None:
            trackio.finish()

    return Run


def _tensorboard(folder: str) -> _Opened:
    # tensorboard's own writer: PyTorch's would load PyTorch for a head that comes from the cache
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb
    from tensorboard.plugins.text.summary_v2 import text_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    class Run:
        def __init__(self, name: str, config: dict[str, Any]) -> None:
            self.folder = Path(folder or "runs") / f"{name.replace('/', '-')} {time.strftime('%Y%m%d-%H%M%S')}"
            self.writer = EventFileWriter(str(self.folder))
            self._add(text_pb("config", f"```\n{json.dumps(config, indent=1, sort_keys=True)}\n```"), 0)

        def _add(self, summary: Any, step: int) -> None:
            self.writer.add_event(Event(summary=summary, step=step, wall_time=time.time()))

        def scalars(self, values: Mapping[str, float], step: int) -> None:
            for name, value in values.items():
                self._add(scalar_pb(name, value), step)

        def table(self, name: str, table: Table) -> None:
            self._add(text_pb(name, _markdown(table)), 0)

        def file(self, path: Path) -> None:
            shutil.copy2(path, self.folder / path.name)

        def end(self) -> None:
            self.writer.close()

    return Run


def _mlflow(where: str) -> _Opened:
    from mlflow import MlflowClient

    place = where or os.environ.get("MLFLOW_TRACKING_URI") or "mlruns"
    if not may_fetch() and re.match(r"(https?|databricks)\b", place):
        raise UsageError(f"`tracker` mlflow: {place} is on a network, and nothing may be sent.")
    store = place if ":" in place else Path(place).resolve().as_uri()

    class Run:
        def __init__(self, name: str, config: dict[str, Any]) -> None:
            # files are what mlflow-skinny can write without a database; newer versions want to be asked for them
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            self.client = MlflowClient(tracking_uri=store)
            experiment = self.client.get_experiment_by_name(_PROJECT)
            number = experiment.experiment_id if experiment else self.client.create_experiment(_PROJECT)
            self.number = self.client.create_run(number, run_name=name).info.run_id
            self.client.log_dict(self.number, config, "config.json")

        def scalars(self, values: Mapping[str, float], step: int) -> None:
            for name, value in values.items():
                self.client.log_metric(self.number, name, value, step=step)

        def table(self, name: str, table: Table) -> None:
            self.client.log_text(self.number, _markdown(table), f"{name}.md")

        def file(self, path: Path) -> None:
            self.client.log_artifact(self.number, str(path))

        def end(self) -> None:
            self.client.set_terminated(self.number)

    return Run


def _markdown(table: Table) -> str:
    """Return a table in Markdown in which a cell stays a cell, and markup is text."""
    lines = [list(map(markdown_cell, table.headers)), ["---"] * len(table.headers)]
    lines += [list(map(markdown_cell, row)) for row in table.rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{markdown_cell(table.title)}\n\n{body}\n" if table.title else f"{body}\n"


def _with_safe_name(make: Callable[[str], _Opened]) -> Callable[[str], _Opened]:
    def open_kind(where: str) -> _Opened:
        opened = make(where)
        return lambda name, config: opened(_safe(name), config)

    return open_kind


TRACKERS = {
    "wandb": _with_safe_name(_wandb),
    "trackio": _with_safe_name(_trackio),
    "tensorboard": _with_safe_name(_tensorboard),
    "mlflow": _with_safe_name(_mlflow),
}
