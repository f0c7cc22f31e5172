"""A world without images: a tiny encoder of texts goes through the store, the loader, the heads and the training loop."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featcache.backbones.base import Backbone, Preprocess, Stage
from featcache.backbones.timm_models import hash_weights
from featcache.datasets import Dataset, MemoryReader, Sample
from featcache.errors import UsageError
from featcache.experiments.finetune import FineTuneInputs, run_finetune
from featcache.experiments.fit import FitPlan, run_fit
from featcache.extraction.feature_cache import FeatureCache, Output, Settings
from featcache.finetuning import FineTunePlan, Unfreeze
from featcache.heads import bundle
from featcache.heads.base import answers
from featcache.specs import POOLED, BackboneSpec, LoadedBackbone, Tokenisation, Views
from featcache.store.entry import FeatureStore

WORDS = {"weather": ["rain", "wind", "cloud", "storm", "sun"], "kitchen": ["pan", "salt", "oven", "spoon", "bread"]}
WIDTH = 16


@dataclass(frozen=True)
class Bytes:
    """Texts to ids, int32 (1, length): the bytes of their UTF-8 plus one, filled up with 0."""

    spec: Tokenisation
    dtype = np.dtype(np.int32)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one text."""
        return (self.spec.length,)

    def __call__(self, content: bytes, views: Views) -> np.ndarray[Any, Any]:
        """Return a text's ids; there is one view of a text."""
        if views.count != 1:
            raise UsageError("`views`: a text has one.")
        content.decode("utf-8")  # refuses what is no text
        ids = np.frombuffer(content[: self.spec.length], np.uint8).astype(np.int32) + 1
        return np.pad(ids, (0, self.spec.length - len(ids)))[None]


class Block(nn.Module):
    """Attention over the tokens, and a layer beside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the tokens (b, length, width)."""
        normed = self.norm(tokens)
        attended: Tensor = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        return attended + torch.relu(self.layer(attended))


class Mean(nn.Module):
    """The mean over all tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (b, width)."""
        return tokens.mean(1)


class Joint(nn.Module):
    """Several cuts in one pass, as a tuple."""

    def __init__(self, pieces: Sequence[nn.Module], depths: Sequence[int]) -> None:
        super().__init__()
        self.pieces, self.depths = nn.ModuleList(pieces), tuple(depths)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Return the activations behind so many pieces each."""
        reached = [ids]
        for piece in self.pieces:
            reached.append(piece(reached[-1]))
        return tuple(reached[depth] for depth in self.depths)


@dataclass(frozen=True)
class TextEncoder:
    """An embedding, two blocks and a mean: ids (b, length) -> embeddings (b, width)."""

    spec: BackboneSpec
    loaded: LoadedBackbone
    preprocess: Bytes
    module: nn.Sequential

    origin: None = None
    content: None = None
    file_sha256: None = None
    is_current: bool = True
    device = torch.device("cpu")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One for each piece with parameters."""
        pieces = {name: dict(piece.named_parameters(prefix=name)) for name, piece in self.module.named_children()}
        return tuple(
            Stage(name, tuple(named), sum(value.numel() for value in named.values()))
            for name, named in pieces.items()
            if named
        )

    @property
    def whole(self) -> nn.Module:
        """Ids to embeddings."""
        return self.module

    def _depth(self, cut: str) -> int:
        names = [name for name, _ in self.module.named_children()]
        if cut != POOLED and cut not in names:
            raise UsageError(f"`cut` {cut}: there are {', '.join(names)} and pooled.")
        return len(names) if cut == POOLED else names.index(cut) + 1

    def example_inputs(self, count: int) -> np.ndarray[Any, Any]:
        """Return empty texts."""
        return np.zeros((count, *self.preprocess.shape), np.int32)

    def prefix(self, cut: str) -> nn.Module:
        """Return the pieces up to a cut."""
        return self.module[: self._depth(cut)]

    def suffix(self, cut: str) -> nn.Module:
        """Return the pieces behind a cut."""
        return self.module[self._depth(cut) :]

    def program(self, cuts: Sequence[str]) -> nn.Module:
        """Return several cuts in one pass."""
        return Joint(list(self.module), [self._depth(cut) for cut in cuts]).eval()

    def format_version(self, cut: str) -> int:
        """Return the first: no row was ever another."""
        self._depth(cut)
        return 1

    def separate(self) -> "TextEncoder":
        """Return a copy that may be trained."""
        return replace(self, module=copy.deepcopy(self.module))


