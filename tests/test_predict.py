"""From a trained head to labels of new images, and to one ONNX model that says the same."""

import csv
import gc
import io
import itertools
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import TINY, Run, draw_image

from featcache.backbones.timm_models import load_backbone
from featcache.datasets.decoding import decode
from featcache.evaluation.metrics import at_temperature
from featcache.experiments import predict as predicting
from featcache.experiments.predict import label_samples
from featcache.extraction.feature_cache import Settings
from featcache.heads import bundle
from featcache.specs import BackboneSpec, Transform
from featcache.store.entry import FeatureStore


@pytest.fixture
def fit(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Train a head on the folder and return its file."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))

    def train(name: str) -> Path:
        return Path(run("fit", folder, *TINY, "--head", name, "--no-baselines", "--json").json["heads"][-1]["bundle"])

    return train


def test_predictions_are_the_heads(run: Run, fit: Callable[[str], Path], folder: Path, tmp_path: Path) -> None:
    """A row an image, in the order given; copies are answered too; a broken image says why."""
    head = fit("logistic")
    (tmp_path / "broken.png").write_bytes(b"no image")
    copy = tmp_path / "copy.png"
    copy.write_bytes((folder / "red" / "00.png").read_bytes())

    done = run("predict", head, copy, tmp_path / "broken.png", folder)

    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert done.code == 0
    assert [row["path"] for row in rows[:2]] == [str(copy), str(tmp_path / "broken.png")]
    assert len(rows) == 38
    assert rows[1]["label"] == ""
    assert rows[1]["reason"] == "not an image file"
    of_path = {row["path"]: row for row in rows}
    original = of_path[str(folder / "red" / "00.png")]
    assert [rows[0][name] for name in ("label", "red", "green", "blue")] == [
        original[name] for name in ("label", "red", "green", "blue")
    ]
    right = [Path(row["path"]).parent.name == row["label"] for row in rows[2:]]
    assert np.mean(right) > 0.6
    assert float(original["red"]) + float(original["green"]) + float(original["blue"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", ["knn", "logistic", "ensemble"])
def test_probabilities_are_scaled(name: str, fit: Callable[[str], Path], folder: Path, settings: Settings) -> None:
    """They are the estimator's at the head's temperature; the label is the estimator's; older cards scale nothing."""
    loaded = bundle.load(fit(name))
    paths = [str(path) for path in sorted(folder.rglob("*.png"))]
    features = FeatureStore.open(loaded.path.parent.parent).features()
    X = features.X[[features.paths.index(str(Path(path).relative_to(folder))) for path in paths]]
    older = replace(loaded, card={key: value for key, value in loaded.card.items() if key != "scaled_by"})

    scaled, plain = (list(label_samples(one, paths, settings)) for one in (loaded, older))

    expected = loaded.estimator.predict_proba(X)
    np.testing.assert_allclose([one.probabilities for one in plain], expected, atol=1e-4)
    temperature = loaded.card["scaled_by"]
    assert temperature != pytest.approx(1, abs=0.01)
    np.testing.assert_allclose([one.probabilities for one in scaled], at_temperature(expected, temperature), atol=1e-4)
    labels = [loaded.classes[number] for number in loaded.estimator.predict(X)]
    assert [one.label for one in scaled] == [one.label for one in plain] == labels


def test_answers_are_forgotten_once_given(
    fit: Callable[[str], Path], folder: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many images there are, only so many at a time are held; copies and paths given twice are answered alike."""
    loaded = bundle.load(fit("ridge"))
    paths = [str(path) for path in sorted(folder.rglob("*.png"))]
    (folder / "copy.png").write_bytes(Path(paths[0]).read_bytes())
    paths = [*paths, str(folder / "copy.png"), *paths[:4]]
    whole = [(one.path, one.label) for one in label_samples(loaded, paths, settings)]
    monkeypatch.setattr(predicting, "_AT_ONCE", 4)

    answers = label_samples(loaded, paths, settings)
    first = weakref.ref(next(answers))
    found = [(one.path, one.label) for one in itertools.islice(answers, 8)]
    gc.collect()

    assert first() is None
    assert [whole[0], *found, *((one.path, one.label) for one in answers)] == whole
    assert [path for path, _ in whole] == paths


def test_a_list_on_stdin(run: Run, fit: Callable[[str], Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``-`` reads paths; ``--json`` gives one object a line; a head without probabilities gives labels alone."""
    head = fit("ridge")
    paths = [str(folder / "red" / "01.png"), str(folder / "blue" / "01.png")]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(paths) + "\n"))

    done = run("predict", head, "-", "--json")

    said = [json.loads(line) for line in done.out.splitlines()]
    assert [one["path"] for one in said] == paths
    assert all(one["label"] in {"red", "green", "blue"} and one["probabilities"] is None for one in said)


def test_a_path_that_is_not_there(run: Run, fit: Callable[[str], Path]) -> None:
    """It is named, before anything is computed."""
    done = run("predict", fit("ridge"), "nowhere.png")

    assert done.code == 3
    assert "nowhere.png" in done.err


@pytest.mark.parametrize("name", ["centroid", "logistic", "ridge", "svm", "lda", "knn", "mlp", "rbf", "ensemble"])
def test_an_exported_model_says_the_same(
    name: str, run: Run, fit: Callable[[str], Path], folder: Path, tmp_path: Path
) -> None:
    """Backbone and head as one file: the same scores on images, one at a time or several, to 1e-4."""
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    head = fit(name)

    done = run("export", head, tmp_path / "model.onnx", "--json")

    assert done.code == 0, done.err
    assert done.json["difference"] <= 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    facts = {one.key: json.loads(one.value) for one in onnx.load(str(tmp_path / "model.onnx")).metadata_props}
    transform = facts["transform"]
    three = {key: tuple(transform[key]) for key in ("mean", "std")}
    paths = sorted(folder.rglob("*.png"))[:5]
    pixels = np.concatenate([decode(path.read_bytes(), Transform(**(transform | three))) for path in paths])
    together = session.run(None, {"pixels": pixels})[0]
    alone = np.concatenate([session.run(None, {"pixels": one[None]})[0] for one in pixels])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    said = list(csv.DictReader(io.StringIO(run("predict", head, *paths).out)))
    assert [facts["classes"][index] for index in together.argmax(1)] == [row["label"] for row in said]
    if "red" in said[0]:
        expected = [[float(row[label]) for label in facts["classes"]] for row in said]
        np.testing.assert_allclose(together, expected, atol=1e-4)


def test_trees_cannot_be_exported(run: Run, fit: Callable[[str], Path], tmp_path: Path) -> None:
    """The message says which heads can."""
    done = run("export", fit("boosting"), tmp_path / "model.onnx")

    assert done.code == 2
    assert "logistic" in done.err
    assert not (tmp_path / "model.onnx").exists()


def test_groups_stay_together(run: Run, folder: Path) -> None:
    """A manifest's column keeps its values in one part; few shots are drawn and said."""
    manifest = folder / "images.csv"
    lines = ["path,label,patient"]
    for number in range(40):
        for label, colour in (("red", (200, 50, 40)), ("blue", (30, 40, 200))):
            path = folder / "more" / f"{label}{number}.png"
            draw_image(path, colour, 7000 + 100 * number + len(label))
            lines.append(f"more/{path.name},{label},p{number // 4}")
    manifest.write_text("\n".join(lines) + "\n")

    done = run("fit", manifest, *TINY, "--group", "patient", "--shots", "1,4", "--no-baselines", "--json")

    assert done.code == 0, done.err
    assert [point["images"] for point in done.json["curves"][0]["points"]] == [2, 8]
    assert run("fit", manifest, *TINY, "--group", "site").code == 3


@pytest.mark.parametrize("target", ["labels", "number"])
def test_other_targets(target: str, run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several labels an image, or a number, from a manifest's label column to predictions."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    lines = ["path,label"]
    for number in range(60):
        red, blue = number % 2, number % 3 == 0
        path = folder / "more" / f"{number}.png"
        draw_image(path, (200 * red, 60, 200 * blue), 9000 + number)
        labels = ";".join(["any", *["red"] * red, *["blue"] * blue])
        lines.append(f"more/{path.name},{labels if target == 'labels' else 2.5 * red - blue}")
    manifest = folder / "images.csv"
    manifest.write_text("\n".join(lines) + "\n")

    done = run("fit", manifest, *TINY, "--target", target, "--json")

    assert done.code == 0, done.err
    best = done.json["heads"][0]
    if target == "labels":
        assert best["test"]["mean_average_precision"] > 0.8
        assert best["test"]["mean_average_precision_ci"] is None  # 12 test images tell too little
    else:
        assert [head["head"] for head in done.json["heads"]] == ["ridge", "knn"]
        assert best["test"]["r2"] > 0.3
    said = list(csv.DictReader(io.StringIO(run("predict", best["bundle"], folder / "more" / "1.png").out)))
    assert "red" in said[0]["label"] if target == "labels" else float(said[0]["label"]) > 1


def test_labels_that_are_no_numbers(run: Run, folder: Path) -> None:
    """The label is named."""
    done = run("fit", folder, *TINY, "--target", "number")

    assert done.code == 3
    assert "'blue' is no number" in done.err


def test_layers_and_views(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head on several layers, trained on views, predicts from files as any other."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    names = [stage.name for stage in load_backbone(BackboneSpec("test_resnet", random_init=0)).stages[-2:]]

    done = run("fit", folder, *TINY, "--layers", ",".join(names), "--views", "2", "--no-baselines", "--json")

    assert done.code == 0, done.err
    assert done.json["extract"]["cut"] == "+".join(names)
    assert done.json["heads"][0]["head"] == f"logistic on {'+'.join(names)} 2 views"
    assert run("predict", done.json["heads"][0]["bundle"], folder / "red" / "00.png").code == 0


def test_an_exported_model_looks_at_one_view(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers are not those of a head that averages several: that is said."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    fitted = run("fit", folder, *TINY, "--views", "2", "--no-baselines", "--json").json["heads"][0]["bundle"]

    done = run("export", fitted, tmp_path / "model.onnx", "--json")

    assert done.code == 0, done.err
    assert "averages its answers over 2 views" in done.err
    assert "averages its answers over 2 views" in done.json["notes"][0]


@pytest.mark.parametrize("good", [0, 1, 8, 9])
def test_copies_of_broken_images_are_answered_too(
    run: Run, fit: Callable[[str], Path], folder: Path, tmp_path: Path, good: int
) -> None:
    """However images fall into batches, every path has its row: broken ones, their copies, and those behind them."""
    head = fit("ridge")
    several = sorted(folder.rglob("*.png"))[:good]
    broken = [tmp_path / f"broken{number}.png" for number in range(3)]
    for path in broken:
        path.write_bytes(b"no image")
    again = [tmp_path / f"again{number}.png" for number in range(min(1, good))]
    for path in again:
        path.write_bytes(several[0].read_bytes())
    paths = [*broken[:2], *several, *again, broken[2]]

    done = run("predict", head, *paths, *TINY[-2:])

    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert done.code == 0, done.err
    assert [row["path"] for row in rows] == list(map(str, paths))
    of_path = {row["path"]: row for row in rows}
    assert [of_path[str(path)]["reason"] for path in broken] == ["not an image file"] * 3
    assert all(of_path[str(path)]["label"] for path in (*several, *again))


def test_an_iterator_that_is_left_ends_with_the_interpreter(fit: Callable[[str], Path], folder: Path) -> None:
    """Threads that still compute when Python ends are waited for: they would abort it."""
    script = (
        "import featcache\n"
        f"_, images = featcache.predict({str(fit('ridge'))!r}, [{str(folder)!r}])\n"
        "print(next(images).label)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() in {"blue", "green", "red"}


def test_nothing_to_label_is_an_error(run: Run, fit: Callable[[str], Path], tmp_path: Path) -> None:
    """A folder without images is most often a mistyped one."""
    (tmp_path / "none").mkdir()

    assert "there is no image to label" in run("predict", fit("ridge"), tmp_path / "none").err
