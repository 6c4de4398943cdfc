"""Files of `serve deploy` and `ray up` are what Ray takes, and fit each other."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import ray.serve.schema
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve._private.build_app import build_app as build_serve

from ernie_cluster import serving
from ernie_cluster.actors.app import APP_NAME
from ernie_cluster.config.checks import label_selector
from ernie_cluster.config.environment import SETTINGS
from ernie_cluster.config.load import from_tree
from ernie_cluster.errors import ConfigError
from ernie_cluster.render.files import CLOUDS, ray_up_files
from ernie_cluster.render.groups import node_groups
from ernie_cluster.render.machines import Cloud, machines_of
from ernie_cluster.render.options import RAY_VERSION, Options
from ernie_cluster.render.ray_up import addresses, cluster_file
from ernie_cluster.render.serve_config import API_DEPLOYMENT, APPLICATION, IMPORT_PATH, serve_config
from ernie_cluster.render.setup import SETUPS, local_setup, preset_setup
from tests.unit.render.consistency import application_faults, node_faults

OPTIONS = Options("1.2.3")
SETUPS_WITH_GPUS = ("28b", "424b", "both")


def deployed(document: dict[str, Any]) -> ray.serve.schema.ServeDeploySchema:
    """As Serve reads it; keys that it would pass over in silence are refused here."""
    schema = ray.serve.schema.ServeDeploySchema.model_validate(document)
    read = schema.model_dump(exclude_unset=True, mode="json")
    parts = [(document, read), (document["http_options"], read["http_options"])]
    parts += zip(document["applications"], read["applications"], strict=True)
    for given, known in parts:
        if unknown := set(given) - set(known):
            raise ValueError(f"unexpected: {sorted(unknown)}")
    return schema


def rented(name: str, where: Cloud) -> dict[str, Any]:
    setup = preset_setup(name, "/models")
    return cluster_file(setup, node_groups(setup, machines_of(where, ()), fill=True), where, OPTIONS)


def accepted(document: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` does it, before it talks to anybody."""
    config: dict[str, Any] = prepare_config(copy.deepcopy(document))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", [*SETUPS, "local"])
def test_serve_takes_the_application(name: str) -> None:
    setup = local_setup("pocket", "/models") if name == "local" else preset_setup(name, "/models")
    document = serve_config(setup)
    schema = deployed(document)
    assert application_faults(document) == []
    (application,) = schema.applications
    assert (application.route_prefix, application.import_path) == ("/", f"{serving.__name__}:{serving.app.__name__}")
    assert from_tree(application.args, {}) == setup.config
    assert [d.max_surge_percent for d in application.deployments] == ([100] * 3 if name == "local" else [])


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (lambda d: d.update(name="ernie-pocket-encode"), "args say None"),
        (lambda d: d.update(num_replicas=3), "3 replicas of ernie-pocket-vision, and args say 1"),
    ],
)
def test_numbers_of_replicas_are_those_of_the_configuration(
    break_it: Callable[[dict[str, Any]], None], word: str
) -> None:
    document = serve_config(local_setup("pocket", "/models"))
    break_it(document["applications"][0]["deployments"][0])
    assert word in " ".join(application_faults(document))


def test_pools_are_called_as_serve_will_call_them() -> None:
    built = build_serve(serving.app({"models": [{"preset": "pocket"}]}), name=APPLICATION)
    (model,) = local_setup("pocket", "/models").config.models
    assert {d.name for d in built.deployments} == {
        API_DEPLOYMENT,
        *(model.deployment_name(p.role) for p in model.pools),
    }


@pytest.mark.parametrize(
    "break_it",
    [
        lambda d: d.update(proxy_locations="HeadOnly"),
        lambda d: d.update(proxy_location="Everywhere"),
        lambda d: d["http_options"].update(prot=80),
        lambda d: d["applications"][0].update(import_path="nowhere"),
        lambda d: d["applications"][0].update(route="/"),
    ],
)
def test_serve_refuses_what_it_does_not_know(break_it: Callable[[dict[str, Any]], None]) -> None:
    document = serve_config(preset_setup("28b", "/models"))
    break_it(document)
    with pytest.raises(ValueError, match=r"validation error|unexpected|Import path"):
        deployed(document)


