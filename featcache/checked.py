"""The door for values: frozen dataclasses whose fields are checked against their annotations, once, when they are made."""

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from featcache.errors import UsageError

MAX_SEED = 2**32 - 1  # NumPy's and scikit-learn's generators take no greater one
_MAX_INT = 2**53  # whole numbers beyond are no longer exact in JSON, and no count of anything here
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}


def check_fields(value: object) -> None:
    """Refuse a dataclass whose fields are not what their annotations say; call it first in ``__post_init__``.

    What comes from TOML or Python is made to fit where nothing is lost: a list becomes a tuple, a whole number a float. NaN
    and infinite numbers are refused everywhere: no setting here means anything by them.

    Raises:
        UsageError: a field is of another kind; the message names it.
    """
    kind: Any = type(value)
    for name, wanted in _annotations(kind):
        given = getattr(value, name)
        fitted = _fit(given, wanted)
        if fitted is _MISFIT:
            raise UsageError(f"{kind.__name__}.{name}: {_shown(given)}: {describe(wanted)} is needed.")
        if fitted is not given:
            object.__setattr__(value, name, fitted)


def check_value(given: Any, wanted: Any, what: str) -> Any:
    """Return one value as its annotation wants it, as ``check_fields`` does for a field.

    Raises:
        UsageError: it is of another kind; ``what`` names it in the message.
    """
    fitted = _fit(given, wanted)
    if fitted is _MISFIT:
        raise UsageError(f"{what}: {_shown(given)}: {describe(wanted)} is needed.")
    return fitted


def check_seed(seed: Any, what: str = "seed") -> int:
    """Return a seed that every generator here takes.

    Raises:
        UsageError: it is no whole number from 0 to 2**32 - 1.
    """
    number = _fit(seed, int)
    if number is _MISFIT or not 0 <= number <= MAX_SEED:
        raise UsageError(f"{what}: {_shown(seed)}: a whole number from 0 to {MAX_SEED} is needed.")
    return int(number)


def describe(wanted: Any) -> str:
    """Return an annotation in words."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in {Union, types.UnionType}:
        return " or ".join(describe(each) for each in arguments if each is not type(None))
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is ...:
            return f"a list (of each: {describe(arguments[0])})"
        return f"a list of {len(arguments)} ({'; '.join(map(describe, arguments))})"
    return _NAMES.get(wanted, f"a {getattr(wanted, '__name__', wanted)}")


class _Misfit:
    """What no value is."""


_MISFIT: Any = _Misfit()


@cache
def _annotations(kind: Any) -> tuple[tuple[str, Any], ...]:
    hints = typing.get_type_hints(kind)
    return tuple((field.name, hints[field.name]) for field in fields(kind))


def _fit(given: Any, wanted: Any) -> Any:
    """Return a value as the annotation wants it, ``_MISFIT`` where it cannot be."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    fitted = _MISFIT
    if origin is Literal:
        # True == 1 and 1.0 == 1: equal is not enough
        fitted = given if any(type(given) is type(each) and given == each for each in arguments) else _MISFIT
    elif origin in {Union, types.UnionType}:
        fits = (each for kind in arguments if (each := _fit(given, kind)) is not _MISFIT)
        fitted = next(fits, _MISFIT)
    elif origin is tuple:
        fitted = _fit_tuple(given, arguments)
    elif wanted in {int, float}:
        fitted = _fit_number(given, wanted)
    elif wanted is Path and isinstance(given, str):
        fitted = Path(given)
    elif wanted is Any or isinstance(given, origin or wanted):
        fitted = given
    return fitted


def _fit_number(given: Any, wanted: type) -> Any:
    if isinstance(given, bool) or not hasattr(given, "__index__" if wanted is int else "__float__"):
        return _MISFIT
    if isinstance(given, str | bytes) or getattr(given, "shape", ()) != ():
        return _MISFIT
    try:
        number = given.__index__() if wanted is int else float(given)
    except (OverflowError, TypeError, ValueError):
        return _MISFIT
    if abs(number) > _MAX_INT if wanted is int else not math.isfinite(number):
        return _MISFIT
    return given if type(given) is wanted else number


def _fit_tuple(given: Any, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(given, tuple | list):
        return _MISFIT
    many = len(arguments) == 2 and arguments[1] is ...
    if not many and len(given) != len(arguments):
        return _MISFIT
    kinds = (arguments[0],) * len(given) if many else arguments
    fitted = tuple(_fit(each, kind) for each, kind in zip(given, kinds, strict=True))
    if any(each is _MISFIT for each in fitted):
        return _MISFIT
    unchanged = isinstance(given, tuple) and all(new is old for new, old in zip(fitted, given, strict=True))
    return given if unchanged else fitted


def _shown(given: Any) -> str:
    text = repr(given) if not isinstance(given, Mapping) else "a table"
    return text if len(text) <= 60 else f"{text[:57]}..."
