"""Transformers of texts, cut between their blocks: what enters one is kept, and put in its place again. And a tiny one.

Neither the embeddings nor the attention masks of a family are written again here: every part runs the model's own
``forward``, in which the blocks that are not meant hand on what they are given. So each family is cut alike, and what a cut
gives is checked against the whole model.
"""

import copy
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from featcache.backbones.pooling import Layout, Pooling
from featcache.errors import CutError, SetupError, StorageError
from featcache.specs import Pool

# Workers run one module at once, each in its thread: what enters a block is told by the context, not by the module.
_noted: ContextVar[dict[int, Tensor]] = ContextVar("noted")
_stored: ContextVar[Tensor] = ContextVar("stored")
_AGREES = 1e-4  # of the greatest number: what rounding leaves of a model in two pieces
_SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
_LENGTH = 64  # tokens: a paragraph is shorter as a rule, and attention costs the square
_WORD_PIECES = 2000
_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": _LENGTH,
}


class _Reached(Exception):  # noqa: N818 - nothing is wrong: what lies behind the last cut need not be computed
    pass


class _Wrapped(nn.Module):
    """A block in another's place; what encoders ask of their blocks besides calling them is the block's own."""

    def __init__(self, block: nn.Module, number: int) -> None:
        super().__init__()
        self.block = block
        self.number = number

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


class _Noting(_Wrapped):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        _noted.get()[self.number] = hidden_states
        return self.block(hidden_states, *args, **kwargs)


class _Stopping(_Wrapped):
    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        _noted.get()[self.number] = hidden_states
        raise _Reached


class _Entering(_Wrapped):
    def forward(self, _: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.block(_stored.get(), *args, **kwargs)


class _Passing(nn.Module):
    """In the place of a block that ran before: hands on what it is given, in the form of a block's answer."""

    def __init__(self, block: nn.Module, answers: int) -> None:
        super().__init__()
        self.answers = answers
        for name, value in vars(block).items():
            if isinstance(value, str | int | float) and name != "training" and not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states, *[None] * (self.answers - 1)) if self.answers else hidden_states


class TokenStates(nn.Module):
    """Token ids, int32 (b, l), -1 behind the text -> the last hidden states (b, l, d) beside the mask (b, l, 1)."""

    def __init__(self, model: nn.Module, padding: int) -> None:
        super().__init__()
        self.model = model
        self.padding = padding

    def forward(self, ids: Tensor) -> Tensor:
        """Return the states, the mask as their last channel."""
        mask = ids >= 0
        return beside_mask(run_model(self.model, ids, self.padding), mask)


def run_model(model: nn.Module, ids: Tensor, padding: int) -> Tensor:
    """Return the last hidden states (b, l, d) of token ids, int32 (b, l), -1 behind the text."""
    mask = ids >= 0
    filled = torch.where(mask, ids, padding).long()
    return cast("Tensor", model(input_ids=filled, attention_mask=mask.long()).last_hidden_state)


def beside_mask(states: Tensor, mask: Tensor) -> Tensor:
    """Return states (b, l, d) with their mask (b, l) as one channel more, zero where there is no token."""
    ones = mask.to(states.dtype)[..., None]
    # what a model computes for filling depends on how much of it there is
    return torch.cat([states * ones, ones], -1)


class TextPooling(nn.Module):
    """States and mask (b, l, d + 1) -> vectors (b, d), of length 1 where the encoder's own library makes them so."""

    def __init__(self, kind: Pool, layout: Layout, *, is_normalised: bool) -> None:
        super().__init__()
        self.pooling = Pooling(kind, layout)
        self.is_normalised = is_normalised

    def forward(self, states: Tensor) -> Tensor:
        """Return the vectors."""
        vectors = cast("Tensor", self.pooling(states))
        return nn.functional.normalize(vectors, dim=1) if self.is_normalised else vectors