def test_the_application_that_serve_imports_is_the_one_of_ernie_cluster_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, function = IMPORT_PATH.partition(":")
    assert (module, function, APPLICATION) == (serving.__name__, "app", APP_NAME)
    args = {"models": [{"preset": "pocket"}]}
    built = serving.app(args)
    assert isinstance(built, ray.serve.Application)
    assert args == {"models": [{"preset": "pocket"}]}
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"models": [{"preset": "pocket"}], "api": {"prot": 1}}, "unknown key 'prot'"),
        ({"models": [{"preset": "28b"}]}, "path: missing"),
        ({"models": [{"preset": "pocket", "quantization": "fp8"}]}, "needs Hopper GPUs"),
    ],
)
def test_the_application_is_refused_as_by_ernie_cluster_serve(args: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        serving.app(args)


def test_the_environment_goes_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERNIE__API__PROT", "1")
    with pytest.raises(ConfigError, match="prot"):
        serving.app({"models": [{"preset": "pocket"}]})


@pytest.mark.parametrize("name", SETUPS_WITH_GPUS)
@pytest.mark.parametrize("where", ["aws", "gcp"])
def test_rented_nodes_hold_the_application(name: str, where: Cloud) -> None:
    config = accepted(rented(name, where))
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0
    workers = [t for n, t in types.items() if n != config["head_node_type"]]
    nodes = [
        (t["labels"], t["min_workers"], float(t["resources"]["CPU"]), float(t["resources"].get("GPU", 0)))
        for t in workers
    ]
    assert node_faults(preset_setup(name, "/models").config, nodes) == []
    assert config["max_workers"] >= sum(t["max_workers"] for t in workers)


@pytest.mark.parametrize("name", SETUPS_WITH_GPUS)
def test_machines_of_ones_own_get_their_labels_by_address(name: str) -> None:
    config = accepted(rented(name, "on-prem"))
    setup = preset_setup(name, "/models")
    known = addresses(node_groups(setup, machines_of("on-prem", ()), fill=True))
    assert config["provider"]["worker_ips"] == list(known)
    found = {}
    for address, group in known.items():
        labels, cpus = told(rented(name, "on-prem")["worker_start_ray_commands"][-1], address)
        assert (labels, cpus) == (",".join(group.labels), str(group.cpus))
        found.setdefault(group.name, []).append(group)
    nodes = [(label_selector(g[0].labels), len(g), float(g[0].cpus), float(g[0].gpus)) for g in found.values()]
    assert node_faults(setup.config, nodes) == []


def told(command: str, address: str) -> tuple[str, str]:
    """What the shell makes of a node's start command at this address: labels and CPUs."""
    choice = command.partition("esac;")[0].replace("$(hostname -I)", address)
    shell = subprocess.run(["sh", "-c", f"{choice}esac; echo $L $C"], capture_output=True, text=True, check=True)
    labels, cpus = shell.stdout.split()
    return labels, cpus


def test_an_unknown_machine_of_ones_own_does_not_join() -> None:
    with pytest.raises(subprocess.CalledProcessError) as e:
        told(rented("28b", "on-prem")["worker_start_ray_commands"][-1], "10.9.9.9")
    assert "no pool for" in e.value.stderr


@pytest.mark.parametrize("where", [*CLOUDS, "local-cpu"])
def test_every_node_is_started_with_what_ours_needs_and_rays_version_is_the_pinned_one(where: Any) -> None:
    if where == "local-cpu":
        config = cluster_file(local_setup("pocket", "/models"), (), where, OPTIONS)
        accepted(config)
    else:
        config = rented("28b", where)
        assert f"'ray[serve]=={RAY_VERSION}' 'ernie-cluster[gpu]==1.2.3'" in " ".join(config["setup_commands"])
    starts = [c for k in ("head", "worker") for c in config[f"{k}_start_ray_commands"] if " start " in c]
    assert len(starts) == (1 if where == "local-cpu" else 2)
    for command in starts:
        assert all(f" {key}={value}" in command for key, value in SETTINGS.items())
        assert " RAY_AUTH_MODE=token" in command
        assert command.index("export") < command.index("ray start")


@pytest.mark.parametrize(
    "break_it",
    [
        lambda d: d.update(cluster_nam="x"),
        lambda d: d.pop("provider"),
        lambda d: d["available_node_types"]["decode"].update(label={}),
        lambda d: d["available_node_types"]["decode"].update(min_workers="one"),
        lambda d: d.update(head_node_type="nobody"),
    ],
)
def test_ray_up_refuses_what_it_does_not_know(break_it: Callable[[dict[str, Any]], Any]) -> None:
    document = rented("28b", "aws")
    break_it(document)
    with pytest.raises(Exception, match=r"\S"):
        accepted(document)


def test_the_application_comes_with_its_cluster() -> None:
    files = ray_up_files(preset_setup("28b", "/models"), "aws", OPTIONS)
    cluster, serve = files["deploy/ray-up.aws.28b.yaml"], "deploy/serve.28b.yaml"
    assert serve in files
    assert cluster.documents[0]["file_mounts"]["~/serve.yaml"] == serve
