"""One application for the folder, on six machines:

head       Ray's tables and Serve's controller, nothing of ours
front      API, vision
prefill1   API, prefill
prefill2   prefill
decode1    decode
decode2    decode

Every machine's port takes requests, as behind a balancer. The head's tables are in Redis where that is installed.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from ernie_cluster.config.api import ApiConfig
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.emulate import EmulateConfig
from ernie_cluster.config.pool import PoolConfig
from ernie_cluster.config.presets import tiny
from ernie_cluster.config.router import RouterConfig
from tests.multinode.namespaces import Namespaces, obstacle
from tests.multinode.ray_nodes import Machine, RayNodes, Redis
from tests.multinode.site import Site
from tests.tiny import tiny_folder

MACHINES = {
    "head": Machine(),
    "front": Machine(("front=yes", "pool=vision")),
    "prefill1": Machine(("front=yes", "pool=prefill")),
    "prefill2": Machine(("pool=prefill",)),
    "decode1": Machine(("pool=decode",)),
    "decode2": Machine(("pool=decode",)),
}
START_TIMEOUT_S = 400.0
WHOLE_TIMEOUT_S = 240.0
PORT = 8000


def build_config(folder: str) -> ClusterConfig:
    config = tiny(folder)
    pools = (
        PoolConfig("vision", node_labels=("pool=vision",)),
        PoolConfig("prefill", num_replicas=2, node_labels=("pool=prefill",)),
        PoolConfig("decode", num_replicas=2, node_labels=("pool=decode",)),
    )
    engine = dataclasses.replace(config.models[0].engine, emulate=EmulateConfig(step_s=0.05))  # streams of many seconds
    return dataclasses.replace(
        config,
        models=(dataclasses.replace(config.models[0], pools=pools, engine=engine),),
        api=ApiConfig("0.0.0.0", PORT, num_replicas=2, node_labels=("front=yes",), listen_on="every_node"),
        router=RouterConfig(heartbeat_timeout_s=5.0, lease_timeout_s=10.0, max_attempts=3),
    )


@pytest.fixture(scope="package")
def running_site() -> Iterator[Site]:
    if why := obstacle():
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="em", dir="/tmp"))  # not pytest's: a socket's path must be short
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        spaces = stack.enter_context(Namespaces(list(MACHINES)))
        storage = {}
        if Redis.is_installed():
            redis = stack.enter_context(closing(Redis(spaces.gateway)))
            storage = {"RAY_REDIS_ADDRESS": redis.address}
        nodes = RayNodes(spaces, MACHINES, folder, storage)
        nodes.start_all()
        site = Site(build_config(tiny_folder()), spaces, nodes, folder)
        site.wait(START_TIMEOUT_S)
        yield site


@pytest.fixture
def site(running_site: Site) -> Iterator[Site]:
    """Whole before, and whole and at rest again afterwards."""
    running_site.become_whole(WHOLE_TIMEOUT_S)
    yield running_site
    running_site.become_whole(WHOLE_TIMEOUT_S)
