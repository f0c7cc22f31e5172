"""The gap taken apart: steps from the linear probe to the whole network, on one set of test images."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetune_support import GAINS
from support import TINY, Outcome

from featcache.datasets import open_dataset
from featcache.evaluation.metrics import Gap, decode_correct, encode_correct, paired_gap
from featcache.experiments import finetune, fit
from featcache.experiments.bench import load_grid, run_bench
from featcache.experiments.gap import GapResult, GapStep, run_gap
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.reports import RunRecord, read_records
from featcache.reports.wording import draw_gap, gap_lines, gap_sentence, gap_table
from featcache.specs import BackboneSpec

REPEATED = """
import pickle, sys
from featcache.datasets import open_dataset
from featcache.experiments.gap import GapStep, run_gap
from featcache.extraction.feature_cache import FeatureCache
data, spec, settings, plan, records = pickle.load(sys.stdin.buffer)
is_better = GapStep.is_better
GapStep.is_better = lambda step, other: step.name != "last:2" and is_better(step, other)
run_gap(FeatureCache(open_dataset(data), spec, settings), plan, records=records)
print("loaded", *({"torch", "timm", "sklearn", "pandas", "scipy.stats", "scipy.signal"} & set(sys.modules)))
"""


def images_right(record: RunRecord) -> int:
    """Return how many test images a record has right."""
    return int(decode_correct(record.right).sum())


def test_steps_add_up_and_a_second_run_computes_nothing(
    subtle: Path,
    tiny: BackboneSpec,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Image by image and in points; a kept step is better on validation, its interval is of the two on the same images.

    A depth goes on from the last that was kept, not from one that validation rejects. Again no head and no epoch is trained,
    with a budget that is spent or not; the same is said, no record is written twice.
    """
    is_better = GapStep.is_better
    monkeypatch.setattr("featcache.finetuning.attentive._EPOCHS", 2)
    monkeypatch.setattr(GapStep, "is_better", lambda step, other: step.name != "last:2" and is_better(step, other))
    caplog.set_level("INFO", "featcache")
    dataset, records, plan = open_dataset(subtle), settings.cache / "runs.jsonl", replace(GAINS, epochs=2)
    result = run_gap(FeatureCache(dataset, tiny, settings), plan, records=records)
    first, *later = result.kept

    assert [step.name for step in result.steps][:6] == ["linear", "pooling", "layers", "attentive", "last:1", "last:2"]
    assert result.steps[-1].name == "all"
    assert later
    assert len({step.record.test_items for step in result.steps}) == 1
    assert sum(result.samples.values()) == images_right(later[-1].record) - images_right(first.record)
    assert sum(step.between.points for step in later) == pytest.approx(result.total.points)
    for before, step in zip(result.kept, later, strict=False):
        assert step.is_better(before)
        assert step.between == paired_gap(decode_correct(step.record.right), decode_correct(before.record.right))
    for step in result.steps:
        if not step.is_kept:
            assert (step.samples, step.between) == (0, None)
    columns = [row[2:4] for row in gap_table(result).rows]
    assert [whole == "-" for whole, _ in columns] == [step.origin == "weights" for step in result.steps]
    assert [part for _, part in columns] == [f"{100 * step.val[0]:.1f}" for step in result.steps]
    require_starts(result)
    # what is told of a fine-tuning by itself is of its own probe: another gap than the table's
    assert not [line for line in caplog.messages if "to logistic" in line or "no gain" in line]
    assert len([line for line in caplog.messages if line.startswith("Activations at")]) == 1

    recorded = [record.cell for record in read_records([records])]
    monkeypatch.setattr(finetune.FineTuneJob, "run", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(fit._Fitting, "_train", lambda *_: pytest.fail("fitted again"))
    again = run_gap(FeatureCache(dataset, tiny, settings), plan, records=records, budget=0.0)
    assert json.loads(json.dumps(again.summary)) == json.loads(json.dumps(result.summary))
    assert [record.cell for record in read_records([records])] == recorded
    assert len(set(recorded)) == len(recorded)
    arguments = pickle.dumps((subtle, tiny, settings, plan, records))
    loaded = subprocess.run([sys.executable, "-c", REPEATED], input=arguments, capture_output=True, check=True).stdout
    assert loaded.split() == [b"loaded"]  # the stages' names are noted; heads and their scores are read
    Path(settings.cache / result.steps[-1].record.artefact).unlink()
    told = run_gap(FeatureCache(dataset, tiny, settings), plan, records=records, budget=0.0)
    assert [step.name for step in told.steps] == [step.name for step in result.steps[:-1]]
    assert told.left == ("all",)


def require_starts(result: GapResult) -> None:
    """Assert what depths go on from, and that they and the whole cost what led there."""
    probe, last = next(step for step in reversed(result.kept) if step.origin in {"", "pooling"}), None
    for step in (step for step in result.steps if step.origin == "weights"):
        before = last or probe
        assert step.starts_from == before.name
        assert step.record.method == (step.name if last is None else f"{step.name} after {last.record.method}")
        own = step.record.seconds["extract"] + step.record.seconds["train"]
        assert step.seconds == pytest.approx(before.seconds + own, abs=1e-2)
        last = step if step.is_kept else last
    assert result.record is not None
    assert sum(result.record.seconds.values()) >= max(step.seconds for step in result.steps) - 1e-2


def test_a_budget_stops_between_steps(subtle: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """What is left is named, nothing is recorded as taken apart, and no step after the first is begun."""
    cache, path = FeatureCache(open_dataset(subtle), tiny, settings), settings.cache / "runs.jsonl"

    stopped = run_gap(cache, GAINS, budget=0.0, records=path)

    assert [step.name for step in stopped.steps] == ["linear"]
    assert stopped.left[:3] == ("pooling", "layers", "attentive")
    assert stopped.record is None
    assert any("left no time for pooling" in line for line in gap_lines(stopped))
    assert {record.kind for record in read_records([path])} == {"fit"}


def step(name: str, origin: Any, right: Any, val: float, before: Any = None) -> GapStep:
    """Return a step of which this many test images are right, kept after another."""
    answers = np.arange(40) < right
    record: Any = RunRecord.__new__(RunRecord)
    for field, value in {
        "right": encode_correct(answers),
        "test": {"accuracy": right / 40, "accuracy_ci": None},
        "val": {"accuracy": val, "log_loss": 1 - val},
        "seconds": {"fit": 1.0},
        "test_groups": None,
        "dataset": "set",
        "backbone": "net",
    }.items():
        object.__setattr__(record, field, value)
    if before is None:
        return GapStep(name, origin, record, (val, 1 - val), is_kept=True)
    between = paired_gap(answers, np.arange(40) < before)
    return GapStep(name, origin, record, (val, 1 - val), is_kept=True, samples=right - before, between=between)


def test_rounded_shares_add_up_to_the_rounded_whole() -> None:
    """One image of 40 is 2.5 points: three origins, thirds of a point that rounding would lose or count twice."""
    steps = [
        step("linear", "", 20, 0.5),
        step("pooling", "pooling", 23, 0.6, 20),
        step("layers", "other layers", 30, 0.7, 23),
    ]
    steps.append(step("all", "weights", 37, 0.9, 30))

    text = gap_sentence(GapResult(tuple(steps)))

    assert "Of +42.5 points" in text
    assert "+7.5 pooling, +17.5 other layers and +17.5 weights" in text


def test_no_verdict_without_a_second_step() -> None:
    """A budget that is spent at once has measured nothing."""
    assert gap_sentence(GapResult((step("linear", "", 20, 0.5),), left=("pooling",))).startswith("Only the linear probe")


@pytest.mark.parametrize(("flags", "told"), [(("--pool", "auto"), "--pool"), (("--price", "-1"), "--price")])
def test_flags_that_mean_nothing_here_are_refused(run: Any, folder: Path, flags: tuple[str, ...], told: str) -> None:
    """Before anything is opened, with what to do."""
    outcome: Outcome = run("gap", folder, *TINY, *flags)

    assert outcome.code == 2
    assert told in outcome.err


def test_no_gain_is_told_as_none() -> None:
    """Where validation keeps the probe, and where what it chose is no better on test."""
    only = GapResult((step("linear", "", 20, 0.5), replace(step("all", "weights", 30, 0.4, 20), is_kept=False)))
    worse = GapResult((step("linear", "", 20, 0.5), step("all", "weights", 19, 0.6, 20)))

    assert gap_sentence(only).startswith("No step gained on validation")
    assert "-2.5 points from the linear probe" in gap_sentence(worse)
    assert gap_sentence(worse).endswith("no gain.")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_waterfall_is_drawn(tmp_path: Path, suffix: str) -> None:
    """With kept and left steps, with intervals and without."""
    pytest.importorskip("matplotlib")
    steps = [step("linear", "", 20, 0.5), step("pooling", "pooling", 23, 0.6, 20)]
    steps.append(replace(step("all", "weights", 30, 0.4, 20), is_kept=False, between=None))
    assert isinstance(steps[1].between, Gap)

    assert draw_gap(GapResult(tuple(steps)), tmp_path / f"gap.{suffix}").stat().st_size > 1000


def test_a_grid_takes_gaps_apart(subtle: Path, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row for each data set, backbone and seed, run once."""
    monkeypatch.setattr("featcache.finetuning.attentive._EPOCHS", 1)
    pipeline = tmp_path / "apart.toml"
    pipeline.write_text(
        f'gap = true\n[[dataset]]\ndata = "{subtle}"\n[[backbone]]\nname = "test_resnet"\nrandom_init = 0\n'
        "input_size = 32\n[finetune]\nepochs = 1\nlr = 1e-3\n"
    )
    grid = load_grid(pipeline)

    first, again = (run_bench(grid, settings, tmp_path / "out") for _ in range(2))

    assert [record.kind for record in first.records] == ["gap"]
    assert (first.computed_cells, again.computed_cells) == (1, 0)
    assert again.records == first.records
    assert first.failures == ()


def test_the_command_prints_table_and_sentence(run: Any, subtle: Path) -> None:
    """And as JSON the same steps."""
    outcome: Outcome = run("gap", subtle, *TINY, "--budget", "0s", "--price", "3")
    told = run("gap", subtle, *TINY, "--budget", "0s", "--json").json

    assert outcome.code == 0
    assert "price" in outcome.out
    assert "left no time for pooling, layers, attentive, last:1" in outcome.out
    assert [each["step"] for each in told["steps"]] == ["linear"]
    assert told["left"][0] == "pooling"
