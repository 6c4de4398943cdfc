"""Every checked-in cluster has what `ernie-cluster plan` counts for the application that runs on it: GPUs, their memory, the host's."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from ernie_cluster.config.checks import label_selector
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.load import from_tree
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.published import PUBLISHED
from ernie_cluster.policy.sizing.check import pools_of, setting_of
from ernie_cluster.policy.sizing.gpus import GPUS
from ernie_cluster.policy.sizing.pools import size_pool
from ernie_cluster.render.machines import MACHINES, Machine
from ernie_cluster.render.pods import GPU_PRODUCTS
from tests.unit.render.consistency import ROOT, node_faults, num_bytes

KUBERNETES = sorted(ROOT.glob("k8s/overlays/*/ray-service.*.yaml"))
RAY_UP = sorted(ROOT.glob("deploy/ray-up.*.yaml"))
KINDS = {machine.name: machine for machines in MACHINES.values() for machine in machines}
PRODUCTS = {product: gpu for gpu, product in GPU_PRODUCTS.items()}

Tree = dict[str, Any]


@dataclass(frozen=True)
class Nodes:
    """Nodes that are alike, as a file says."""

    labels: dict[str, str]
    count: int
    cpus: float
    gpus: int
    gpu: str
    """A name of `GPUS`; "" without."""
    memory_bytes: int
    """For replicas and Ray itself."""


def read(path: Path) -> Tree:
    tree: Tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    return tree


def pods(service: Tree) -> list[Nodes]:
    """What KubeRay starts for a RayService."""
    found = []
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        pod, params = group["template"]["spec"], group["rayStartParams"]
        limits = pod["containers"][0]["resources"]["limits"]
        (shm,) = [v["emptyDir"]["sizeLimit"] for v in pod["volumes"] if v["name"] == "shm"]
        found.append(
            Nodes(
                group["labels"],
                group["minReplicas"],
                float(params["num-cpus"]),
                int(limits.get("nvidia.com/gpu", 0)),
                PRODUCTS.get(pod.get("nodeSelector", {}).get("nvidia.com/gpu.product", ""), ""),
                num_bytes(limits["memory"]) - num_bytes(shm),
            )
        )
    return found


def rented(cluster: Tree) -> list[Nodes]:
    """What `ray up` rents beside the head; a machine is as large as its maker says."""
    found = []
    for name, kind in cluster["available_node_types"].items():
        if name != cluster["head_node_type"]:
            config, resources = kind["node_config"], kind["resources"]
            machine = KINDS[config.get("InstanceType") or config["machineType"]]
            assert resources["CPU"] < machine.cpus, "Ray's own processes need some"
            assert resources.get("GPU", 0) == machine.gpus
            found.append(_on(machine, kind["labels"], kind["min_workers"], resources["CPU"]))
    return found


def owned(cluster: Tree, text: str) -> list[Nodes]:
    """Machines of one's own: how large they have to be stands in the comment, labels in the command that starts Ray there."""
    sizes = dict(re.findall(r"^#   (10\.\S+)  \S+, as large as (\S+)", text, flags=re.M))
    starts = re.findall(r'" (\S+) "\*\) L=(\S+) C=(\d+);;', cluster["worker_start_ray_commands"][-1])
    assert [address for address, *_ in starts] == cluster["provider"]["worker_ips"] == list(sizes)
    kinds = [(sizes[address], labels, cpus) for address, labels, cpus in starts]
    return [
        _on(KINDS[size], label_selector(labels.split(",")), kinds.count((size, labels, cpus)), float(cpus))
        for size, labels, cpus in dict.fromkeys(kinds)
    ]


def _on(machine: Machine, labels: dict[str, str], count: int, cpus: float) -> Nodes:
    return Nodes(labels, count, cpus, machine.gpus, machine.gpu, machine.memory_bytes)


def nodes_of(cluster: Tree, text: str = "") -> list[Nodes]:
    return rented(cluster) if "available_node_types" in cluster else owned(cluster, text)


def application(serve: Tree) -> tuple[ClusterConfig, dict[str, ModelConfig]]:
    """The configuration of an application, and the shape of each checkpoint by served name."""
    (args,) = [a["args"] for a in serve["applications"]]
    config = from_tree(args, {})
    shapes = [
        PUBLISHED.get(a["preset"]) or ModelConfig.from_folder(m.path)
        for a, m in zip(args["models"], config.models, strict=True)
    ]
    return config, {m.name: shape for m, shape in zip(config.models, shapes, strict=True)}


def plan_faults(serve: Tree, nodes: list[Nodes]) -> list[str]:
    """What the pools need that these nodes do not have."""
    config, shapes = application(serve)
    found = node_faults(config, [(n.labels, n.count, n.cpus, float(n.gpus)) for n in nodes])
    if found:
        return found
    needed = 0.0
    for model in config.models:
        for pool in pools_of(model):
            (own,) = [n for n in nodes if label_selector(pool.node_labels).items() <= n.labels.items()]
            sizing = size_pool(setting_of(model, shapes[model.name], GPUS.get(own.gpu)), pool)
            needed += sizing.num_gpus
            if sizing.problem:
                found.append(f"{model.name}, {pool.role}: {sizing.problem}")
            on_one = math.ceil(pool.num_replicas / own.count) * pool.dims.world * sizing.host_bytes
            if on_one > own.memory_bytes:
                found.append(f"{model.name}, {pool.role}: {on_one} bytes of host memory on {own.memory_bytes}")
    if (there := sum(n.count * n.gpus for n in nodes)) < math.ceil(needed):
        found.append(f"{needed:g} GPUs are needed, and there are {there}")
    return found


