"""What shall be rendered: a configuration, with the shape of each checkpoint and a short name for each model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ernie_cluster.config.api import ApiConfig, is_loopback
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.pool import PoolConfig
from ernie_cluster.config.presets import PACKAGED, POCKET, PRESETS
from ernie_cluster.config.published import PUBLISHED
from ernie_cluster.errors import ConfigError

SETUPS: Mapping[str, tuple[str, ...]] = {
    "pocket": ("pocket",),
    "28b": ("28b",),
    "28b-thinking": ("28b-thinking",),
    "424b": ("424b",),
    "both": ("28b", "424b"),
}
"""What `--preset` may say -> presets of its models."""

REPOSITORIES: Mapping[str, str] = {
    "28b": "baidu/ERNIE-4.5-VL-28B-A3B-PT",
    "28b-thinking": "baidu/ERNIE-4.5-VL-28B-A3B-Thinking",
    "424b": "baidu/ERNIE-4.5-VL-424B-A47B-PT",
}
"""Preset -> where its checkpoint is published; packaged ones are missing."""

KEYS_FILE = "/etc/ernie/keys.yaml"
"""Clients' keys, on each node with an API replica."""
POOL = "pool"
"""Key of the labels that nodes get."""
API = "api"
"""Value of that label for the nodes of API replicas and the router."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What shall be rendered."""

    name: str
    """Stands in names of files and objects."""
    config: ClusterConfig
    shapes: Mapping[str, ModelConfig]
    """By served name."""
    presets: Mapping[str, str]
    """Served name -> the preset that the model began as; only of those that did."""

    def short(self, model: ModelDeployment) -> str:
        """What pools of a model are named after where there is more than one."""
        return self.presets.get(model.name) or re.sub(r"[^a-z0-9]+", "-", model.name.lower()).strip("-")

    def group(self, model: ModelDeployment, pool: PoolConfig) -> str:
        """Name of a pool's nodes: its role, after the model where there are several."""
        return pool.role if len(self.config.models) == 1 else f"{self.short(model)}-{pool.role}"

    @property
    def repositories(self) -> Mapping[str, str]:
        """Folder -> repository that belongs there."""
        known = {m.path: REPOSITORIES.get(self.presets.get(m.name, "")) for m in self.config.models}
        return {path: name for path, name in known.items() if name is not None}

    @property
    def folders(self) -> list[str]:
        """Of checkpoints that do not come with the package."""
        return [m.path for m in self.config.models if m.path not in PACKAGED.values()]

    def check_reachable(self) -> None:
        """Raises ConfigError when nobody outside a node could reach its API."""
        if is_loopback(self.config.api.host):
            raise ConfigError(
                f"api.host = {self.config.api.host} is reached from its own machine only; set it to 0.0.0.0"
            )

    def check_pods(self, models_folder: str) -> None:
        """Raises ConfigError for what pods do not have."""
        self.check_reachable()
        api = self.config.api
        if api.listen_on != "every_node":
            raise ConfigError(
                "api.listen_on = head, and requests go to API pods, not to the head; set it to every_node"
            )
        if api.keys_file not in (None, KEYS_FILE):
            raise ConfigError(f"api.keys_file = {api.keys_file}: pods have the secret as {KEYS_FILE}; set it to that")
        for folder in self.folders:
            if not folder.startswith(f"{models_folder.rstrip('/')}/"):
                raise ConfigError(
                    f"path {folder} is not below {models_folder}, where pods have their volume; see --models"
                )


def preset_setup(name: str, models_folder: str, api_replicas: int = 2) -> Setup:
    """A ready-made setup for several machines; raises ConfigError for an unknown name."""
    if name not in SETUPS:
        raise ConfigError(f"--preset {name}: known are {', '.join(SETUPS)}; for others write a CONFIG")
    models, shapes, presets = [], {}, {}
    for preset in SETUPS[name]:
        path = PACKAGED.get(preset) or f"{models_folder.rstrip('/')}/{REPOSITORIES[preset].rpartition('/')[2]}"
        model = PRESETS[preset](path).models[0]
        models.append(model)
        shapes[model.name] = PUBLISHED.get(preset) or ModelConfig.from_folder(path)
        presets[model.name] = preset
    api = ApiConfig(
        host="0.0.0.0", grpc_port=9000, num_replicas=api_replicas, listen_on="every_node", keys_file=KEYS_FILE
    )
    return labelled(Setup(name, ClusterConfig(tuple(models), api=api), shapes, presets))


def local_setup(name: str, models_folder: str) -> Setup:
    """The same models for one machine, for this machine alone: no labels, no keys."""
    setup = preset_setup(name, models_folder)
    models = tuple(replace(m, pools=tuple(replace(p, node_labels=()) for p in m.pools)) for m in setup.config.models)
    return replace(setup, config=ClusterConfig(models, api=ApiConfig(grpc_port=setup.config.api.grpc_port)))


def config_setup(config: ClusterConfig, name: str) -> Setup:
    """A configuration of one's own, whose checkpoints are here; raises CheckpointError when they are not."""
    shapes = {m.name: ModelConfig.from_folder(m.path) for m in config.models}
    presets = {m.name: "pocket" for m in config.models if m.path == POCKET}  # its folder is elsewhere on other machines
    return labelled(Setup(name, config, shapes, presets))


def labelled(setup: Setup) -> Setup:
    """With a label for every pool that has none, and for the API: each gets nodes of its own."""
    config = setup.config
    models = tuple(
        replace(
            model,
            pools=tuple(
                replace(pool, node_labels=pool.node_labels or (f"{POOL}={setup.group(model, pool)}",))
                for pool in model.pools
            ),
        )
        for model in config.models
    )
    api = replace(config.api, node_labels=config.api.node_labels or (f"{POOL}={API}",))
    return replace(setup, config=replace(config, models=models, api=api))
