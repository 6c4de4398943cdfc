"""A Ray cluster's nodes, asked and tried from one of its machines; each question has a deadline.

Only acts: `doctor` says what to gather on a node and what to think of it. Nothing that is started here outlives its
question, and nothing takes cores, so that a cluster at work can be asked, too; NCCL is tried on GPUs that are free.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ernie_cluster.doctor import tcp
from ernie_cluster.doctor.facts import Clock, Link, Missing, Node
from ernie_cluster.doctor.gather import gather, timeout_of
from ernie_cluster.doctor.judge_cluster import pairs_of
from ernie_cluster.doctor.need import Need
from ernie_cluster.errors import ConfigError

START_TIMEOUT_S = 60.0
"""For a node's first worker, which imports this package."""
NCCL_TIMEOUT_S = 60.0
"""For two processes with CUDA, a communicator and a gigabyte."""
_NUM_ASKED = 3
"""Times that each clock is read; the fastest answer counts."""


def connect(address: str) -> None:
    """Join the cluster at `address`; raises ConfigError when there is none, or Ray or Python is another version there."""
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, RayError) as e:
        words = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ConfigError(f"no Ray cluster at {address}: {words}; start one with `ray start --head`") from None


def disconnect() -> None:
    ray.shutdown()


def facts_of_nodes(names: Collection[str], need: Need) -> dict[Node, dict[str, Any]]:
    """What `gather` finds on every node, all at the same time; of one that cannot run it nothing but `Node.error`."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    tasks = {node["NodeID"]: _remote(_look, node["NodeID"]).remote(sorted(names), need) for node in alive}
    deadline_s = time.monotonic() + START_TIMEOUT_S + max(map(timeout_of, names), default=0.0)
    found: dict[Node, dict[str, Any]] = {}
    for node in alive:
        facts, error = dict.fromkeys(names, Missing("the node does not run our code")), ""
        try:
            facts = ray.get(tasks[node["NodeID"]], timeout=max(0.0, deadline_s - time.monotonic()))
        except (RayError, TimeoutError) as e:
            error = _words(e)
        gpus = float(node["Resources"].get("GPU", 0))
        found[Node(node["NodeID"], node["NodeManagerAddress"], gpus, error)] = facts
    return found


def facts_between(names: Collection[str], need: Need, nodes: Sequence[Node]) -> dict[str, Any]:
    """Of `nodes` themselves and what lies between them.

    Args:
        names: of nodes, labels, clocks, links, nccl_links.
        need: whose labels count.
        nodes: all; those with an error are left out of what is tried.
    """
    sound = [node for node in nodes if not node.error]
    asked: dict[str, Callable[[], object]] = {
        "nodes": lambda: nodes,
        "labels": lambda: _labels(need),
        "clocks": lambda: clocks(sound),
        "links": lambda: [_tcp(a, b) for a, b in _pairs(sound)],
        "nccl_links": lambda: [_nccl(a, b) for a, b in _pairs(node for node in sound if node.num_gpus >= 1)],
    }
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = asked[name]()
        except (RayError, TimeoutError) as e:  # a node that leaves meanwhile
            found[name] = Missing(_words(e))
    return found


def _labels(need: Need) -> list[tuple[str, tuple[str, ...]]]:
    if need.config is None:
        return []
    from ernie_cluster.actors.launch import unmatched_labels  # torch, which the workers on the nodes do without

    return unmatched_labels(need.config)


def clocks(nodes: Iterable[Node]) -> list[Clock]:
    """Each node's clock against this machine's."""
    found = []
    for node in nodes:
        readings = []
        for _ in range(_NUM_ASKED):
            before_s, start_s = time.time(), time.monotonic()
            told_s = ray.get(_remote(_time, node.id).remote(), timeout=START_TIMEOUT_S)
            half_s = (time.monotonic() - start_s) / 2
            readings.append(Clock(node.name, told_s - before_s - half_s, half_s))
        found.append(min(readings, key=lambda clock: clock.error_s))
    return found


def _pairs(nodes: Iterable[Node]) -> list[tuple[Node, Node]]:
    by_id = {node.id: node for node in nodes}
    return [(by_id[a], by_id[b]) for a, b in pairs_of(sorted(by_id))]


def _tcp(first: Node, second: Node) -> Link:
    """From `first` to `second`; processes of Ray at both ends, as those that hand KV over."""
    ends = [_remote(_Wire, node.id).remote() for node in (first, second)]
    try:
        port = ray.get(ends[1].offer.remote(), timeout=START_TIMEOUT_S)
        trip_s, rate = ray.get(ends[0].measure.remote(second.name, port), timeout=START_TIMEOUT_S)
        return Link(first.name, second.name, trip_s, rate)
    except (RayError, TimeoutError) as e:
        return Link(first.name, second.name, error=_words(e))
    finally:
        _end(ends)


def _nccl(first: Node, second: Node) -> Link:
    """From a GPU of `first` to one of `second`."""
    names = (first.name, second.name)
    ends = [_remote(_Gpu, node.id, num_gpus=1).remote() for node in (first, second)]
    try:
        uid = ray.get([end.unique_id.remote() for end in ends], timeout=START_TIMEOUT_S)[0]
    except GetTimeoutError:
        _end(ends)
        return Link(*names, untried=f"no free GPU on both within {START_TIMEOUT_S:g} s; try before anything is served")
    except RayError as e:
        _end(ends)
        return Link(*names, error=_words(e))
    try:
        rates = ray.get([end.meet.remote(uid, rank) for rank, end in enumerate(ends)], timeout=NCCL_TIMEOUT_S)
        return Link(*names, bytes_per_s=min(rates))
    except (RayError, TimeoutError) as e:
        return Link(*names, error=_words(e))
    finally:
        _end(ends)


def _end(actors: Iterable[Any]) -> None:
    for actor in actors:
        ray.kill(actor)


def _remote(what: Any, node_id: str, num_gpus: int = 0) -> Any:
    """A function or an actor's class, to run on this node or not at all."""
    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, num_gpus=num_gpus)(what).options(scheduling_strategy=where)


def _words(error: Exception) -> str:
    """The cause in one line."""
    if isinstance(error, TimeoutError):  # Ray's own is one, too
        return "no answer in time; is a firewall between the nodes, or the node overloaded?"
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _look(names: list[str], need: Need) -> dict[str, Any]:
    return gather(names, need)


def _time() -> float:
    return time.time()


class _Wire:
    """One end of a TCP connection."""

    def offer(self) -> int:
        return tcp.offer()

    def measure(self, host: str, port: int) -> tuple[float, float]:
        return tcp.measure(host, port)


class _Gpu:
    """A process with one GPU."""

    def __init__(self) -> None:
        import torch

        from ernie_cluster.transport.gpu import CudaGpu

        self._gpu = CudaGpu(torch.device("cuda", 0))
        self._gpu.bind()

    def unique_id(self) -> Any:
        return self._gpu.nccl.get_unique_id()

    def meet(self, uid: Any, rank: int) -> float:
        from ernie_cluster.doctor.gpu_pair import meet

        return meet(self._gpu, uid, rank)
