"""Advice: what samples say of backbones, of training weights and of more images, and that test images are not looked at."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import Outcome
from test_audit import draw_textures

from featcache.api import advise
from featcache.datasets import FileReader, open_dataset
from featcache.errors import UsageError
from featcache.evaluation.metrics import Gap, log_loss
from featcache.evaluation.splits import Fold, chances, drawn_accuracies, drawn_weights, more_samples, round_count
from featcache.experiments import advise as advising
from featcache.experiments.advise import (
    AdviceResult,
    Evidence,
    TuningRows,
    chosen_crosswise,
    last_stage,
    run_advise,
    tune_shortly,
)
from featcache.experiments.backbone_race import MARGIN, Pool, Race, Round, Runner, Standing
from featcache.experiments.fit import FitPlan, run_fit
from featcache.extraction.feature_cache import FeatureCache, Output, Settings
from featcache.heads.search import ridge_shares
from featcache.reports.wording import advice_lines, more_text
from featcache.specs import BackboneSpec

LIKE = Gap(0.0, (-1.0, 1.0), 1.0)
UNLIKE = Gap(4.0, (2.0, 6.0), 0.001)


@pytest.fixture
def textures(tmp_path: Path) -> Path:
    """87 pictures in three classes, given as train and test."""
    return draw_textures(tmp_path / "textures", train=20, test=9)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the bundled backbones out: what is tested here does not depend on them."""
    monkeypatch.setattr(advising, "BUNDLED", ())


class TrainOnly(FileReader):
    """Files of which those below ``test`` cannot be read."""

    def read(self, path: str) -> bytes:
        """Return a file's bytes."""
        assert not path.startswith("test"), f"{path} was read"
        return super().read(path)


def evidence(images: int, *, layers: Gap | None = LIKE, pays: float | None = None, wrong: float = 0.0) -> Evidence:
    """Return evidence of which only some matters."""
    tuned = None if pays is None else LIKE
    return Evidence(images, 3, 100, 0.4, 0.5, {"ridge": 0.9}, layers, tuned, pays, wrong)


def test_copies_are_drawn_together() -> None:
    """Images of one unit come equally often in every draw, and units in all as often as there are."""
    weights = drawn_weights(np.array([3, 3, 3, 7, 7, 9]), seed=0, draws=500)

    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 4]).all()
    assert (weights[:, 0] + weights[:, 3] + weights[:, 5] == 3).all()


