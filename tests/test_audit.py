"""What an audit finds of what was planted: copies, wrong labels, shortcuts, blank images; and that it finds nothing else."""

import csv
import hashlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.metrics import roc_auc_score
from support import TINY, Outcome

from featcache.datasets import open_dataset
from featcache.datasets.decoding import Exif, exif_of, oddities
from featcache.errors import UsageError
from featcache.evaluation import likeness
from featcache.evaluation.likeness import Likeness, components, neighbourhood, tone_rows, unit_rows
from featcache.evaluation.splits import Split, units_of
from featcache.experiments.audit import AuditResult, Suspect, cleaned, run_audit
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.heads.checks import auc, label_issues, out_of_fold, outliers, shift, without
from featcache.reports.wording import audit_lines, suspects_csv
from featcache.specs import BackboneSpec, TransformOverrides

HUES = {"blue": (60, 90, 190), "green": (70, 160, 80), "red": (180, 80, 70)}


def texture(hue: tuple[int, int, int], seed: int) -> Image.Image:
    """Return a picture of 48 pixels a side: blotches of a hue."""
    rng = np.random.default_rng(seed)
    coarse = np.clip(np.array(hue) + rng.normal(0, 50, (7, 7, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC)


def opened(path: Path) -> Image.Image:
    """Return an image, its file closed."""
    with Image.open(path) as image:
        return image.copy()


def draw_textures(root: Path, train: int = 16, test: int = 8) -> Path:
    """Write train/CLASS/IMAGE and test/CLASS/IMAGE, all of them different."""
    for number, (name, hue) in enumerate(HUES.items()):
        for part, count, first in (("train", train, 0), ("test", test, 500)):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                texture(hue, 1000 * number + first + index).save(root / part / name / f"{index:02d}.png")
    return root


@pytest.fixture
def textures(tmp_path: Path) -> Path:
    """72 pictures in three classes, given as train and test."""
    return draw_textures(tmp_path / "textures")


@pytest.fixture
def audit(tiny: BackboneSpec, settings: Settings) -> Callable[[Path], AuditResult]:
    """Return what audits a folder with a small backbone."""
    return lambda data: run_audit(FeatureCache(open_dataset(data), tiny, settings))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, tuple[str, str]], FeatureCache, AuditResult]:
    """Return copies that were planted, the cache and the audit: done once, since no test changes them."""
    root = tmp_path_factory.mktemp("planted")
    copies = plant_copies(draw_textures(root / "textures"))
    tiny = BackboneSpec("test_resnet", random_init=0, overrides=TransformOverrides(input_size=32))
    cache = FeatureCache(open_dataset(root / "textures"), tiny, Settings(root / "cache", batch_size=8))
    return copies, cache, run_audit(cache)


Planted = tuple[dict[str, tuple[str, str]], FeatureCache, AuditResult]


def plant_copies(root: Path) -> dict[str, tuple[str, str]]:
    """Put copies of training images into test; return their kinds and originals by their paths."""
    planted = {}
    for index, kind in enumerate(["exact", "encoded", "resized", "both", "mirrored"] * 2):
        name = list(HUES)[index % 3]
        original = root / "train" / name / f"{index:02d}.png"
        image = opened(original)
        image = ImageOps.mirror(image) if kind == "mirrored" else image
        image = image.resize((43, 43), Image.Resampling.BICUBIC) if kind in {"resized", "both"} else image
        copy = root / "test" / name / f"copy{index}.{'png' if kind in {'exact', 'resized'} else 'jpg'}"
        if kind == "exact":
            copy.write_bytes(original.read_bytes())
        else:
            image.save(copy, quality=70)
        shown = {"exact": "copy", "mirrored": "mirrored copy"}.get(kind, "near copy")
        planted[copy.relative_to(root).as_posix()] = (f"{shown} across splits", original.relative_to(root).as_posix())
    return planted