class Blocks:
    """The blocks of a model, by the name of the list that holds them.

    Args:
        model: in inference mode.
        padding: the id that fills texts up.
        example: token ids, int32 (b, l), of texts of different lengths.
    """

    def __init__(self, model: nn.Module, padding: int, example: Tensor) -> None:
        self.model, self._padding, self._example = model, padding, example
        self.path = _path_of_blocks(model)
        self._list = model.get_submodule(self.path) if self.path else nn.ModuleList()
        self._answers, self._order = self._looked_at()
        self._is_checked: dict[int, bool] = {}

    def __len__(self) -> int:
        """Return how many there are, 0 where none can be told from others."""
        return len(self._answers)

    @property
    def names(self) -> list[str]:
        """Their names in the model."""
        return [f"{self.path}.{number}" for number in range(len(self))]

    def comes_after(self, name: str) -> bool:
        """Tell whether a parameter outside the blocks is one of a module that is first called behind all of them."""
        module = name.rpartition(".")[0]
        return self._order.get(module, 0) > self._order.get(self.names[-1], 0) if len(self) else True

    def _looked_at(self) -> tuple[list[int], dict[str, int]]:
        """Return how many values each block answers with (0: a tensor), none where one is called twice; and when it ran."""
        calls: list[str] = []
        answers: dict[str, int] = {}

        def note(name: str) -> Any:
            def hook(_: nn.Module, __: Any, answer: Any) -> None:
                answers[name] = len(answer) if isinstance(answer, tuple) else 0

            return hook

        hooks = []
        for name, module in self.model.named_modules():
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: calls.append(name)))
            if name.rpartition(".")[0] == self.path and name:
                hooks.append(module.register_forward_hook(note(name)))
        try:
            with torch.no_grad():
                run_model(self.model, self._example, self._padding)
        finally:
            for hook in hooks:
                hook.remove()
        names = [f"{self.path}.{number}" for number in range(len(cast("nn.ModuleList", self._list)))]
        in_turn = [name for name in calls if name in set(names)]
        order = {name: place for place, name in reversed(list(enumerate(calls)))}
        return ([answers[name] for name in names] if in_turn == names else []), order

    def prefix(self, numbers: Sequence[int | None]) -> "Prefix":
        """Return what gives the states that enter some blocks, ``None`` for the last states, in one pass."""
        return Prefix(self._with(self._noting(numbers)), self._padding, numbers)

    def suffix(self, number: int, pooling: nn.Module) -> "Suffix":
        """Return what goes on from the states that enter a block.

        Raises:
            CutError: what comes out is not what the whole model gives.
        """
        suffix = Suffix(self._with(self._entering(number)), pooling)
        if number not in self._is_checked:
            with torch.inference_mode():
                (states,) = self.prefix([number])(self._example)
                embeddings = pooling(TokenStates(self.model, self._padding)(self._example))
                again = suffix(states)
            self._is_checked[number] = bool((again - embeddings).abs().max() <= _AGREES * embeddings.abs().max())
        if not self._is_checked[number]:
            raise CutError(f"the model in two pieces at {self.names[number]} gives other embeddings than in one.")
        return suffix

    def _noting(self, numbers: Sequence[int | None]) -> nn.ModuleList:
        cuts = {number for number in numbers if number is not None}
        last = max(cuts) if None not in numbers else len(self)
        blocks = [_Noting(block, number) if number in cuts else block for number, block in enumerate(self._blocks[:last])]
        return nn.ModuleList([*blocks, *([_Stopping(self._blocks[last], last)] if last < len(self) else [])])

    def _entering(self, number: int) -> nn.ModuleList:
        passing = [_Passing(block, self._answers[place]) for place, block in enumerate(self._blocks[:number])]
        return nn.ModuleList([*passing, _Entering(self._blocks[number], number), *self._blocks[number + 1 :]])

    @property
    def _blocks(self) -> list[nn.Module]:
        return list(cast("nn.ModuleList", self._list))

    def _with(self, blocks: nn.ModuleList) -> nn.Module:
        """Return the model with other blocks in its list; what is not replaced is shared with it."""
        return _replaced(self.model, self.path, blocks)


