"""Heads on cached features. Known without loading any library that could train one: their names, and their cards."""

import base64
import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from featcache.errors import DataError, UsageError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from featcache.evaluation.metrics import AnyScores, Kind, TestResult


# what validation chooses of each head, in the order of the heads' cost
PARAMETERS: dict[str, tuple[str, ...]] = {
    "centroid": (),
    "ridge": ("alpha",),
    "knn": ("k",),
    "logistic": ("C",),
    "svm": ("C",),
    "selected": ("share", "C"),
    "lda": ("shrinkage",),
    "rbf": ("width", "C"),
    "mlp": ("alpha",),
    "boosting": (),
}
# these begin with what a text tower says of the classes: of models of two towers alone
ZEROSHOT = ("zeroshot", "zeroshot-probe", "tip")
ATTENTIVE = ("attentive", "attentive-latent")  # these train on tokens, the others on what is pooled of them
STREAMING = ("ridge", "logistic")  # these read features too large for memory from disk, in every pass
ENSEMBLE, ALL = "ensemble", "all"
HEAD_NAMES = (*PARAMETERS, *ZEROSHOT, *ATTENTIVE, ENSEMBLE, ALL)
MEMBERS = ("logistic", "knn", "lda", "rbf", "mlp", "boosting")
_USUAL_MEMBERS = MEMBERS[:4]  # the others take longer than they add on most data sets
# one output a label: any loss that is a sum over outputs would do, the logistic one gives probabilities
HEADS_FOR: "dict[Kind, tuple[str, ...]]" = {
    "label": tuple(PARAMETERS),
    "labels": ("logistic",),
    "number": ("ridge", "knn"),
}
_UP_TO_ONE = frozenset({"share", "shrinkage"})


def require_head(name: str) -> None:
    """Check a head's name.

    Raises:
        UsageError: there is no such head.
    """
    if name not in HEAD_NAMES:
        raise UsageError(f"`heads` {name}: choose from {', '.join(HEAD_NAMES)}.{did_you_mean(name, HEAD_NAMES)}")


def require_params(name: str, grid: Sequence[dict[str, Any]]) -> None:
    """Check values to choose from.

    Raises:
        UsageError: the head takes other parameters, or other values.
    """
    known = PARAMETERS.get(name, ())
    for params in grid:
        if set(params) != set(known):
            taken = ", ".join(sorted(known)) or "no parameter"
            raise UsageError(f"`grid` {', '.join(sorted(params))}: {name} takes {taken}.")
        for key, value in params.items():
            most = 1 if key in _UP_TO_ONE else math.inf
            if not 0 < value <= most or value == math.inf or (key == "k" and value % 1):
                kind = "a whole number" if key == "k" else "a number up to 1" if most == 1 else "a number"
                raise UsageError(f"`grid` {key}={value:g}: {kind}, above 0, is needed.")


def in_order(names: Sequence[str]) -> list[str]:
    """Return heads to run for those asked for, the cheapest first: ``all`` stands for each on what is pooled.

    An ensemble needs members.
    """
    asked = set(names) | ({*PARAMETERS, ENSEMBLE} if ALL in names else set())
    return [name for name in HEAD_NAMES if name in asked - {ALL}]


def members_of(names: Sequence[str]) -> list[str]:
    """Return the heads to fit for those asked for: an ensemble that is alone brings its usual members."""
    if ENSEMBLE in names and not set(names) & set(MEMBERS):
        return in_order([*names, *_USUAL_MEMBERS])
    return in_order(names)


def heads_for(kind: "Kind", names: Sequence[str]) -> list[str]:
    """Return the heads to fit for those asked for, the cheapest first.

    Raises:
        UsageError: there is no such head, or it cannot tell what is to be told.
    """
    for name in names:
        require_head(name)
    if kind == "label":
        return members_of(names)
    able = HEADS_FOR[kind]
    if unable := [name for name in names if name not in {*able, ALL}]:
        raise UsageError(f"`heads` {unable[0]}: for `target` {kind} choose from {', '.join(able)}.")
    return [name for name in able if name in names or ALL in names]


