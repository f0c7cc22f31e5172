"""The world of transformers: encoders of texts, their own tokenisation, and cuts between their blocks."""

import copy
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featcache.backbones import (
    Origin,
    hub_has_an_address,
    origin_of,
    sha256_of_given_weights,
    sha256_of_weights,
    tokeniser_files,
)
from featcache.backbones.base import Stage, default_device
from featcache.backbones.encoders import Blocks, TextPooling, TokenStates, WholeEncoder, quietly
from featcache.backbones.pooling import Layout, Poolings, same_vectors
from featcache.backbones.timm_models import first_line, hash_weights, load_weights
from featcache.datasets import decode_text
from featcache.errors import CutError, DataError, SetupError, UsageError
from featcache.fingerprint import fingerprint
from featcache.resources import FETCH, may_fetch
from featcache.specs import (
    FORMAT_VERSION,
    INPUT,
    POOLED,
    POOLS,
    TEXT,
    TOKENS,
    BackboneSpec,
    LoadedBackbone,
    Pool,
    Tokenisation,
    Views,
    is_embedding,
    layers_of,
)

_FILLING = -1  # behind a text; what the model sees there is its own padding
# Of config.json what decides no row: where it was saved, by which version, and what an omitted classifier is called.
_NO_MATTER = frozenset(
    [
        *("_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype"),
        *("id2label", "label2id", "problem_type", "use_cache", "gradient_checkpointing"),
    ]
)
_LAYOUT = Layout(3, 2, class_token=True, masked=True)
_LONGEST = 512  # tokens, where a model names no limit of its own: what a block costs grows with the square


@dataclass(frozen=True)
class Tokeniser:
    """Texts to token ids, int32 (1, length), -1 behind the text, by the model's own tokeniser.

    ``encode`` takes a text to ids with the special ones, cut off already.
    """

    spec: Tokenisation
    encode: Callable[[str], Sequence[int]]
    dtype = np.dtype(np.int32)
    input_name = "ids"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one text."""
        return (self.spec.length,)

    def __call__(self, content: bytes, views: Views) -> NDArray[np.int32]:
        """Return a text's ids.

        Raises:
            UnreadableSample: it is empty, no UTF-8, or longer than 1 MiB.
        """
        if views.count != 1:
            raise UsageError("`views`: a text has one.")
        ids = self.encode(decode_text(content))
        row = np.full((1, self.spec.length), _FILLING, np.int32)
        row[0, : len(ids)] = ids
        return row


@dataclass(frozen=True)
class _FastEncoding:
    """The tokeniser of the library ``tokenizers``: many threads may use it at once, and a pickle holds it."""

    tokenizer: Any
    is_lower: bool

    def __call__(self, text: str) -> Sequence[int]:
        ids: Sequence[int] = self.tokenizer.encode(text.lower() if self.is_lower else text).ids
        return ids


class _SlowEncoding:
    """A tokeniser of Python's: it has a state, so that threads take turns."""

    def __init__(self, tokenizer: Any, length: int, *, is_lower: bool) -> None:
        self._arguments = tokenizer, length, is_lower
        self._turn = threading.Lock()

    def __getstate__(self) -> tuple[Any, ...]:
        return self._arguments

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._arguments, self._turn = state, threading.Lock()

    def __call__(self, text: str) -> Sequence[int]:
        tokenizer, length, is_lower = self._arguments
        with self._turn:
            ids: Sequence[int] = tokenizer(text.lower() if is_lower else text, truncation=True, max_length=length)[
                "input_ids"
            ]
        return ids


@dataclass(frozen=True)
class OwnWay:
    """How a model's own library pools: the mean over real tokens unless its folder says otherwise."""

    kind: Pool = "avg"
    is_normalised: bool = False


