"""Manifests keep to their schemas and to themselves; broken ones are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from ray.serve._private import node_port_manager
from ray.serve._private.common import RequestProtocol

from ernie_cluster.api.routes import OPERATIONS
from ernie_cluster.render.files import kuberay_files
from ernie_cluster.render.options import Options
from ernie_cluster.render.setup import SETUPS, preset_setup
from tests.unit.render.consistency import api_port, monitor_faults, one, service_faults
from tests.unit.render.schemas import problem

OPTIONS = Options("1.2.3")


def documents(name: str, options: Options = OPTIONS) -> list[dict[str, Any]]:
    files = kuberay_files(preset_setup(name, "/models"), options).values()
    return [dict(document) for file in files for document in file.documents]


@pytest.mark.parametrize("name", SETUPS)
def test_every_document_is_what_its_kind_takes_and_they_fit_each_other(name: str) -> None:
    found = documents(name)
    assert {f"{d['kind']}": problem(d) for d in found if problem(d)} == {}
    assert service_faults(one(found, "RayService"), api_port(found)) == []
    assert monitor_faults(found) == []


def test_kinds_that_are_there() -> None:
    kinds = {d["kind"] for d in documents("both")}
    assert kinds == {
        *("RayService", "PodDisruptionBudget", "NetworkPolicy", "HTTPRoute", "GRPCRoute", "PodMonitor", "Service"),
        *("PrometheusRule", "ConfigMap"),
        *("StatefulSet", "PersistentVolumeClaim", "Job", "Kustomization"),
    }


@pytest.mark.parametrize("name", SETUPS)
def test_services_routes_budgets_and_policies_find_their_pods(name: str) -> None:
    found = documents(name)
    cluster = one(found, "RayService")["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = {g.get("groupName", "head"): g["template"] for g in groups}
    service = one(found, "Service", "ernie-api")
    chosen = [n for n, pod in pods.items() if service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()]
    assert chosen == ["api"]
    ports = {p["name"] for p in pods["api"]["spec"]["containers"][0]["ports"]}
    assert {p["targetPort"] for p in service["spec"]["ports"]} <= ports
    offered = {p["port"] for p in service["spec"]["ports"]}
    for kind in ("HTTPRoute", "GRPCRoute"):
        (back,) = one(found, kind)["spec"]["rules"][0]["backendRefs"]
        assert (back["name"], back["port"] in offered) == ("ernie-api", True)
    budgets = [d["spec"]["selector"]["matchLabels"]["pool"] for d in found if d["kind"] == "PodDisruptionBudget"]
    assert sorted(budgets) == sorted(set(pods) - {"head"})
    policy = one(found, "NetworkPolicy", "ernie")["spec"]
    assert all(policy["podSelector"]["matchLabels"].items() <= p["metadata"]["labels"].items() for p in pods.values())
    assert {p["port"] for p in policy["ingress"][1]["ports"]} == offered


def test_the_gateway_lets_in_what_clients_ask_and_nothing_of_operators() -> None:
    matches = one(documents("28b"), "HTTPRoute")["spec"]["rules"][0]["matches"]
    prefixes = {m["path"]["value"] for m in matches}
    inside = {o.path for o in OPERATIONS if not any(o.path == p or o.path.startswith(f"{p}/") for p in prefixes)}
    assert inside == {"/health", "/metrics", "/debug/experts", *(o.path for o in OPERATIONS if "/admin" in o.path)}


@pytest.mark.parametrize("name", SETUPS)
def test_volumes_and_secrets_are_where_they_are_needed_only(name: str) -> None:
    found = documents(name)
    cluster = one(found, "RayService")["spec"]["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        volumes = {v["name"]: v for v in group["template"]["spec"]["volumes"]}
        assert ("keys" in volumes) == (group.get("groupName") == "api")
        assert ("models" in volumes) == (name != "pocket")
    claims = [d["metadata"]["name"] for d in found if d["kind"] == "PersistentVolumeClaim"]
    assert claims == ([] if name == "pocket" else ["ernie-models"])


def test_the_next_api_replica_of_a_pod_takes_the_port_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    container = _container(one(documents("28b"), "RayService"), "api")
    environment = {e["name"]: e["value"] for e in container["env"]}
    quarantine_s, first = (
        environment[f"RAY_SERVE_{name}"] for name in ("PORT_QUARANTINE_S", "DIRECT_INGRESS_MIN_HTTP_PORT")
    )
    (measured,) = [p["containerPort"] for p in container["ports"] if p["name"] == "api-metrics"]
    monkeypatch.setattr(node_port_manager, "RAY_SERVE_PORT_QUARANTINE_S", float(quarantine_s))
    ports = node_port_manager.PortAllocator(int(first), int(first) + 1000, RequestProtocol.HTTP, "pod")
    for replica in ("first", "next"):
        assert ports.allocate(replica) == measured
        ports.release(replica, measured)


def test_weights_are_apart_from_what_is_applied_again_and_again() -> None:
    for found in (documents("28b"), documents("pocket")):
        (kustomization,) = [d for d in found if d["kind"] == "Kustomization" and "namespace" in d]
        assert "checkpoints.yaml" not in kustomization["resources"]
    commands = one(documents("both"), "Job")["spec"]["template"]["spec"]["containers"][0]["command"][-1]
    paths = [m.path for m in preset_setup("both", "/models").config.models]
    assert [line.rpartition(" ")[2] for line in commands.splitlines()] == paths


def test_rdma_is_asked_for_where_there_are_gpus_only() -> None:
    found = documents("28b", Options("1.2.3", rdma="rdma/hca"))
    assert [problem(d) for d in found if d["kind"] == "RayService"] == [""]
    groups = one(found, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    has = {g["groupName"]: g["template"]["spec"]["containers"][0] for g in groups}
    assert {n: c["resources"]["limits"].get("rdma/hca") for n, c in has.items()} == {
        "api": None, "vision": "1", "prefill": "1", "decode": "1"
    }  # fmt: skip
    assert has["decode"]["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert {"name": "NCCL_IB_DISABLE", "value": "0"} in has["decode"]["env"]


def _group(service: dict[str, Any], name: str) -> dict[str, Any]:
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (found,) = [g for g in groups if g["groupName"] == name]
    assert isinstance(found, dict)
    return found


def _container(service: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = _group(service, name)["template"]["spec"]["containers"][0]
    return found


Break = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (lambda s: s.update(apiVersion="ray.io/v3"), "ray.io/v3"),
        (lambda s: _group(s, "decode").update(groupname=_group(s, "decode").pop("groupName")), "groupname"),
        (lambda s: s["spec"].update(serveConfig=""), "serveConfig"),
        (lambda s: _group(s, "decode").update(replicas="one"), "one"),
        (lambda s: _container(s, "api").update(imagePullpolicy="Always"), "imagePullpolicy"),
        (lambda s: _container(s, "api")["readinessProbe"]["httpGet"].pop("port"), "port"),
        (lambda s: s["spec"]["rayClusterConfig"]["authOptions"].update(mode="maybe"), "maybe"),
    ],
)
def test_what_kuberay_does_not_know_is_refused(break_it: Break, word: str) -> None:
    service = copy.deepcopy(one(documents("28b"), "RayService"))
    break_it(service)
    assert word in problem(service)


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (lambda s: s["spec"]["rayClusterConfig"].update(rayVersion="2.59.0"), "Ray 2.59.0"),
        (lambda s: _group(s, "prefill")["rayStartParams"].update({"num-gpus": "7"}), "8 GPUs"),
        (lambda s: _container(s, "prefill")["resources"]["limits"].update({"nvidia.com/gpu": "4"}), "the pod has 4"),
        (lambda s: _group(s, "decode")["rayStartParams"].update({"num-cpus": "8"}), "32 CPUs on 8"),
        (lambda s: _group(s, "decode")["labels"].update(pool="prefill"), "0 groups"),
        (lambda s: _group(s, "vision").update(replicas=0, minReplicas=0), "1 replicas on 0 nodes"),
        (lambda s: _container(s, "api")["ports"][0].update(containerPort=8001), "port 8001"),
        (
            lambda s: s["spec"].update(serveConfigV2=s["spec"]["serveConfigV2"].replace("port: 8000", "port: 80")),
            "port",
        ),
        (lambda s: _group(s, "decode")["template"]["spec"].update(terminationGracePeriodSeconds=30), "drained"),
        (lambda s: s["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"].pop("num-cpus"), "the head"),
    ],
)
def test_what_does_not_fit_the_application_is_found(break_it: Break, word: str) -> None:
    found = documents("424b")
    service = copy.deepcopy(one(found, "RayService"))
    break_it(service)
    assert word in " ".join(service_faults(service, api_port(found)))


@pytest.mark.parametrize(
    ("kind", "break_it"),
    [
        ("PodDisruptionBudget", lambda d: d["spec"].update(maxUnavailabel=1)),
        ("NetworkPolicy", lambda d: d["spec"]["ingress"][1]["ports"][0].update(port={})),
        ("HTTPRoute", lambda d: d["spec"]["rules"][0].update(backendRef=[])),
        ("GRPCRoute", lambda d: d["spec"]["rules"][0]["matches"][0]["method"].update(type="Prefix")),
        ("PodMonitor", lambda d: d["spec"]["podMetricsEndpoints"][0].update(prot="x")),
        ("StatefulSet", lambda d: d["spec"]["template"]["spec"]["containers"][0].update(comand=[])),
        ("Job", lambda d: d["spec"].update(backofLimit=1)),
    ],
)
def test_a_misspelt_field_of_any_kind_is_refused(kind: str, break_it: Break) -> None:
    document = copy.deepcopy(next(d for d in documents("28b") if d["kind"] == kind))
    assert problem(document) == ""
    break_it(document)
    assert problem(document) != ""
