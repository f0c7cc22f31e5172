"""Encoders of transformers: every family is cut alike, trains from what is stored, and is told by its files."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_support import PLAN, KilledError, epochs_of
from safetensors.torch import load_file
from support import Run

import featcache
from featcache.backbones import open_backbone
from featcache.backbones.base import Backbone
from featcache.backbones.encoders import write_tiny_encoder
from featcache.datasets import open_dataset
from featcache.datasets.arrays import other_docstrings
from featcache.errors import DataError, UsageError
from featcache.evaluation.metrics import Kind, paired_gap
from featcache.experiments.finetune import FineTuneInputs, run_finetune
from featcache.experiments.fit import FitPlan, run_fit
from featcache.experiments.gap import run_gap
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.extraction.runtimes import by_length
from featcache.finetuning import Unfreeze, attentive
from featcache.finetuning.loop import Trial
from featcache.finetuning.model import LinearHead, Network, open_up, select_trainable
from featcache.heads.baselines import best_on_validation
from featcache.reports.wording import fit_lines
from featcache.specs import BackboneSpec, TransformOverrides, Views

pytest.importorskip("transformers")


SUBJECTS = {"weather": ["rain", "wind", "cloud", "storm", "sun"], "kitchen": ["pan", "salt", "oven", "spoon", "bread"]}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(word for words in SUBJECTS.values() for word in words)]
TEXTS = ("rain", "wind cloud storm", "pan salt oven spoon bread rain wind", "sun sun")
SIZES = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
WIDE = SIZES | {"intermediate_size": 24, "max_position_embeddings": 40, "pad_token_id": 0}
FAMILIES = {
    "bert": WIDE,
    "roberta": WIDE,
    "distilbert": {"vocab_size": len(WORDS), "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24},
    "electra": WIDE | {"embedding_size": 8},
    "mpnet": WIDE,
    "deberta-v2": WIDE | {"relative_attention": True, "position_biased_input": False},
    "modernbert": WIDE | {"global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": None},
}


def write_encoder(folder: Path, family: str = "bert") -> BackboneSpec:
    """Write a tiny encoder with random weights and a tokeniser of whole words, and return its spec."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(AutoConfig.for_model(family, **FAMILIES[family])).save_pretrained(folder)
    return BackboneSpec(f"text:{folder}")


pytestmark = pytest.mark.usefixtures("one_thread")


def ids_of(backbone: Backbone, texts: tuple[str, ...] = TEXTS) -> torch.Tensor:
    """Return texts as a backbone takes them."""
    return torch.from_numpy(np.concatenate([backbone.preprocess(text.encode(), Views()) for text in texts]))


@pytest.fixture
def spec(tmp_path: Path) -> BackboneSpec:
    """A tiny encoder."""
    return write_encoder(tmp_path / "encoder")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """40 texts of two subjects in a CSV file, and three that are none."""
    rng = np.random.default_rng(0)
    rows = [
        f"{' '.join(rng.choice(words, rng.integers(2, 7)))},{label}" for label, words in SUBJECTS.items() for _ in range(20)
    ]
    path = tmp_path / "subjects.csv"
    path.write_bytes(
        "\n".join(["text,label", *rows, " ,kitchen", "x" * 1_200_000 + ",kitchen", ""]).encode() + b"\xff,kitchen\n"
    )
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_cut_between_its_blocks(family: str, tmp_path: Path) -> None:
    """Prefix then suffix is the whole encoder at every stage, and as transformers itself computes each text alone."""
    backbone = open_backbone(write_encoder(tmp_path, family))
    ids = ids_of(backbone)

    with torch.inference_mode():
        whole = backbone.whole(ids)
        for stage in backbone.stages[:-1]:
            rows = backbone.prefix(stage.name)(ids)
            torch.testing.assert_close(backbone.suffix(stage.name)(rows), whole, rtol=1e-4, atol=1e-5)
        alone = [backbone.module(input_ids=row[row >= 0].long()[None]).last_hidden_state.mean(1) for row in ids]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert len(backbone.stages) == 4


