"""ClusterConfig -> groups of equal nodes: one per pool of each model, and one for the API.

A gang is placed on one node, never split (`STRICT_PACK`), so a node holds whole replicas only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.pool import PoolConfig
from ernie_cluster.config.units import GIB
from ernie_cluster.errors import ConfigError
from ernie_cluster.policy.sizing.check import pools_of, remedy, setting_of
from ernie_cluster.policy.sizing.gpus import GPUS
from ernie_cluster.policy.sizing.pools import PoolSizing, gigabytes, size_pool
from ernie_cluster.render.machines import Machine
from ernie_cluster.render.setup import API, Setup

_RAY_CPUS = 1
"""Of each node, for Ray's own processes and Serve's proxy."""
_RAY_BYTES = 4 * GIB
_OBJECT_STORE = {True: 8 * GIB, False: GIB // 2}
"""Whether the node has GPUs: what KV and embeddings go through where no faster way is."""
_PROCESS_BYTES = GIB
"""Interpreter, tokenizers and libraries of an API replica or the router."""


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Nodes that are alike."""

    name: str
    labels: tuple[str, ...]
    """As `key=value`; those that the pool or the API asks for."""
    machine: Machine
    num_replicas: int
    """That shall be there at the start."""
    max_replicas: int
    per_node: int
    """Replicas on one node, at least 1."""
    cpus: int
    """That the replicas of a node take, and that Ray is told of."""
    gpus: int
    """Likewise, in whole GPUs."""
    memory_bytes: int
    """Of a node's replicas, Ray's own processes and shared memory."""
    object_store_bytes: int
    shm_bytes: int
    """/dev/shm: the object store, and pieces between replicas of one node."""

    @property
    def nodes(self) -> int:
        return -(-self.num_replicas // self.per_node)

    @property
    def max_nodes(self) -> int:
        return -(-self.max_replicas // self.per_node)

    @property
    def all_cpus(self) -> int:
        """Ray's own among them."""
        return self.cpus + _RAY_CPUS


def node_groups(setup: Setup, machines: Sequence[Machine], *, fill: bool) -> tuple[NodeGroup, ...]:
    """All groups, the API's first.

    Args:
        setup: with labels.
        machines: to choose from, smallest first: the first that holds a replica is taken.
        fill: put as many replicas on a node as it holds; else one, as pods do.

    Raises:
        ConfigError: a replica fits on none of the machines; with the reason and a remedy.
    """
    pools = [_pool_group(setup, m, p, machines, fill=fill) for m in setup.config.models for p in m.pools]
    return (_api_group(setup, machines), *pools)


def _pool_group(
    setup: Setup, model: ModelDeployment, pool: PoolConfig, machines: Sequence[Machine], *, fill: bool
) -> NodeGroup:
    name = setup.group(model, pool)
    computing = next(p for p in pools_of(model) if p.role == pool.role)
    why: list[str] = []
    for machine in machines:
        if bool(machine.gpus) != bool(pool.num_gpus):
            continue
        sizing, problem = _sized(setup, model, computing, machine)
        group = _group(setup, name, pool, machine, sizing, 1)
        if problem := problem or _lack(group, machine):
            why.append(f"{machine}: {problem}")
            continue
        return _filled(setup, name, pool, machine, sizing) if fill else group
    kinds = "GPUs" if pool.num_gpus else "CPUs alone"
    raise ConfigError(f"pool {name}: a replica fits on no machine with {kinds}; {why[-1] if why else 'there is none'}")


def _sized(setup: Setup, model: ModelDeployment, pool: PoolConfig, machine: Machine) -> tuple[PoolSizing, str]:
    """Bytes of its ranks, and why they do not fit, or ""."""
    gpu = GPUS[machine.gpu] if machine.gpus else None
    sizing = size_pool(setting_of(model, setup.shapes[model.name], gpu), pool)
    return sizing, f"{sizing.problem}; {remedy(sizing)}" if sizing.problem else ""


def _lack(group: NodeGroup, machine: Machine) -> str:
    """What a machine has too little of, or ""."""
    if group.gpus > machine.gpus:
        return f"a replica takes {group.gpus} GPUs, all on one node, and it has {machine.gpus}; lower tp or dp"
    if group.all_cpus > machine.cpus:
        return f"a replica and Ray take {group.all_cpus} CPUs, and it has {machine.cpus}; lower num_cpus"
    if group.memory_bytes > machine.memory_bytes:
        return f"a replica and Ray take {gigabytes(group.memory_bytes)}, and it has {gigabytes(machine.memory_bytes)}"
    return ""


def _filled(setup: Setup, name: str, pool: PoolConfig, machine: Machine, sizing: PoolSizing) -> NodeGroup:
    """With as many replicas as a node holds and there are."""
    best = _group(setup, name, pool, machine, sizing, 1)
    for per_node in range(2, best.max_replicas + 1):
        group = _group(setup, name, pool, machine, sizing, per_node)
        if _lack(group, machine):
            break
        best = group
    return best


def _group(setup: Setup, name: str, pool: PoolConfig, machine: Machine, sizing: PoolSizing, per_node: int) -> NodeGroup:
    ranks = per_node * pool.dims.world
    store = _OBJECT_STORE[bool(pool.num_gpus)]
    shm = store + 2 * ranks * setup.config.transport.staging_bytes
    return NodeGroup(
        name=name,
        labels=pool.node_labels,
        machine=machine,
        num_replicas=pool.num_replicas,
        max_replicas=_most(setup, pool),
        per_node=per_node,
        cpus=math.ceil(ranks * pool.num_cpus),
        gpus=gpus_of(pool, per_node),
        memory_bytes=ranks * sizing.host_bytes + shm + _RAY_BYTES,
        object_store_bytes=store,
        shm_bytes=shm,
    )


def gpus_of(pool: PoolConfig, replicas: int) -> int:
    """Whole GPUs that hold so many replicas; parts of one GPU are of one rank or another, not of two GPUs."""
    if not pool.num_gpus:
        return 0
    return -(-replicas * pool.dims.world // math.floor(1 / pool.num_gpus))


def _most(setup: Setup, pool: PoolConfig) -> int:
    """Replicas that the autoscaler may want, or those that there are."""
    config = setup.config
    if config.scaling is None:
        return pool.num_replicas
    within = math.floor(config.budget / config.holds(pool)) if config.holds(pool) else pool.num_replicas
    return max(pool.num_replicas, min(pool.max_replicas or within, within))


def _api_group(setup: Setup, machines: Sequence[Machine]) -> NodeGroup:
    """One replica per node, so that a lost node is one lost replica; the router is on one of them."""
    api = setup.config.api
    decoding = api.decode_processes * api.decode_memory_bytes if api.decode_processes else 0
    store = _OBJECT_STORE[False]
    memory = 2 * _PROCESS_BYTES + decoding + api.media_cache_bytes + 2 * api.max_body_bytes + store + _RAY_BYTES
    cpus = 1 + api.preprocess_threads + api.decode_processes
    for machine in machines:
        group = NodeGroup(
            API, api.node_labels, machine, api.num_replicas, api.num_replicas, 1, cpus, 0, memory, store, store
        )
        if not machine.gpus and not _lack(group, machine):
            return group
    raise ConfigError(f"the API takes {cpus} CPUs and {gigabytes(memory)} a replica, more than any machine here has")
