"""A fine-tuning from a data set to its record: started once, killed anywhere, at every depth, with what it has cost."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from finetune_support import GAINS, PLAN, KilledError, epochs_of
from support import TINY, Run

from featcache.backbones.timm_models import load_backbone
from featcache.datasets import open_dataset, tables
from featcache.errors import StorageError
from featcache.experiments import experiment
from featcache.experiments.bench import load_grid, run_bench
from featcache.experiments.finetune import FineTuneInputs, FineTuneResult, run_finetune, run_sweep
from featcache.experiments.fit import PROBE, Ledger
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.finetuning import Unfreeze, loop
from featcache.finetuning.finetuner import Checkpoint, Finetuner
from featcache.finetuning.loop import TrainContext
from featcache.finetuning.model import Network, OpenNetwork
from featcache.heads import linear as linear_heads
from featcache.heads import search
from featcache.heads.bundle import load as load_bundle
from featcache.reports import RunRecord, as_read, read_records
from featcache.reports.wording import finetune_lines
from featcache.specs import BackboneSpec


@pytest.mark.parametrize(("given", "solved"), [(True, 0), (False, 1)])
def test_the_head_of_train_alone_is_the_one_that_the_search_fitted(
    folder: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch, *, given: bool, solved: int
) -> None:
    """Chosen on a given val split, the head that training starts from is not fitted again; folds of a draw have none."""
    for image in sorted(folder.glob("*/*.png")) if given else []:
        part = "val" if int(image.stem) % 4 == 0 else "test" if int(image.stem) % 4 == 1 else "train"
        (folder / part / image.parent.name).mkdir(parents=True, exist_ok=True)
        image.rename(folder / part / image.parent.name / image.name)
    for name in ("blue", "green", "red") if given else ():
        (folder / name).rmdir()
    inputs = FineTuneInputs(FeatureCache(open_dataset(folder), tiny, settings))
    probe = next(job.fitted for job in inputs.fitted if job.record.method == PROBE)
    train, fitted = search.train, []
    monkeypatch.setattr(search, "train", lambda *arguments: fitted.append(arguments) or train(*arguments))

    start, _ = inputs.linear_probes

    rows = inputs.split.train
    features = inputs.cache.extracted().store.features()
    anew = train(PROBE, probe.params, features.X[rows], features.y[rows], 0)
    weights, bias = linear_heads.linear_weights(anew, 3)
    assert len(fitted) == solved
    np.testing.assert_allclose(start.weights, weights, atol=1e-3 * np.abs(weights).max())
    np.testing.assert_allclose(start.bias, bias, atol=1e-3 * np.abs(bias).max())


def test_the_job_reports_gap_costs_and_checkpoint(subtle: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """From a folder to a record: gap with interval and p, seconds of every phase, a file that can be loaded again."""
    bench = FeatureCache(open_dataset(subtle), tiny, settings)

    job = run_finetune(
        FineTuneInputs(bench, probes=("centroid",)), replace(GAINS, unfreeze=Unfreeze.parse("last:2"), lr=(1e-4,))
    )

    summary = job.summary
    assert summary["cut"] == "layer2"
    assert summary["gained"]
    assert summary["probe"]["of"] == ["centroid", "ridge", "knn", "logistic"]
    assert summary["probe"]["head"] in summary["probe"]["of"]
    assert set(summary["gap"]) == {"points", "ci", "p_value"}
    assert summary["gap"]["points"] == pytest.approx(
        100 * (summary["test"]["accuracy"] - summary["probe"]["test"]["accuracy"])
    )
    assert summary["seconds"]["train"] > 0
    assert job.table().note.startswith("* on 5 folds of train and val")
    assert load_backbone(replace(tiny, random_init=None, weights=summary["checkpoint"])).loaded.tag == "file"


def test_what_cannot_be_cut_is_trained_whole(
    folder: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no cut is found, training runs from pixels and says so."""
    from featcache.backbones import base as module
    from featcache.errors import CutError

    def refuse(*_: object) -> None:
        raise CutError("this backbone cannot be traced.")

    monkeypatch.setattr(module, "Cutter", refuse)

    job = run_finetune(FineTuneInputs(FeatureCache(open_dataset(folder), tiny, settings)), PLAN)

    assert job.record.cut == "input"
    assert "runs again in every epoch" in job.record.notes[0]


