"""Every key of a configuration as one Markdown page, read from the dataclasses and the text beneath their fields.

Knows no key by name, but for `preset`, which is no field. A field without such a text is an error: a key that nobody
explains would be in the page without a meaning.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.keys import ApiKey
from ernie_cluster.config.presets import PACKAGED, PRESETS
from ernie_cluster.config.units import GIB, KIB, MIB

_HEAD = """\
# Configuration reference

Written by `ernie-cluster config --reference`; change the text beneath the fields in `ernie_cluster/config`, not this page.

A configuration is one YAML file. Only `models` is required, and of a model with a preset only what the preset does not
say. Every key has one value, from the last of these that names it:

1. the default below, or what the entry's `preset` says,
2. the file,
3. the environment: `ERNIE__` and the key's path in capitals, `__` for each dot: `ERNIE__API__PORT=9000`,
4. `--set`, with dots: `--set api.port=9000`.

Items of a list are named by their number, from 0; the next free number appends: `models.0.engine.max_num_seqs`.
`null` stands for none. A key named `*_bytes` takes a whole number or a size (`256MiB`, `12GiB`, `1GB`), one named `*_s` seconds
or a duration (`50ms`, `30s`, `15min`, `1h`). An unknown key, a wrong type and values that cannot work together are refused at
the start, with the key, the value and the bound.

```sh
ernie-cluster config cluster.yaml                       # check a file, and show every key with its value
ernie-cluster config cluster.yaml --set api.port=9000
```
"""

_PRESETS = """
Instead of all this an entry may begin with `preset: NAME`. Its other keys replace the preset's, lists as a whole. Names:
{names}. {packaged} need no `path`.
"""

_KEYS_HEAD = """
## The keys file

`api.keys_file` names another file: a YAML list of clients' keys, one entry each. `ernie-cluster key --name NAME` makes a key and
prints its entry.
"""


@dataclass(frozen=True, slots=True)
class Key:
    """One key."""

    name: str
    hint: Any
    """Its type, without None."""
    may_be_none: bool
    default: Any
    """`dataclasses.MISSING` where it has to be given."""
    meaning: str

    @property
    def inner(self) -> type[Any] | None:
        """The dataclass whose keys are below this one."""
        hint = typing.get_args(self.hint)[0] if self.is_list else self.hint
        return typing.cast(type[Any], hint) if dataclasses.is_dataclass(hint) else None

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.hint) is tuple


def meanings(cls: type[Any]) -> dict[str, str]:
    """The text beneath each annotated name of a class and of those that it inherits from; "" where there is none."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for node, following in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = _text_of(following)
    return found


def keys_of(cls: type[Any]) -> list[Key]:
    """The keys of a configuration's dataclass, in order."""
    hints, texts = typing.get_type_hints(cls), meanings(cls)
    found = []
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
        if is_union:
            (hint,) = (a for a in typing.get_args(hint) if a is not type(None))
        found.append(Key(f.name, hint, is_union, f.default, texts[f.name]))
    return found


def sections(cls: type[Any] = ClusterConfig, path: str = "") -> Iterator[tuple[str, type[Any], list[Key]]]:
    """(path, class, keys) of a dataclass and of all below it; an item of a list is called N."""
    keys = keys_of(cls)
    yield path, cls, keys
    for key in keys:
        if key.inner is not None:
            step = f"{path}.{key.name}" if path else key.name
            yield from sections(key.inner, f"{step}.N" if key.is_list else step)


@cache
def reference() -> str:
    """The page."""
    parts = [_HEAD]
    for path, cls, keys in sections():
        parts.append(_section(path, cls, keys))
        if path == "models.N":
            packaged = " and ".join(f"`{name}`" for name in PACKAGED)
            parts.append(_PRESETS.format(names=", ".join(f"`{name}`" for name in PRESETS), packaged=packaged))
    parts.append(_KEYS_HEAD)
    parts.append(_table("", keys_of(ApiKey)))
    return "".join(parts)


def _section(path: str, cls: type[Any], keys: list[Key]) -> str:
    title = f"`{path}`" if path else "The top"
    about = _plain((inspect.getdoc(cls) or "").split("\n\n")[0])
    variable = f"ERNIE__{path.upper().replace('.', '__')}__KEY" if path else "ERNIE__KEY"
    return f"\n## {title}\n\n{about} In the environment: `{variable}`.\n{_table(path, keys)}"


def _table(path: str, keys: list[Key]) -> str:
    rows = [f"| `{k.name}` | {_type(k, path)} | {_default(k)} | {_plain(k.meaning)} |" for k in keys]
    return "\n".join(["", "| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows, ""])


def _type(key: Key, path: str) -> str:
    if key.inner is not None:
        step = (f"{path}.{key.name}" if path else key.name) + (".N" if key.is_list else "")
        kind = f"[keys](#{step.lower().replace('.', '')})"
    else:
        kind = _word(typing.get_args(key.hint)[0] if key.is_list else key.hint, key.name)
    return f"list of {kind}" if key.is_list else kind


def _word(hint: Any, name: str) -> str:
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Union:  # of literals
        return ", ".join(_word(a, name) for a in typing.get_args(hint))
    if name.endswith("_bytes"):
        return "size"
    if name.endswith("_s"):
        return "duration"
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}[hint]


def _default(key: Key) -> str:
    value = key.default
    if value is dataclasses.MISSING:
        return "required"
    if value is None:
        return "none"
    if dataclasses.is_dataclass(value):
        return "its own"
    if isinstance(value, tuple):
        return "empty" if not value else ", ".join(f"`{v}`" for v in value)
    return f"`{_value(key.name, value)}`"


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if name.endswith("_bytes"):
        for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
            if value and value % size == 0:
                return f"{value // size}{unit}"
    return f"{value:g}s" if name.endswith("_s") and value else f"{value}"


def _text_of(node: ast.stmt | None) -> str:
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return inspect.cleandoc(node.value.value) if is_text else ""  # type: ignore[union-attr]


def _plain(text: str) -> str:
    """One line of a table: no line breaks, no bars, no stars that Markdown would take for emphasis."""
    pieces = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(p if p.startswith("`") else p.replace("*", r"\*") for p in pieces).replace("|", r"\|")
