"""A server on this machine for as long as a `with` block lasts. Ray is imported only when one is started."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from ernie_cluster.cli.hub import with_local_folders
from ernie_cluster.cli.progress import Progress
from ernie_cluster.cli.remote import DEFAULT_URL
from ernie_cluster.cli.serve import base_url, check_ports
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.presets import POCKET, pocket_mixed
from ernie_cluster.errors import CheckpointError

START_TIMEOUT_S = 300.0
_PROBE_TIMEOUT_S = 2.0


@contextmanager
def serving(config: ClusterConfig, progress: Progress) -> Iterator[str]:
    """Serve `config` from a Ray cluster of its own; yields the base URL once every pool is ready.

    Raises:
        ConfigError: the port is taken, the checkpoint cannot be used, or it is not ready in time.
        ReplicaError: a replica cannot start.
    """
    check_ports(config.api)
    for model in config.models:
        check_packaged(model.path)
    config = with_local_folders(config, progress)
    progress("loading Ray")
    from ernie_cluster.actors import launch

    launch.check(config)
    launch.start_ray(config, None, progress)
    try:
        launch.start(config, progress, timeout_s=START_TIMEOUT_S)
        yield base_url(config.api.host, config.api.port)
    finally:
        launch.stop(progress)


@contextmanager
def server_or_pocket(url: str | None, model: str | None) -> Iterator[str]:
    """The server to talk to: the one that is named or listens on the default port, else pocket, started here.

    Args:
        url: what the user named; nothing is started for it.
        model: a served name that the user asks for; pocket is not started in its place.
    """
    if url is not None or model is not None or is_listening(DEFAULT_URL):
        yield url or DEFAULT_URL
        return
    progress = Progress()
    progress(f"nothing listens on {DEFAULT_URL}: serving the packaged model for this chat")
    from ernie_cluster.actors.environment import free_port

    with serving(at_port(pocket_mixed(), free_port()), progress) as own:
        yield own


def at_port(config: ClusterConfig, port: int) -> ClusterConfig:
    """The same configuration on another HTTP port."""
    return dataclasses.replace(config, api=dataclasses.replace(config.api, port=port))


def check_packaged(path: str) -> None:
    """Raises CheckpointError when it is the packaged checkpoint, and that is not there."""
    if path == POCKET and not is_packaged():
        raise CheckpointError(
            f"{path} holds no checkpoint; make it with `python scripts/pocket/train.py`, or serve another one "
            "(ernie-cluster demo --model PATH, ernie-cluster serve)"
        )


def is_packaged() -> bool:
    """Whether this package has its model with it."""
    return (Path(POCKET) / "config.json").exists()


def is_listening(url: str) -> bool:
    """Whether anything accepts connections there."""
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname, parts.port), _PROBE_TIMEOUT_S):
            return True
    except OSError:
        return False
