"""The file that `serve deploy` and KubeRay take."""

from __future__ import annotations

from typing import Any

from ernie_cluster.render.brief import arguments
from ernie_cluster.render.setup import Setup

APPLICATION = "ernie"
API_DEPLOYMENT = "api"
"""Serve's name of the API replicas."""
IMPORT_PATH = "ernie_cluster.serving:app"

_HEADER = """\
Serve application of preset {name}: `serve deploy deploy/serve.{name}.yaml` on the head of a Ray cluster.

Change first:
{changes}
`args` is a configuration as `ernie-cluster serve` reads it; `ernie-cluster plan` says what fits. Where keys appear twice
(http_options.port and args.api.port) they have to be the same. Written by `ernie-cluster render --target serve`.
"""
_MORE = """
More replicas of a pool, or fewer, while all else stays as it is: write beside `args`, with the pool's name, and deploy again
  deployments: [{{name: {pool}, num_replicas: 2}}]
"""
_HERE = """
To change the number of replicas of a pool, or anything of `args`, edit this file and deploy again. `num_replicas` below goes
over that of `args`, and touches no other replica; all else starts every replica anew, each before its predecessor stops.
"""
_LABELS = "  node_labels   labels of nodes, of `ray start --labels` or of the cluster's node types\n"
_KEYS = "  api.keys_file clients' keys, on each node with an API replica; make them by `ernie-cluster key`\n"
_PATH = "  path          the checkpoint's folder, the same on every node, the head's included\n"


def serve_config(setup: Setup) -> dict[str, Any]:
    """ServeDeploySchema, as plain data."""
    api = setup.config.api
    own = {"deployments": _pools(setup)} if _is_here(setup) else {}
    return {
        "proxy_location": "EveryNode" if api.listen_on == "every_node" else "HeadOnly",
        "http_options": {"host": api.host, "port": api.port},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": arguments(setup),
                **own,
            }
        ],
    }


def header(setup: Setup) -> str:
    """What to change first."""
    config = setup.config
    changes = [_PATH] if setup.folders else []
    changes += [_KEYS] if config.api.keys_file else []
    changes += [_LABELS] if config.api.node_labels else []
    if not changes:
        changes = ["  nothing: it is for this machine alone; api.host and http_options.host open it to others\n"]
    found = _HEADER.format(name=setup.name, changes="".join(changes))
    if _is_here(setup):
        return found + _HERE
    if config.scaling is None:
        model = config.models[0]
        found += _MORE.format(pool=model.deployment_name(model.pools[-1].role))
    return found


def _is_here(setup: Setup) -> bool:
    """One machine whose cores are shared, so that a replica more finds a place for a moment."""
    pools = [p for m in setup.config.models for p in m.pools]
    return setup.config.scaling is None and not any(p.num_gpus or p.node_labels for p in pools)


def _pools(setup: Setup) -> list[dict[str, Any]]:
    """Numbers at hand to be changed, and a successor that is ready before a replica stops."""
    return [
        {"name": m.deployment_name(p.role), "num_replicas": p.num_replicas, "max_surge_percent": 100}
        for m in setup.config.models
        for p in m.pools
    ]