def serve_of(service: Tree) -> Tree:
    serve: Tree = yaml.safe_load(service["spec"]["serveConfigV2"])
    return serve


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda p: p.stem)
def test_pods_have_what_the_plan_counts(path: Path) -> None:
    service = read(path)
    assert plan_faults(serve_of(service), pods(service)) == []


@pytest.mark.parametrize("path", [p for p in RAY_UP if ".local-cpu." not in p.name], ids=lambda p: p.stem)
def test_machines_have_what_the_plan_counts(path: Path) -> None:
    cluster = read(path)
    serve = read(ROOT / cluster["file_mounts"]["~/serve.yaml"])
    assert plan_faults(serve, nodes_of(cluster, path.read_text(encoding="utf-8"))) == []


def test_this_machine_needs_neither_gpus_nor_labels() -> None:
    (path,) = [p for p in RAY_UP if ".local-cpu." in p.name]
    name = path.stem.rpartition(".")[2]
    config, _ = application(read(ROOT / f"deploy/serve.{name}.yaml"))
    pools = [p for m in config.models for p in m.pools]
    assert not any(p.num_gpus or p.node_labels for p in pools)
    assert not config.api.node_labels
    assert math.fsum(p.num_replicas * p.dims.world * p.num_cpus for p in pools) <= 1, "any laptop has a core"


def test_every_application_has_a_cluster() -> None:
    mounted = {read(p).get("file_mounts", {}).get("~/serve.yaml") for p in RAY_UP}
    alone = {str(p.relative_to(ROOT)) for p in ROOT.glob("deploy/serve.*.yaml")} - mounted
    assert alone == {
        "deploy/serve.pocket.yaml",
        "deploy/serve.28b-thinking.yaml",
    }  # for this machine; as large as the 28b
    assert len(KUBERNETES) == len(list(ROOT.glob("k8s/overlays/*")))


def _group(service: Tree, name: str) -> Tree:
    (group,) = [g for g in service["spec"]["rayClusterConfig"]["workerGroupSpecs"] if g["groupName"] == name]
    return dict(group)


def _pod(service: Tree, name: str) -> Tree:
    pod: Tree = _group(service, name)["template"]["spec"]
    return pod


def _fewer(service: Tree) -> None:
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][-1]["minReplicas"] = 0


def _configure(old: str, new: str) -> Callable[[Tree], Any]:
    def change(service: Tree) -> None:
        text = service["spec"]["serveConfigV2"]
        assert old in text
        service["spec"]["serveConfigV2"] = text.replace(old, new)

    return change


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (lambda s: _pod(s, "decode")["nodeSelector"].update({"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}), "weights"),
        (lambda s: _pod(s, "prefill")["containers"][0]["resources"]["limits"].update(memory="12Gi"), "of host memory"),
        (lambda s: _pod(s, "decode")["containers"][0]["resources"]["limits"].update({"nvidia.com/gpu": "4"}), "8 GPUs"),
        (_fewer, "on 0 nodes"),
        (_configure("preset: 424b\n", "preset: 424b\n          engine:\n            kv_cache_bytes: 60GiB\n"), "KV"),
    ],
)  # fmt: skip
def test_pods_that_are_too_small_are_found(break_it: Callable[[Tree], Any], word: str) -> None:
    service = read(ROOT / "k8s/overlays/424b/ray-service.424b.yaml")
    break_it(service)
    assert word in " ".join(plan_faults(serve_of(service), pods(service)))


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (lambda t: t["decode"]["node_config"].update(InstanceType="p5.48xlarge"), "weights"),
        (lambda t: t["decode"].update(min_workers=0), "on 0 nodes"),
        (lambda t: t["decode"]["labels"].update(pool="encode"), "0 groups have"),
        (lambda t: t["prefill"]["resources"].update(CPU=16), "32 CPUs on 8 and 16"),
    ],
)
def test_machines_that_are_too_small_are_found(break_it: Callable[[Tree], Any], word: str) -> None:
    cluster = read(ROOT / "deploy/ray-up.aws.424b.yaml")
    break_it(cluster["available_node_types"])
    assert word in " ".join(plan_faults(read(ROOT / "deploy/serve.424b.yaml"), nodes_of(cluster)))


def test_smaller_machines_of_ones_own_are_found() -> None:
    path = ROOT / "deploy/ray-up.on-prem.424b.yaml"
    text = path.read_text(encoding="utf-8").replace(
        "decode, as large as 8x-h200-141g", "decode, as large as 8x-h100-80g"
    )
    said = plan_faults(read(ROOT / "deploy/serve.424b.yaml"), nodes_of(read(path), text))
    assert "more than 85.5 GB of h100-80g" in " ".join(said)
