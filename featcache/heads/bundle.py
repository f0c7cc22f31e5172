"""Trained heads as files, joblib or skops, with a card beside them that says, too, when a head does not know.

Nothing foreign is executed unasked.
"""

import io
import json
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

import featcache
from featcache.display import Displayed, Table, facts_table, logger
from featcache.errors import DataError, FeatcacheError, SetupError, UsageError
from featcache.evaluation.metrics import Kind, TestResult, decode_correct, scores_from
from featcache.fingerprint import sha256_of_bytes
from featcache.heads import FittedHead, pack_array, parse_card, unpack_array
from featcache.store.disk import is_signed, make_folder, remove_file, replace_file, sign

if TYPE_CHECKING:
    from featcache.reports import RunRecord

Format = Literal["joblib", "skops"]
_SUFFIX: dict[Format, str] = {"joblib": ".joblib", "skops": ".skops"}
_MOST_ANSWERS = 16 << 20  # bytes: beyond it a head is fitted again for an ensemble, which takes less than a disk's room
_TOLD: dict[str, type] = {"predicted": np.int64, "confidence": np.float64}
_CARD = b"featcache: card of a head\n"  # what a signature is for; it covers the file by the hash in the card
# what scikit-learn's own heads hold beside what skops trusts by itself
_TRUSTED = frozenset(
    {
        "featcache.backbones.attention.AttentiveHead",  # arrays, numbers and texts
        "featcache.heads.zeroshot.TipAdapter",
        "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
        "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
        "sklearn.ensemble._hist_gradient_boosting.binning._BinMapper",
        "sklearn.utils._bunch.Bunch",
        "sklearn._loss.loss.HalfBinomialLoss",
        "sklearn._loss.loss.HalfMultinomialLoss",
        "sklearn._loss.link.Interval",
        "sklearn._loss.link.LogitLink",
        "sklearn._loss.link.MultinomialLogit",
        "scipy.stats._distn_infrastructure.rv_continuous_frozen",
        "scipy.stats._distn_infrastructure.rv_continuous_frozen.pdf",
        "scipy.stats._continuous_distns.norm_gen",
    }
)