def test_a_clear_lead_is_sure_and_a_lead_of_few_groups_is_not() -> None:
    """Ten points on 400 images leave no doubt; the same of four groups does, and an image or two never do."""
    right = np.ones((2, 400), bool)
    right[0, :40] = False
    sure = chances(drawn_accuracies(right, drawn_weights(np.arange(400), 0)), MARGIN)
    grouped = chances(drawn_accuracies(right, drawn_weights(np.arange(400) // 100, 0)), MARGIN)
    right[0] = True
    right[0, 0] = False
    near = chances(drawn_accuracies(right, drawn_weights(np.arange(400), 0)), MARGIN)

    assert sure[0] < 0.001
    assert sure[1] > 0.999
    assert grouped[0] > 0.2
    assert near[0] > 0.5


def test_more_images_follow_the_power_law_they_were_drawn_from() -> None:
    """Of errors 2 x images^-0.4 the slope and what 1,000 more bring are found, inside the interval."""
    rng, sizes = np.random.default_rng(0), np.array([100, 200, 400, 800])
    right = rng.random((4, 2, 2000)) > (2 * sizes**-0.4)[:, None, None]
    true = 200 * (1000**-0.4 - 2000**-0.4)

    more = more_samples(sizes, right, drawn_weights(np.arange(2000), 0), 1000, 1000)

    assert more is not None
    assert more.slope == pytest.approx(-0.4, abs=0.05)
    assert more.points == pytest.approx(true, abs=0.9)
    assert more.interval[0] < true < more.interval[1]
    assert more_samples(sizes, np.ones_like(right), drawn_weights(np.arange(2000), 0), 1000, 1000) is None
    assert more_samples(sizes[:2], right[:2], drawn_weights(np.arange(2000), 0), 1000, 1000) is None
    assert [round_count(count) for count in (1, 244, 504, 1443, 8_000)] == [1, 200, 500, 2000, 10_000]


def test_ridge_gives_shares_of_samples_that_it_has_not_seen() -> None:
    """Of two clouds it is right and sure; of labels drawn at random it has hardly less log-loss than the classes' shares."""
    rng = np.random.default_rng(0)
    y = np.arange(120) % 3
    X = rng.normal(size=(120, 40)).astype(np.float32)
    folds = [Fold(np.flatnonzero(np.arange(120) % 5 != k), np.flatnonzero(np.arange(120) % 5 == k)) for k in range(5)]
    held = y[np.concatenate([fold.val for fold in folds])]

    blind, seeing = ridge_shares(X, y, folds), ridge_shares(X + 4 * np.eye(3, 40, dtype=np.float32)[y], y, folds)

    np.testing.assert_allclose(blind.sum(axis=1), 1)
    assert log_loss(held, blind) > np.log(3) - 0.05
    assert log_loss(held, seeing) < 0.1
    assert (seeing.argmax(axis=1) == held).all()


def test_where_accuracy_and_log_loss_disagree_nobody_is_sure() -> None:
    """The greater doubt counts, whichever of the two is ahead; where they agree there is none."""
    ahead, behind = np.full((100, 1), 0.9), np.full((100, 1), 0.8)
    accuracies = np.concatenate([ahead, behind], axis=1)

    torn = Round([4, 7], accuracies, losses=accuracies)
    agreed = Round([4, 7], accuracies, losses=1 - accuracies)

    assert (torn.doubt(4, [7]), torn.doubt(7, [4])) == (1.0, 1.0)
    assert (agreed.doubt(4, [7]), agreed.doubt(7, [4]), agreed.doubt(4, [])) == (0.0, 1.0, 0.0)


def test_a_rate_is_judged_where_it_was_not_chosen() -> None:
    """Each half of the judged images is answered by what did best on the other half."""
    first, second = np.array([True, True, False, False]), np.array([False, False, True, True])

    chosen = chosen_crosswise([first, second], (np.array([0, 1]), np.array([2, 3])))

    assert chosen.tolist() == [False, False, False, False]


def test_samples_grow_by_class_and_hold_no_test_image(textures: Path) -> None:
    """A larger sample holds the smaller, each class has its share, and whatever is tested is not among them."""
    pool = Pool.of(open_dataset(textures), None, 0)
    small, large = pool.drawn(30), pool.drawn(60)

    assert set(small) < set(large) <= set(pool.samples)
    assert np.bincount(pool.y[small]).tolist() == [10, 10, 10]
    assert {sample.split for sample in pool.part(pool.drawn(1000)).samples} == {"train"}
    assert len(pool.drawn(1000)) == 60


def test_drawn_test_images_are_those_of_fit(textures: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Where no split is given, none of the images that fit tests are in the pool, and all others are."""
    dataset = open_dataset(textures / "train")
    pool = Pool.of(dataset, None, 3)
    (head,) = run_fit(FeatureCache(dataset, tiny, settings), FitPlan(("ridge",), baselines=False), seed=3).heads

    tested = {head.task.features.paths[place] for place in head.split.test}
    assert {sample.path for sample in pool.part(pool.samples).samples} == set(head.task.features.paths) - tested


@pytest.mark.usefixtures("alone")
def test_no_test_image_is_read_and_fit_takes_the_rows(textures: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Advice computes train images alone; a later fit computes the test images and nothing again."""
    dataset = open_dataset(textures)
    result = advise(replace(dataset, reader=TrainOnly(textures.resolve())), [tiny], settings=settings)
    fitted = run_fit(FeatureCache(dataset, tiny, settings), FitPlan(("ridge",), baselines=False))

    assert result.evidence.seen == 60
    assert "<table>" in result._repr_html_()
    assert result.evidence.tuned is not None
    assert result.evidence.layers is not None
    assert fitted.extracted.report.computed == 27


@pytest.mark.usefixtures("alone")
def test_a_complete_entry_stays_as_it_is(textures: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Advice after a fit computes no embedding, and the entry lists and holds what it did."""
    cache = FeatureCache(open_dataset(textures), tiny, settings)
    before = cache.features([Output()], thumbnails=32)[0].store
    pixels = cache.thumbnails(32).store
    table = (before.path / "features.h5").read_bytes()

    result = run_advise(FeatureCache(open_dataset(textures), tiny, settings), [tiny])

    for store, manifest in ((before, before.manifest), (pixels, pixels.manifest)):
        store.refresh()
        assert store.manifest.listing == manifest.listing
        assert store.manifest.rows == manifest.rows
    assert (before.path / "features.h5").read_bytes() == table
    assert json.loads(json.dumps(result.summary))["backbone"] == tiny.text


def test_the_race_leaves_behind_who_sees_nothing(
    textures: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a backbone and one that sees nothing the second falls behind on the first sample, and that is sure."""
    monkeypatch.setattr("featcache.experiments.backbone_race._FIRST", 30)
    blind = replace(tiny, overrides=replace(tiny.overrides, input_size=32, mean=(0.5,) * 3, std=(1e42,) * 3))
    race = Race(Pool.of(open_dataset(textures), None, 0), [Runner(blind, settings), Runner(tiny, settings)])

    winner, chance = race.run()

    assert winner.spec == tiny
    assert chance > 0.99
    assert race.standings[0].is_left
    assert race.standings[0].samples == 30


def test_a_backbone_that_cannot_be_had_is_left_out(
    textures: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others race; without any the reason is the error."""
    monkeypatch.setattr(advising, "BUNDLED", ())
    unknown = BackboneSpec("no_such_network")
    result = advise(str(textures), [unknown, tiny], settings=settings)

    assert [standing.runner.spec for standing in result.standings] == [tiny]
    with pytest.raises(UsageError, match="no_such_network"):
        Race(Pool.of(open_dataset(textures), None, 0), [Runner(unknown, settings)]).run()


def test_candidates_are_asked_for_bundled_and_cached(textures: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Whatever has rows of the data set is tried again, as it was asked for, and each candidate once."""
    cache = FeatureCache(open_dataset(textures), tiny, settings)
    cache.extracted()

    specs = advising.candidates(FeatureCache(open_dataset(textures), BackboneSpec(), settings), [BackboneSpec("mini")])

    assert specs == [BackboneSpec("mini"), BackboneSpec("lite0"), tiny]


@pytest.mark.usefixtures("alone")
def test_a_spent_budget_leaves_steps_out_and_says_so(textures: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Without time there are still candidates and heads; no short training, and no sureness about it."""
    result = advise(str(textures), [tiny], budget=0.0, settings=settings)

    assert result.evidence.tuned is None
    assert result.evidence.depth == ("features", None)
    assert any("short training" in what for what in result.missing)
    assert "was not measured" in "\n".join(advice_lines(result))


@pytest.mark.parametrize(
    ("measured", "depth", "sure"),
    [
        (evidence(500, pays=0.1), "features", 0.9),
        (evidence(500, pays=0.2, wrong=0.3), "last", 0.2),
        (evidence(500, pays=0.97, wrong=0.02), "last", 0.97),
        (evidence(500, pays=0.97, wrong=0.3), "all", 0.97),
        (evidence(500, layers=UNLIKE), "last", None),
        (evidence(500, layers=None), "features", None),
    ],
)
def test_what_was_measured_decides(measured: Evidence, depth: str, sure: float | None) -> None:
    """The short training decides where there was one; else other layers do, without a claim to be sure.

    Where it is open whether training pays, the last stages are tried: that answers with the probe where it gains nothing.
    """
    assert measured.depth == (depth, pytest.approx(sure) if sure is not None else None)


@pytest.mark.parametrize(
    ("pays", "depth", "said"),
    [
        (0.02, "a head on its features only. 98 %", "that it does not pay by over half a point."),
        (0.3, "its last stages too, to find out. 70 %", "that it does not pay by over half a point; that is open"),
        (0.8, "its last stages too. 80 %", "that it pays by over half a point; that is open"),
        (0.97, "its last stages too. 97 %", "that it pays by over half a point."),
    ],
)
def test_what_is_open_is_called_so_in_words(pays: float, depth: str, said: str, settings: Settings) -> None:
    """The sentence says which way the short training points, and below nine in ten that a fine-tuning has to tell."""
    spec = BackboneSpec("mini")
    standing = Standing(Runner(spec, settings), 100, {"ridge": 0.9}, 1.0, 0.3)
    lines = advice_lines(AdviceResult("photos", spec, 1.0, (standing,), evidence(500, pays=pays)))

    weights = next(line for line in lines if line.startswith("Weights:"))

    assert f"{depth} sure" in weights
    assert said in weights


@pytest.mark.parametrize(
    ("measured", "depth"),
    [
        (evidence(500), "features"),
        (evidence(500, layers=UNLIKE), "last"),
        (evidence(5000), "last"),
        (evidence(5000, layers=UNLIKE), "all"),
        (evidence(50_000), "all"),
        (evidence(500, layers=None), None),
    ],
)
def test_the_textbook_rule_goes_by_size_and_likeness(measured: Evidence, depth: str | None) -> None:
    """Few and like: features; few and unlike, more and like: the last stages; more and unlike, many: all."""
    assert measured.textbook == depth


def test_a_short_training_learns_what_the_probe_cannot(subtle: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """The judged images are answered by weights that have not seen them, and the backbone is left as it was."""
    cache = FeatureCache(open_dataset(subtle), tiny, settings)
    backbone = cache.backbone
    trainable = last_stage(backbone)
    pooled, at_cut = cache.features([Output(), Output(trainable.cut)])
    features = pooled.store.features()
    everyone = np.arange(len(features.y))
    fold = Fold(everyone[everyone % 3 > 0], everyone[everyone % 3 == 0])
    places = np.arange(len(fold.val))
    given = TuningRows(
        at_cut.store.features().X, features.X, features.y, fold, (places[::2], places[1::2]), params={"C": 0.01}
    )
    before = {name: value.clone() for name, value in backbone.module.state_dict().items()}

    (probe, tuned), (_, again) = (tune_shortly(backbone, given, 0) for _ in range(2))

    assert (tuned == again).all()
    assert len(probe) == len(tuned) == len(fold.val)
    assert all((value == before[name]).all() for name, value in backbone.module.state_dict().items())


@pytest.mark.usefixtures("alone")
def test_the_command_tells_answers_evidence_and_textbook(
    textures: Path, run: Callable[..., Outcome], tiny: BackboneSpec, settings: Settings, tmp_path: Path
) -> None:
    """Text and JSON of two commands say the same."""
    FeatureCache(open_dataset(textures), tiny, replace(settings, cache=tmp_path / "cache")).extracted()
    first = run("advise", textures, "--cache", tmp_path / "cache", "--json").json
    told = run("advise", textures, "--cache", tmp_path / "cache").out

    for word in ("Backbone: test_resnet", "Weights:", "The textbook rule:", "More samples:", "Evidence:", "not looked at"):
        assert word in told
    told_accuracies = ", ".join(f"{head} {100 * share:.1f} %" for head, share in first["evidence"]["accuracies"].items())
    assert told_accuracies in told
    assert first["backbone"] == tiny.text


def test_what_a_curve_cannot_tell_is_said_in_words() -> None:
    """Too few images for a curve give no number."""
    assert more_text(None) == "too few for a learning curve, or too few of them wrong."
