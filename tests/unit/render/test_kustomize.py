"""What `kubectl apply -k` would send, as kustomize itself makes it of the checked-in files, and of a team's own patches on top."""

from __future__ import annotations

import copy
import functools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ernie_cluster.render.setup import SETUPS
from tests.unit.render.consistency import ROOT, api_port, monitor_faults, one, service_faults
from tests.unit.render.schemas import problem

KUSTOMIZE = next(
    (words for words in (["kubectl", "kustomize"], ["kustomize", "build"]) if shutil.which(words[0])), None
)
pytestmark = pytest.mark.skipif(KUSTOMIZE is None, reason="neither kubectl nor kustomize is on the PATH")

Document = dict[str, Any]


def built(folder: Path) -> list[Document]:
    """Raises CalledProcessError for what kustomize refuses."""
    assert KUSTOMIZE is not None
    said = subprocess.run([*KUSTOMIZE, str(folder)], capture_output=True, text=True, check=True, timeout=60)
    return list(yaml.safe_load_all(said.stdout))


@functools.cache
def overlay(name: str) -> tuple[Document, ...]:
    return tuple(built(ROOT / "k8s" / "overlays" / name))


def faults(found: list[Document]) -> list[str]:
    """What any of the checks has against the objects of one overlay."""
    said = [f"{d['kind']}: {problem(d)}" for d in found if problem(d)]
    said += service_faults(one(found, "RayService"), api_port(found)) + monitor_faults(found)
    names = [(d["kind"], d["metadata"]["name"]) for d in found]
    said += [f"{name} twice" for name in names if names.count(name) > 1]
    spaces = {d["metadata"].get("namespace") for d in found}
    return said + ([f"namespaces {spaces}"] if len(spaces) != 1 or None in spaces else [])


@pytest.mark.parametrize("name", SETUPS)
def test_an_overlay_is_whole_and_fits_together(name: str) -> None:
    found = list(overlay(name))
    assert faults(found) == []
    folder = ROOT / "k8s" / "overlays" / name
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    base = yaml.safe_load((ROOT / "k8s/base/kustomization.yaml").read_text())["resources"]
    files = [folder / f for f in listed if f.endswith(".yaml")] + [ROOT / "k8s/base" / f for f in base]
    written = [(d["kind"], d["metadata"]["name"]) for f in files for d in yaml.safe_load_all(f.read_text())]
    assert sorted(written) == sorted((d["kind"], d["metadata"]["name"]) for d in found)


def _group(found: list[Document], name: str) -> Document:
    groups = one(found, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (group,) = [g for g in groups if g["groupName"] == name]
    return dict(group)


def _container(found: list[Document], name: str) -> Document:
    container: Document = _group(found, name)["template"]["spec"]["containers"][0]
    return container


def _set(container: Document, variable: str, value: str) -> None:
    (entry,) = [e for e in container["env"] if e["name"] == variable]
    entry["value"] = value


Break = Callable[[list[Document]], Any]


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (lambda f: one(f, "Service", "ernie-api")["metadata"].pop("namespace"), "namespaces"),
        (lambda f: f.append(copy.deepcopy(f[0])), "twice"),
        (lambda f: _container(f, "decode").update(image="other:1"), "images"),
        (lambda f: _container(f, "decode")["volumeMounts"].pop(), "mounts"),
        (lambda f: _container(f, "decode")["resources"]["limits"].update(memory="9Gi"), "no memory beside"),
        (lambda f: _group(f, "prefill")["template"]["metadata"]["labels"].pop("app"), "not chosen"),
        (lambda f: _group(f, "api")["template"]["spec"].pop("containers"), "containers"),
        (lambda f: one(f, "PodMonitor")["spec"]["podMetricsEndpoints"][1].update(port="api-metric"), "pods have []"),
        (lambda f: one(f, "NetworkPolicy", "ernie")["spec"]["ingress"][2]["ports"].pop(), "Prometheus may reach"),
        (lambda f: _set(_container(f, "api"), "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "3000"), "api-metrics is port"),
        (lambda f: _set(_container(f, "api"), "RAY_SERVE_PORT_QUARANTINE_S", "150"), "another port than its first"),
        (lambda f: one(f, "HTTPRoute")["spec"]["rules"][0]["backendRefs"][0].update(port=80), "80 of routes"),
        (lambda f: one(f, "StatefulSet")["spec"].update(replica=1), "replica"),
    ],
)  # fmt: skip
def test_a_broken_object_is_found(break_it: Break, word: str) -> None:
    found = copy.deepcopy(list(overlay("28b")))
    try:
        break_it(found)
        said = " ".join(faults(found))
    except KeyError as e:  # what the checks themselves cannot do without
        said = str(e)
    assert word in said


def test_the_api_has_a_pod_per_replica_and_room_for_the_next_ones() -> None:
    found = copy.deepcopy(list(overlay("28b")))
    spec = one(found, "RayService")["spec"]
    next(g for g in spec["rayClusterConfig"]["workerGroupSpecs"] if g["groupName"] == "api")["maxReplicas"] = 2
    spec["serveConfigV2"] = spec["serveConfigV2"].replace("max_replicas_per_node: 1", "max_replicas_per_node: 2")
    said = " ".join(faults(found))
    assert "several API replicas in a pod" in said
    assert "2 API pods at most" in said


PATCHES = """\
resources: [../k8s/overlays/28b]
images:
  - {name: ernie-cluster, newName: registry.example.com/ernie, newTag: "9"}
patches:
  - target: {kind: HTTPRoute}
    patch: '[{"op": "replace", "path": "/spec/hostnames", "value": ["llm.corp.example"]}]'
"""


def patched(folder: Path, kustomization: str, **changes: tuple[str, str]) -> list[Document]:
    """Of a team's own folder beside a copy of ours, where files (by name without their ending) have been changed."""
    shutil.copytree(ROOT / "k8s", folder / "k8s")
    for stem, (old, new) in changes.items():
        (path,) = [
            p for p in (folder / "k8s").rglob(f"{stem.replace('_', '-')}.yaml") if p.parent.name in ("base", "28b")
        ]
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    (folder / "mine").mkdir()
    (folder / "mine" / "kustomization.yaml").write_text(kustomization)
    return built(folder / "mine")


def test_a_teams_own_image_and_patches_reach_every_pod(tmp_path: Path) -> None:
    found = patched(tmp_path, PATCHES)
    assert faults(found) == []
    assert one(found, "HTTPRoute")["spec"]["hostnames"] == ["llm.corp.example"]
    assert _container(found, "decode")["image"] == "registry.example.com/ernie:9"


@pytest.mark.parametrize(
    ("kustomization", "changes", "word"),
    [
        (PATCHES.replace("/spec/hostnames", "/spec/hostname/0"), {}, "hostname"),
        (PATCHES.replace("28b", "29b"), {}, "29b"),
        (PATCHES, {"routes": ("kind: GRPCRoute", "kind: HTTPRoute")}, "already registered"),
        (PATCHES, {"redis": ("kind: StatefulSet\n", "")}, "kind"),
        (PATCHES, {"service": ("  type: ClusterIP", "   type: ClusterIP")}, "service.yaml"),
        (PATCHES + "patch: []\n", {}, "patch"),
    ],
)
def test_what_kustomize_refuses(
    kustomization: str, changes: dict[str, tuple[str, str]], word: str, tmp_path: Path
) -> None:
    with pytest.raises(subprocess.CalledProcessError) as e:
        patched(tmp_path, kustomization, **changes)
    assert word in e.value.stderr
