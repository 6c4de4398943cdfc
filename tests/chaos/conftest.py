"""One application to be disturbed: the tiny model with two replicas of every kind, faults on purpose switched on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from ernie_cluster.config.api import ApiConfig
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.faults import FaultsConfig
from ernie_cluster.config.presets import PRESETS
from ernie_cluster.config.router import RouterConfig
from tests.tiny import tiny_folder

START_TIMEOUT_S = 300.0
READY_S = 180.0
STEP_TIMEOUT_S = 8.0
"""Longer than processes are stopped for."""


def build_config(folder: str, port: int) -> ClusterConfig:
    """See the module."""
    (tiny,) = PRESETS["tiny"](folder).models
    pools = tuple(dataclasses.replace(pool, num_replicas=2) for pool in tiny.pools)
    engine = dataclasses.replace(tiny.engine, step_timeout_s=STEP_TIMEOUT_S)
    return ClusterConfig(
        models=(dataclasses.replace(tiny, pools=pools, engine=engine),),
        api=ApiConfig(port=port, num_replicas=2),
        router=RouterConfig(max_attempts=3),
        faults=FaultsConfig(enabled=True),
    )


@pytest.fixture(scope="package")
def app() -> Iterator[object]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # no token file in the home of whoever runs the tests
        from ernie_cluster.actors import launch
        from ernie_cluster.actors.environment import free_port
        from tests.e2e.application import Application, eventually

        application = Application(build_config(tiny_folder(), free_port()))
        launch.check(application.config)
        launch.start_ray(application.config, None, print)
        try:
            launch.start(application.config, print, timeout_s=START_TIMEOUT_S)
            eventually(application.objection_to_ready, READY_S)
            yield application
        finally:
            launch.stop(print)


@pytest.fixture
def whole_app(app: object) -> object:
    """Whole before; whether it is whole afterwards is for the experiment to say."""
    from tests.e2e.application import Application, eventually

    assert isinstance(app, Application)
    eventually(app.objection_to_ready, READY_S)
    eventually(app.objection_to_rest, 30)
    return app