@dataclass(frozen=True, repr=False)
class Bundle(Displayed):
    """A head from a file, and its card: classes, backbone and transform of its features, how it was chosen and tested."""

    estimator: Any
    card: dict[str, Any]
    path: Path

    def table(self) -> Table:
        """Return what the card says in short; weights and estimator are not shown."""
        backbone = self.card.get("backbone", {}).get("name")
        accuracy = self.card.get("test", {}).get("accuracy")
        test = f"{accuracy:.1%}" if isinstance(accuracy, float) else None
        head = self.card.get("head")
        return facts_table(
            "Head", head=head, backbone=backbone, classes=len(self.classes), test_accuracy=test, file=self.path
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names that the head answers with, by number."""
        return tuple(self.card["classes"])


def save(
    estimator: Any, card: Mapping[str, Any], path: Path, how: Format = "joblib", *, answers: NDArray[Any] | None = None
) -> Path:
    """Write a head, and beside it a signed JSON card with its hash and scikit-learn's version; return the head's path.

    Killed at any point it leaves the head of before with its card, or the new one with its own.

    Args:
        estimator: the fitted head.
        card: what is said of it.
        path: of the head, without the format's suffix.
        how: the format.
        answers: what the head said on validation (n, classes); kept beside it, so that an ensemble need not fit it again.

    Raises:
        SetupError: skops is not installed, or the secret is not the user's own.
        StorageError: the disk failed.
    """
    import sklearn

    path = head_path(path, how)
    content = _skops().dumps(estimator) if how == "skops" else _pickled(estimator)
    versions = {"scikit_learn": sklearn.__version__, "featcache": featcache.__version__}
    facts = {"sha256": sha256_of_bytes(content), "format": how} | versions
    make_folder(path.parent)
    if answers is not None and answers.ndim == 2 and answers.nbytes <= _MOST_ANSWERS:
        facts["answers_sha256"] = _save_answers(_answers(path), answers)
    full = json.loads(json.dumps({**card, **facts}))  # as it will be read
    text = json.dumps({"signature": sign(_CARD, _signed_text(full)), **full}, indent=1).encode()
    # the old head's card stays until the new head is there, whose own card waits beside it
    replace_file(_waiting_card(path), text)
    replace_file(path, content)
    replace_file(_card(path), text)
    remove_file(_waiting_card(path))
    return path


def _pickled(estimator: Any) -> bytes:
    import joblib

    buffer = io.BytesIO()
    joblib.dump(estimator, buffer)
    return buffer.getvalue()


def head_path(path: Path, how: Format = "joblib") -> Path:
    """Return the path of a head's file; what is behind a dot of its name is no suffix (``blocks.6``, ``10.5%``)."""
    return path.with_name(f"{path.name}{_SUFFIX[how]}")


def load(path: Path, *, trust: bool = False) -> Bundle:
    """Read a head. A joblib file can run any code: one that this user did not write must be trusted expressly.

    So must one whose card was changed: class names, backbone, cut and weights are believed as the card says them. A head
    of an earlier version, whose signature does not cover the card, is loaded with a warning.

    Args:
        path: of the head; its card lies beside it.
        trust: run what a joblib file holds, and believe its card, wherever they come from.

    Raises:
        DataError: there is no such file, it is not the one that its card describes, or it is from another scikit-learn.
        UsageError: it is foreign, and not trusted.
        SetupError: the secret is not the user's own.
    """
    import sklearn

    content = _read(path, "give a head that `featcache fit` wrote")
    card = _card_of(path, sha256_of_bytes(content))
    if card["scikit_learn"] != sklearn.__version__:
        raise DataError(
            f"{path}: was made with scikit-learn {card['scikit_learn']}, this is {sklearn.__version__}: fit again, or "
            f"`pip install scikit-learn=={card['scikit_learn']}`."
        )
    is_skops = card.get("format") == "skops"
    if is_skops and not zipfile.is_zipfile(io.BytesIO(content)):
        raise DataError(f"{path}: not a skops file.")
    if not trust:
        _require_own(path, content, card)
    try:
        estimator = _load_skops(content, path, trust=trust) if is_skops else _load_joblib(content)
    except FeatcacheError:
        raise
    except Exception as error:  # a damaged or foreign file fails in any way
        raise DataError(f"{path}: cannot be loaded ({error!r:.200}): fit again.") from error
    _check_estimator(path, estimator, card)
    return Bundle(estimator, card, path)


def own_card(path: Path) -> dict[str, Any] | None:
    """Return the card of a head that this user wrote with this featcache and scikit-learn, ``None`` where there is none."""
    if not path.is_file():
        return None
    try:
        content = _read(path, "fit again")
        card = _card_of(path, sha256_of_bytes(content))
    except DataError as error:
        logger.warning("%s It is fitted again.", error)
        return None
    if card.get("featcache") != featcache.__version__:  # the code is not in an experiment's key: another may answer better
        return None
    # by its package's notes: importing scikit-learn takes longer than all else that a head in a file costs
    if card["scikit_learn"] != version("scikit-learn") or not is_signed(
        card.get("signature", ""), _CARD, _signed_text(card)
    ):
        return None
    _settle(path, card)
    return card


def _settle(path: Path, card: Mapping[str, Any]) -> None:
    """End what a process did not that was killed once its head was there: the card that waits takes its place."""
    waiting = _waiting_card(path)
    if not waiting.is_file():
        return
    try:
        content = _read(waiting, "fit again")
        if parse_card(content) != card:  # of a head that is being written now
            return
    except DataError:
        return
    replace_file(_card(path), content)
    remove_file(waiting)


def packed(tested: TestResult) -> dict[str, Any]:
    """Return what a head said of the test samples, sample by sample, as texts that a card can hold."""
    return {name: None if (values := getattr(tested, name)) is None else pack_array(values) for name in _TOLD}


def fitted_head(path: Path, card: Mapping[str, Any], record: "RunRecord", kind: Kind) -> FittedHead:
    """Return a head that lies in a file, with the scores of its record; the file is run where the estimator is asked for."""
    told: dict[str, Any] = {
        key: None if text is None else unpack_array(text, _TOLD[key]) for key, text in card["tested"].items()
    }
    tested = TestResult(scores_from(kind, record.test), decode_correct(record.right), **told)
    return FittedHead(
        card["head"],
        dict(record.params),
        scores_from(kind, record.val),
        tested,
        record.seconds["fit"],
        cache(lambda: load(path).estimator),
        lambda: _load_answers(path, card),
        temperature=card.get("scaled_by"),
    )


def _save_answers(path: Path, answers: NDArray[Any]) -> str:
    buffer = io.BytesIO()
    np.save(buffer, answers, allow_pickle=False)
    replace_file(path, buffer.getvalue())
    return sha256_of_bytes(buffer.getvalue())


def _load_answers(path: Path, card: Mapping[str, Any]) -> NDArray[Any] | None:
    """Return what a head said on validation; ``None`` where that was too large to keep, or is not what was kept."""
    try:
        content = _answers(path).read_bytes()
    except OSError:
        return None
    if sha256_of_bytes(content) != card.get("answers_sha256"):
        return None
    values: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    return values


def problem_of(path: Path) -> str:
    """Return what is wrong with a head's file or its card, "" where both are as this user wrote them; nothing is run."""
    try:
        content = _read(path, "fit again")
        card = _card_of(path, sha256_of_bytes(content))
        _require_own(path, content, card)
        if "answers_sha256" in card and _answers(path).exists() and _load_answers(path, card) is None:
            return f"{_answers(path)}: is not what was written there; an ensemble fits the head again."
    except FeatcacheError as error:
        return str(error)
    return ""


def recorded_weights(path: Path) -> str:
    """Return the hash of the weights that a head's card names, "" where there is no head or its backbone has another origin.

    Raises:
        DataError: its card is damaged.
    """
    if not path.exists():
        return ""
    card = _card_of(path, sha256_of_bytes(_read(path, "fit again")))
    weights = card["backbone"].get("weights") if isinstance(card.get("backbone"), dict) else ""
    return weights if isinstance(weights, str) and weights.startswith("sha256:") else ""


def _answers(path: Path) -> Path:
    return path.with_name(f"{path.name}.answers.npy")


def _card(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _waiting_card(path: Path) -> Path:
    return path.with_name(f"{path.name}.next.json")


def _card_of(path: Path, sha256: str) -> dict[str, Any]:
    """Return the card that describes a file.

    Raises:
        DataError: there is none, or what lies there is no card.
    """
    places = [_card(path), _waiting_card(path)]
    if path.suffix in _SUFFIX.values():
        places.append(path.with_name(path.name.removesuffix(path.suffix) + ".json"))  # of earlier versions
    there = [place for place in places if place.exists()]
    problems = []
    for place in there:
        try:
            card = parse_card(_read(place, "fit again"))
        except DataError as error:
            problems.append(f"{place}: not a head's card ({error}).")
            continue
        if card["sha256"] == sha256:
            return card
        problems.append(f"{path}: is not the file that {place.name} describes (another SHA-256).")
    raise DataError(problems[0] if problems else f"{_card(path)}: the head's card is not there: fit again.")


def _read(path: Path, advice: str) -> bytes:
    try:
        if path.exists() and not path.is_file():  # reading a pipe or a device would not end
            raise DataError(f"{path}: is no file: {advice}.")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): {advice}.") from error


def _require_own(path: Path, content: bytes, card: Mapping[str, Any]) -> None:
    """Refuse a head that this user did not write.

    Raises:
        UsageError: so it is.
    """
    signature = card.get("signature", "")
    if is_signed(signature, _CARD, _signed_text(card)):
        return
    if is_signed(signature, b"", content):
        logger.warning(
            "%s: its signature is of an earlier version and does not cover its card (class names, backbone, cut): fit again "
            "to sign both",
            path,
        )
        return
    raise UsageError(
        f"{path}: it, or its card, was not written by you on this machine, or was changed since. A joblib file can run any "
        "code, and a card names classes and weights. If you know who made them, say `trust=True`."
    )


def _signed_text(card: Mapping[str, Any]) -> bytes:
    """Return the one text of a card without its signature; it holds the file's hash."""
    body = {name: value for name, value in card.items() if name != "signature"}
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _load_joblib(content: bytes) -> Any:
    import joblib

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return joblib.load(io.BytesIO(content))


def _load_skops(content: bytes, path: Path, *, trust: bool) -> Any:
    skops = _skops()
    unknown = skops.get_untrusted_types(data=content)
    foreign = sorted(set(unknown) - _TRUSTED)
    if foreign and not trust:
        raise UsageError(
            f"{path}: holds {', '.join(foreign)}, which no head of ours does. If you know who made it, say `trust=True`."
        )
    return skops.loads(content, trusted=unknown)


def _check_estimator(path: Path, estimator: Any, card: Mapping[str, Any]) -> None:
    """Refuse what answers with no classes of the card's.

    Raises:
        DataError: so it is.
    """
    if not callable(getattr(estimator, "predict", None)):
        raise DataError(f"{path}: holds a {type(estimator).__name__}, no head.")
    if card.get("target", "label") == "label" and hasattr(estimator, "classes_"):
        known = list(estimator.classes_)
        if known and not 0 <= min(known) <= max(known) < len(card["classes"]):
            raise DataError(f"{path}: knows classes up to number {max(known)}, its card names {len(card['classes'])}.")


def _skops() -> Any:
    try:
        import skops.io
    except ImportError:
        raise SetupError("skops is not installed: `pip install 'featcache[skops]'`.") from None
    return skops.io
