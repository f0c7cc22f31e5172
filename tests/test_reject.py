"""When a head says that it does not know: sets keep their promise, far images are unfamiliar, errors say what to do."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf_shrinkage
from support import TINY, Run, draw_folder, draw_image

from featcache.datasets.decoding import ImagePreprocess
from featcache.errors import DataError, UsageError
from featcache.evaluation import Task
from featcache.evaluation.metrics import at_temperature
from featcache.extraction.feature_cache import FeatureCache
from featcache.fingerprint import sha256_of_bytes
from featcache.heads import bundle
from featcache.heads.checks import auc
from featcache.heads.rejection import (
    Calibration,
    ClassCentres,
    Neighbours,
    Rejection,
    RejectPlan,
    SetScore,
    TrainingRows,
    _towards_sphere,
    all_scores,
    draws_of,
    fewest_units,
    read_familiar,
)
from featcache.heads.search import fit, predict_with
from featcache.specs import Transform, Views
from featcache.store import Features


def drawn_answers(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return classes (n,), and probabilities (n, 4) that are too sure of themselves."""
    logits = rng.normal(size=(n, 4))
    y = np.array([rng.choice(4, p=row) for row in at_temperature(np.exp(logits), 1.0)])
    return y, at_temperature(np.exp(logits), 0.4)


def calibrated(rng: np.random.Generator, n: int) -> Calibration:
    """Return the calibration by ``n`` images, each its own unit."""
    y, answers = drawn_answers(rng, n)
    return Calibration.of(y, answers, [f"{rng.integers(1 << 62):064x}" for _ in range(n)], np.arange(n))


@pytest.mark.parametrize("kind", ["lac", "aps"])
@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_sets_hold_the_true_class_as_often_as_stated(kind: SetScore, coverage: float) -> None:
    """Over many calibrations coverage is the stated one, at most 1 / (n + 1) more, however wrong probabilities are."""
    rng, n, hits = np.random.default_rng(0), 60, []
    for _ in range(300):
        threshold = calibrated(rng, n).threshold(kind, coverage)
        y, answers = drawn_answers(rng, 50)
        hits.append((all_scores(answers, kind, rng.random(50))[np.arange(50), y] <= threshold).mean())

    error = 3 * np.std(hits) / np.sqrt(len(hits))
    assert coverage - error <= np.mean(hits) <= coverage + 1 / (n + 1) + error


def test_a_threshold_is_the_right_order_statistic() -> None:
    """Of 19 images, at 90 %, the 18th score: ceil(20 x 0.9)."""
    scores = np.random.default_rng(0).permutation(np.arange(1.0, 20))
    calibration = Calibration(scores, scores, np.arange(19), np.empty(0, np.int64))

    assert calibration.threshold("lac", 0.9) == 18
    assert calibration.threshold("lac", 0.5) == 10


def test_an_image_that_was_copied_counts_once() -> None:
    """Copies of a calibration image change no threshold; taken for different images they would."""
    rng = np.random.default_rng(0)
    scores, units = rng.random(40), np.arange(40)
    often = np.concatenate([units, np.full(200, scores.argmax())])

    plain = Calibration(scores, scores, units, np.empty(0, np.int64))
    copied = Calibration(scores[often], scores[often], often, np.empty(0, np.int64))

    assert copied.threshold("lac", 0.9) == plain.threshold("lac", 0.9)
    assert replace(copied, units=np.arange(len(often))).threshold("lac", 0.9) > plain.threshold("lac", 0.9)


def test_images_of_new_groups_are_covered() -> None:
    """Sets of images of a new group hold the true class as often as stated; thresholds by image would not."""
    rng, hits, naive = np.random.default_rng(1), [], []
    for _ in range(600):
        hard = rng.random(30) < 0.3
        sizes = np.where(hard, 2, 40)
        units = np.repeat(np.arange(30), sizes)
        scores = rng.random(len(units)) + 2.0 * hard[units]
        calibration = Calibration(scores, scores, units, np.empty(0, np.int64))
        new = rng.random() + 2.0 * (rng.random() < 0.3)
        hits.append(new <= calibration.threshold("lac", 0.9))
        naive.append(new <= replace(calibration, units=np.arange(len(units))).threshold("lac", 0.9))

    assert np.mean(hits) >= 0.9 - 3 * 0.3 / np.sqrt(600)
    assert np.mean(naive) < 0.8


