"""What tests of fine-tuning share: a tiny backbone with its features, and trainings of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.backbones.timm_models import load_backbone
from featcache.datasets import open_dataset
from featcache.evaluation.splits import make_split
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.finetuning import FineTunePlan, Unfreeze
from featcache.finetuning.finetuner import Checkpoint, FineTuned, Finetuner
from featcache.finetuning.loop import ProcessGroup, TrainContext, Trial
from featcache.finetuning.model import LinearHead, Network, Take, open_up, select_trainable
from featcache.heads import linear as linear_heads
from featcache.heads import search
from featcache.specs import BackboneSpec
from featcache.store import Features

PLAN = FineTunePlan(
    Unfreeze.parse("last:1"), epochs=3, batch_size=8, dtype="float32", lr=(1e-2,), head_lr=1e-2, precision="float32"
)


GAINS = replace(PLAN, epochs=5, lr=(1e-3,), label_smoothing=0.0)  # of the subtle images it learns more than the probe


class Prepared:
    """A tiny backbone with its features, its pixels and its probe."""

    def __init__(self, folder: Path, spec: BackboneSpec, settings: Settings) -> None:
        self.bench = FeatureCache(open_dataset(folder), spec, settings)
        self.backbone = load_backbone(spec)
        self.features: Features = self.bench.extracted().store.features()
        self.split = make_split(self.features.y, self.features.splits, self.features.classes)
        self.head = search.train("logistic", {"C": 1e-3}, self.features.X, self.features.y, 0)
        self.probe = LinearHead(*linear_heads.linear_weights(self.head, 3))
        self.pixels = self.bench.extracted("input").store.reader()

    def tune(
        self,
        cut: str,
        take: Take,
        plan: FineTunePlan = PLAN,
        checkpoint: Checkpoint | None = None,
        seed: int = 0,
        *,
        tries_live: bool = False,
    ) -> FineTuned:
        """Fine-tune what a plan unfreezes in a copy of the backbone, from rows at a cut, in the plan's precision."""
        trainable = select_trainable(self.backbone.stages, plan.unfreeze, self.backbone.module)
        network, precision = open_up(self.backbone, trainable, cut, Network({}, self.probe), seed=seed), plan.precision
        assert precision not in {None, "auto"}
        checkpoint, processes = checkpoint or Checkpoint(None), ProcessGroup()
        context = TrainContext(network.model, network.stages, take, self.features.y, plan, processes, seed, precision)
        refitted = Network({}, self.probe)
        return Finetuner(network, context, self.split, refitted, checkpoint, tries_live, self.probe_on).run()

    @staticmethod
    def probe_on(X: NDArray[np.float64], y: NDArray[np.int64]) -> LinearHead:
        """Fit the probe on other embeddings."""
        return LinearHead(*linear_heads.linear_weights(search.train("logistic", {"C": 1e-3}, X, y, 0), 3))


def tuned(
    prepared: Prepared, plan: FineTunePlan, checkpoint: Checkpoint | None = None, take: Any = None
) -> dict[str, Tensor]:
    """Fine-tune and return the whole backbone's weights and the head's."""
    trainable = select_trainable(prepared.backbone.stages, plan.unfreeze, prepared.backbone.module)
    stored = prepared.bench.extracted(trainable.cut, "float32" if trainable.cut != "input" else None).store.reader()
    result = prepared.tune(trainable.cut, take or stored.take, plan, checkpoint)
    return result.network.backbone.module.state_dict() | {
        f"head.{name}": value for name, value in result.network.model.head.state_dict().items()
    }


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Return the names of the weights that differ."""
    return {name for name in before if not torch.equal(before[name], after[name])}


class KilledError(Exception):
    """Stands for the end of the process."""


def epochs_of(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that gets the rate of every epoch that is trained from now on."""
    trained: list[float] = []
    epoch = Trial._epoch

    def counted(trial: Trial, *arguments: Any) -> None:
        epoch(trial, *arguments)
        trained.append(trial._lr)

    monkeypatch.setattr(Trial, "_epoch", counted)
    return trained
