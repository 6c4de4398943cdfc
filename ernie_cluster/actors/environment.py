"""What Ray's and Serve's processes are told through their environment, which they take from whoever starts Ray."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from ernie_cluster.config.environment import SETTINGS

_SIDE_PORTS = range(20_000, 30_000)
"""Below the ports that the system hands out, above those that services are known by."""
_PORTS_PER_CLUSTER = 64
"""For the replicas that HAProxy sends requests to, on one machine."""


@contextmanager
def local_cluster() -> Iterator[None]:
    """Set what a cluster on this machine needs while it starts, except what the user has set.

    Afterwards it is as before: another cluster, or a child of ours that starts one, must not share ports and folder.
    """
    values = {k: v for k, v in (SETTINGS | _own_proxy()).items() if k not in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for key in values:
            os.environ.pop(key, None)


def _own_proxy() -> dict[str, str]:
    """HAProxy's files and side ports, which Serve else puts at one place for all users of a machine."""
    folder = tempfile.mkdtemp(prefix="ernie-haproxy-", dir="/tmp")  # not $TMPDIR: a socket's path must be short
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Serve counts up from one number, and until a replica has found its port taken its requests go to who took it
    first = free_port()
    return {
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + _PORTS_PER_CLUSTER - 1),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",  # as many cores as a laptop can spare for it
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # no balancer before us that must hear of an end first
    }


def free_port() -> int:
    """A port of this machine that nobody listens on now, and that Ray's processes will not be handed either."""
    while True:
        port = random.choice(_SIDE_PORTS)
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port
