"""How weights move: the schedule, the optimisers, and the precision of a step."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from finetune_support import PLAN, Prepared, moved, tuned

from featcache.finetuning import finetuner as choosing
from featcache.finetuning.loop import ProcessGroup, rate
from featcache.finetuning.model import LinearHead, SuffixAndHead


def test_the_rate_rises_then_falls_to_nothing() -> None:
    """Linear warm-up, half cosine."""
    factors = [rate(step, 100, 0.1) for step in range(101)]

    assert factors[0] == pytest.approx(0.1)
    assert factors[10] == pytest.approx(1.0)
    assert max(factors) == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("optimiser", ["adamw", "adam", "sgd"])
def test_every_optimiser_steps_from_the_cache_as_on_the_whole_model(prepared: Prepared, optimiser: Any) -> None:
    """From stored activations or from pixels through the whole network: the same weights."""
    plan = replace(PLAN, optimiser=optimiser, epochs=2, clip=1.0)
    prepared.probe = LinearHead(np.zeros_like(prepared.probe.weights), np.zeros_like(prepared.probe.bias))  # any step gains
    whole = prepared.tune("input", prepared.pixels.take, plan).network.backbone.module.state_dict()

    cached = tuned(prepared, plan)

    assert moved(prepared.backbone.module.state_dict(), whole)
    for name, value in whole.items():
        torch.testing.assert_close(cached[name], value, rtol=1e-4, atol=1e-5)


def test_half_precision_steps_go_almost_the_same_way(prepared: Prepared) -> None:
    """Weights stay float32, and what is tested is computed in float32."""
    stored = prepared.bench.extracted("layer3").store.reader()
    runs = []
    for precision in ("float32", "bfloat16"):
        plan = replace(PLAN, lr=(1e-4,), head_lr=1e-4, precision=precision, refit=False)
        runs.append(prepared.tune("layer3", stored.take, plan))
        assert {parameter.dtype for parameter in runs[-1].network.backbone.module.parameters()} == {torch.float32}
    exact, half = ([epoch.train_loss for epoch in run.history[1:]] for run in runs)
    assert half == pytest.approx(exact, rel=0.02)
    assert half != exact
    assert [run.precision for run in runs] == ["float32", "bfloat16"]


@pytest.mark.parametrize(
    ("has", "seconds", "expected"),
    [(True, (2.0, 1.0), "bfloat16"), (True, (1.1, 1.0), "float32"), (False, (2.0, 1.0), "float32")],
)
def test_if_asked_steps_are_in_bfloat16_where_that_pays(
    prepared: Prepared,
    monkeypatch: pytest.MonkeyPatch,
    has: bool,  # noqa: FBT001
    seconds: tuple[float, float],
    expected: str,
) -> None:
    """The machine must multiply it, and be clearly faster so; asking changes neither weights nor statistics."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has}, raising=False)
    own = prepared.backbone.separate()
    rows = torch.from_numpy(prepared.bench.extracted("layer3").store.reader().take(np.arange(8)))
    model = SuffixAndHead(own.suffix("layer3"), prepared.probe)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = choosing._step_seconds

    def timed(model: SuffixAndHead, rows: torch.Tensor, precision: str) -> float:
        assert run(model, rows, precision) > 0
        return dict(zip(("float32", "bfloat16"), seconds, strict=True))[precision]

    monkeypatch.setattr(choosing, "_step_seconds", timed)

    assert choosing.choose_precision(model, rows, ProcessGroup(), on_cpu=True) == expected
    assert choosing.choose_precision(model, rows, ProcessGroup(), on_cpu=False) == "float32"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
