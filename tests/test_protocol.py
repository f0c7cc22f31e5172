"""What is printed is what benchmarks/PROTOCOL.md says: groups, copies, common images, the best probe, latest records."""

import csv
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetune_support import GAINS, PLAN
from safetensors.torch import save_file
from support import TINY, Run, draw_image
from test_fit import blobs

from featcache import heads
from featcache.backbones.timm_models import load_backbone
from featcache.datasets import open_dataset
from featcache.datasets.decoding import statistics
from featcache.errors import DataError, UsageError
from featcache.evaluation.splits import make_split
from featcache.experiments import bench
from featcache.experiments import fit as jobs
from featcache.experiments.bench import load_grid, run_bench
from featcache.experiments.finetune import FineTuneInputs, run_finetune
from featcache.experiments.fit import FitPlan, run_fit
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.heads import search
from featcache.heads.baselines import Baseline, baselines, best_on_validation, standardised
from featcache.reports import RunRecord, read_records
from featcache.reports.tables import rows
from featcache.specs import BackboneSpec

TOML_BACKBONE = """[[backbone]]
name = "test_resnet"
random_init = 0
input_size = 32
[finetune]
epochs = 1
"""


def manifest(root: Path, folder: Path, patients: int = 9) -> Path:
    """Write a manifest of a folder's images with a column of patients, each with images of all classes."""
    path = root / "list.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "patient"])
        for image in sorted(folder.glob("*/*.png")):
            writer.writerow([image, image.parent.name, f"p{int(image.stem) % patients}"])
    return path


def parted_groups(record: RunRecord) -> set[int]:
    """Return how many images each group of a record's test split has."""
    return set(Counter(record.test_groups).values()) if record.test_groups else set()


# groups and copies


def test_finetune_keeps_groups_on_one_side(subtle: Path, tiny: BackboneSpec, settings: Settings, tmp_path: Path) -> None:
    """Patients are whole in the test split of probe and fine-tuning; it is another experiment, and its record says so."""
    source = open_dataset(manifest(tmp_path, subtle))
    workbench = FeatureCache(source, tiny, settings)

    grouped = run_finetune(FineTuneInputs(workbench, group="patient"), replace(PLAN, epochs=1)).record
    plain = run_finetune(FineTuneInputs(workbench), replace(PLAN, epochs=1)).record

    assert grouped.test_groups is not None
    assert len(grouped.test_groups) == grouped.split["test"] == len(grouped.right)
    assert parted_groups(grouped) <= {6, 9}  # two or three images of each class
    assert grouped.request["group"] == "patient"
    assert plain.test_groups is None
    assert "group" not in plain.request
    assert grouped.cell != plain.cell


@pytest.mark.parametrize("command", ["fit", "finetune", "gap"])
def test_groups_that_are_not_told_are_refused_before_anything_is_extracted(run: Run, folder: Path, command: str) -> None:
    """A folder has no columns: the flag is named, and no image was looked at for it."""
    outcome = run(command, folder, *TINY, "--group", "patient")

    assert outcome.code == 3
    assert "--group patient" in outcome.err
    assert "to compute" not in outcome.err


def test_groups_from_the_command_line(run: Run, subtle: Path, tmp_path: Path) -> None:
    """``finetune --group`` and ``fit --group`` test the same patients; an image without a value is an error."""
    path = manifest(tmp_path, subtle)

    tuned = run("finetune", path, *TINY, "--group", "patient", "--epochs", "1", "--lr", "1e-3", "--json")
    fitted = run("fit", path, *TINY, "--group", "patient", "--no-baselines", "--json")
    records = read_records([tmp_path / "cache" / "records" / "runs.jsonl"])
    path.write_text(path.read_text().replace("a/00.png,a,p0", "a/00.png,a,"))
    blank = run("finetune", path, *TINY, "--group", "patient", "--epochs", "1", "--lr", "1e-3")

    assert tuned.code == fitted.code == 0
    assert tuned.json["probe"]["of"] == ["ridge", "knn", "logistic"]
    assert len({record.test_items for record in records}) == 1
    assert all(record.test_groups for record in records)
    assert blank.code == 3
    assert "--group patient" in blank.err
    assert "line 2 has none" in blank.err


