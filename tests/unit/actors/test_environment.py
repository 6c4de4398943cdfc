"""What a cluster on this machine is told: clusters beside each other must not answer each other's requests."""

from __future__ import annotations

import os
import random

import pytest

from ernie_cluster.actors.environment import local_cluster
from ernie_cluster.config.environment import SETTINGS

PORT_KEYS = ("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT")


def told() -> dict[str, str]:
    """The environment within."""
    with local_cluster():
        return dict(os.environ)


def test_clusters_share_neither_ports_nor_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "choice", random.Random(0).choice)
    (first, last), (other_first, other_last) = (tuple(int(env[key]) for key in PORT_KEYS) for env in (told(), told()))
    assert 20_000 <= first <= last < 32_768, "below the ports that the system hands out"
    assert last < other_first or other_last < first
    assert told()["RAY_SERVE_HAPROXY_SOCKET_PATH"] != told()["RAY_SERVE_HAPROXY_SOCKET_PATH"]


def test_what_the_user_has_set_stands_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PORT_KEYS[0], "31000")
    before = dict(os.environ)
    env = told()
    assert env[PORT_KEYS[0]] == "31000"
    assert env.items() >= {k: v for k, v in SETTINGS.items() if k not in before}.items()
    assert dict(os.environ) == before