@dataclass(frozen=True)
class Unseen:
    """What heads answered (k, classes) of samples that they were not trained on, at these positions (k,)."""

    samples: "NDArray[np.int64]"
    answers: "NDArray[Any]"


@dataclass(frozen=True)
class FittedHead:
    """A head, what was chosen for it, its validation scores before the refit and its test scores after.

    ``temperature`` scales its logits best on validation. The estimator, and its answers there, (n, classes) or (n,), are
    asked for with functions: of a head that lies in a file already they are read when they are needed. ``unseen`` is what
    says when the head should not answer, of one that was fitted just now.
    """

    name: str
    params: dict[str, Any]
    val: "AnyScores"
    tested: "TestResult"
    seconds: float
    load_estimator: Callable[[], Any] = field(repr=False)
    load_answers: "Callable[[], NDArray[Any] | None]" = field(repr=False)
    notes: tuple[str, ...] = ()
    temperature: float | None = None
    solutions: tuple[Any, ...] = field(default=(), repr=False)
    unseen: Unseen | None = field(default=None, repr=False)

    @property
    def estimator(self) -> Any:
        """The fitted head, as scikit-learn's."""
        return self.load_estimator()

    @property
    def answers(self) -> "NDArray[Any] | None":
        """What was answered on validation, ``None`` where a file does not hold that."""
        return self.load_answers()


def parse_card(text: bytes) -> dict[str, Any]:
    """Return a card's fields, each of its kind.

    Raises:
        DataError: it is no JSON object, or a field is missing or of another kind.
    """
    try:
        card = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(str(error)) from error
    if not isinstance(card, dict):
        raise DataError("no JSON object")
    for name, is_right in _FIELDS.items():
        if name in card and not is_right(card[name]):
            raise DataError(f"{name} is {card[name]!r:.60}")
    if missing := [name for name in ("sha256", "scikit_learn", "classes") if name not in card]:
        raise DataError(f"{missing[0]} is missing")
    return card


def pack_array(values: "NDArray[Any]") -> str:
    """Return an array's bytes as a text that a card can hold."""
    import numpy as np

    return base64.b64encode(zlib.compress(np.ascontiguousarray(values).tobytes())).decode()


def unpack_array(text: str, dtype: type) -> "NDArray[Any]":
    """Return the array (n,) that ``pack_array`` made a text of."""
    import numpy as np

    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_backbone(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    pairs, seed = value.get("model_args", []), value.get("random_init")
    return (
        _is_text(value.get("name"))
        and _is_text_or_none(value.get("weights"))
        and (seed is None or type(seed) is int)
        and isinstance(pairs, list)
        and all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs)
        and _is_object(value.get("overrides", {}))
    )


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "sha256": _is_text,
    "signature": lambda value: isinstance(value, str) and value.isascii(),
    "scikit_learn": _is_text,
    "featcache": _is_text,
    "format": lambda value: isinstance(value, str) and value in {"joblib", "skops"},
    "classes": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "target": lambda value: isinstance(value, str) and value in {"label", "labels", "number"},
    "views": lambda value: type(value) is int and value >= 1,
    "temperature": lambda value: value is None or (type(value) in {int, float} and 0 < value < math.inf),
    "scaled_by": lambda value: value is None or (type(value) in {int, float} and 0.01 <= value <= 100),
    "cut": _is_text,
    "head": _is_text,
    "data": _is_text,
    "feature_key": _is_text,
    "weights": _is_text_or_none,
    "backbone": _is_backbone,
    "loaded": _is_object,
    "transform": _is_object,
    "params": _is_object,
    "columns": _is_object,
    "calibration": _is_object,
    "test": _is_object,
}