@dataclass(frozen=True)
class TextBackbone:
    """An encoder of texts in inference mode: token ids, int32 (b, l), -1 behind the text -> embeddings (b, d)."""

    spec: BackboneSpec
    loaded: LoadedBackbone
    preprocess: Tokeniser
    module: nn.Module
    device: torch.device
    way: OwnWay
    origin: Origin | None = None
    content: str | None = None
    file_sha256: str | None = None

    @property
    def is_current(self) -> bool:
        """Whether the files that it was loaded from are still what they were."""
        same = self.origin is None or self.origin.content() == self.content
        return same and sha256_of_given_weights(self.spec) == self.file_sha256

    @cached_property
    def _blocks(self) -> Blocks:
        return Blocks(self.module, self._padding, torch.from_numpy(self._example).to(self.device))

    @property
    def _padding(self) -> int:
        return self.preprocess.spec.padding

    @property
    def _example(self) -> NDArray[np.int32]:
        """Two texts of different lengths."""
        texts = (b"a text", b"another text, that is longer than the first")
        ids = np.concatenate([self.preprocess(text, Views()) for text in texts])
        return cast("NDArray[np.int32]", ids[:, : int((ids >= 0).sum(1).max())])

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The embeddings, then every block; what follows the last block belongs to it."""
        sizes = {name: value.numel() for name, value in self.module.named_parameters()}
        names = self._blocks.names
        groups: dict[str, list[str]] = {"embeddings": [], **{name: [] for name in names}}
        for name in sizes:
            inside = next((block for block in names if name.startswith(f"{block}.")), None)
            tail = names[-1] if names and self._blocks.comes_after(name) else "embeddings"
            groups[inside or tail].append(name)
        return tuple(
            Stage(name, tuple(group), sum(map(sizes.__getitem__, group))) for name, group in groups.items() if group
        )

    @cached_property
    def pooling(self) -> TextPooling:
        """The pooling that was asked for, over tokens and mask."""
        return self._pooling(self.spec.pool)

    def _pooling(self, kind: Pool) -> TextPooling:
        is_own = kind == "default"
        normalised = self.way.is_normalised and is_own
        return TextPooling(self.way.kind if is_own else kind, _LAYOUT, is_normalised=normalised)

    @property
    def whole(self) -> nn.Module:
        """Token ids (b, l) to embeddings (b, d)."""
        return WholeEncoder(self.module, self._padding, self.pooling)

    def example_inputs(self, count: int) -> NDArray[np.int32]:
        """Return a short text many times, int32 (count, length)."""
        return np.repeat(self.preprocess(b"a text", Views()), count, axis=0)

    def _after(self, name: str) -> int | None:
        """Return the number of the block that a stage's states enter, ``None`` behind the last one."""
        names = [stage.name for stage in self.stages]
        if name not in names:
            raise UsageError(
                f"`cut` {name}: {self.spec.name} has the stages {', '.join(names)}, besides pooled, tokens and input."
            )
        place = names.index(name)
        return None if place == len(names) - 1 else place

    def _entered(self, cut: str) -> int:
        number = self._after(cut)
        if number is None:
            raise UsageError(f"`cut` {cut} is the last stage, nothing is left to train behind it: use pooled.")
        if not len(self._blocks):
            raise CutError(f"{self.spec.name} has no blocks that are run once each, one behind the other.")
        return number

    def prefix(self, cut: str) -> nn.Module:
        """Return the frozen part up to a stage, token ids (b, l) -> states and mask (b, l, d + 1).

        Raises:
            UsageError: there is no such stage.
            CutError: the encoder cannot be cut there.
        """
        number = self._entered(cut)
        self._blocks.suffix(number, self.pooling)
        return _First(self._blocks.prefix([number]))

    def suffix(self, cut: str) -> nn.Module:
        """Return what follows a cut: states and mask (b, n, d + 1) -> embeddings (b, d); of ``input`` token ids (b, n)."""
        return self.whole if cut == INPUT else self._blocks.suffix(self._entered(cut), self.pooling)

    def program(self, cuts: Sequence[str]) -> nn.Module:
        """Return the frozen part of several cuts in one pass: token ids, int32 (b, l) -> a tuple of rows.

        Raises:
            UsageError: there is no such stage.
            CutError: the encoder cannot be cut there.
        """
        for cut in cuts:
            self.format_version(cut)
        if all(cut in {POOLED, TOKENS} for cut in cuts):
            # without a look at how long texts are: what exports and compiles programs would keep that length for good
            body: nn.Module = _Only(TokenStates(self.module, self._padding))
            places: list[int | None] = [None]
        else:
            places = list(dict.fromkeys(self._place(name) for cut in cuts for name in layers_of(cut)))
            body = self._blocks.prefix(places)
        rows = []
        for cut in cuts:
            names = layers_of(cut)
            by_name = {True: self.pooling, False: self._pooling("avg" if self.spec.pool == "default" else self.spec.pool)}
            pools = [by_name[name == POOLED] for name in names] if is_embedding(cut) else []
            rows.append((tuple(places.index(self._place(name)) for name in names), nn.ModuleList(pools)))
        return _Program(body, rows).eval().to(self.device)

    def _place(self, name: str) -> int | None:
        return None if name in {POOLED, TOKENS} else self._after(name)

    def format_version(self, cut: str) -> int:
        """Return which version of the format a cut's rows have.

        Raises:
            UsageError: there is no such stage.
            CutError: the encoder cannot be cut there.
        """
        if is_embedding(cut):
            for name in layers_of(cut):
                if name != POOLED and self._place(name) is not None and not len(self._blocks):
                    self._entered(name)
        elif cut not in {TOKENS, INPUT}:
            self.prefix(cut)
        return FORMAT_VERSION

    @property
    def token_layout(self) -> Layout:
        """What the axes of rows at the cut ``tokens`` are: states, and the mask as their last channel."""
        return _LAYOUT

    def poolings(self) -> Poolings:
        """Return the ways from rows at the cut ``tokens`` to vectors, the encoder's own first, each once."""
        ways: dict[Pool, nn.Module] = {kind: self._pooling(kind) for kind in POOLS}
        with torch.inference_mode():
            states = TokenStates(self.module, self._padding)(torch.from_numpy(self._example).to(self.device))
            vectors = {kind: way(states) for kind, way in ways.items()}
        kinds = list(ways)
        for place, kind in enumerate(kinds):
            if any(same_vectors(vectors[kind], vectors[earlier]) for earlier in kinds[:place]):
                del ways[kind]
        return Poolings(ways, self.device)

    def separate(self) -> "TextBackbone":
        """Return a copy whose parameters can be trained without touching this one's."""
        return replace(self, module=copy.deepcopy(self.module))