def test_a_step_from_the_cache_is_the_whole_encoders_step(spec: BackboneSpec) -> None:
    """Loss and gradients of the last block are the same from stored states as from token ids."""
    backbone = open_backbone(spec)
    ids, y = ids_of(backbone), torch.tensor([0, 0, 1, 0])
    trainable = select_trainable(backbone.stages, Unfreeze.parse("last:1"), backbone.module)
    head = LinearHead(np.random.default_rng(0).normal(size=(2, 16)), np.zeros(2))
    with torch.no_grad():
        (stored,) = backbone.program((trainable.cut,))(ids)

    steps = []
    for cut, rows in ((trainable.cut, stored), ("input", ids)):
        network = open_up(backbone, trainable, cut, Network({}, head))
        network.model.eval()
        loss = torch.nn.functional.cross_entropy(network.model(rows), y)
        loss.backward()
        steps.append([loss.detach(), *(parameter.grad for parameter in network.stages[0])])

    assert len(steps[0]) > 10
    for from_cache, from_ids in zip(*steps, strict=True):
        torch.testing.assert_close(from_cache, from_ids, rtol=1e-4, atol=1e-6)


def test_a_row_does_not_depend_on_other_texts(spec: BackboneSpec) -> None:
    """A text gives the same bits alone and beside longer and shorter ones."""
    backbone = open_backbone(spec)
    program = backbone.program(("pooled", "tokens"))

    def run(ids: np.ndarray) -> tuple[np.ndarray, ...]:
        with torch.inference_mode():
            return tuple(rows.numpy() for rows in program(torch.from_numpy(ids)))

    ids = ids_of(backbone, TEXTS * 9).numpy()
    together = by_length(run, 64)(ids)
    for place in (0, 1, 2, 17):
        for rows, alone in zip(together, by_length(run, 64)(ids[place : place + 1]), strict=True):
            np.testing.assert_array_equal(rows[place : place + 1], alone)


def test_heads_stand_beside_words_and_lengths(spec: BackboneSpec, table: Path, tmp_path: Path) -> None:
    """Texts of a table are fitted with their own baselines; what is no text is set aside with its reason."""
    cache = FeatureCache(open_dataset(table), spec, Settings(tmp_path / "cache", max_bad=0.2))

    result = run_fit(cache, FitPlan())

    names = [baseline.name for baseline in result.baselines]
    assert names == ["majority class", "length + logistic", "TF-IDF + logistic"]
    reasons = sorted(bad.reason for bad in result.extracted.report.quarantined)
    assert [reason.split(" (")[0] for reason in reasons] == [
        "a text of 1.2 MB, over the limit of 1.0 MB", "an empty text", "no text in UTF-8",
    ]  # fmt: skip
    assert result.baselines[-1].tested.scores.primary[0] > 0.9
    (head,) = result.heads
    rival = best_on_validation(result.baselines)
    gap = paired_gap(head.fitted.tested.right, rival.tested.right)
    assert result.summary["ahead"] == {"head": "logistic", "baseline": rival.name, **asdict(gap)}
    again = run_fit(cache, FitPlan())
    assert json.loads(json.dumps(result.ahead)) == again.ahead
    assert f" points to {rival.name} (95 % interval " in "\n".join(fit_lines(again))


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json"])
def test_changed_files_are_another_entry(file: str, spec: BackboneSpec, table: Path, tmp_path: Path) -> None:
    """A tokeniser or a configuration that was changed misses; the same files hit, wherever they lie."""
    settings = Settings(tmp_path / "cache", max_bad=0.2)

    def computed() -> int:
        return FeatureCache(open_dataset(table), spec, settings).extracted().report.computed

    assert computed() > 0
    assert computed() == 0
    path = Path(spec.name.removeprefix("text:")) / file
    facts = json.loads(path.read_text())
    changed: dict[str, Callable[[], None]] = {
        "tokenizer.json": lambda: facts.update(normalizer={"type": "Lowercase"}),
        "config.json": lambda: facts.update(layer_norm_eps=1e-3),
    }
    changed[file]()
    path.write_text(json.dumps(facts))
    assert computed() > 0


