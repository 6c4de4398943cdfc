"""An application's router: found by its name, and started where there is none, or where it has another configuration."""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from ernie_cluster.actors.messages import NAMESPACE
from ernie_cluster.actors.router import Router
from ernie_cluster.config.checks import label_selector
from ernie_cluster.config.cluster import ClusterConfig

log = logging.getLogger(__name__)

_RENEWALS = 20
_RENEWAL_PAUSE_S = 0.2
_RENEWAL_TIMEOUT_S = 5.0


def router_name(app: str) -> str:
    return f"{app}:router"


def find_router(app: str, config: ClusterConfig) -> Any:
    """Handle of the application's router, which is started when there is none."""
    return Router.options(  # type: ignore[attr-defined]
        name=router_name(app),
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=0,
        label_selector=label_selector(config.api.node_labels),
        scheduling_strategy="DEFAULT",  # not in the placement group of the replica that misses it, to go with it
    ).remote(config)


def renew_router(app: str, config: ClusterConfig) -> Any:
    """The router, for a replica that has just started and so has the configuration that holds now.

    One that was made with another ends, and the next knows all replicas within a second, as after any other end.
    """
    for _ in range(_RENEWALS):
        router = find_router(app, config)
        try:
            if ray.get(router.has.remote(config), timeout=_RENEWAL_TIMEOUT_S):
                break
            log.info("the router has another configuration: another one begins")
            ray.kill(router)
        except (RayActorError, GetTimeoutError) as e:
            log.info("the router is not there, looking for it again: %s", e)
        time.sleep(_RENEWAL_PAUSE_S)
    return router
