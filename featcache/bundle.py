"""Trained heads as files: joblib or skops, with a card beside them, and nothing foreign is executed unasked."""

import hmac
import io
import json
import secrets
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from featcache.errors import DataError, SetupError, UsageError
from featcache.fingerprint import sha256_of_bytes
from featcache.store.atomic import create_file, make_folder, replace_file

Format = Literal["joblib", "skops"]
_SUFFIX: dict[Format, str] = {"joblib": ".joblib", "skops": ".skops"}
# what scikit-learn's own heads hold beside what skops trusts by itself
_TRUSTED = frozenset(
    {
        "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
        "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
        "sklearn.ensemble._hist_gradient_boosting.binning._BinMapper",
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


@dataclass(frozen=True)
class Bundle:
    """A head from a file, and its card: classes, backbone and transform of its features, how it was chosen and tested."""

    estimator: Any
    card: dict[str, Any]
    path: Path

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names that the head answers with, by number."""
        return tuple(self.card["classes"])


def save(estimator: Any, card: Mapping[str, Any], path: Path, how: Format = "joblib") -> Path:
    """Write a head, and beside it a JSON card with its hash and scikit-learn's version; return the head's path.

    Raises:
        SetupError: skops is not installed.
        StorageError: the disk failed.
    """
    import joblib
    import sklearn

    path = path.with_suffix(_SUFFIX[how])
    if how == "skops":
        content = _skops().dumps(estimator)
    else:
        buffer = io.BytesIO()
        joblib.dump(estimator, buffer)
        content = buffer.getvalue()
    facts = {"sha256": sha256_of_bytes(content), "scikit_learn": sklearn.__version__, "format": how}
    full = {**facts, "signature": _signature(content), **card}
    make_folder(path.parent)
    replace_file(path, content)
    replace_file(path.with_suffix(".json"), json.dumps(full, indent=1).encode())
    return path


def load(path: Path, *, trust: bool = False) -> Bundle:
    """Read a head. A joblib file can run any code: one that this user did not write must be trusted expressly.

    Args:
        path: of the head; its card lies beside it.
        trust: run what a joblib file holds wherever it comes from.

    Raises:
        DataError: there is no such file, it is not the one that its card describes, or it is from another scikit-learn.
        UsageError: it is foreign, and not trusted.
    """
    import sklearn

    card_path = path.with_suffix(".json")
    try:
        content, card = path.read_bytes(), json.loads(card_path.read_text())
    except OSError as error:
        raise DataError(
            f"{error.filename}: cannot be read ({error.strerror}): give a head that `featcache fit` wrote."
        ) from error
    except ValueError as error:
        raise DataError(f"{card_path}: not a head's card ({error}).") from error
    if not isinstance(card, dict) or not {"sha256", "scikit_learn", "classes"} <= set(card):
        raise DataError(f"{card_path}: not a head's card.")
    if card["sha256"] != sha256_of_bytes(content):
        raise DataError(f"{path}: is not the file that {card_path.name} describes (another SHA-256).")
    if card["scikit_learn"] != sklearn.__version__:
        raise DataError(
            f"{path}: was made with scikit-learn {card['scikit_learn']}, this is {sklearn.__version__}: fit again, or "
            f"`pip install scikit-learn=={card['scikit_learn']}`."
        )
    if card.get("format") == "skops":
        return Bundle(_load_skops(content, path, trust=trust), card, path)
    if not trust and not hmac.compare_digest(str(card.get("signature")), _signature(content)):
        raise UsageError(
            f"{path}: was not written by you on this machine, and a joblib file can run any code. If you know who made it, "
            "say --trust."
        )
    import joblib

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Bundle(joblib.load(io.BytesIO(content)), card, path)


def _load_skops(content: bytes, path: Path, *, trust: bool) -> Any:
    skops = _skops()
    unknown = skops.get_untrusted_types(data=content)
    foreign = sorted(set(unknown) - _TRUSTED)
    if foreign and not trust:
        raise UsageError(
            f"{path}: holds {', '.join(foreign)}, which no head of ours does. If you know who made it, say --trust."
        )
    return skops.loads(content, trusted=unknown)


def _signature(content: bytes) -> str:
    """Return what only this user's processes on this machine can know of some bytes."""
    return hmac.new(_secret(), content, "sha256").hexdigest()


def _secret() -> bytes:
    from platformdirs import user_data_path

    path = user_data_path("featcache") / "secret"
    if not path.exists():
        make_folder(path.parent)
        create_file(path, secrets.token_bytes(32), mode=0o600)
    return path.read_bytes()


def _skops() -> Any:
    try:
        import skops.io
    except ImportError:
        raise SetupError("skops is not installed: `pip install 'featcache[skops]'`.") from None
    return skops.io
