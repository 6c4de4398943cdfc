"""What a configuration asks of the machines: a value that the judges compare facts with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.pool import PoolConfig
from ernie_cluster.policy.sizing.check import pools_of, setting_of
from ernie_cluster.policy.sizing.pools import size_pool


@dataclass(frozen=True, slots=True)
class Need:
    """A configuration beside the shapes of its models."""

    config: ClusterConfig | None = None
    """None = none was given: machines are then held against what every configuration asks for."""
    shapes: Mapping[str, ModelConfig] = field(default_factory=dict)
    """By served name, of the models whose config.json could be read."""
    is_whole: bool = True
    """All of it shall run on the machine that is judged; else on several together."""

    @property
    def pools(self) -> tuple[tuple[ModelDeployment, PoolConfig], ...]:
        """As they will compute, see `pools_of`."""
        models = self.config.models if self.config is not None else ()
        return tuple((model, pool) for model in models for pool in pools_of(model))

    @property
    def num_gpus(self) -> float:
        """Of all replicas that it begins with."""
        return sum(pool.num_replicas * pool.dims.world * pool.num_gpus for _, pool in self.pools)

    @property
    def uses_cpu(self) -> bool:
        """Some pool computes without GPUs, or none is known."""
        return not self.pools or any(not pool.num_gpus for _, pool in self.pools)

    @property
    def quantizations(self) -> set[str]:
        """Of the models with GPUs: what the configuration says, else what the checkpoint is stored as."""
        found: set[str] = set()
        for model in {model.name: model for model, pool in self.pools if pool.num_gpus}.values():
            shape = self.shapes.get(model.name)
            found.add(shape.quantization if model.quantization == "auto" and shape is not None else model.quantization)
        return found

    @property
    def host_bytes(self) -> int | None:
        """Memory that all ranks take on their hosts; None where the shape of a model is not known.

        Raises:
            ConfigError: a pool does not fit its model; `ernie-cluster plan` says the same.
        """
        if self.config is None or any(model.name not in self.shapes for model in self.config.models):
            return None
        return sum(self._host_bytes_of_pools())

    def _host_bytes_of_pools(self) -> Iterator[int]:
        for model, pool in self.pools:
            if not pool.num_gpus:  # of those with GPUs it depends on the kind
                setting = setting_of(model, self.shapes[model.name], None)
                yield pool.num_replicas * pool.dims.world * size_pool(setting, pool).host_bytes

    @property
    def ports(self) -> dict[int, str]:
        """That the API listens on -> for what."""
        if self.config is None:
            return {8000: "HTTP"}
        api = self.config.api
        return {api.port: "HTTP"} | ({} if api.grpc_port is None else {api.grpc_port: "gRPC"})
