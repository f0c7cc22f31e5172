"""What a model has cost: a pass over images is booked once, and a training that was killed counts all its time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support import TINY, Outcome

from featcache.datasets import open_dataset
from featcache.experiments.finetune import FineTuneInputs, run_finetune
from featcache.extraction.feature_cache import Extracted, FeatureCache, Output, Settings
from featcache.finetuning import FineTunePlan, Unfreeze
from featcache.finetuning.finetuner import Checkpoint
from featcache.specs import BackboneSpec

ROUNDING = 0.01  # of some thousandths in every manifest


def booked(done: list[Extracted]) -> list[float]:
    """Return the seconds in the entries' manifests."""
    return [one.store.manifest.seconds for one in done]


def test_cuts_of_one_pass_share_its_seconds(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Entries that lack the same images book the same, together no more than the pass took."""
    bench = FeatureCache(open_dataset(folder), tiny, settings)

    done = bench.features([Output("pooled"), Output("layer2"), Output("layer3"), Output("input")])

    seconds = booked(done)
    assert 0 < sum(seconds) <= done[0].report.seconds + ROUNDING
    assert seconds == pytest.approx([seconds[0]] * 4, abs=ROUNDING)


def test_what_is_there_costs_nothing(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """An entry that lacks no image books none of a pass for others, and a hit books nothing."""
    first = FeatureCache(open_dataset(folder), tiny, settings).extracted("layer3")
    before = first.store.manifest.seconds

    done = FeatureCache(open_dataset(folder), tiny, settings).features([Output("layer3"), Output("pooled")])
    again = FeatureCache(open_dataset(folder), tiny, settings).features([Output("layer3"), Output("pooled")])

    assert booked(done)[0] == before
    assert 0 < booked(done)[1] <= done[1].report.seconds + ROUNDING
    assert booked(again) == booked(done)


def test_parts_add_up(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Several processes' seconds are summed, whoever lists the images."""
    runs = [FeatureCache(open_dataset(folder), tiny, replace(settings, part=(number, 2))).extracted() for number in (1, 2)]

    whole = FeatureCache(open_dataset(folder), tiny, settings).extracted()
    assert 0 < whole.store.manifest.seconds <= sum(run.report.seconds for run in runs) + ROUNDING


def test_a_killed_training_counts_all_its_time(
    folder: Path, tiny: BackboneSpec, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seconds of the process that was killed are in those that are reported: no less than all epochs took."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    plan = FineTunePlan(Unfreeze.parse("all"), epochs=4, lr=(1e-3,), patience=9, refit=False)
    real, kept = Checkpoint.save, []

    def dying(checkpoint: Checkpoint, state: dict[str, float]) -> None:
        kept.append(checkpoint.seconds)
        real(checkpoint, state)
        if len(kept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        run_finetune(FineTuneInputs(FeatureCache(open_dataset(folder), tiny, settings)), plan)
    monkeypatch.setattr(Checkpoint, "save", real)

    job = run_finetune(FineTuneInputs(FeatureCache(open_dataset(folder), tiny, settings)), plan)

    assert 0 < kept[0] <= kept[-1]
    assert job.record.seconds["train"] >= kept[-1]
    assert job.record.seconds["train"] >= sum(epoch.seconds for epoch in job.tuned.history) - ROUNDING


def test_every_pass_says_what_it_is(run: Callable[..., Outcome], folder: Path) -> None:
    """What nobody asked for is named: thumbnails within a pass, or as one of their own."""
    together = run("fit", folder, *TINY, "--head", "ridge")
    run("fit", folder, *TINY, "--head", "ridge", "--no-baselines", "--cache", folder.parent / "other")
    apart = run("fit", folder, *TINY, "--head", "ridge", "--cache", folder.parent / "other")

    (said,) = [line for line in together.err.splitlines() if "images to compute" in line]
    assert said.startswith("36 images")
    assert "thumbnails for the baselines" in said
    (said,) = [line for line in apart.err.splitlines() if "images to compute" in line]
    assert said.startswith("thumbnails for the baselines: 36 images")