def test_a_grid_takes_groups(subtle: Path, settings: Settings, tmp_path: Path) -> None:
    """Of a data set, or of the whole file; without one it is another experiment."""
    path = tmp_path / "grid.toml"
    manifest(tmp_path, subtle)
    text = 'heads = ["ridge"]\nunfreeze = ["last:1"]\n{top}\n[[dataset]]\ndata = "{data}"\n{own}\n' + TOML_BACKBONE

    def ran(top: str, own: str) -> list[RunRecord]:
        path.write_text(text.format(top=top, own=own, data=tmp_path / "list.csv"))
        result = run_bench(load_grid(path), settings, tmp_path / "out")
        assert not result.failures
        return list(result.records)

    own, whole, none = ran("", 'group = "patient"'), ran('group = "patient"', ""), ran("", "")

    assert own == whole
    assert all(record.test_groups and record.request["group"] == "patient" for record in own)
    assert not {record.cell for record in own} & {record.cell for record in none}
    assert all(record.test_groups is None for record in none)
    path.write_text(text.format(top="group = 3", own="", data="x"))
    with pytest.raises(UsageError, match="group: 3: a text is needed"):
        load_grid(path)


def test_a_manifest_in_another_order_gives_the_same_numbers(run: Run, subtle: Path, tmp_path: Path) -> None:
    """Lines shuffled: the same test images, accuracy and choice."""
    path = manifest(tmp_path, subtle)
    head, *lines = path.read_text().splitlines()
    found = []
    for _ in range(2):
        found.append(run("fit", path, *TINY, "--head", "knn", "--no-baselines", "--json").json["heads"][0])
        path.write_text("\n".join([head, *np.random.default_rng(0).permutation(lines).tolist()]) + "\n")

    for name in ("best_params", "confusion"):
        assert found[0][name] == found[1][name]


def test_copies_do_not_teach_the_test(run: Run, tmp_path: Path) -> None:
    """Random pictures of random labels, each four times: what is drawn is near chance, and four equal answers are one."""
    for number, name in enumerate("ab"):
        for index in range(20):
            draw_image(tmp_path / "data" / name / f"{index}.png", (110, 110, 110), 100 * number + index)
            for copy in range(3):
                shutil.copy(tmp_path / "data" / name / f"{index}.png", tmp_path / "data" / name / f"{index}_{copy}.png")

    found = run("fit", tmp_path / "data", *TINY, "--head", "knn", "--no-baselines", "--json")
    (record,) = read_records([tmp_path / "cache" / "records" / "runs.jsonl"])

    assert found.json["heads"][0]["test"]["accuracy"] < 0.9
    assert record.copies == {"copies": 120, "test_repeated": 24}
    assert Counter(Counter(record.test_groups or []).values()) == {4: 8}
    assert "24 of 32 test samples are copies of other test samples" in found.err


def test_copies_across_given_splits_are_said_and_recorded(run: Run, folder: Path, tmp_path: Path) -> None:
    """How many test images were seen, and how many labels contradict each other, is on stderr and in the record."""
    root = tmp_path / "data"
    for part in ("train", "test"):
        shutil.copytree(folder, root / part)
    for image in sorted((root / "test").glob("*/*.png"))[::2]:
        draw_image(image, (90, 90, 90), 99000 + int(image.stem) + 100 * ord(image.parent.name[0]))
    shutil.copy(root / "train" / "red" / "00.png", root / "train" / "blue" / "other.png")

    found = run("fit", root, *TINY, "--head", "ridge", "--no-baselines")
    (record,) = read_records([tmp_path / "cache" / "records" / "runs.jsonl"])

    assert "18 of 36 test samples are byte for byte training or validation samples too" in found.err
    assert "2 samples are byte for byte a sample with another label" in found.err
    assert record.copies["test_seen"] == 18
    assert record.copies["labels_differ"] == 2
    assert any("18 of 36" in note for note in record.notes)


# controls


