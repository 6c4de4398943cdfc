"""Cluster files for `ray up`: this machine, machines of one's own, AWS and Google Cloud."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ernie_cluster.config.environment import SETTINGS
from ernie_cluster.render.groups import NodeGroup
from ernie_cluster.render.machines import MACHINES, Cloud, Machine
from ernie_cluster.render.options import RAY_PORT, RAY_VERSION, REPLICA_PORT, Options
from ernie_cluster.render.setup import KEYS_FILE, Setup

Where = Cloud | Literal["local-cpu"]

ENVIRONMENT: Mapping[str, str] = {
    **SETTINGS,
    "RAY_AUTH_MODE": "token",  # the same ~/.ray/auth_token on all nodes
    "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(REPLICA_PORT),
}
"""Of every node, before `ray start`."""

_VENV = "~/ernie"
_HEAD = "head"
_USER = {"aws": "ubuntu", "gcp": "ubuntu", "on-prem": "ubuntu"}
_DISK_GB = 200


def cluster_file(setup: Setup, groups: Sequence[NodeGroup], where: Where, options: Options) -> dict[str, Any]:
    """What `ray up` takes; `groups` are filled machines of that cloud, none for local-cpu."""
    if where == "local-cpu":
        return _local_cpu(setup)
    if where == "on-prem":
        return _common(setup, options, where) | _on_prem(groups)
    return _common(setup, options, where) | _rented(groups, where)


def addresses(groups: Sequence[NodeGroup]) -> dict[str, NodeGroup]:
    """Of machines of one's own: one address after the other, from 10.0.0.11 on, which have to be replaced."""
    nodes = [group for group in groups for _ in range(group.nodes)]
    return {f"10.0.0.{11 + i}": group for i, group in enumerate(nodes)}


def _local_cpu(setup: Setup) -> dict[str, Any]:
    start = f"ray start --head --port={RAY_PORT} --dashboard-host=127.0.0.1"
    return {
        "cluster_name": f"ernie-{setup.name}",
        "provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []},
        "auth": {"ssh_user": "CHANGE-ME"},
        "max_workers": 0,
        "setup_commands": [],
        "head_start_ray_commands": ["ray stop", f"{_exports(ENVIRONMENT)} {start}"],
        "worker_start_ray_commands": [],
    }


def _common(setup: Setup, options: Options, where: Cloud) -> dict[str, Any]:
    """What does not depend on where the machines come from."""
    gpus = any(p.num_gpus for m in setup.config.models for p in m.pools)
    files = {"~/.ray/auth_token": "~/.ray/auth_token", "~/serve.yaml": f"deploy/serve.{setup.name}.yaml"}
    commands = [
        f"test -x {_VENV}/bin/ray || (curl -LsSf https://astral.sh/uv/install.sh | sh"
        f" && ~/.local/bin/uv venv --python 3.11 {_VENV})",
        f"~/.local/bin/uv pip install --python {_VENV}/bin/python 'ray[serve]=={RAY_VERSION}'"
        f" '{options.package_for(gpus=gpus)}'" + (" boto3" if where == "aws" else ""),
    ]
    if where == "gcp":
        commands[-1] += " google-api-python-client google-auth cryptography"
    if where != "on-prem":
        commands.append(
            f"sudo mkdir -p {options.models_folder} && (mountpoint -q {options.models_folder} || sudo mount -t nfs"
            f" -o ro,nconnect=16 CHANGE-ME:/models {options.models_folder})"
        )
    if setup.config.api.keys_file == KEYS_FILE:
        files["~/keys.yaml"] = "keys.yaml"
        commands.append(f'sudo install -D -m 0400 -o "$USER" ~/keys.yaml {KEYS_FILE}')
    return {
        "cluster_name": f"ernie-{setup.name}",
        "auth": {"ssh_user": _USER[where]},
        "idle_timeout_minutes": 15,
        "file_mounts": files,
        "setup_commands": commands,
    }


