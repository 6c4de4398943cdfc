"""What no schema sees: whether a cluster and the application that shall run on it fit each other."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import yaml

from ernie_cluster.config.checks import label_selector
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.load import from_tree
from ernie_cluster.render.serve_config import API_DEPLOYMENT, APPLICATION

ROOT = Path(__file__).parents[3]
UNITS = {"Mi": 2**20, "Gi": 2**30}


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pin(package: str) -> str:
    """The lower bound of a dependency, as 2.60."""
    (line,) = [d for d in pyproject()["project"]["dependencies"] if d.startswith(package)]
    return str(line.partition(">=")[2].partition(",")[0])


def application_faults(serve: dict[str, Any]) -> list[str]:
    """Of a file of `serve deploy`."""
    (application,) = serve["applications"]
    config = from_tree(application["args"], {})
    found = []
    if application["name"] != APPLICATION:
        found.append(f"application {application['name']}, not {APPLICATION}")
    numbers = {m.deployment_name(p.role): p.num_replicas for m in config.models for p in m.pools}
    for deployment in application.get("deployments", []):
        name = deployment["name"]
        if name != API_DEPLOYMENT and deployment["num_replicas"] != numbers.get(name):
            found.append(f"{deployment['num_replicas']} replicas of {name}, and args say {numbers.get(name)}")
    if serve["http_options"] != {"host": config.api.host, "port": config.api.port}:
        found.append(f"http_options {serve['http_options']}, and the API says {config.api.host}:{config.api.port}")
    if serve["proxy_location"] != ("EveryNode" if config.api.listen_on == "every_node" else "HeadOnly"):
        found.append(f"proxy_location {serve['proxy_location']}, and api.listen_on = {config.api.listen_on}")
    return found


def wanted(config: ClusterConfig) -> list[tuple[dict[str, str], int, int, float, int]]:
    """(labels, replicas, ranks of one, CPUs of a rank, whole GPUs of a replica) of the API and each pool."""
    api = config.api
    rows = [(label_selector(api.node_labels), api.num_replicas, 1, 0.0, 0)]
    for pool in (p for m in config.models for p in m.pools):
        gpus = math.ceil(pool.dims.world * pool.num_gpus)
        rows.append((label_selector(pool.node_labels), pool.num_replicas, pool.dims.world, pool.num_cpus, gpus))
    return rows


def node_faults(config: ClusterConfig, nodes: list[tuple[dict[str, str], int, float, float]]) -> list[str]:
    """Of nodes as (labels, how many, CPUs, GPUs), each kind once.

    A gang lies on one node, so a node holds as many whole replicas as its CPUs and GPUs allow.
    """
    found = []
    for labels, replicas, ranks, cpus, gpus in wanted(config):
        kinds = [n for n in nodes if labels.items() <= n[0].items()]
        if len(kinds) != 1:
            found.append(f"{len(kinds)} groups have {labels}")
            continue
        _, count, has_cpus, has_gpus = kinds[0]
        fits = [math.inf]
        if cpus:
            fits.append(math.floor(has_cpus / (cpus * ranks) + 1e-9))  # fractions of a core add up to whole ones
        if gpus:
            fits.append(has_gpus // gpus)
        holds = min(fits)
        if holds < 1:
            found.append(
                f"{labels}: a replica of {gpus} GPUs and {cpus * ranks:g} CPUs on {has_gpus:g} and {has_cpus:g}"
            )
        elif count * holds < replicas:
            found.append(f"{labels}: {replicas} replicas on {count} nodes that hold {holds:g} each")
    return found


def one(documents: list[dict[str, Any]], kind: str, name: str = "") -> dict[str, Any]:
    """The only one of its kind, or of that kind and name."""
    (document,) = [d for d in documents if d["kind"] == kind and name in ("", d["metadata"]["name"])]
    return document


def api_port(documents: list[dict[str, Any]]) -> int:
    """That routes lead to."""
    return int(one(documents, "HTTPRoute")["spec"]["rules"][0]["backendRefs"][0]["port"])


def service_faults(service: dict[str, Any], serve_port: int) -> list[str]:
    """Of a RayService; `serve_port` is what routes and services expect."""
    spec = service["spec"]
    cluster = spec["rayClusterConfig"]
    serve = yaml.safe_load(spec["serveConfigV2"])
    config = from_tree(serve["applications"][0]["args"], {})
    found = application_faults(serve)
    if not f"{cluster['rayVersion']}.".startswith(f"{pin('ray[serve]')}."):
        found.append(f"Ray {cluster['rayVersion']}, and pyproject.toml says {pin('ray[serve]')}")
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        found.append("the head takes work of ours")
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {g["template"]["spec"]["containers"][0]["image"] for g in groups}
    if images != {_container(groups[0])["image"]} or "image" in cluster["autoscalerOptions"]:
        found.append(
            f"images {sorted(images)}: all pods of a cluster have one; the autoscaler takes the head's by itself"
        )
    found += _api_faults(serve["applications"][0], cluster["workerGroupSpecs"], config)
    nodes = []
    for group in cluster["workerGroupSpecs"]:
        params = group["rayStartParams"]
        nodes.append((group["labels"], group["replicas"], float(params["num-cpus"]), float(params.get("num-gpus", 0))))
        found += _pod_faults(group, config, serve_port)
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            found.append(f"{group['groupName']}: bounds {group['minReplicas']} to {group['maxReplicas']}")
    return found + node_faults(config, nodes)


def _api_faults(application: dict[str, Any], groups: list[dict[str, Any]], config: ClusterConfig) -> list[str]:
    """Each API replica has a pod of its own, where its metrics are found at one port whatever came before."""
    found = []
    if application.get("deployments") != [{"name": API_DEPLOYMENT, "max_replicas_per_node": 1}]:
        found.append("several API replicas in a pod, of which Prometheus sees one")
    labels = label_selector(config.api.node_labels)
    for group in (g for g in groups if labels.items() <= g["labels"].items()):
        if group["maxReplicas"] < 2 * config.api.num_replicas:
            found.append(f"{group['maxReplicas']} API pods at most: none for a new configuration's API replicas")
        container = _container(group)
        environment = {e["name"]: e["value"] for e in container["env"]}
        ports = {p["name"]: str(p["containerPort"]) for p in container["ports"]}
        if ports["api-metrics"] != environment["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"]:
            found.append(f"api-metrics is port {ports['api-metrics']}, and Serve gives API replicas another")
        if environment["RAY_SERVE_PORT_QUARANTINE_S"] != "0":
            found.append("the second API replica of a pod gets another port than its first")
    return found


def monitor_faults(documents: list[dict[str, Any]]) -> list[str]:
    """Of a PodMonitor, and whether Prometheus may reach what it names."""
    cluster = one(documents, "RayService")["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    ports = [{p["name"]: p["containerPort"] for p in _container(g)["ports"]} for g in groups]
    monitor = one(documents, "PodMonitor")["spec"]
    chosen = monitor["selector"]["matchLabels"].items()
    found = [f"{g}: not chosen" for g in groups if not chosen <= g["template"]["metadata"]["labels"].items()]
    allowed = {
        port["port"]
        for rule in one(documents, "NetworkPolicy", "ernie")["spec"]["ingress"]
        for port in rule.get("ports", [])
        if "monitoring" in str(rule["from"])
    }
    for endpoint in monitor["podMetricsEndpoints"]:
        numbers = {own[endpoint["port"]] for own in ports if endpoint["port"] in own}
        if len(numbers) != 1 or not numbers <= allowed:
            found.append(
                f"port {endpoint['port']}: pods have {sorted(numbers)}, Prometheus may reach {sorted(allowed)}"
            )
    return found


def _container(group: dict[str, Any]) -> dict[str, Any]:
    (found,) = group["template"]["spec"]["containers"]
    return dict(found)


def _pod_faults(group: dict[str, Any], config: ClusterConfig, serve_port: int) -> list[str]:
    name, params, pod = group["groupName"], group["rayStartParams"], group["template"]["spec"]
    (container,) = pod["containers"]
    limits, found = container["resources"]["limits"], []
    if limits.get("nvidia.com/gpu", "0") != params.get("num-gpus", "0"):
        found.append(
            f"{name}: Ray counts {params.get('num-gpus', 0)} GPUs, the pod has {limits.get('nvidia.com/gpu', 0)}"
        )
    if float(limits["cpu"]) < float(params["num-cpus"]):
        found.append(f"{name}: Ray counts {params['num-cpus']} CPUs, the pod has {limits['cpu']}")
    (shm,) = [v["emptyDir"] for v in pod["volumes"] if v["name"] == "shm"]
    if shm["medium"] != "Memory" or num_bytes(shm["sizeLimit"]) < int(params["object-store-memory"]):
        found.append(f"{name}: /dev/shm of {shm} is less than the object store")
    if num_bytes(limits["memory"]) <= num_bytes(shm["sizeLimit"]):
        found.append(f"{name}: no memory beside /dev/shm")
    if pod["terminationGracePeriodSeconds"] <= max(config.router.drain_timeout_s, config.router.notice_s):
        found.append(f"{name}: ends after {pod['terminationGracePeriodSeconds']} s, before it has drained")
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    if ports.get("serve", config.api.port) != config.api.port or config.api.port != serve_port:
        found.append(
            f"{name}: port {ports.get('serve')} of the pod, {config.api.port} of the API, {serve_port} of routes"
        )
    if ports.get("grpc", config.api.grpc_port) != config.api.grpc_port:
        found.append(f"{name}: gRPC port {ports['grpc']}, and the API says {config.api.grpc_port}")
    mounted = {m["name"] for m in container["volumeMounts"]}
    if mounted != {v["name"] for v in pod["volumes"]}:
        found.append(f"{name}: mounts {sorted(mounted)}")
    return found


def num_bytes(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]