def test_controls_scale_by_training_images_alone() -> None:
    """What one test image looks like changes no control's choice, nor its answers for the others."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [60, 40])
    thumbnails = np.clip(rng.normal(90 + 20 * y[:, None, None, None], 30, (100, 32, 32, 3)), 0, 255).astype(np.uint8)
    split = make_split(y, [""] * 100, ["dark", "light"])
    strange = thumbnails.copy()
    strange[split.test[0]] = np.tile([[0], [255]], (16, 32, 1, 3)).reshape(32, 32, 3)

    plain, other = baselines(thumbnails, y, split), baselines(strange, y, split)

    for one, two in zip(plain, other, strict=True):
        assert one.val == two.val
        np.testing.assert_array_equal(one.tested.predicted[1:], two.tested.predicted[1:])
    seen = standardised(statistics(thumbnails), split.train_val)[split.train_val]
    np.testing.assert_allclose(seen.mean(axis=0), 0, atol=1e-4)


def test_the_control_to_beat_is_the_best_on_validation() -> None:
    """The test split does not choose it."""
    features = blobs(3, count=20)
    split = make_split(features.y, features.splits, features.classes)
    good, bad = (controls_like(features.y, split, right) for right in (0.9, 0.4))

    lucky = replace(good, name="lucky", val=bad.val)

    assert best_on_validation([lucky, replace(bad, name="steady", val=good.val)]).name == "steady"


def controls_like(y: np.ndarray, split: Any, right: float) -> Baseline:
    """Return a control that answers such a share of the validation and test images rightly."""
    from featcache.evaluation.metrics import evaluate_on_test, score

    def answer(index: np.ndarray) -> np.ndarray:
        wrong = np.arange(len(index)) >= right * len(index)
        return np.where(wrong, (y[index] + 1) % 3, y[index])

    return Baseline("", score(y[split.val], answer(split.val)), evaluate_on_test(answer(split.test), y, split))


# the best probe, no gain, latest records


def test_the_gap_is_to_the_best_of_three_probes(subtle: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Ridge, nearest neighbours and logistic are fitted unasked; the best on validation is named, and the others."""
    workbench = FeatureCache(open_dataset(subtle), tiny, settings)
    fitted = run_fit(workbench, FitPlan(("ridge", "knn", "logistic"), baselines=False)).heads

    record = run_finetune(FineTuneInputs(workbench), GAINS).record

    assert record.probe is not None
    assert record.gap is not None
    best = max(fitted, key=lambda job: (job.record.val["accuracy"], job.record.method == "logistic"))
    assert record.probe["of"] == ["ridge", "knn", "logistic"]
    assert record.probe["head"] == best.record.method
    assert record.probe["start"] == "logistic"
    between = 100 * (record.test["accuracy"] - best.record.test["accuracy"])
    assert record.gap["points"] == pytest.approx(between)


def test_no_gain_is_said_everywhere(run: Run, folder: Path) -> None:
    """A rate that ruins the network beats no start: in the sentence and in JSON there is no gap."""
    options = ("finetune", folder, *TINY, "--epochs", "1", "--lr", "30", "--head-lr", "30")
    told, plain = run(*options, "--json"), run(*options)

    assert told.json["gap"] is None
    assert told.json["gained"] is False
    assert "no gain on validation" in " ".join(told.json["notes"])
    assert "no gain on validation: no epoch did better" in plain.out
    assert "no gain" not in plain.err  # once is enough
    assert "gap of" not in plain.out + plain.err


# what is fitted and what is left out


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each head is fitted."""
    from featcache.heads import search as stage

    done: Counter[str] = Counter()
    whole = stage.fit

    def noted(*arguments: Any, **named: Any) -> Any:
        done[arguments[2]] += 1
        return whole(*arguments, **named)

    monkeypatch.setattr(stage, "fit", noted)
    return done


def test_an_ensemble_has_one_row_and_nothing_is_fitted_twice(
    folder: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its members that the grid does not name leave no record; fine-tuning takes the heads that the grid has fitted."""
    path = tmp_path / "grid.toml"
    path.write_text(
        f'heads = ["logistic", "ensemble"]\nunfreeze = ["last:1"]\n[[dataset]]\ndata = "{folder}"\n{TOML_BACKBONE}'
    )
    done = counted(monkeypatch)

    first = run_bench(load_grid(path), settings, tmp_path / "out")
    once = Counter(done)
    second = run_bench(load_grid(path), settings, tmp_path / "out")

    assert not first.failures
    assert [row[2] for row in rows(first.records)] == ["logistic", "ensemble", "last:1"]
    assert len(read_records([tmp_path / "out" / "grid.jsonl"])) == 3
    assert once == {"logistic": 1, "knn": 1, "lda": 1, "rbf": 1, "ridge": 1}
    assert done == once
    assert second.computed_cells == 0


