"""What the tests share: small real image files, a small real backbone, the command line in this process."""

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from support import Outcome, draw_folder, draw_subtle

from featcache.cli import main
from featcache.extraction.feature_cache import Settings
from featcache.specs import BackboneSpec, TransformOverrides

if TYPE_CHECKING:
    from finetune_support import Prepared


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Let what is drawn be the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _as_loud_as_before() -> Iterator[None]:
    """Let a command line that was quiet, or loud, in one test say nothing of the next: tests run in any order."""
    logger = logging.getLogger("featcache")
    level, propagate, handlers = logger.level, logger.propagate, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.propagate, logger.handlers = propagate, handlers


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread: on so little it would wait for others longer than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """36 images in three classes."""
    return draw_folder(tmp_path / "images")


@pytest.fixture
def subtle(tmp_path: Path) -> Path:
    """60 images in three classes that are hard to tell apart."""
    return draw_subtle(tmp_path / "subtle")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """An empty cache."""
    return Settings(tmp_path / "cache", batch_size=8)


@pytest.fixture
def tiny() -> BackboneSpec:
    """A small convolutional network with BatchNorm, random weights, 32 pixels."""
    return BackboneSpec("test_resnet", random_init=0, overrides=TransformOverrides(input_size=32))


@pytest.fixture(scope="session")
def _prepared_once(tmp_path_factory: pytest.TempPathFactory) -> "Prepared":
    from finetune_support import Prepared

    root = tmp_path_factory.mktemp("prepared")
    spec = BackboneSpec("test_resnet", random_init=0, overrides=TransformOverrides(input_size=32))
    return Prepared(draw_folder(root / "images"), spec, Settings(root / "cache", batch_size=8))


@pytest.fixture
def prepared(_prepared_once: "Prepared") -> "Prepared":
    """Everything that fine-tuning needs: computed once, since no test changes it but for its own attributes."""
    return copy.copy(_prepared_once)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run the command line in this process, its cache in a temporary folder."""
    monkeypatch.setenv("FEATCACHE_CACHE", str(tmp_path / "cache"))

    def call(*arguments: str | Path) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        code = ended.value.code
        return Outcome(code if isinstance(code, int) else 0, out, err)

    return call
