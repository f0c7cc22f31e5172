"""Heads that begin with what a text tower says of classes."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from clip_support import TEMPLATE, write_clip
from support import COLOURS, Outcome, Run, draw_folder

pytest.importorskip("open_clip")

from featcache.backbones import clip, open_backbone
from featcache.backbones.clip import embed_classes
from featcache.evaluation.splits import Fold
from featcache.heads.search import search_head
from featcache.heads.zeroshot import ClassRows, search_zeroshot
from featcache.specs import BackboneSpec

CLASSES = sorted(COLOURS)
HEADS = ("zeroshot", "zeroshot-probe", "tip")


def noisy(count: int, seed: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw so many images of each colour, uint8 (n, 32, 32, 3), and their classes."""
    rng, y = np.random.default_rng(seed), np.repeat(np.arange(3), count)
    colours = np.array([COLOURS[CLASSES[label]] for label in y])[:, None, None]
    return np.clip(colours + rng.normal(0, noise, (len(y), 32, 32, 3)), 0, 255).astype(np.uint8), y


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose texts say what colour an image has."""
    folder = tmp_path_factory.mktemp("clip") / "planted"
    write_clip(folder, *reversed_pair(noisy(40, 0, 60)))
    return folder


def reversed_pair(drawn: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Return images, class names and classes, as a model is made of them."""
    return drawn[0], CLASSES, drawn[1]


def test_texts_tell_what_images_show(planted: Path, tmp_path: Path, run: Run) -> None:
    """Class names alone have 95 % right and more; the table has every head, and predict needs no text tower."""
    data = draw_folder(tmp_path / "images", 20, first_seed=7)
    asked = [part for head in (*HEADS, "logistic") for part in ("--head", head)]

    fitted = run("fit", data, "-b", f"clip:{planted}", "--prompt", TEMPLATE, *asked, "--json")

    assert fitted.code == 0, fitted.err
    heads = {head["head"]: head for head in fitted.json["heads"]}
    assert heads["zeroshot"]["test"]["accuracy"] >= 0.95
    assert heads["zeroshot-probe"]["val"]["accuracy"] >= max(
        heads[name]["val"]["accuracy"] for name in ("zeroshot", "logistic")
    )
    again = run("fit", data, "-b", f"clip:{planted}", "--prompt", TEMPLATE, *asked, "--json")
    assert [head["bundle"] for head in again.json["heads"]] == [head["bundle"] for head in fitted.json["heads"]]
    for name in HEADS:
        out = run("predict", heads[name]["bundle"], data).out
        rows = list(csv.DictReader(io.StringIO(out)))
        assert np.mean([Path(row["path"]).parent.name == row["label"] for row in rows]) >= 0.95


@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
def test_a_probe_from_zero_shot_is_no_worse_than_either(planted: Path, shots: int) -> None:
    """On validation the probe drawn towards zero-shot is at least as good as zero-shot and as the plain probe."""
    spec = BackboneSpec(f"clip:{planted}")
    texts = embed_classes(spec, CLASSES, [TEMPLATE])
    rows = ClassRows(texts.rows, texts.scale, texts.bias)
    (train, y_train), (val, y_val) = noisy(shots, 1, 240), noisy(40, 2, 240)
    X = open_backbone(spec).runner("pooled")(np.concatenate([train, val]))
    y, folds = np.concatenate([y_train, y_val]), [Fold(np.arange(3 * shots), np.arange(3 * shots, 3 * shots + 120))]

    reached = {name: search_zeroshot(name, rows, X, y, folds).val for name in HEADS}
    probe = search_head("logistic", X, y, folds, 0).val

    assert reached["zeroshot-probe"].rank <= min(reached["zeroshot"].rank, probe.rank)
    assert reached["tip"].rank <= reached["zeroshot"].rank


def test_few_shots_of_heads_of_texts(planted: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A curve of 1 to 16 shots begins at zero-shot; texts go through their tower once, and again through another model's."""
    data = draw_folder(tmp_path / "images", 32, first_seed=7)
    loads: list[object] = []
    load = clip._load
    monkeypatch.setattr(clip, "_load", lambda *spec: loads.append(spec) or load(*spec))

    def fitted(head: str, model: Path = planted) -> Outcome:
        loads.clear()
        return run(
            "fit", data, "-b", f"clip:{model}", "--prompt", TEMPLATE, "--head", head, "--shots", "1,2,4,8,16", "--json"
        )

    asked = {head: fitted(head) for head in HEADS}
    assert [outcome.code for outcome in asked.values()] == [0, 0, 0], asked["tip"].err
    assert not loads
    curves = {head: outcome.json["curves"][0] for head, outcome in asked.items()}
    assert {curve["head"] for curve in curves.values()} == {*HEADS}
    for curve in curves.values():
        assert [point["shots"] for point in curve["points"]] == [1, 2, 4, 8, 16]
        assert curve["points"][0]["mean"] == pytest.approx(asked["zeroshot"].json["heads"][0]["test"]["accuracy"])
    write_clip(tmp_path / "other", *reversed_pair(noisy(40, 1, 60)))
    assert fitted("zeroshot", tmp_path / "other").code == 0
    assert loads


@pytest.mark.parametrize("params", [{"pull": 0.0}, {"pull": 1.0}, {"mix": 0.3}, {"mix": 1.0}])
@pytest.mark.parametrize("count", [2, 3])
def test_a_saved_head_answers_as_it_was_chosen(params: dict[str, float], count: int) -> None:
    """What is refitted answers what the candidate of the same parameters did, of two classes and of several."""
    from featcache.heads import zeroshot

    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(90, 8)).astype(np.float32), np.arange(90) % count
    X[:, :count] += 2 * np.eye(count)[y]
    rows = ClassRows(np.eye(count, 8, dtype=np.float32), 5.0, 0.0)
    everything = np.arange(90)
    candidates = list(zeroshot._CANDIDATES["zeroshot-probe"](rows, X, y, [Fold(everything, everything)]))
    (candidate,) = (each for each in candidates if {**each.params, **params} == each.params)

    head = zeroshot._refitted("zeroshot-probe", candidate.params, rows, X, y, 0)

    np.testing.assert_allclose(head.predict_proba(X), candidate.answers, atol=1e-4)


def test_heads_of_texts_need_texts(planted: Path, tmp_path: Path, run: Run) -> None:
    """Other backbones, other embeddings and prompts without a place for the class are refused at once."""
    draw_folder(tmp_path / "images", 4)
    for flags, reason in (
        (("-b", "mini"), "need a model with a text tower, --backbone clip:MODEL/TAG"),
        (("-b", f"clip:{planted}", "--prompt", "a photo"), "--prompt"),
        (("-b", f"clip:{planted}", "--pool", "avg"), "--pool avg"),
        (("-b", f"clip:{planted}", "--layers", "stem"), "without"),
    ):
        refused = run("fit", tmp_path / "images", *flags, "--head", "zeroshot")
        assert (refused.code, reason in refused.err) == (2, True), refused.err
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("parts/*"))