class _First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        return cast("Tensor", self.inner(ids)[0])


class _Only(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        return (self.inner(ids),)


class _Program(nn.Module):
    """The frozen part: each cut's row is some of what ``body`` gives, pooled and side by side, or as it is."""

    def __init__(self, body: nn.Module, rows: Sequence[tuple[tuple[int, ...], nn.ModuleList]]) -> None:
        super().__init__()
        self.body = body
        self.places = [places for places, _ in rows]
        self.pools = nn.ModuleList(pools for _, pools in rows)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        states = self.body(ids)
        rows = []
        for places, pools in zip(self.places, self.pools, strict=True):
            steps = list(cast("nn.ModuleList", pools))
            vectors = [pool(states[place]) for place, pool in zip(places, steps, strict=False)]
            rows.append(torch.cat(vectors, 1) if vectors else states[places[0]])
        return tuple(rows)


def load_text(spec: BackboneSpec, device: torch.device | None = None) -> TextBackbone:
    """Load an encoder and its tokeniser from a folder, or from the hub's copy of a repository.

    Raises:
        UsageError: the folder is not there or none of an encoder, or something is asked for that texts have not.
        DataError: the weights are not there, broken, or pickled.
        SetupError: transformers is not installed, or nothing may be fetched.
    """
    transformers = _library(spec)
    device = device or default_device()
    _refuse_what_images_have(spec)
    origin = origin_of(spec)
    assert origin is not None
    origin, folder = _fetched(spec, origin)
    content = origin.content(folder)
    with quietly():
        config, raw = _config(transformers, spec, folder)
        model = _model(transformers, spec, config, folder)
        tokenizer = _tokenizer(transformers, spec, folder)
    way = _own_way(folder)
    file_sha256 = sha256_of_given_weights(spec)
    if spec.weights is not None:
        load_weights(model, Path(spec.weights))
    if getattr(model, "pooler", None) is not None:
        setattr(model, "pooler", None)  # noqa: B010 - its type does not know it; it is no pooling over tokens, and would train with nothing to train for
    model.eval().requires_grad_(False).to(device)
    preprocess = _preprocess(spec, tokenizer, config, folder)
    facts: dict[str, Any] = {
        "config": fingerprint({name: value for name, value in raw.items() if name not in _NO_MATTER}),
        "pooling": way.kind,
        "normalised": way.is_normalised,
    }
    tag = f"random:{spec.random_init}" if spec.random_init is not None else "file" if spec.weights else "default"
    loaded = LoadedBackbone(type(model).__name__, tag, hash_weights(model), tuple(sorted(facts.items())), spec.pool)
    if origin.content(folder) != content:
        raise DataError(f"`backbone` {spec.name}: its files changed while they were read. Run again.")
    backbone = TextBackbone(spec, loaded, preprocess, model, device, way, origin, content, file_sha256)
    _try_text(backbone)
    return backbone


def _library(spec: BackboneSpec) -> Any:
    try:
        import transformers
    except ImportError:
        raise SetupError(f"`backbone` {spec.name} needs transformers: `pip install 'featcache[text]'`.") from None
    return transformers


def _refuse_what_images_have(spec: BackboneSpec) -> None:
    asked = [name for name in spec.overrides.given() if name != "input_size"]
    if asked or spec.model_args:
        name = asked[0] if asked else "model_args"
        raise UsageError(
            f"`{name}`: {spec.name} takes texts, leave it out; `input_size` says after how many tokens they end."
        )


def _fetched(spec: BackboneSpec, origin: Origin) -> tuple[Origin, Path]:
    """Return where the files are now, and the folder; of the hub, the commit that its branch stands for now.

    Raises:
        SetupError: they are not here, and nothing may be fetched, or the hub cannot be reached.
    """
    if origin.kind == "folder":
        folder = origin.folder()
        assert folder is not None
        return origin, folder
    if hub_has_an_address():
        from huggingface_hub import snapshot_download

        # no pickles: they could run code
        files = ["*.json", "*.txt", "*.model", "*.safetensors", "1_Pooling/*"]
        try:
            folder = Path(snapshot_download(origin.place, revision=origin.revision or None, allow_patterns=files))
        except Exception as error:
            folder = origin.folder()
            if folder is None:
                raise SetupError(f"`backbone` {spec.name}: cannot be had ({first_line(error)}).") from error
    else:
        folder = origin.folder()
    if folder is None:
        why = "the hub cannot be reached" if may_fetch() else f"{FETCH}=never"
        raise SetupError(
            f"`backbone` {spec.name}: not on this machine, and {why}. `backbone='{TEXT}FOLDER'` takes a folder that "
            "save_pretrained has written."
        )
    return replace(origin, revision=folder.name), folder


def _config(transformers: Any, spec: BackboneSpec, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return what the folder says of the architecture, as transformers reads it and as it is written."""
    try:
        raw: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UsageError(f"`backbone` {spec.name}: its config.json is of no encoder ({first_line(error)}).") from error
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        raise UsageError(f"`backbone` {spec.name}: {config.model_type} has a decoder, and encoders alone are taken.")
    return config, raw


def _model(transformers: Any, spec: BackboneSpec, config: Any, folder: Path) -> nn.Module:
    try:
        if spec.random_init is not None or spec.weights is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(spec.random_init or 0)
                return cast("nn.Module", transformers.AutoModel.from_config(config, dtype=torch.float32))
        if not any(folder.glob("*.safetensors")):
            raise DataError(
                f"`backbone` {spec.name}: no .safetensors in it. Pickled weights are not read, since they could run code: "
                "save them with save_pretrained, or give a plain state of tensors with `weights=FILE`."
            )
        model, told = transformers.AutoModel.from_pretrained(
            str(folder),
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"`backbone` {spec.name}: its weights cannot be read ({first_line(error)}).") from error
    missing = sorted(name for name in told["missing_keys"] if not name.startswith("pooler."))
    if missing or told.get("mismatched_keys"):
        names = missing or sorted(map(str, told["mismatched_keys"]))
        raise DataError(f"`backbone` {spec.name}: its weights lack {len(names)} tensors ({names[0]}, ...).")
    return cast("nn.Module", model)


def _tokenizer(transformers: Any, spec: BackboneSpec, folder: Path) -> Any:
    if not tokeniser_files(folder):
        raise DataError(f"`backbone` {spec.name}: no tokeniser in it. Save that beside the model with save_pretrained.")
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise DataError(f"`backbone` {spec.name}: its tokeniser cannot be read ({first_line(error)}).") from error


def _preprocess(spec: BackboneSpec, tokenizer: Any, config: Any, folder: Path) -> Tokeniser:
    """Return what turns texts into ids: as many as were asked for, else as its own library takes."""
    sentences = _read_json(folder / "sentence_bert_config.json")
    offset = int(getattr(config, "pad_token_id", 0) or 0) + 1 if config.model_type in _SHIFTED else 0
    places = int(getattr(config, "max_position_embeddings", 0) or _LONGEST) - offset
    most = min(places, int(tokenizer.model_max_length)) if getattr(config, "max_position_embeddings", 0) else places
    length = spec.overrides.input_size or int(sentences.get("max_seq_length") or min(most, _LONGEST))
    if length > most or length <= tokenizer.num_special_tokens_to_add():
        least = tokenizer.num_special_tokens_to_add() + 1
        raise UsageError(f"`input_size` {length}: {spec.name} takes texts of {least} to {most} tokens.")
    side = tokenizer.truncation_side
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    files = {path.name: sha256_of_weights(path) for path in tokeniser_files(folder)}
    tokenisation = Tokenisation(f"sha256:{fingerprint(files)}", length, int(padding), side)
    is_lower = bool(sentences.get("do_lower_case"))
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return Tokeniser(tokenisation, _SlowEncoding(tokenizer, length, is_lower=is_lower))
    fast = copy.deepcopy(fast)
    fast.no_padding()
    fast.enable_truncation(length, direction=side)
    return Tokeniser(tokenisation, _FastEncoding(fast, is_lower))


# Families whose positions begin behind the number of their padding, so that as many places fewer hold tokens.
_SHIFTED = frozenset(
    [
        *("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "roberta-prelayernorm"),
        *("longformer", "data2vec-text", "xmod"),
    ]
)


def _own_way(folder: Path) -> OwnWay:
    """Return how sentence-transformers pools what this folder holds, as its files say."""
    modules = _read_json(folder / "modules.json")
    steps = [str(step.get("type", "")).rpartition(".")[2] for step in modules if isinstance(step, dict)] if modules else []
    if "Pooling" not in steps:
        return OwnWay()
    config = _read_json(folder / "1_Pooling" / "config.json")
    kinds: dict[str, Pool] = {"cls_token": "cls", "mean_tokens": "avg", "max_tokens": "max"}
    chosen = [kind for name, kind in kinds.items() if config.get(f"pooling_mode_{name}")]
    foreign = [step for step in steps if step not in {"Transformer", "Pooling", "Normalize"}]
    if len(chosen) != 1 or foreign:
        raise UsageError(
            f"{folder}: its modules.json pools in a way of its own ({', '.join(foreign) or 'several poolings'}): take "
            "that file out, and name a pooling with `pool`."
        )
    return OwnWay(chosen[0], "Normalize" in steps)


def _read_json(path: Path) -> Any:
    """Return a JSON file's content, nothing where there is none.

    Raises:
        DataError: it is no JSON.
    """
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: no JSON ({error}).") from error


def _try_text(backbone: TextBackbone) -> None:
    """Let a short text through: what a model cannot take is told before anything is computed."""
    name = backbone.spec.name
    try:
        with torch.no_grad():
            out = backbone.whole(torch.from_numpy(backbone.example_inputs(1)).to(backbone.device))
    except Exception as error:
        raise UsageError(f"`backbone` {name}: it does not take token ids and a mask ({first_line(error)}).") from error
    if not out.isfinite().all():
        raise DataError(f"`backbone` {name}: a text's embedding is not finite. Take other weights.")