def text_encoder() -> TextEncoder:
    """Return an encoder of random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pieces = {"embed": nn.Embedding(257, WIDTH), "block1": Block(), "block2": Block(), "mean": Mean()}
    module = nn.Sequential()
    for name, piece in pieces.items():
        module.add_module(name, piece)
    module.eval().requires_grad_(False)
    loaded = LoadedBackbone("bytes", "random:0", hash_weights(module))
    return TextEncoder(BackboneSpec("text:bytes", random_init=0), loaded, Bytes(Tokenisation("utf-8", 24)), module)


@pytest.fixture
def texts() -> Dataset:
    """80 short texts of two subjects, one of them twice, and one that is no text."""
    rng = np.random.default_rng(0)
    content = {
        f"{label}/{number:02d}.txt": " ".join(rng.choice(words, 3)).encode() + b" %d" % number
        for label, words in WORDS.items()
        for number in range(40)
    }
    content["kitchen/copy.txt"] = content["kitchen/00.txt"]
    content["weather/broken.txt"] = b"\xff\xfe not a text"
    samples = [Sample(path, path.partition("/")[0]) for path in content]
    return Dataset("texts", "drawn", samples, MemoryReader(content), kind="text")


@pytest.fixture
def cache(texts: Dataset, tmp_path: Path) -> FeatureCache:
    """The texts and the encoder, nothing of them stored yet."""
    return cache_of(texts, Settings(tmp_path / "cache", batch_size=8, max_bad=0.1))


def cache_of(texts: Dataset, settings: Settings) -> FeatureCache:
    """Return texts and the encoder."""
    backbone: Backbone = text_encoder()  # what the protocol asks for it has
    preprocess: Preprocess = backbone.preprocess
    assert preprocess.spec == Tokenisation("utf-8", 24)
    cache = FeatureCache(texts, backbone.spec, settings)
    cache.backbone = backbone  # type: ignore[misc]  # as a loader of texts would put it there
    return cache


def test_texts_are_stored_as_images_are(cache: FeatureCache, texts: Dataset) -> None:
    """Two cuts in one pass; rows are the encoder's; copies share a row; what is no text is set aside; a hit is a hit."""
    pooled, block = cache.features([Output(), Output("block1")])

    encoder, features = text_encoder(), pooled.store.features()
    ids = np.concatenate([encoder.preprocess(texts.read(path), Views()) for path in features.paths])
    expected = encoder.module(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(features.X, expected, atol=1e-6)
    assert block.store.reader().shape == (24, WIDTH)
    assert (pooled.report.computed, pooled.report.rows) == (80, 81)
    assert [image.path for image in pooled.report.quarantined] == ["weather/broken.txt"]
    assert "UnicodeDecodeError" in pooled.report.quarantined[0].reason
    assert cache_of(texts, cache.settings).extracted().report.computed == 0
    assert not FeatureStore.open(pooled.store.path).verify()


def test_the_tokenisation_is_in_the_key(cache: FeatureCache) -> None:
    """Texts that are cut off elsewhere are other rows."""
    longer = replace(text_encoder(), preprocess=Bytes(Tokenisation("utf-8", 32)))
    key = cache.key(POOLED, "float32", Views())

    cache.backbone = longer  # type: ignore[misc]

    assert cache.key(POOLED, "float32", Views()) != key


def test_heads_are_fitted_on_texts(cache: FeatureCache) -> None:
    """A saved head tells the subjects of texts apart."""
    (head,) = run_fit(cache, FitPlan(("logistic",), baselines=False)).heads

    features = cache.extracted().store.features()
    labels = answers(bundle.load(head.bundle).estimator, features.X, 2).argmax(axis=1)
    assert (labels == features.y).mean() > 0.9


def test_a_text_encoder_is_fine_tuned_from_stored_activations(cache: FeatureCache) -> None:
    """What lies behind the first block trains from what it gave; the tuned network and its head are written."""
    plan = FineTunePlan(Unfreeze.parse("last:1"), epochs=2, lr=(0.01,), batch_size=8)

    result = run_finetune(FineTuneInputs(cache), plan)

    assert result.record.cut == "block1"
    assert result.checkpoint.is_file()
    assert result.bundle.is_file()
    assert result.record.test["accuracy"] > 0.6


def test_token_ids_are_stored_at_the_input(cache: FeatureCache, texts: Dataset) -> None:
    """The cut at the input holds what the tokenisation gives, for every encoder that has the same one."""
    store = cache.extracted("input").store

    reader, paths = store.reader(), store.listing().files.paths
    expected = np.concatenate([text_encoder().preprocess(texts.read(path), Views()) for path in paths])
    np.testing.assert_array_equal(reader.take(np.arange(len(paths))), expected)
    assert (store.spec["dtype"], store.spec["backbone"]) == ("int32", None)


def test_texts_go_to_encoders_of_texts_alone(texts: Dataset, tmp_path: Path) -> None:
    """A backbone of images is refused before anything is opened."""
    with pytest.raises(UsageError, match="takes images, and drawn holds texts"):
        FeatureCache(texts, BackboneSpec("lite0"), Settings(tmp_path))
