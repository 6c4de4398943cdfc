"""Reads API keys from a file.

No message shows a value of the file: somebody may have put a key there where its hash belongs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ernie_cluster.config.convert import build
from ernie_cluster.config.keys import ApiKey, is_sha256
from ernie_cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class _Keys:
    keys: tuple[ApiKey, ...]


def load_keys(path: str | Path) -> tuple[ApiKey, ...]:
    """Read a YAML list of keys; an empty list lets nobody in.

    Raises:
        ConfigError: no such file, not such a list, or one name or key twice.
    """
    try:
        tree = yaml.safe_load(Path(path).read_bytes())
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}") from None
    except yaml.MarkedYAMLError as e:
        line = f", line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{path}: not valid YAML") from None
    _check_shape(path, tree)
    try:
        keys = build(_Keys, {"keys": tree}).keys
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from None
    for field in ("name", "sha256"):
        if len({getattr(key, field) for key in keys}) < len(keys):
            raise ConfigError(f"{path}: two keys have one {field}; give each its own")
    return keys


def _check_shape(path: str | Path, tree: Any) -> None:
    """What `build` would refuse by showing the value."""
    if not isinstance(tree, list):
        raise ConfigError(f"{path}: expected a list of keys; `ernie-cluster key` prints a line of it")
    for i, entry in enumerate(tree):
        if not isinstance(entry, dict) or not is_sha256(entry.get("sha256")):
            raise ConfigError(
                f"{path}: keys.{i} must have a name and sha256: 64 hexadecimal digits, never the key itself; "
                "`ernie-cluster key` prints such a line"
            )