def _path_of_blocks(model: nn.Module) -> str:
    """Return the name of the list that holds most of a model's parameters, "" where there is none."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    sizes = {name: sum(value.numel() for value in module.parameters()) for name, module in lists.items()}
    return max(sizes, key=lambda name: sizes[name]) if sizes else ""  # of equals the first: the outermost


def _replaced(module: nn.Module, path: str, inner: nn.Module) -> nn.Module:
    """Return a module with another one at a path; all else is the same objects, and the module stays as it is."""
    if not path:
        return inner
    name, _, rest = path.partition(".")
    clone = copy.copy(module)
    children: Mapping[str, nn.Module | None] = module._modules  # noqa: SLF001 - a copy shares it otherwise
    child = children[name]
    assert child is not None
    clone.__dict__["_modules"] = {**children, name: _replaced(child, rest, inner)}
    return clone


class Prefix(nn.Module):
    """Token ids, int32 (b, l) -> a tuple of states and mask (b, l, d + 1), one a place."""

    def __init__(self, model: nn.Module, padding: int, numbers: Sequence[int | None]) -> None:
        super().__init__()
        self.model = model
        self.padding = padding
        self.numbers = tuple(numbers)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Return the states."""
        states: dict[int, Tensor] = {}
        token = _noted.set(states)
        last = None
        try:
            last = run_model(self.model, ids, self.padding)
        except _Reached:
            pass
        finally:
            _noted.reset(token)
        reached = [last if number is None else states[number] for number in self.numbers]
        return tuple(beside_mask(cast("Tensor", each), ids >= 0) for each in reached)


class Suffix(nn.Module):
    """States that enter a block, with their mask (b, n, d + 1) -> embeddings (b, d)."""

    def __init__(self, model: nn.Module, pooling: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling

    def forward(self, rows: Tensor) -> Tensor:
        """Return the embeddings."""
        mask = rows[..., -1] > 0.5
        length = int(mask.sum(1).max())  # rows are as long as the longest text may be: most of that is filling
        mask, states = mask[:, :length], rows[:, :length, :-1]
        token = _stored.set(states)
        try:
            blank = torch.zeros_like(mask, dtype=torch.long)  # what is made of it enters no block
            last = self.model(input_ids=blank, attention_mask=mask.long()).last_hidden_state
        finally:
            _stored.reset(token)
        return cast("Tensor", self.pooling(beside_mask(last, mask)))


class WholeEncoder(nn.Module):
    """Token ids, int32 (b, l), -1 behind the text -> embeddings (b, d); what no text of a batch reaches is not computed."""

    def __init__(self, model: nn.Module, padding: int, pooling: nn.Module) -> None:
        super().__init__()
        self.states = TokenStates(model, padding)
        self.pooling = pooling

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings."""
        return cast("Tensor", self.pooling(self.states(ids[:, : int((ids >= 0).sum(1).max())])))


@contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers' notes and bars to itself: what is wrong is an error here."""
    from transformers.utils import logging as notes

    before, had_bars = notes.get_verbosity(), notes.is_progress_bar_enabled()
    notes.set_verbosity(logging.CRITICAL)
    notes.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        notes.set_verbosity(before)
        if had_bars:
            notes.enable_progress_bar()  # type: ignore[no-untyped-call]


def write_tiny_encoder(folder: Path, texts: Iterable[str]) -> Path:
    """Write a BERT of 0.7 million random weights as transformers keeps one, unless it is there, and return its folder.

    It knows no language: it is for trying the road without a download. Its word pieces are those of ``texts``.

    Raises:
        SetupError: transformers is not installed.
        StorageError: the folder cannot be written.
    """
    try:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
        from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    except ImportError:
        raise SetupError("encoders of texts need transformers: `pip install 'featcache[text]'`.") from None
    if folder.exists():
        return folder
    tokenizer = Tokenizer(models.WordPiece(unk_token=_SPECIAL["unk_token"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = list(_SPECIAL.values())
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=_WORD_PIECES, special_tokens=special, show_progress=False)
    )
    marks = [(name, special.index(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, marks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same weights on every machine: rows are found again
        model = BertModel(BertConfig(vocab_size=tokenizer.get_vocab_size(), **_SIZES), add_pooling_layer=False)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # elsewhere first, so that a killed command leaves no half encoder behind that the next one would take
        with tempfile.TemporaryDirectory(dir=folder.parent) as draft, quietly():
            tokens: Any = PreTrainedTokenizerFast
            tokens(tokenizer_object=tokenizer, model_max_length=_LENGTH, **_SPECIAL).save_pretrained(draft)
            model.save_pretrained(draft)
            shutil.copytree(draft, partial := folder.with_name(f"{folder.name}.partial"), dirs_exist_ok=True)
            partial.rename(folder)
    except OSError as error:
        raise StorageError(f"{folder}: the encoder cannot be written ({error.strerror}).") from error
    return folder
