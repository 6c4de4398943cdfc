"""YAML, environment and `key.path=value` overrides -> `ClusterConfig`, and back.

Nothing here knows a field by name: the dataclasses' type hints say what is read, `*_bytes` takes sizes ("256MiB") and
`*_s` durations ("30s"). Later sources win: file, then `ERNIE__API__PORT=9000`, then overrides. A model entry may say
`preset: 28b`; its other keys replace the preset's, lists as a whole. `preset: pocket` needs no other key.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.convert import Text, build, plain, unknown_key
from ernie_cluster.config.presets import PACKAGED, PRESETS
from ernie_cluster.errors import ConfigError

ENV_PREFIX = "ERNIE__"

Assignment = tuple[str, list[str], str]
"""(where it comes from, key path, value as text)."""


def load_config(path: str | Path | None, env: Mapping[str, str], overrides: Sequence[str] = ()) -> ClusterConfig:
    """Read a configuration.

    Args:
        path: YAML file; None = from `env` and `overrides` alone.
        env: environment; only names that begin with ERNIE__ count, `__` stands for a dot, case does not matter.
        overrides: `key.path=value` each; list items by index, one past the end appends.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a wrong type, or a configuration that cannot work.
    """
    return from_tree({} if path is None else _read(Path(path)), env, overrides)


def from_tree(given: Mapping[str, Any], env: Mapping[str, str], overrides: Sequence[str] = ()) -> ClusterConfig:
    """As `load_config`, of what a file would hold; `given` stays as it is."""
    tree = copy.deepcopy(dict(given))
    assignments = [*_from_env(env), *_from_overrides(overrides)]
    for origin, keys, value in assignments:
        if keys[-1] == "preset":
            _assign(tree, origin, keys, value)
    _expand_presets(tree)
    for origin, keys, value in assignments:
        if keys[-1] != "preset":
            _assign(tree, origin, keys, value)
    return build(ClusterConfig, tree)


def dump_config(config: ClusterConfig) -> str:
    """The configuration as YAML that `load_config` reads back into an equal value."""
    return yaml.dump(plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Safe dumper that escapes Unicode's line breaks, which the loader would fold into a space."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(c in data for c in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} appears twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}") from None
    except (yaml.YAMLError, ValueError) as e:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values at the top, got a {type(tree).__name__}")
    return tree


def _from_env(env: Mapping[str, str]) -> list[Assignment]:
    return [
        (name, name.removeprefix(ENV_PREFIX).lower().split("__"), env[name])
        for name in sorted(env)
        if name.startswith(ENV_PREFIX)
    ]


def _from_overrides(overrides: Sequence[str]) -> list[Assignment]:
    assignments: list[Assignment] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {text!r} must look like key.path=value, for example api.port=9000")
        assignments.append((text, key.strip().split("."), value.strip()))
    return assignments


def _assign(tree: dict[str, Any], origin: str, keys: list[str], value: str) -> None:
    """Set one leaf, making what is missing on the way; what it means is up to `build`."""
    node: Any = tree
    for depth, key in enumerate(keys):
        is_last = depth == len(keys) - 1
        child: Any = Text(value) if is_last else _empty(keys[depth + 1])
        if isinstance(node, dict):
            if is_last or node.get(key) is None:
                node[key] = child
            node = node[key]
        elif isinstance(node, list) and key.isdecimal() and int(key) <= len(node):
            index = int(key)
            if index == len(node):
                node.append(child)
            elif is_last:
                node[index] = child
            node = node[index]
        else:
            bound = f"an index from 0 to {len(node)}" if isinstance(node, list) else "no key below it"
            raise ConfigError(f"{origin}: {'.'.join(keys[:depth])} takes {bound}, got {key!r}")


def _empty(key: str) -> dict[str, Any] | list[Any]:
    return [] if key.isdecimal() else {}


def _expand_presets(tree: dict[str, Any]) -> None:
    """Replace every model entry that names a preset by the preset's fields, overlaid with its own."""
    models = tree.get("models")
    if not isinstance(models, list):
        return  # a wrong type: `build` says so
    for i, entry in enumerate(models):
        if isinstance(entry, dict) and "preset" in entry:
            models[i] = _expanded(entry, f"models.{i}")


def _expanded(entry: dict[str, Any], where: str) -> dict[str, Any]:
    own = dict(entry)
    name = str(own.pop("preset"))
    if name not in PRESETS:
        raise unknown_key(f"{where}.preset", name, PRESETS, what="preset")
    base = plain(PRESETS[name](PACKAGED.get(name, "-")).models[0])
    if name not in PACKAGED:
        del base["path"]  # required of the entry itself
    return _overlay(base, own)


def _overlay(base: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        below = merged.get(key)
        merged[key] = _overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