def test_planted_copies_are_found_and_nothing_else(planted: Planted) -> None:
    """Copied byte for byte, encoded again, resized, both, mirrored: each with its original, and no other pair."""
    copies, _, result = planted

    suspects = [suspect for suspect in result.suspects if "copy" in suspect.kind]
    assert {suspect.path: (suspect.kind, suspect.other) for suspect in suspects} == copies
    assert {(suspect.split, suspect.other_split) for suspect in suspects} <= {("test", "train"), ("test", "val")}
    assert result.leaks.leaked.removed == len(copies)
    assert result.leaks.retrained is not None
    assert result.suspects[: len(copies)] == tuple(suspects)  # they come first
    assert "<table>" in result._repr_html_()


def test_without_copies_none_is_told(textures: Path, audit: Callable[[Path], AuditResult]) -> None:
    """Seventy-two different pictures are no copies, nothing is left out, and no score changes."""
    result = audit(textures)

    assert not [kind for kind in result.counts if "copy" in kind]
    assert result.dropped == {}
    assert (result.leaks.leaked.change, result.leaks.retrained) == (None, None)


def test_the_cleaned_manifest_has_no_copy_in_train_and_all_of_test(
    textures: Path, run: Callable[..., Outcome], tmp_path: Path, audit: Callable[[Path], AuditResult]
) -> None:
    """It is read as a data set, which holds no leak any more; the images are as they were."""
    planted = plant_copies(textures)
    before = {path: path.read_bytes() for path in textures.rglob("*.*")}
    files = ("--fix", tmp_path / "clean.csv", "--csv", tmp_path / "suspects.csv")

    outcome = run("audit", textures, *TINY, *files, "--json")

    assert outcome.code == 0, outcome.err
    assert {path: path.read_bytes() for path in textures.rglob("*.*")} == before
    with (tmp_path / "suspects.csv").open() as file:
        told = list(csv.DictReader(file))
    assert len(told) == len(outcome.json["suspects"])
    assert {row["path"] for row in told if "across" in row["kind"]} == planted.keys()
    data = open_dataset(tmp_path / "clean.csv")
    splits = [sample.split for sample in data.samples]
    assert (splits.count("train"), splits.count("test")) == (48 - len(planted), 24 + len(planted))
    assert not [kind for kind in audit(tmp_path / "clean.csv").counts if "across" in kind]


def test_flipped_labels_are_doubted(textures: Path, audit: Callable[[Path], AuditResult]) -> None:
    """Of six pictures in another class's folder most are told, with the class that they show, and few others."""
    flipped = {}
    for name, wrong in (("blue", "red"), ("green", "blue"), ("red", "green")):
        for index in (3, 7):
            moved = textures / "train" / wrong / f"moved-{name}-{index}.png"
            (textures / "train" / name / f"{index:02d}.png").rename(moved)
            flipped[moved.relative_to(textures).as_posix()] = name

    result = audit(textures)

    doubted = {suspect.path: suspect.other_label for suspect in result.suspects if suspect.kind == "label"}
    hits = {path for path, label in doubted.items() if flipped.get(path) == label}
    assert len(hits) >= 4
    assert len(doubted) <= 2 * len(hits)


def test_a_border_of_its_class_is_a_shortcut(textures: Path, audit: Callable[[Path], AuditResult]) -> None:
    """Pictures of one kind, told by their frames alone: the border's colour is named, at nearly all of the accuracy."""
    frames = {"blue": (60, 100, 200), "green": (100, 200, 60), "red": (200, 60, 100)}  # equally bright
    for path in textures.rglob("*.png"):
        image = texture((128, 128, 128), int(hashlib.sha256(path.as_posix().encode()).hexdigest()[:8], 16))
        ImageOps.expand(image.crop((3, 3, 45, 45)), 3, frames[path.parent.name]).save(path)

    (best, *others) = audit(textures).shortcuts

    assert (best.measure, best.is_near) == ("border colour", True)
    assert best.accuracy > 0.9
    assert not [other.measure for other in others if other.measure in {"image size", "aspect ratio"}]  # all are alike


