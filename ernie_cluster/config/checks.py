"""What configuration values check at birth: each raises ConfigError that names the field, its value and the bound."""

from __future__ import annotations

import math
import re
from collections.abc import Collection

from ernie_cluster.errors import ConfigError


def check_range(owner: object, low: float, *names: str, high: float = math.inf) -> None:
    """Raise ConfigError unless each named field is finite and within [low, high]; None passes."""
    for name in names:
        value = getattr(owner, name)
        if value is None or (math.isfinite(value) and low <= value <= high):
            continue
        bound = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise ConfigError(f"{name} = {value} must be {bound}")


def check_positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} = {value} must be greater than 0")


def check_unique(what: str, values: Collection[str]) -> None:
    twice = sorted({v for v in values if list(values).count(v) > 1})
    if twice:
        raise ConfigError(f"{what} {', '.join(map(repr, twice))} appears more than once; give each its own")


_LABEL = re.compile(r"(?P<key>[\w./-]+)=(?P<value>[\w.-]+)")


def check_labels(owner: object, name: str) -> None:
    """Raise ConfigError unless the named field holds labels of nodes, each key once; see `label_selector`."""
    labels: tuple[str, ...] = getattr(owner, name)
    for label in labels:
        if not _LABEL.fullmatch(label):
            raise ConfigError(f"{name} has {label!r}; a label is key=value, for example pool=decode")
    check_unique(f"{name}: key", [label.partition("=")[0] for label in labels])


def label_selector(labels: Collection[str]) -> dict[str, str]:
    """What nodes must have, by key: ("pool=decode",) gives {"pool": "decode"}."""
    return dict(label.split("=") for label in labels)
