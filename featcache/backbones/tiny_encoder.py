"""A tiny encoder of texts, made on the spot: random weights, and a tokeniser that has read some texts."""

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from featcache.backbones.text import quietly
from featcache.errors import SetupError, StorageError

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