def noted(path: Path, *, model: str = "", taken: str = "", orientation: int = 1, place: bool = False) -> None:
    """Write what a camera would note into an image's file."""
    notes = Image.Exif()
    notes[0x010F], notes[0x0110], notes[0x0112] = "Maker", model, orientation
    if taken:
        notes.get_ifd(0x8769)[0x9003] = taken
    if place:
        notes.get_ifd(0x8825)[1] = "N"
    opened(path).save(path, exif=notes)


def test_what_a_camera_noted_is_a_shortcut_where_it_gives_the_class_away(
    textures: Path, audit: Callable[[Path], AuditResult]
) -> None:
    """One camera a class, and a rare one: it is named; orientations drawn at random are not."""
    rng = np.random.default_rng(0)
    hues = np.random.default_rng(1)
    for number, path in enumerate(sorted(textures.rglob("*.png"))):
        texture((128, 128, 128), int(hues.integers(1 << 30))).save(path)
        model = {"blue": "A", "green": "B" if number % 12 else "rare", "red": "C"}[path.parent.name]
        noted(path, model=model, orientation=int(rng.integers(1, 9)))

    shortcuts = {shortcut.measure: shortcut for shortcut in audit(textures).shortcuts}

    assert shortcuts["EXIF camera"].is_near
    assert shortcuts["EXIF camera"].accuracy > 0.95
    assert not shortcuts["EXIF orientation"].is_near
    assert not {"EXIF date", "EXIF place given"} & shortcuts.keys()  # all are alike


def test_notes_of_a_camera_are_read_from_headers(tmp_path: Path) -> None:
    """Of JPEG, PNG and WebP; of an image without any, or with broken ones, there is nothing, and no error."""
    for ending in ("jpg", "png", "webp"):
        path = tmp_path / f"a.{ending}"
        texture(HUES["red"], 1).save(path)
        assert exif_of(path.read_bytes()) == Exif()
        noted(path, model="Model 1", taken="2024:02:03 12:00:00", orientation=6, place=True)
        assert exif_of(path.read_bytes()) == Exif("Maker Model 1", 6, 738919.5, has_place=True)
    noted(path, taken="yesterday", orientation=99)
    assert exif_of(path.read_bytes()) == Exif("Maker", 0, 0.0)
    texture(HUES["red"], 1).save(tmp_path / "b.jpg", exif=b"Exif\0\0MM\0*\0\0\xff\xff" + bytes(20))
    assert exif_of((tmp_path / "b.jpg").read_bytes()) == Exif()


def test_size_that_says_nothing_is_no_shortcut(textures: Path, audit: Callable[[Path], AuditResult]) -> None:
    """Pictures of random heights: their shape is measured, and is not named."""
    rng = np.random.default_rng(0)
    for path in textures.rglob("*.png"):
        opened(path).crop((0, 0, 48, int(rng.integers(30, 49)))).save(path)

    shape = next(shortcut for shortcut in audit(textures).shortcuts if shortcut.measure == "aspect ratio")

    assert not shape.is_near