def test_no_stochastic_depth_means_none(folder: Path, settings: Settings) -> None:
    """A model that brings a rate of its own trains without it where the plan says none, as its record does."""
    own = BackboneSpec("test_vit", random_init=0, model_args=(("drop_path_rate", 0.5),))
    bench = FeatureCache(open_dataset(folder), own, settings)
    rates = [module.drop_prob for module in bench.backbone.module.modules() if type(module).__name__ == "DropPath"]

    backbone = bench.backbone.separate()

    assert max(rates) == 0.5
    assert not any(module.drop_prob for module in backbone.module.modules() if type(module).__name__ == "DropPath")
    assert max(module.drop_prob for module in bench.backbone.module.modules() if type(module).__name__ == "DropPath") == 0.5


@pytest.mark.parametrize(
    "step",
    [
        "featcache.finetuning.model.save_checkpoint",
        "featcache.heads.linear.linear_estimator",  # of the head's file
        "featcache.experiments.experiment.append_once",
        "featcache.finetuning.finetuner.Checkpoint.clear",
    ],
)
def test_a_training_that_has_ended_is_not_lost(
    folder: Path, tiny: BackboneSpec, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Killed at the checkpoint, the head, the record or after it: nothing is trained again, and one record stands."""
    records, bench = tmp_path / "runs.jsonl", FeatureCache(open_dataset(folder), tiny, settings)
    plan = replace(PLAN, lr=(1e-3, 1e-2))

    def killed(*_: object, **__: object) -> None:
        raise KilledError

    trained = epochs_of(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(step, killed)
        with pytest.raises(KilledError):
            run_finetune(FineTuneInputs(bench), plan, records=records)
    assert trained
    trained.clear()
    job = run_finetune(FineTuneInputs(bench), plan, records=records)

    assert trained == []
    assert read_cells(records) == [job.record.cell]
    assert {path.name.removeprefix(job.checkpoint.stem) for path in job.checkpoint.parent.iterdir()} == {
        ".safetensors",
        ".joblib",
        ".joblib.json",
    }


def test_a_sweep_that_is_killed_keeps_the_depths_it_has(
    folder: Path, tiny: BackboneSpec, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the second depth's record, the first two are not trained again, and each depth has one record."""
    records, bench = tmp_path / "runs.jsonl", FeatureCache(open_dataset(folder), tiny, settings)
    plan = replace(PLAN, epochs=1, lr=(1e-3,), refit=False)
    append = experiment.append_once

    def killed(path: Path, record: RunRecord, tracker: object) -> None:
        if read_cells(path):
            raise KilledError
        append(path, record, tracker)

    trained = epochs_of(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(experiment, "append_once", killed)
        with pytest.raises(KilledError):
            run_sweep(FineTuneInputs(bench), plan, records=records)
    assert len(trained) == 2
    jobs = run_sweep(FineTuneInputs(bench), plan, records=records).jobs

    assert len(trained) == len(jobs) > 2
    assert read_cells(records) == [job.record.cell for job in jobs]
    assert not list(settings.cache.rglob("*.unfinished"))


@pytest.mark.parametrize("sweep", [False, True])
def test_what_has_been_trained_is_not_trained_again(
    folder: Path, tiny: BackboneSpec, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, sweep: bool
) -> None:
    """The same command again reports the record of before; another seed or other heads train anew, and what lost a file."""
    records, plan = tmp_path / "runs.jsonl", replace(PLAN, epochs=1, lr=(1e-3,), refit=False)
    run: Any = run_sweep if sweep else run_finetune

    def again(**more: Any) -> Any:
        return run(FineTuneInputs(FeatureCache(open_dataset(folder), tiny, settings), **more), plan, records=records)

    first = again()
    trained, lines = epochs_of(monkeypatch), records.read_bytes()
    assert json.loads(json.dumps(again().summary)) == json.loads(json.dumps(first.summary))
    assert trained == []
    assert records.read_bytes() == lines

    again(probes=("centroid",))
    assert len(trained) == len(first.jobs)
    first.jobs[-1].checkpoint.unlink()
    again(seed=1)
    assert len(trained) == 2 * len(first.jobs)
    again(probes=("centroid",))  # the depth that lost its file, and what it goes on from, whose weights are needed
    assert 2 * len(first.jobs) < len(trained) <= 3 * len(first.jobs)
    trained.clear()
    again(probes=("centroid",))
    assert trained == []


def test_a_training_of_groups_is_found_again_while_the_groups_are_the_same(
    folder: Path, tiny: BackboneSpec, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command on a manifest with a column of groups, read once a command, trains nothing; other groups in it do."""
    read, asked = tables.read_column, list[str]()
    monkeypatch.setattr(tables, "read_column", lambda *names: asked.append(names[1]) or read(*names))
    records, plan = tmp_path / "runs.jsonl", replace(PLAN, epochs=1, lr=(1e-3,), refit=False)

    def again(groups: int) -> None:
        paths = sorted(folder.glob("*/*.png"))
        rows = [f"{path.relative_to(folder)},{path.parent.name},{place % groups}" for place, path in enumerate(paths)]
        (folder / "data.csv").write_text("\n".join(["path,label,patient", *rows]))
        inputs = FineTuneInputs(FeatureCache(open_dataset(folder / "data.csv"), tiny, settings), group="patient")
        run_finetune(inputs, plan, records=records)

    again(9)
    trained = epochs_of(monkeypatch)

    again(9)
    assert trained == []
    again(12)
    assert len(trained) == 1
    assert asked == ["patient"] * 3


def test_trainings_as_long_to_the_millisecond_have_each_its_record(
    folder: Path, tiny: BackboneSpec, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training compared with other heads is another, though its epochs took just as long: the next command finds it."""
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 0.0))
    records, plan = tmp_path / "runs.jsonl", replace(PLAN, epochs=1, lr=(1e-3,), refit=False)

    def again(*probes: str) -> FineTuneResult:
        inputs = FineTuneInputs(FeatureCache(open_dataset(folder), tiny, settings), probes=probes)
        return run_finetune(inputs, plan, records=records)

    first, other = again().record, again("centroid").record
    trained = epochs_of(monkeypatch)

    assert (other.cell, other.params, other.right) == (first.cell, first.params, first.right)
    assert (again("centroid").record, again().record) == (as_read(other), as_read(first))
    assert trained == []


def test_a_grid_clears_what_a_killed_run_left(
    folder: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between a cell's record and the end of its state: the next run computes nothing, and the state is gone."""
    (tmp_path / "grid.toml").write_text(
        f'unfreeze = ["last:1"]\n[[dataset]]\ndata = "{folder}"\n[[backbone]]\nname = "test_resnet"\nrandom_init = 0\n'
        "input_size = 32\n[finetune]\nepochs = 1\nlr = 1e-3\n"
    )
    grid = load_grid(tmp_path / "grid.toml")

    def killed(_: Checkpoint) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "clear", killed)
        with pytest.raises(KeyboardInterrupt):
            run_bench(grid, settings, tmp_path / "out")
    assert list(settings.cache.rglob("*.unfinished"))

    assert run_bench(grid, settings, tmp_path / "out").computed_cells == 0
    assert not list(settings.cache.rglob("*.unfinished"))


def test_a_state_of_an_earlier_protocol_is_begun_again(
    folder: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was killed goes on under the protocol that it began with; another one starts from another probe, so from none."""
    plan, saved = replace(PLAN, epochs=2), list[bool]()
    load = Checkpoint.load

    def noted(checkpoint: Checkpoint) -> dict[str, Any] | None:
        state = load(checkpoint)
        saved.append(state is not None)
        return state

    def killed(_: Checkpoint) -> None:
        raise KeyboardInterrupt

    def tune(protocol: int) -> None:
        monkeypatch.setattr("featcache.experiments.finetune.PROTOCOL", protocol)
        run_finetune(FineTuneInputs(FeatureCache(open_dataset(folder), tiny, settings)), plan)

    monkeypatch.setattr(Checkpoint, "load", noted)
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "clear", killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                tune(protocol=1)
    tune(protocol=2)

    assert saved == [False, True, False]


def test_stages_with_dots_and_seeds_have_files_of_their_own(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Every head answers with its own card and weights, however alike what was asked for is spelt."""
    bench, ledger = FeatureCache(open_dataset(folder), tiny, settings), Ledger()
    plan = replace(PLAN, epochs=1, lr=(1e-3,), refit=False)
    asked = [("10.5%", 0), ("10.3%", 0), ("10.5%", 1), ("norm:last:1", 0)]
    jobs = [
        run_finetune(FineTuneInputs(bench, seed=seed, ledger=ledger), replace(plan, unfreeze=Unfreeze.parse(text)))
        for text, seed in asked
    ]

    assert len({job.bundle for job in jobs}) == len({job.checkpoint for job in jobs}) == len(asked)
    for (text, _), job in zip(asked, jobs, strict=True):
        loaded = load_bundle(job.bundle)
        assert loaded.card["head"] == text
        assert loaded.card["weights"] == str(job.checkpoint)
        assert loaded.card["test"]["accuracy"] == job.record.test["accuracy"]


def test_views_train_end_to_end(run: Run, folder: Path) -> None:
    """The option stores augmentations at the boundary and trains from them."""
    done = run("finetune", folder, *TINY, "--views", "2", "--epochs", "1", "--lr", "1e-3", "--json")

    assert done.code == 0, done.err
    assert "lower" not in done.err
    assert done.json["cut"] == "layer3"


def test_augment_needs_pixels(run: Run, folder: Path) -> None:
    """At a later cut nothing can be flipped, and it is not done silently."""
    done = run("finetune", folder, *TINY, "--augment")

    assert done.code == 2
    assert "--unfreeze all" in done.err


def test_a_budget_that_holds_nothing(folder: Path, tiny: BackboneSpec, tmp_path: Path) -> None:
    """Where not even the pixels fit, it is said before anything is computed."""
    with pytest.raises(StorageError, match="a larger `budget`"):
        run_finetune(
            FineTuneInputs(FeatureCache(open_dataset(folder), tiny, Settings(tmp_path / "cache", budget=1000))), PLAN
        )


def test_budget_between_activations_and_pixels(folder: Path, tiny: BackboneSpec, tmp_path: Path) -> None:
    """Where pixels fit and activations do not, the frozen part runs again: the same result within rounding."""
    plan = replace(PLAN, unfreeze=Unfreeze.parse("last:4"), epochs=1)
    ledger, bench = Ledger(), FeatureCache(open_dataset(folder), tiny, Settings(tmp_path / "one", batch_size=8))
    wide = run_finetune(FineTuneInputs(bench, ledger=ledger), plan)
    stored = sum(path.stat().st_size for path in (tmp_path / "one").glob(f"*/*.{wide.record.cut}-*/parts/*.h5"))
    pixels = 36 * 32 * 32 * 3
    assert pixels < stored

    narrow = FeatureCache(open_dataset(folder), tiny, Settings(tmp_path / "two", batch_size=8, budget=pixels + 1))
    again = run_finetune(FineTuneInputs(narrow, ledger=ledger), plan)

    assert again.record.cut == "input"
    assert any("again in every epoch" in note for note in again.record.notes)
    assert again.record.val["log_loss"] == pytest.approx(wide.record.val["log_loss"], rel=1e-2)


def test_a_sweep_goes_from_the_last_stage_to_all(
    folder: Path, tiny: BackboneSpec, settings: Settings, tmp_path: Path
) -> None:
    """Every depth once, from one pass over the images; rates are searched until one depth has gained."""
    bench = FeatureCache(open_dataset(folder), tiny, settings)
    done = run_sweep(FineTuneInputs(bench), replace(PLAN, epochs=1, lr=(1e-3, 1e-2)), records=tmp_path / "records.jsonl")

    stages = [stage.name for stage in bench.backbone.stages]
    assert [job.record.cut for job in done.jobs] == [*reversed(stages[:-1]), "input"]
    assert [job.record.method.split()[0] for job in done.jobs] == [*(f"last:{n}" for n in range(1, len(stages))), "all"]
    best = [job.record.val["accuracy"] for job in done.jobs]
    for before, after in zip(done.jobs, done.jobs[1:], strict=False):
        if before.tuned.best > 0:
            assert "after" in after.record.method
            assert after.tuned.rates.keys() == {before.tuned.lr}
            assert after.record.val["accuracy"] >= before.record.val["accuracy"]
            # a depth that goes on from another has needed all that the other did
            assert after.record.seconds["before"] == pytest.approx(sum(before.record.seconds.values()), abs=1e-3)
            assert after.record.short_method == after.record.method.split()[0]
    assert len(read_records([tmp_path / "records.jsonl"])) == len(best) == len(set(read_cells(tmp_path / "records.jsonl")))


def test_a_depth_that_gains_nothing_answers_as_the_shallower_one(
    subtle: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model is the one that was finished before it, trained on train and validation, image by image."""
    wreck = replace(PLAN, epochs=1, lr=(1e20,))

    def wrecked(network: OpenNetwork, context: TrainContext, split: Any, refitted: Network, *more: Any) -> Finetuner:
        context = replace(context, plan=wreck) if refitted.weights else context
        return Finetuner(network, context, split, refitted, *more)

    monkeypatch.setattr("featcache.finetuning.finetuner.Finetuner", wrecked)
    first, *deeper = run_sweep(FineTuneInputs(FeatureCache(open_dataset(subtle), tiny, settings)), GAINS).jobs

    assert first.tuned.best > 0
    assert first.tuned.refitted
    lines = list(finetune_lines([job.record for job in (first, *deeper)]))
    assert any(line.startswith(f"Of {1 + len(deeper)} depths last:1 is the best on validation: test") for line in lines)
    assert not any("after" in line for line in lines)
    for job in deeper:
        assert job.tuned.best == 0
        assert not job.tuned.refitted
        assert job.record.right == first.record.right
        assert job.record.test["log_loss"] == pytest.approx(first.record.test["log_loss"], rel=1e-2)


def read_cells(path: Path) -> list[str]:
    """Return the names of the experiments in a file of records."""
    return [record.cell for record in read_records([path])]


def test_the_tuned_network_predicts_and_exports(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its head's file is as any other's, its checkpoint a backbone to extract from."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    tune = run("finetune", folder, *TINY, "--epochs", "2", "--lr", "1e-2", "--json").json

    labels = run("predict", tune["bundle"], folder, "--json")
    exported = run("export", tune["bundle"], tmp_path / "model.onnx", "--json")
    probed = run("fit", folder, "-b", "test_resnet", "--weights", tune["checkpoint"], "--input-size", "32", "--json")

    assert labels.code == exported.code == probed.code == 0, labels.err + exported.err + probed.err
    assert (tmp_path / "model.onnx").exists()