def test_a_group_has_its_own_threshold() -> None:
    """Asked of one group, only its images count."""
    scores = np.concatenate([np.arange(1.0, 20), 100 + np.arange(1.0, 20)])
    calibration = Calibration(scores, scores, np.arange(38), np.repeat([0, 1], 19), ("north", "south"))

    assert calibration.threshold("lac", 0.9, "north") == 18
    assert calibration.threshold("lac", 0.9, "south") == 118
    with pytest.raises(UsageError, match="no such group"):
        calibration.threshold("lac", 0.9, "west")


@pytest.mark.parametrize(("coverage", "fewest"), [(0.5, 1), (0.9, 9), (0.95, 19)])
def test_too_little_to_calibrate_by_is_an_error(coverage: float, fewest: int) -> None:
    """With fewer images than a threshold needs no set is made that would be of no use."""
    assert fewest_units(coverage) == fewest
    few = calibrated(np.random.default_rng(0), fewest)
    assert np.isfinite(few.threshold("lac", coverage))
    few = Calibration(few.lac[1:], few.aps[1:], few.units[1:], few.members)

    with pytest.raises(UsageError, match="ask for less coverage"):
        few.threshold("lac", coverage)


def test_draws_are_uniform_and_the_same_again() -> None:
    """What APS draws of an image follows its content alone."""
    contents = [f"{value:064x}" for value in np.random.default_rng(0).integers(1 << 62, size=4000)]
    draws = draws_of(contents)

    assert draws_of(contents[::-1])[::-1].tolist() == draws.tolist()
    assert np.abs(np.quantile(draws, [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.03


def blobs(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings (n, 20) of three classes, and the classes."""
    y = np.arange(n) % 3
    return (3 * np.eye(20)[y] + rng.normal(0, 0.7, (n, 20))).astype(np.float32), y


@pytest.mark.parametrize("kind", [Neighbours, ClassCentres])
def test_familiarity_is_a_p_value_for_images_like_those_of_training(kind: type[Neighbours] | type[ClassCentres]) -> None:
    """New images of the same classes are called unfamiliar as often as 5 %, far ones always."""
    rng = np.random.default_rng(0)
    X, y = blobs(rng, 300)
    neighbours = kind.fitted(TrainingRows.of(X, y, np.arange(300)))

    alike = neighbours.shares(blobs(rng, 3000)[0])
    far = neighbours.shares((-12 * np.eye(20)[5] + rng.normal(0, 1, (50, 20))).astype(np.float32))

    assert 0.03 <= (alike <= 0.05).mean() <= 0.07
    assert abs(alike.mean() - 0.5) < 0.05
    assert (far <= 0.05).mean() > 0.9


def test_leaving_out_needs_no_second_fit() -> None:
    """What each neighbour gets without its unit is what a fit without that unit gives it."""
    X, y = blobs(np.random.default_rng(0), 60)
    units = np.arange(60) // 2
    neighbours = Neighbours.fitted(TrainingRows.of(X, y, units))

    alone = []
    for unit in range(30):
        others = Neighbours.fitted(TrainingRows.of(X[units != unit], y[units != unit], np.arange(58)))
        others = replace(others, mean=neighbours.mean)  # the mean is of all
        rest = replace(neighbours, rows=neighbours.rows[units != unit])
        votes = np.linalg.solve(
            np.exp(2 * (rest.rows.astype(float) @ rest.rows.astype(float).T - 1)) + 0.1 * np.eye(58),
            np.eye(3)[y[units != unit]],
        )
        alone += replace(rest, votes=votes.astype(np.float32)).familiarity(X[units == unit]).tolist()

    np.testing.assert_allclose(neighbours.usual, np.sort(alone), atol=5e-3)


def test_centres_tell_a_class_that_was_left_out() -> None:
    """Among directions in which all classes scatter widely, an unknown class that lies apart in others is told."""
    rng = np.random.default_rng(0)
    y = np.arange(600) % 6
    scatter = np.r_[np.full(10, 0.4), np.full(30, 2.0)]
    X = (2 * np.eye(40)[y] + rng.normal(0, 1, (600, 40)) * scatter).astype(np.float32)
    is_new = y == 5
    training = TrainingRows.of(X[~is_new][:300], y[~is_new][:300], np.arange(300))

    asked, unknown = X[300:], is_new[300:]
    areas = [auc(unknown, -kind.fitted(training).familiarity(asked))[0] for kind in (ClassCentres, Neighbours)]

    assert isinstance(training.familiar, ClassCentres)
    assert areas[0] > 0.9
    assert areas[0] > areas[1]


@pytest.mark.parametrize("kind", [Neighbours, ClassCentres])
def test_every_layer_counts_however_large_its_activations_are(kind: type[Neighbours] | type[ClassCentres]) -> None:
    """A layer that says nothing, a thousand times as large, hides no class that another one tells."""
    rng = np.random.default_rng(0)
    y = np.arange(600) % 6
    telling = 2 * np.eye(20)[y] + rng.normal(0, 0.4, (600, 20))
    X = np.concatenate([1000 * rng.normal(0, 1, (600, 30)), telling], axis=1).astype(np.float32)
    train, asked, is_new = np.flatnonzero(y[:300] < 5), X[300:], y[300:] == 5

    def area(widths: tuple[int, ...]) -> float:
        return auc(is_new, -kind.fitted(TrainingRows.of(X[train], y[train], train, widths)).familiarity(asked))[0]

    assert area((30, 20)) > 0.9
    assert area(()) < 0.7


@pytest.mark.parametrize("dims", [8, 200])
def test_classes_of_copies_lie_apart_all_the_same(dims: int) -> None:
    """Where every class is one row many times nothing scatters: what lies elsewhere is less familiar."""
    rng = np.random.default_rng(0)
    rows, y = rng.normal(0, 1, (5, dims)).astype(np.float32), np.arange(60) % 4
    familiar = TrainingRows.of(rows[y], y, np.arange(60)).familiar
    told = familiar.familiarity(rows)

    assert isinstance(familiar, ClassCentres)
    assert np.isfinite(familiar.usual).all()
    assert told[:4].min() > told[4]


@pytest.mark.parametrize("n", [30, 400])
def test_shrinkage_is_that_of_ledoit_and_wolf(n: int) -> None:
    """From the scatter that is there, what scikit-learn works out from the rows at forty times the price."""
    X = (np.random.default_rng(0).normal(size=(n, 60)) * np.logspace(0, -2, 60)).astype(np.float32)

    assert _towards_sphere(X, X.T @ X / n) == pytest.approx(ledoit_wolf_shrinkage(X, assume_centered=True), rel=1e-4)


def test_few_classes_or_rows_are_told_by_votes() -> None:
    """Two classes, and rows too few for the scatter within classes, have votes instead of centres."""
    X, y = blobs(np.random.default_rng(0), 60)

    two = TrainingRows.of(X[y < 2], y[y < 2], np.arange(40))
    few = TrainingRows.of(X[:9], y[:9], np.arange(9))

    assert isinstance(two.familiar, Neighbours)
    assert isinstance(few.familiar, Neighbours)


def test_votes_that_were_kept_say_what_they_said(tmp_path: Path) -> None:
    """A file of before, with votes worked out, is read as it is."""
    X, y = blobs(np.random.default_rng(0), 90)
    votes = Neighbours.fitted(TrainingRows.of(X, y, np.arange(90)))
    np.savez(tmp_path / "neighbours-of-before.npz", **vars(votes))
    content = (tmp_path / "neighbours-of-before.npz").read_bytes()
    facts = {"file": "neighbours-of-before.npz", "sha256": sha256_of_bytes(content)}

    familiar = read_familiar(tmp_path / "logistic.skops", facts)

    assert isinstance(familiar, Neighbours)
    np.testing.assert_array_equal(familiar.shares(X), votes.shares(X))


def test_a_drawn_val_split_calibrates_out_of_fold() -> None:
    """Where a small val split was drawn all of train and val calibrate, out of fold; a given one is taken as it is."""
    rng = np.random.default_rng(0)
    n = 1500
    X, y = blobs(rng, n)
    paths = [str(number) for number in range(n)]
    contents = [f"{value:064x}" for value in rng.integers(1 << 62, size=n)]
    features = Features(X, y.astype(np.int64), ("a", "b", "c"), paths, [""] * n, contents)
    drawn, split = Task(features), Task(features).split(0)
    given = Task(replace(features, splits=["val" if number in set(split.val.tolist()) else "" for number in range(n)]))

    fitted, fitted_given = fit(drawn, split, "logistic"), fit(given, given.split(0), "logistic")

    assert fitted.unseen is not None
    assert fitted_given.unseen is not None
    assert sorted(fitted.unseen.samples.tolist()) == split.train_val.tolist()
    assert sorted(fitted_given.unseen.samples.tolist()) == sorted(split.val.tolist())
    seen = predict_with(fitted.estimator, X[fitted.unseen.samples], "label", 3)
    truth = y[fitted.unseen.samples]
    assert fitted.unseen.answers[np.arange(len(truth)), truth].mean() < seen[np.arange(len(truth)), truth].mean()


@pytest.fixture
def head(tmp_path: Path, run: Run) -> Path:
    """A logistic head on three colours, fitted by the command."""
    data = draw_folder(tmp_path / "photos", 20)
    told = run("fit", str(data), *TINY, "--no-baselines", "--json").json
    return Path(told["heads"][0]["bundle"])


def test_predict_says_what_it_does_not_know(head: Path, tmp_path: Path, run: Run) -> None:
    """With ``--reject`` each image has its set, how familiar it is and a verdict; without, output is as ever."""
    draw_image(tmp_path / "new" / "red.png", (200, 50, 40), 77)
    (tmp_path / "new" / "broken.png").write_bytes(b"no image")

    plain = run("predict", str(head), str(tmp_path / "new"))
    lines = run("predict", str(head), str(tmp_path / "new"), "--reject").out.splitlines()
    told = run("predict", str(head), str(tmp_path / "new"), "--reject", "--sets", "aps", "--json").out.splitlines()

    assert plain.out.splitlines()[0] == "path,label,blue,green,red,reason"
    assert lines[0] == "path,label,blue,green,red,set,familiar,verdict,reason"
    assert lines[1].split(",")[5:8] == ["", "", ""]
    _, label, *_, classes, familiar, verdict, _ = lines[2].split(",")
    assert verdict in {"sure", "unsure", "none", "unfamiliar"}
    assert 0 < float(familiar) <= 1
    assert (verdict != "sure") or classes == label
    assert json.loads(told[1])["verdict"] in {"sure", "unsure", "none", "unfamiliar"}
    assert isinstance(json.loads(told[1])["set"], list)


def test_options_of_reject_go_with_it(head: Path, tmp_path: Path, run: Run) -> None:
    """A coverage without ``--reject``, one that no set can have, and a group that was not there are errors of usage."""
    draw_image(tmp_path / "red.png", (200, 50, 40), 77)
    image = str(tmp_path / "red.png")

    assert "go with --reject" in run("predict", str(head), image, "--coverage", "0.8").err
    assert run("predict", str(head), image, "--reject", "--coverage", "1").code == 2
    assert "--of-group 'x'" in run("predict", str(head), image, "--reject", "--of-group", "x").err
    assert "--coverage 0.999: 999 samples" in run("predict", str(head), image, "--reject", "--coverage", "0.999").err


def test_a_head_of_before_is_calibrated_by_fitting_again(head: Path, tmp_path: Path, run: Run) -> None:
    """A card that says nothing of it is an error that names the remedy, and the remedy works."""
    loaded = bundle.load(head)
    card = {name: value for name, value in loaded.card.items() if name not in {"calibration", "signature"}}
    bundle.save(loaded.estimator, card, head.with_suffix(""))

    with pytest.raises(DataError, match="fit again"):
        Rejection.of(bundle.load(head), RejectPlan())

    run("fit", str(tmp_path / "photos"), *TINY, "--no-baselines")
    assert Rejection.of(bundle.load(head), RejectPlan()).familiar is not None


def test_what_lies_beside_a_head_is_checked(head: Path, tmp_path: Path, run: Run) -> None:
    """Neighbours that were changed are refused, absent ones named; fitting again brings them back."""
    (neighbours,) = head.parent.glob("neighbours-*.npz")
    content = neighbours.read_bytes()
    neighbours.write_bytes(content[:-1] + b"?")
    with pytest.raises(DataError, match="not what was written"):
        Rejection.of(bundle.load(head), RejectPlan())
    verified = run("store", "verify")
    assert neighbours.name in verified.out + verified.err
    neighbours.unlink()
    with pytest.raises(DataError, match="goes where that goes"):
        Rejection.of(bundle.load(head), RejectPlan())

    run("fit", str(tmp_path / "photos"), *TINY, "--no-baselines")
    assert neighbours.read_bytes() == content


def test_heads_without_probabilities_cannot_reject(tmp_path: Path, run: Run) -> None:
    """A ridge head says so."""
    data = draw_folder(tmp_path / "photos", 20)
    told = run("fit", str(data), *TINY, "--head", "ridge", "--no-baselines", "--json").json

    ended = run("predict", told["heads"][0]["bundle"], str(data), "--reject")

    assert "probability" in ended.err


def test_widths_of_layers_are_asked_of_a_backbone_once(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """They add up to a row, lie beside the head's samples, and are noted: another command loads no backbone for them."""
    data = draw_folder(tmp_path / "photos", 20)
    fit_layers = ["fit", str(data), *TINY, "--layers", "layer1,layer3,pooled", "--no-baselines", "--json"]
    head = Path(run(*fit_layers).json["heads"][0]["bundle"])

    familiar = Rejection.of(bundle.load(head), RejectPlan()).familiar
    assert familiar is not None
    assert len(familiar.widths) == 3
    assert familiar.widths.sum() == len(familiar.mean)

    monkeypatch.setattr(FeatureCache, "backbone", property(lambda _: pytest.fail("the backbone was loaded")))
    again = run(*fit_layers[:-1], "--head", "lda", "--json").json

    assert Path(again["heads"][0]["bundle"]).exists()


def test_a_head_on_cached_layers_needs_no_weights(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the backbone cannot be loaded to be asked how wide its layers are, the head is fitted all the same."""
    data = draw_folder(tmp_path / "photos", 20)
    fit_layers = ["fit", str(data), *TINY, "--layers", "layer1,layer3", "--no-baselines", "--json"]
    first = Path(run(*fit_layers).json["heads"][0]["bundle"])
    for path in first.parent.glob("widths*"):
        path.unlink()

    def absent(_: object) -> None:
        raise DataError("weights cannot be fetched")

    monkeypatch.setattr(FeatureCache, "backbone", property(absent))
    outcome = run(*fit_layers, "--seed", "1")

    assert "weights cannot be fetched" in outcome.err
    assert Path(outcome.json["heads"][0]["bundle"]).exists()


@pytest.mark.parametrize("layers", [(), ("--layers", "layer2,pooled")])
def test_a_model_says_what_predict_says(layers: tuple[str, ...], tmp_path: Path, run: Run) -> None:
    """Sets and familiarity of an exported model are those of ``predict`` on files that neither training nor check saw."""
    onnxruntime = pytest.importorskip("onnxruntime")
    data = draw_folder(tmp_path / "photos", 20)
    head = Path(run("fit", str(data), *TINY, *layers, "--no-baselines", "--json").json["heads"][0]["bundle"])
    draw_folder(tmp_path / "new", 4, first_seed=7000)
    draw_image(tmp_path / "new" / "odd.png", (240, 240, 10), 5)
    model = tmp_path / "model.onnx"

    written = run("export", str(head), str(model), "--reject", "--coverage", "0.8", "--check", str(tmp_path / "new"))
    lines = run("predict", str(head), str(tmp_path / "new"), "--reject", "--coverage", "0.8", "--json").out.splitlines()

    assert written.code == 0, written.err
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    classes = json.loads(facts["classes"])
    assert json.loads(facts["reject"])["coverage"] == 0.8
    transform = ImagePreprocess(Transform(**json.loads(facts["transform"])))
    told = [json.loads(line) for line in lines]
    samples = np.stack([transform(Path(told_of["path"]).read_bytes(), Views())[0] for told_of in told])
    scores, inside, familiar = session.run(["scores", "set", "familiar"], {"pixels": samples})
    assert inside.dtype == np.bool_
    for one, score, row, share in zip(told, scores, inside, familiar, strict=True):
        order = [classes[number] for number in np.argsort(-score) if row[number]]
        assert order == one["set"]
        assert share == pytest.approx(one["familiar"], abs=0.03)


def test_a_model_does_not_say_what_it_cannot(head: Path, tmp_path: Path, run: Run) -> None:
    """Sets that go by a hash of a file's bytes are refused; without the question a model has scores alone."""
    onnxruntime = pytest.importorskip("onnxruntime")
    refused = run("export", str(head), str(tmp_path / "model.onnx"), "--reject", "--sets", "aps")
    assert refused.code == 2
    assert "--sets aps" in refused.err
    assert not (tmp_path / "model.onnx").exists()

    assert run("export", str(head), str(tmp_path / "model.onnx")).code == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["scores"]