def test_all_heads_have_a_row_each(
    folder: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run fits nothing; a cell is named after its head, as if each had been asked for."""
    few = {name: heads.PARAMETERS[name] for name in ("centroid", "ridge", "knn", "logistic")}
    monkeypatch.setattr(heads, "PARAMETERS", few)
    path = tmp_path / "grid.toml"
    text = 'heads = {heads}\n[[dataset]]\ndata = "{data}"\n' + TOML_BACKBONE
    done = counted(monkeypatch)

    def ran(names: str) -> bench.BenchResult:
        path.write_text(text.format(heads=names, data=folder))
        return run_bench(load_grid(path), settings, tmp_path / "out")

    first, second, named = ran('["all"]'), ran('["all"]'), ran('["ridge", "centroid"]')

    assert [row[2] for row in rows(first.records)] == [*few, "ensemble"]
    assert (first.computed_cells, second.computed_cells, named.computed_cells) == (5, 0, 0)
    assert done == dict.fromkeys(few, 1)
    assert len(read_records([tmp_path / "out" / "grid.jsonl"])) == 5


def test_an_image_without_activations_is_left_out_of_both(
    subtle: Path, settings: Settings, tiny: BackboneSpec, tmp_path: Path
) -> None:
    """One overflows float16 at the cut: the gap is taken on the others, which is said, and the grid knows its cell again."""
    bare = FeatureCache(open_dataset(subtle), tiny, settings)
    largest = np.abs(bare.extracted("layer3", "float32").store.features().X.reshape(60, -1)).max(axis=1)
    second, first = np.sort(largest)[-2:]
    weights = load_backbone(tiny).module.state_dict()
    weights["bn1.weight"] = weights["bn1.weight"] * float(65504 / np.sqrt(first * second))
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "w.safetensors")
    spec = replace(tiny, random_init=None, weights=str(tmp_path / "w.safetensors"))
    workbench = FeatureCache(open_dataset(subtle), spec, replace(settings, max_bad=0.1))
    probe = run_fit(workbench, FitPlan(("ridge",), baselines=False)).heads[0].record

    record = run_finetune(FineTuneInputs(workbench), replace(PLAN, epochs=1, dtype=None)).record

    assert sum(record.split.values()) == 59
    assert sum(probe.split.values()) == 60
    assert any("1 samples have no activations at layer3 and are left out" in note for note in record.notes)
    path = tmp_path / "grid.toml"
    path.write_text(
        f'unfreeze = ["last:1"]\n[[dataset]]\ndata = "{subtle}"\n[[backbone]]\nname = "test_resnet"\n'
        f'weights = "{tmp_path / "w.safetensors"}"\ninput_size = 32\n[finetune]\nepochs = 1\n'
    )
    runs = [run_bench(load_grid(path), replace(settings, max_bad=0.1), tmp_path / "out") for _ in range(2)]
    assert [len(one.records) for one in runs] == [1, 1]
    assert [one.computed_cells for one in runs] == [1, 0]


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (FitPlan(target="labels", shots=(1,)), "`shots` are samples a class, and for `target` labels"),
        (FitPlan(target="number", grid=(("k", (1,)),)), "`grid` is of one head, not of ridge, knn"),
        (FitPlan(("mlp",), target="number"), "`heads` mlp: for `target` number choose from ridge, knn"),
        (FitPlan(("knn",), target="labels"), "`heads` knn: for `target` labels choose from logistic"),
    ],
)
def test_what_other_targets_do_not_take_is_refused(folder: Path, settings: Settings, plan: FitPlan, match: str) -> None:
    """By its name, before anything is computed."""
    workbench = FeatureCache(open_dataset(folder), BackboneSpec("test_resnet", random_init=0), settings)

    with pytest.raises(UsageError, match=match):
        run_fit(workbench, plan)
    assert not settings.cache.exists()


def test_a_budget_holds_for_numbers_too(tmp_path: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """After the first head no further one is begun."""
    lines = ["path,label"]
    for index in range(30):
        draw_image(tmp_path / f"{index}.png", (60 + 5 * index, 100, 100), index)
        lines.append(f"{index}.png,{index}")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    workbench = FeatureCache(open_dataset(tmp_path / "list.csv"), tiny, settings)

    done = run_fit(workbench, FitPlan(target="number", budget=0.0))

    assert [job.fitted.name for job in done.heads] == ["ridge"]


def test_probes_that_need_memory_are_left_out_where_there_is_none(
    folder: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The gap is then to the best of those that read from disk, and that is said."""
    monkeypatch.setattr(jobs, "free_memory", lambda: 1000.0)

    record = run_finetune(FineTuneInputs(FeatureCache(open_dataset(folder), tiny, settings)), replace(PLAN, epochs=1)).record

    assert record.probe is not None
    assert record.probe["of"] == ["ridge", "logistic"]
    assert "the gap is to the best of ridge, logistic alone" in caplog.text


def test_a_probe_that_did_not_converge_is_no_start(
    folder: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fine-tuning ends with an error instead of starting from it."""
    workbench = FeatureCache(open_dataset(folder), tiny, settings)
    run_fit(workbench, FitPlan(jobs.PROBES, baselines=False))
    family = search.HEADS["logistic"]
    short = replace(family, fit=lambda *arguments: (family.fit(*arguments)[0], False))
    monkeypatch.setitem(search.HEADS, "logistic", short)  # type: ignore[arg-type]  # a dict, whatever its annotation says

    with pytest.raises(DataError, match="did not reach its optimum"):
        run_finetune(FineTuneInputs(workbench), PLAN)