def _on_prem(groups: Sequence[NodeGroup]) -> dict[str, Any]:
    nodes = addresses(groups)
    cases = " ".join(f'*" {address} "*) L={",".join(g.labels)} C={g.cpus};;' for address, g in nodes.items())
    worker = (
        f'case " $(hostname -I) " in {cases} *) echo "no pool for $(hostname -I)" >&2; exit 1;; esac;'
        f" {_exports(ENVIRONMENT)} {_ray('start')} --address=$RAY_HEAD_IP:{RAY_PORT} --num-cpus=$C --labels=$L"
    )
    return {
        "provider": {"type": "local", "head_ip": "10.0.0.10", "worker_ips": list(nodes)},
        "max_workers": len(nodes),
        "min_workers": len(nodes),
        "head_start_ray_commands": [_ray("stop"), _head_start()],
        "worker_start_ray_commands": [_ray("stop"), worker],
    }


def _rented(groups: Sequence[NodeGroup], where: Cloud) -> dict[str, Any]:
    head = next(m for m in MACHINES[where] if not m.gpus)
    types = {_HEAD: {"resources": {"CPU": 0}, "node_config": _node_config(head, where)}}
    types |= {group.name: _node_type(group, where) for group in groups}
    worker = f"{_exports(ENVIRONMENT)} {_ray('start')} --address=$RAY_HEAD_IP:{RAY_PORT}"
    return {
        "provider": _provider(where),
        "max_workers": sum(g.max_nodes for g in groups),
        "head_node_type": _HEAD,
        "available_node_types": types,
        "head_start_ray_commands": [_ray("stop"), _head_start()],
        "worker_start_ray_commands": [_ray("stop"), worker],
    }


def _node_type(group: NodeGroup, where: Cloud) -> dict[str, Any]:
    resources = {"CPU": group.cpus}
    if group.gpus:
        resources["GPU"] = group.machine.gpus
    return {
        "resources": resources,
        "labels": dict(label.split("=") for label in group.labels),
        "min_workers": group.nodes,
        "max_workers": group.max_nodes,
        "node_config": _node_config(group.machine, where),
    }


def _provider(where: Cloud) -> dict[str, Any]:
    if where == "aws":
        return {"type": "aws", "region": "us-west-2", "availability_zone": "us-west-2a", "cache_stopped_nodes": False}
    return {"type": "gcp", "region": "us-central1", "availability_zone": "us-central1-a", "project_id": "CHANGE-ME"}


def _node_config(machine: Machine, where: Cloud) -> dict[str, Any]:
    if where == "aws":
        disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": _DISK_GB, "VolumeType": "gp3"}}
        return {"InstanceType": machine.name, "ImageId": "ami-CHANGE-ME", "BlockDeviceMappings": [disk]}
    image = "projects/ubuntu-os-accelerator-images/global/images/family/ubuntu-accelerator-2404-amd64-with-nvidia-580"
    if not machine.gpus:
        image = "projects/ubuntu-os-cloud/global/images/family/ubuntu-2404-lts-amd64"
    boot: dict[str, Any] = {
        "boot": True,
        "autoDelete": True,
        "initializeParams": {"diskSizeGb": _DISK_GB, "sourceImage": image},
    }
    config: dict[str, Any] = {"machineType": machine.name, "disks": [boot]}
    if machine.gpus:
        config["scheduling"] = [{"onHostMaintenance": "TERMINATE"}]
    return config


def _head_start() -> str:
    return (
        f"{_exports(ENVIRONMENT)} {_ray('start')} --head --port={RAY_PORT} --num-cpus=0 --num-gpus=0"
        " --autoscaling-config=~/ray_bootstrap_config.yaml"
    )


def _ray(verb: str) -> str:
    return f"{_VENV}/bin/ray {verb}"


def _exports(environment: Mapping[str, str]) -> str:
    return "export " + " ".join(f"{k}={v}" for k, v in environment.items()) + ";"
