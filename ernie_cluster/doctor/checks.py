"""All checks by name, what each is of, and which facts its judge takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ernie_cluster.doctor import judge_cluster, judge_config, judge_machine
from ernie_cluster.doctor.facts import Gpus, Missing
from ernie_cluster.doctor.finding import Finding
from ernie_cluster.doctor.gather import Facts
from ernie_cluster.doctor.need import Need

Scope = Literal["machine", "all", "cluster"]
"""machine: each on its own. all: those of the configuration, beside all machines together. cluster: between nodes."""


@dataclass(frozen=True, slots=True)
class Check:
    """One row."""

    name: str
    scope: Scope
    what: str
    facts: tuple[str, ...]
    """That `judge` takes after the need, in this order; without one of them the check is skipped."""
    judge: Callable[..., Iterable[Finding]]


CHECKS: tuple[Check, ...] = (
    Check("config", "all", "the configuration, beside its models' config.json", (), lambda need: ()),
    Check("software", "machine", "Python, and versions of packages", ("software",), judge_machine.software),
    Check("cpu", "machine", "cores, and instructions for bfloat16", ("cpu",), judge_machine.cpu),
    Check("gpus", "machine", "number, memory, driver, compute capability", ("gpus",), judge_machine.gpus),
    Check("nccl", "machine", "cupy and its NCCL, for KV from GPU to GPU", ("nccl", "gpus"), judge_machine.nccl),
    Check("ports", "machine", "of the API, Ray and Serve's proxy: free, or whose", ("ports",), judge_machine.ports),
    Check("haproxy", "machine", "Serve's proxy", ("haproxy",), judge_machine.haproxy),
    Check("shm", "machine", "/dev/shm, for Ray's object store", ("shm", "memory"), judge_machine.shm),
    Check("open_files", "machine", "ulimit -n", ("open_files",), judge_machine.open_files),
    Check("memory", "machine", "of the host, or the container", ("memory",), judge_machine.memory),
    Check("disks", "machine", "room for models and for Ray", ("disks",), judge_machine.disks),
    Check("checkpoints", "machine", "index, headers and shapes", ("checkpoints",), judge_config.checkpoints),
    Check(
        "plan", "all", "whether the pools fit, as `ernie-cluster plan` sums it", ("gpus", "memory"), judge_config.plan
    ),
    Check("nodes", "cluster", "which nodes run our code", ("nodes",), judge_cluster.nodes),
    Check("labels", "cluster", "node_labels that no node has", ("labels",), judge_cluster.labels),
    Check("clocks", "cluster", "of the nodes, against this machine's", ("clocks",), judge_cluster.clocks),
    Check("links", "cluster", "TCP between nodes: round trip and throughput", ("links",), judge_cluster.links),
    Check("nccl_links", "cluster", "NCCL between nodes with GPUs", ("nccl_links",), judge_cluster.nccl_links),
)


def facts_of(scope: Scope, names: Collection[str]) -> set[str]:
    """What the chosen checks of a scope need to know."""
    return {fact for check in CHECKS if check.scope == scope and check.name in names for fact in check.facts}


def judge(scope: Scope, names: Collection[str], need: Need, facts: Facts, node: str = "") -> Iterator[Finding]:
    """The chosen checks of `machine` or `cluster`, over the facts of one machine or of what lies between several."""
    for check in CHECKS:
        if check.scope == scope and check.name in names:
            for finding in _judged(check, need, facts):
                yield finding.on(node) if node else finding


def _judged(check: Check, need: Need, facts: Facts) -> Iterable[Finding]:
    missing = next((facts[name] for name in check.facts if isinstance(facts[name], Missing)), None)
    if missing is None:
        return check.judge(need, *(facts[name] for name in check.facts))
    if check.name == "nccl" and isinstance(facts["gpus"], Gpus):
        return [judge_machine.no_nccl(need, facts["gpus"], missing.reason)]
    return [Finding(check.name, "skipped", missing.reason)]


def judge_plan(need: Need, machines: Sequence[Facts]) -> Iterable[Finding]:
    """Whether the pools fit all machines together; skipped where one of them does not tell."""
    known: dict[str, list[Any]] = {"gpus": [], "memory": []}
    for name, values in known.items():
        for facts in machines:
            if isinstance(facts[name], Missing):
                return [Finding("plan", "skipped", f"{name} of a machine: {facts[name].reason}")]
            values.append(facts[name])
    return judge_config.plan(need, known["gpus"], known["memory"])
