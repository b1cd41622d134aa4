"""Fields of frozen dataclasses, checked: each error says which field, what it holds and what it may hold."""

import dataclasses
import math
import types
import typing
from typing import Any, TypeVar, get_args

from ..errors import FieldError, MlxSfError

_T = TypeVar("_T")


def require(ok: bool, field: str, got: Any, want: str) -> None:
    """Raise `FieldError` unless `ok`."""
    if not ok:
        raise FieldError(field, got, want)


def choice(field: str, got: Any, kind: Any) -> None:
    """Require one of the values of a `Literal`."""
    require(got in get_args(kind), field, got, "one of " + ", ".join(map(str, get_args(kind))))


def finite(value: Any) -> bool:
    """Whether `value` is a number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number above 1e308
        return False


def check_types(config: Any) -> None:
    """Refuse values of the wrong kind, so that a hand-edited or foreign config fails here and not inside MLX.

    Whole numbers in fields of type float become floats.
    """
    for f in dataclasses.fields(config):
        value, kind = getattr(config, f.name), f.type
        if kind is float:
            require(finite(value), f.name, value, "a finite number")
            object.__setattr__(config, f.name, float(value))
        elif kind is int:
            require(isinstance(value, int) and not isinstance(value, bool), f.name, value, "a whole number")
        elif kind is bool:
            require(isinstance(value, bool), f.name, value, "true or false")
        elif kind is str:
            require(isinstance(value, str), f.name, value, "a string")


def numbers(field: str, values: Any) -> tuple[float, ...]:
    """A list or tuple (JSON knows lists only) of finite numbers as a tuple of floats."""
    require(isinstance(values, list | tuple), field, values, "a list of numbers")
    for v in values:
        require(finite(v), field, v, "finite numbers")
    return tuple(map(float, values))


def from_mapping(kind: type[_T], values: Any, where: str) -> _T:
    """A dataclass from what JSON held, parts that are dataclasses included. Unknown entries are errors."""
    if not isinstance(values, dict):
        raise MlxSfError(f"{where}: configuration is {type(values).__name__}, want an object")
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise MlxSfError(f"{where}: unknown configuration entry {unknown[0]!r}: written by a newer mlx-sf?")
    values = dict(values)
    for name, value in values.items():
        part: Any = next((k for k in _alternatives(hints[name]) if dataclasses.is_dataclass(k)), None)
        if part is not None and value is not None and not dataclasses.is_dataclass(value):
            values[name] = from_mapping(part, value, f"{where}: {name}")
    try:
        return kind(**values)
    except TypeError as e:
        raise MlxSfError(f"{where}: configuration does not fit ({e})") from None
    except FieldError as e:
        raise e.within(where) from None


def _alternatives(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return get_args(hint) if union else (hint,)
