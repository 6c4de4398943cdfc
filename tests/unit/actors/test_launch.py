"""Serve that does not start at once, as on a machine that is very busy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from ernie_cluster.actors import launch
from ernie_cluster.errors import ConfigError


class FakeServe:
    """Its first starts fail."""

    def __init__(self, num_failures: int) -> None:
        self.num_failures = num_failures
        self.calls: list[str] = []

    def start(self, **options: Any) -> None:
        self.calls.append("start")
        if self.calls.count("start") <= self.num_failures:
            raise ActorDiedError

    def shutdown(self) -> None:
        self.calls.append("shutdown")


@pytest.mark.parametrize("num_failures", [0, 1])
def test_one_more_try(monkeypatch: pytest.MonkeyPatch, num_failures: int) -> None:
    serve, said = FakeServe(num_failures), list[str]()
    monkeypatch.setattr(launch, "serve", serve)
    launch._start_serve(said.append)
    assert serve.calls == ["start", *["shutdown", "start"] * num_failures]
    assert len(said) == num_failures


def test_two_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = FakeServe(2)
    monkeypatch.setattr(launch, "serve", serve)
    with pytest.raises(ConfigError, match="busy"):
        launch._start_serve(lambda _: None)
    assert serve.calls == ["start", "shutdown"] * 2


@pytest.mark.parametrize(
    ("status", "trigger", "said"),
    [
        ("UNHEALTHY", "REPLICA_STARTUP_FAILED", "m-decode: no such file"),
        ("DEPLOY_FAILED", "REPLICA_STARTUP_FAILED", "m-decode: no such file"),
        ("UNHEALTHY", "HEALTH_CHECK_FAILED", ""),
        ("UPDATING", "CONFIG_UPDATE_STARTED", ""),
        ("HEALTHY", "UNSPECIFIED", ""),
    ],
)
def test_a_replica_that_cannot_start_is_a_failure_and_one_that_stops_is_none(
    status: str, trigger: str, said: str
) -> None:
    message = "Traceback\nernie_cluster.errors.CheckpointError: no such file"
    deployment = SimpleNamespace(status=status, status_trigger=trigger, message=message)
    application = SimpleNamespace(deployments={"m-decode": deployment}, status="DEPLOYING", message="")
    assert launch._failure(application) == said  # type: ignore[arg-type]
