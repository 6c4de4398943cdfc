"""A configuration as a person would write it: presets by name, defaults left out, sizes with their unit."""

from __future__ import annotations

import dataclasses
from typing import Any

from ernie_cluster.config.convert import plain
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.presets import PACKAGED, PRESETS
from ernie_cluster.config.units import GIB, MIB
from ernie_cluster.render.setup import Setup


def arguments(setup: Setup) -> dict[str, Any]:
    """What `config.load.from_tree` reads back into the configuration."""
    tree: dict[str, Any] = brief(setup.config)
    tree["models"] = [_model(m, setup.presets.get(m.name)) for m in setup.config.models]
    return tree


def brief(value: Any) -> Any:
    """Plain data of a configuration value, without what is at its default."""
    if not dataclasses.is_dataclass(value):
        return [brief(v) for v in value] if isinstance(value, tuple) else value
    given = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    own = {f.name: given[f.name] for f in dataclasses.fields(value) if f.default != given[f.name]}
    return {name: _size(v) if name.endswith("_bytes") else brief(v) for name, v in own.items()}


def _model(model: ModelDeployment, preset: str | None) -> dict[str, Any]:
    if preset is None:
        return dict(brief(model))
    base = plain(PRESETS[preset](model.path).models[0])
    tree = {"preset": preset} if PACKAGED.get(preset) == model.path else {"preset": preset, "path": model.path}
    changed = {k for k, v in plain(model).items() if v != base[k]}
    return tree | {f.name: _whole(model, f.name) for f in dataclasses.fields(model) if f.name in changed}


def _whole(model: ModelDeployment, name: str) -> Any:
    """A field in place of a preset's: lists as a whole, of other values every key, as keys that are left out stay."""
    value = getattr(model, name)
    return brief(value) if isinstance(value, tuple) else plain(value)


def _size(num_bytes: int | None) -> int | str | None:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if num_bytes and num_bytes % unit == 0:
            return f"{num_bytes // unit}{name}"
    return num_bytes
