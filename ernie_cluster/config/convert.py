"""Plain data <-> dataclasses, led by type hints alone.

Understands dataclasses, `tuple[X, ...]`, `X | None`, `Literal`, bool, int, float and str: what configurations are
made of. A field named `*_bytes` also takes a size, one named `*_s` a duration. Every message names the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, TypeVar

import yaml

from ernie_cluster.errors import ConfigError

T = TypeVar("T")

_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_DURATIONS = {"": 1.0, "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)\s*")


class Text(str):
    """A value from the environment or a command line: text until the field's type says how to read it."""

    __slots__ = ()


def build(cls: type[T], value: Any) -> T:
    """Make a dataclass of plain data.

    Raises:
        ConfigError: unknown or missing key, wrong type, or what the dataclass itself refuses; names the key path.
    """
    made: T = _convert(cls, value, "")
    return made


def plain(value: Any) -> Any:
    """Plain data of a dataclass: dicts, lists and scalars; the inverse of `build`."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [plain(v) for v in value] if isinstance(value, tuple) else value


def unknown_key(where: str, name: str, known: Iterable[str], what: str = "key") -> ConfigError:
    """Error for a name that does not exist, with the nearest that does."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    return ConfigError(f"{where}: unknown {what} {name!r}; {remedy}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        (inner,) = (a for a in args if a is not type(None))  # X | None is the only union there is
        is_none = value is None or (isinstance(value, Text) and value.lower() in ("null", "none", "~"))
        return None if is_none else _convert(inner, value, where)
    if isinstance(value, Text) and hint is not str and origin is not Literal:
        value = _read_text(value, where)
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast(type[Any], hint), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _wrong(where, value, "a list")
        return tuple(_convert(args[0], v, _join(where, i)) for i, v in enumerate(value))
    if origin is Literal:
        if value not in args:
            raise _wrong(where, value, f"one of {', '.join(args)}")
        return str(value)
    return _scalar(hint, value, where)


def _dataclass(cls: type[Any], value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(where, value, f"keys of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    given: dict[str, Any] = {}
    for key, item in value.items():
        if key not in hints:
            raise unknown_key(_join(where, key), str(key), hints)
        given[key] = _convert(hints[key], item, _join(where, key))
    for f in dataclasses.fields(cls):
        if f.name not in given and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(where, f.name)}: missing; {cls.__name__} needs it")
    try:
        return cls(**given)
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}" if where else str(e)) from None


def _scalar(hint: Any, value: Any, where: str) -> bool | int | float | str:
    if hint in (str, bool):
        if isinstance(value, hint):
            return str(value) if hint is str else bool(value)
    elif isinstance(value, str):
        quantity = _quantity(hint, value, where)
        if quantity is not None:
            return quantity
    elif isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool):
        return hint(value)  # type: ignore[no-any-return]
    raise _wrong(where, value, _describe(hint, where))


def _quantity(hint: Any, text: str, where: str) -> int | float | None:
    """Number of a text with the unit that the field's name calls for, or None."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    number, unit = match.groups()
    if where.endswith("_bytes") and unit in _SIZES:
        return int(number) * _SIZES[unit] if number.isdecimal() else int(float(number) * _SIZES[unit])
    if where.endswith("_s") and unit in _DURATIONS:
        return float(number) * _DURATIONS[unit]
    return float(number) if hint is float and not unit else None  # YAML 1.1 takes 1e-3 for text


def _describe(hint: Any, where: str) -> str:
    if where.endswith("_bytes"):
        return 'bytes, a whole number or a size such as "256MiB"'
    if where.endswith("_s"):
        return 'seconds, a number or a duration such as "30s"'
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]


def _read_text(value: Text, where: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"{where}: {str(value)!r} cannot be read as YAML") from None


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _wrong(where: str, value: Any, expected: str) -> ConfigError:
    got = repr(value) if isinstance(value, (str, int, float, bool)) or value is None else f"a {type(value).__name__}"
    return ConfigError(f"{where or 'configuration'}: expected {expected}, got {got}")