def test_what_no_encoder_has_is_refused_by_name(spec: BackboneSpec) -> None:
    """Images' settings, too long texts and pickled weights end in plain errors."""
    with pytest.raises(UsageError, match="`crop_pct`: text:"):
        open_backbone(replace(spec, overrides=TransformOverrides(crop_pct=0.5)))
    with pytest.raises(UsageError, match=r"`input_size` 99: .* takes texts of 3 to 32 tokens"):
        open_backbone(replace(spec, overrides=TransformOverrides(input_size=99)))
    folder = Path(spec.name.removeprefix("text:"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"no \.safetensors in it"):
        open_backbone(spec)


def test_attention_leaves_out_what_fills_a_text_up(
    spec: BackboneSpec, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attentive head is fitted on texts, is at least the probe on validation, and labels texts that were never seen."""
    cache = FeatureCache(open_dataset(table), spec, Settings(tmp_path / "cache", max_bad=0.2))
    monkeypatch.setattr(attentive, "_EPOCHS", 3)

    probe, head = run_fit(cache, FitPlan(("logistic", "attentive"), baselines=False)).heads

    assert head.record.cut == "tokens"
    assert head.fitted.val.accuracy >= probe.fitted.val.accuracy
    new = tmp_path / "new.txt"
    new.write_text("rain wind sun cloud")
    _, (answer,) = featcache.predict(head.bundle, [new])
    assert answer.label == "weather"


def test_a_head_labels_texts_of_tables_and_files(spec: BackboneSpec, table: Path, tmp_path: Path) -> None:
    """Texts in a table without labels, in files and in folders get the same labels; what is none gets its reason."""
    cache = FeatureCache(open_dataset(table), spec, Settings(tmp_path / "cache", max_bad=0.2))
    (head,) = run_fit(cache, FitPlan(baselines=False)).heads
    folder, texts = tmp_path / "new", ("rain wind sun", "pan salt", "")
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    new = tmp_path / "new.csv"
    new.write_text("\n".join(["text,other", *(f'"{text}",x' for text in texts), ""]))

    for place in (new, folder):
        _, predictions = featcache.predict(head.bundle, [place])
        answers = list(predictions)
        assert [answer.label for answer in answers] == ["weather", "kitchen", None]
        assert answers[2].reason == "an empty text"


def test_kill_and_resume_of_texts_equals_one_run(spec: BackboneSpec, tmp_path: Path) -> None:
    """Kill -9 once a part is committed: the next run computes the rest, and the rows are bit for bit those of one run."""
    path, rng = tmp_path / "many.csv", np.random.default_rng(0)
    rows = [f"{' '.join(rng.choice(WORDS[4:], rng.integers(1, 20)))} {number},x" for number in range(300)]
    path.write_text("\n".join(["text,label", *rows, ""]))
    code = f"""
import os, signal
from featcache.extraction import extract
from featcache.cli import main
commit = extract.EntryWriter.commit
extract.EntryWriter.is_due = lambda entry, started: True
def killed(entry, runtime):
    commit(entry, runtime)
    if entry.store.manifest.rows:
        os.kill(os.getpid(), signal.SIGKILL)
extract.EntryWriter.commit = killed
flags = "--cut tokens --batch-size 16 --cache".split()
main(["extract", {str(path)!r}, "-b", {spec.name!r}, *flags, {str(tmp_path / "killed")!r}])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr

    resumed, undisturbed = (
        FeatureCache(open_dataset(path), spec, Settings(tmp_path / name, batch_size=16)).extracted("tokens")
        for name in ("killed", "whole")
    )

    assert 0 < resumed.report.computed < 300
    assert resumed.report.rows == undisturbed.report.rows == 300
    one, other = (each.store.features() for each in (resumed, undisturbed))
    np.testing.assert_array_equal(one.X, other.X)
    assert (one.paths, one.sha256) == (other.paths, other.sha256)
    assert not resumed.store.verify()


def test_a_killed_training_on_texts_goes_on(
    spec: BackboneSpec, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its third epoch, the first two are not trained again, and the weights are bit for bit those of one run."""
    plan = replace(PLAN, epochs=4, lr=(1e-3,), refit=False)
    trained = epochs_of(monkeypatch)
    epoch = Trial._epoch

    def killed(trial: Trial, *arguments: Any) -> None:
        if len(trained) == 2:
            raise KilledError
        epoch(trial, *arguments)

    def tuned(name: str) -> dict[str, torch.Tensor]:
        cache = FeatureCache(open_dataset(table), spec, Settings(tmp_path / name, max_bad=0.2))
        return load_file(run_finetune(FineTuneInputs(cache), plan).checkpoint)

    with monkeypatch.context() as patched:
        patched.setattr(Trial, "_epoch", killed)
        with pytest.raises(KilledError):
            tuned("killed")
    assert len(trained) == 2
    resumed = tuned("killed")
    assert len(trained) == 4
    undisturbed = tuned("undisturbed")
    assert {*undisturbed} == {*resumed}
    assert all(torch.equal(value, resumed[name]) for name, value in undisturbed.items())


def test_a_gap_is_taken_apart_on_texts(
    spec: BackboneSpec, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pooling, layers, attention and every depth are steps on the same test texts; again nothing is trained."""
    monkeypatch.setattr(attentive, "_EPOCHS", 2)
    cache = FeatureCache(open_dataset(table), spec, Settings(tmp_path / "cache", max_bad=0.2))
    plan, records = replace(PLAN, epochs=1, lr=(1e-3,), refit=False), tmp_path / "runs.jsonl"

    result = run_gap(cache, plan, records=records)

    names = [step.name for step in result.steps]
    assert names[:5] == ["linear", "pooling", "layers", "attentive", "last:1"]
    assert names[-1] == "all"
    assert len({step.record.test_items for step in result.steps}) == 1
    trained = epochs_of(monkeypatch)
    again = run_gap(cache, plan, records=records)
    assert [step.accuracy for step in again.steps] == [step.accuracy for step in result.steps]
    assert not trained


@pytest.mark.parametrize(
    ("target", "last", "head"), [("labels", "TF-IDF + logistic", "logistic"), ("number", "TF-IDF + ridge", "ridge")]
)
def test_texts_have_several_labels_or_a_number(
    target: Kind, last: str, head: str, spec: BackboneSpec, table: Path, tmp_path: Path
) -> None:
    """Heads and baselines tell them as of images."""
    path = tmp_path / "other.csv"
    labels = {"weather": {"labels": "weather;air", "number": "1.5"}, "kitchen": {"labels": "food", "number": "-2"}}
    lines = [line.rpartition(",") for line in table.read_bytes().decode(errors="replace").splitlines()[1:41]]
    values = [f"{text},{labels[label][target]}" for text, _, label in lines]
    path.write_text("\n".join(["text,label", *values, ""]))
    cache = FeatureCache(open_dataset(path), spec, Settings(tmp_path / "cache"))

    result = run_fit(cache, FitPlan((head,), target=target))

    assert [baseline.name for baseline in result.baselines][-1] == last
    assert result.heads[0].fitted.tested.scores.primary[0] > 0.5


def test_the_quickstart_has_texts_and_an_encoder_of_its_own(tmp_path: Path) -> None:
    """Paragraphs of eight packages, none of them read by the tokeniser; the encoder is written once and tells them apart."""
    dataset = open_dataset("sklearn:docstrings")
    texts = other_docstrings()

    encoder = write_tiny_encoder(tmp_path / "encoder", texts)

    assert (dataset.kind, len(dataset.classes)) == ("text", 8)
    inside = {dataset.read(sample.path).decode() for sample in dataset.samples}
    assert len(inside) == len(dataset.samples) > 1000
    assert not inside & set(texts)
    before = (encoder / "model.safetensors").stat().st_mtime_ns
    assert write_tiny_encoder(tmp_path / "encoder", texts) == encoder
    assert (encoder / "model.safetensors").stat().st_mtime_ns == before
    cache = FeatureCache(replace(dataset, samples=dataset.samples[::4]), BackboneSpec(f"text:{encoder}"), Settings(tmp_path))
    (head,) = run_fit(cache, FitPlan(("knn",), baselines=False)).heads
    assert head.fitted.tested.scores.primary[0] > 0.25


def test_the_quickstart_of_texts_names_what_it_needs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without transformers it ends at once, with the extra that brings them."""
    monkeypatch.setitem(sys.modules, "transformers", None)

    refused = run("quickstart", "--text")

    assert (refused.code, "featcache[text]" in refused.err) == (5, True), refused.err


def test_texts_go_through_a_pipeline(spec: BackboneSpec, tmp_path: Path) -> None:
    """FeatureExtractor takes texts in a list or a column, and gives the encoder's embeddings."""
    extractor = featcache.FeatureExtractor(spec.name, cache=tmp_path / "cache")

    rows = extractor.fit_transform(list(TEXTS))

    backbone = open_backbone(spec)
    with torch.inference_mode():
        expected = backbone.whole(ids_of(backbone)).numpy()
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    with pytest.raises(DataError, match=r"text 1: .* and no text"):
        extractor.transform(["rain", 3])


def test_a_head_is_exported_with_token_ids_in(spec: BackboneSpec, table: Path, tmp_path: Path) -> None:
    """One ONNX model takes ids, as the tokenisation in its metadata makes them, to the head's own probabilities."""
    onnxruntime = pytest.importorskip("onnxruntime")
    cache = FeatureCache(open_dataset(table), spec, Settings(tmp_path / "cache", max_bad=0.2))
    (head,) = run_fit(cache, FitPlan(baselines=False)).heads

    written = featcache.export(head.bundle, tmp_path / "model.onnx")

    session = onnxruntime.InferenceSession(str(written.path), providers=["CPUExecutionProvider"])
    ids = ids_of(cache.backbone, ("wind rain", "spoon pan oven salt")).numpy()
    (scores,) = session.run(None, {"ids": ids})
    assert [head.classes[number] for number in scores.argmax(1)] == ["weather", "kitchen"]
