"""A head's card as it is read: JSON of which every field is of its kind, whoever wrote it."""

import json
import math
from collections.abc import Callable
from typing import Any

from featcache.errors import DataError


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
    "test": _is_object,
}
