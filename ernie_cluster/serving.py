"""The application for `serve deploy FILE`, and for KubeRay: what `import_path: ernie_cluster.serving:app` names.

Serve calls `app` on one of the cluster's nodes with `args` of its file, which are a configuration as `ernie-cluster serve`
reads one from YAML. It is held to the same checks. What only all machines together could tell is not: they may yet come.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ray import serve

from ernie_cluster.actors import launch
from ernie_cluster.actors.app import build_app
from ernie_cluster.config.load import from_tree


def app(args: Mapping[str, Any]) -> serve.Application:
    """The whole application, for an entry of `applications` with `name: ernie` and `route_prefix: /`.

    Args:
        args: the configuration; `ERNIE__*` of the environment goes over it, as elsewhere.

    Raises:
        ConfigError: unknown keys, or what cannot work; the message names the key.
        CheckpointError: no checkpoint at `path` on the node that this runs on.
    """
    config = from_tree(args, os.environ)
    launch.check(config)
    return build_app(config)