def test_odd_images_are_told_and_blank_ones_are_no_copies(textures: Path, audit: Callable[[Path], AuditResult]) -> None:
    """Blank, dark, tiny and long ones; two blank pictures of different bytes are not each other's copy."""
    planted = {
        "train/red/blank.png": ("blank", Image.new("RGB", (48, 48), (100, 100, 100))),
        "test/red/blank.png": ("blank", Image.new("RGB", (40, 48), (100, 100, 100))),
        "train/red/dark.png": ("dark", texture((8, 6, 4), 9).point(lambda level: level // 6)),
        "train/blue/tiny.png": ("tiny", texture(HUES["blue"], 9001).resize((9, 9))),
        "train/blue/long.png": ("long", texture(HUES["blue"], 9002).resize((240, 48))),
    }
    for path, (_, image) in planted.items():
        image.save(textures / path)

    result = audit(textures)

    odd = {(suspect.path, suspect.kind) for suspect in result.suspects if suspect.kind in {"blank", "dark", "tiny", "long"}}
    assert odd == {(path, kind) for path, (kind, _) in planted.items()}
    assert not [suspect for suspect in result.suspects if "copy" in suspect.kind]
    assert result.dropped == {path: "blank" for path in planted if "blank" in path}


def test_a_second_audit_computes_nothing_and_says_the_same(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, probe and thresholds lie in the cache: no backbone is loaded."""
    _, cache, result = planted
    monkeypatch.setattr("featcache.backbones.timm_models.load_backbone", lambda *_: pytest.fail("loaded"))

    again = run_audit(FeatureCache(cache.dataset, cache.spec, cache.settings))

    assert json.dumps(again.summary) == json.dumps(result.summary)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs and nearest neighbours of images compared all at once, and a few at a time, are those of a plain double loop."""
    rng = np.random.default_rng(0)
    thumbnails = rng.integers(0, 256, (23, 32, 32, 3), dtype=np.uint8)
    thumbnails[20], thumbnails[21] = thumbnails[4], thumbnails[7][:, ::-1]
    X = rng.normal(size=(23, 9)).astype(np.float32)
    X[20], X[21], X[22] = X[4], X[7], X[11]  # the last is alike to the backbone alone
    rows = unit_rows(X, X.mean(axis=0))
    limits = {False: Likeness(0.99, 0.99), True: Likeness(0.99, 0.99)}

    at_once = neighbourhood(rows, thumbnails, limits)
    monkeypatch.setattr(likeness, "_BLOCK", 5)
    by_blocks = neighbourhood(rows, thumbnails, limits)
    monkeypatch.setattr(likeness, "_FEW", 0)
    by_tables = neighbourhood(rows, thumbnails, limits)

    cosine = rows @ rows.T - 2 * np.eye(23)
    for result in (at_once, by_blocks, by_tables):
        pairs = zip(result.pairs.first.tolist(), result.pairs.second.tolist(), result.pairs.mirrored.tolist(), strict=True)
        assert sorted(pairs) == [(4, 20, False), (7, 21, True)]
        np.testing.assert_allclose(result.nearest, cosine.max(axis=1), atol=1e-6)


def test_components_join_by_way_of_a_third() -> None:
    """Pairs (0, 2) and (2, 4) make one group of three."""
    numbers = components(6, np.array([0, 2]), np.array([2, 4]))

    assert numbers[0] == numbers[2] == numbers[4]
    assert len(set(numbers.tolist())) == 4


def test_flat_images_are_like_nothing() -> None:
    """Their rows are zeros; all others have length 1."""
    thumbnails = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    thumbnails[1] = 77

    np.testing.assert_allclose(np.linalg.norm(tone_rows(thumbnails), axis=1), [1, 0, 1], atol=1e-5)


def test_what_removal_changes_has_newcombes_interval() -> None:
    """56 of 70 right that stay, 48 of 80 that go: the paper's difference .2 (.0524 to .3339), by the removed share."""
    right = np.concatenate([np.arange(70) < 56, np.arange(80) < 48])
    removed = np.arange(150) >= 70

    result = without(right, removed)

    assert result.change == pytest.approx(56 / 70 - 104 / 150)
    assert result.change_ci == pytest.approx((0.0524 * 80 / 150, 0.3339 * 80 / 150), abs=1e-4)


def test_auc_is_scikit_learns_and_its_variance_that_of_repeated_draws() -> None:
    """On ties too; DeLong's variance is within a tenth of what two thousand samples spread by."""
    rng = np.random.default_rng(0)

    def drawn() -> tuple[np.ndarray, np.ndarray]:
        is_second = np.arange(90) < 40
        return is_second, np.round(rng.normal(is_second.astype(float)), 1)

    values = [auc(*drawn()) for _ in range(2000)]
    is_second, score = drawn()

    assert auc(is_second, score)[0] == pytest.approx(roc_auc_score(is_second, score))
    assert np.mean([variance for _, variance in values]) == pytest.approx(np.var([value for value, _ in values]), rel=0.1)


def test_labels_that_other_answers_contradict_are_doubted_first() -> None:
    """Classes need not be numbered without a gap; where all answers agree with labels none is doubted."""
    y = np.repeat([0, 3], 30)
    probabilities = np.zeros((60, 4))
    probabilities[:30, 0] = probabilities[30:, 3] = 0.9
    probabilities[:30, 3] = probabilities[30:, 0] = 0.1
    assert len(label_issues(y, probabilities)[0]) == 0

    y[[5, 40]] = [3, 0]

    issues, doubt = label_issues(y, probabilities)
    assert set(issues.tolist()) == {5, 40}
    assert doubt[[5, 40]].min() > np.delete(doubt, [5, 40]).max()


def test_where_all_images_are_long_none_is_odd() -> None:
    """Oddity is measured against the median image; unknown sizes are no oddity."""
    thumbnails = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)

    odd = oddities(thumbnails, np.array([[400, 100], [420, 100], [390, 100], [0, 0]]))

    assert not any(mask.any() for mask in odd.values())


def test_an_image_like_no_other_is_an_outlier() -> None:
    """One of two hundred; where all are equally far there is none."""
    nearest = np.random.default_rng(0).normal(0.8, 0.02, 200).astype(np.float32)
    nearest[17] = 0.2

    assert outliers(nearest).tolist() == [17]
    assert outliers(np.full(50, 0.5, np.float32)).tolist() == []


def test_with_groups_heads_are_asked_of_groups_that_they_have_not_met(run: Callable[..., Outcome], tmp_path: Path) -> None:
    """Hues and labels go by the patient: told by heads that have met the patients, doubted by heads that have not."""
    rng, rows = np.random.default_rng(0), ["path,label,patient"]
    for patient in range(30):
        hue = tuple(int(level) for level in rng.integers(30, 226, 3))
        for index in range(4):
            texture(hue, 100 * patient + index).save(tmp_path / f"{patient}-{index}.png")
            rows.append(f"{patient}-{index}.png,{'ill' if patient % 2 else 'well'},{patient}")
    (tmp_path / "all.csv").write_text("\n".join(rows))
    command = ("audit", tmp_path / "all.csv", *TINY, "--beside", "none", "--cache", tmp_path / "cache", "--json")

    plain, grouped = run(*command), run(*command, "--group", "patient")

    assert (plain.code, grouped.code) == (0, 0), grouped.err
    met, unmet = (outcome.json["test"]["leaked"]["accuracy"] for outcome in (plain, grouped))
    assert met > unmet + 0.15
    doubted = [sum(suspect["kind"] == "label" for suspect in outcome.json["suspects"]) for outcome in (plain, grouped)]
    assert doubted[1] > doubted[0]
    assert list(grouped.json["doubting"]) == [f"{head} on {grouped.json['backbone']}" for head in ("logistic", "ridge")]
    assert run(*command, "--group", "hospital").code == 3


def test_images_that_are_no_files_have_no_manifest(run: Callable[..., Outcome], tmp_path: Path) -> None:
    """It is said before anything is computed."""
    with pytest.raises(UsageError, match="no manifest"):
        cleaned(open_dataset("sklearn:digits"), {})

    outcome = run("audit", "sklearn:digits", *TINY, "--fix", tmp_path / "clean.csv")

    assert (outcome.code, outcome.out) == (2, "")


def test_hostile_names_are_inert() -> None:
    """No cell of the CSV is a formula."""
    suspects = [Suspect("label", "=cmd()", "@SUM(1)", "test", other_label="+1", score=-0.5)]

    (row,) = csv.DictReader(io.StringIO(suspects_csv(suspects)))

    assert tuple(row) == tuple(field.name for field in fields(Suspect))
    assert row["path"] == "'=cmd()"
    assert row["label"] == "'@SUM(1)"
    assert row["other_label"] == "'+1"
    assert float(row["score"]) == -0.5


def test_the_terminal_shows_suspects_and_what_they_cost(planted: Planted) -> None:
    """Paths with their originals, and the accuracy with and without them."""
    copies, _, result = planted

    lines = "\n".join(audit_lines(result))

    assert "copy across splits" in lines
    assert any(f"{path} " in lines and original in lines for path, (_, original) in copies.items())
    assert f"Without the {len(copies)} that train or val hold a copy of:" in lines
    assert "Trained without those copies" in lines


def test_without_cleanlab_the_rest_is_told(monkeypatch: pytest.MonkeyPatch, planted: Planted) -> None:
    """What could not be looked for is said, with the command that installs it."""
    copies, cache, _ = planted
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)

    result = run_audit(FeatureCache(cache.dataset, cache.spec, cache.settings))

    assert "pip install 'featcache[audit]'" in result.missing[0]
    assert result.missing[0] in "\n".join(audit_lines(result))
    assert copies.keys() == {suspect.path for suspect in result.suspects}


def test_test_images_of_another_kind_are_told_from_training_images() -> None:
    """Moved by a deviation they are, with an interval above chance; drawn alike they are not."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 8)).astype(np.float32)
    split = Split(np.arange(200), np.empty(0, np.int64), np.arange(200, 300))
    moved = X.copy()
    moved[200:, 0] += 1

    alike, other = (shift(rows, units_of(300), split, {"C": 0.01}, 0) for rows in (X, moved))

    assert alike is not None
    assert other is not None
    assert alike.auc_ci[0] < 0.5
    assert other.auc_ci[0] > 0.6


def test_folds_keep_copies_together_and_leave_small_classes_out() -> None:
    """A head that has not seen an image has not seen its copy: labels drawn at random are told no better than by chance."""
    rng = np.random.default_rng(0)
    X = np.repeat(rng.normal(size=(60, 40)).astype(np.float32), 2, axis=0)
    y = np.repeat(rng.integers(0, 2, 60), 2)
    y[:4] = 2  # two contents
    contents = [f"{number // 2:03d}" for number in range(120)]

    together = out_of_fold({"it": X}, y, units_of(120, contents), {"C": 10.0}, 0)
    apart = out_of_fold({"it": X}, y, units_of(120), {"C": 10.0}, 0)

    assert together.places.min() == 4
    assert (together.shares.argmax(axis=1) == y[together.places]).mean() < 0.7
    assert (apart.shares.argmax(axis=1) == y[apart.places]).mean() > 0.8


def test_two_backbones_doubt_better_than_one_and_one_that_sees_nothing_does_no_harm() -> None:
    """Of labels a tenth of which is flipped; what each head says counts by how well it answers what it has not seen."""
    rng = np.random.default_rng(1)
    y_true = np.arange(240) % 2
    one, other, noise = (rng.normal(size=(240, 20)).astype(np.float32) for _ in range(3))
    one[:, 0] += 2 * y_true
    other[:, 0] += 2 * y_true
    y = np.where(np.arange(240) < 24, 1 - y_true, y_true)

    def doubted(**embeddings: np.ndarray) -> float:
        told = out_of_fold(embeddings, y, units_of(240), {"C": 0.01}, 0)
        assert told.weights.keys() == {f"{head} on {name}" for name in embeddings for head in ("logistic", "ridge")}
        return float(roc_auc_score(told.places < 24, -told.shares[np.arange(240), y[told.places]]))

    assert doubted(one=one, other=other) > doubted(one=one) + 0.03
    assert doubted(one=one, noise=noise) > doubted(one=one) - 0.02


def test_where_ordinary_images_are_alike_limits_are_above_them() -> None:
    """Copies that changed much do not make neighbours into copies; where neighbours are far, copies alone decide."""
    fitted = Likeness.fitted(np.full(50, 0.9), np.full(50, 0.98))

    assert fitted.above(np.full(50, 0.96)).correlation == pytest.approx(0.99)
    assert fitted.above(np.full(50, 0.5)) == fitted
