"""Users of the gRPC API, streaming. `locust -f loadtests/over_grpc.py --host 127.0.0.1:9000`"""

from __future__ import annotations

from typing import Any

import grpc.experimental.gevent
from locust.env import Environment
from locust.exception import StopUser

from ernie_cluster.bench.grpc_asking import ask, chat_request
from ernie_cluster.bench.record import Record
from ernie_cluster.client import Client
from ernie_cluster.errors import ErnieClusterError
from loadtests.asker import Asker

grpc.experimental.gevent.init_gevent()  # before the first channel: calls wait as greenlets, not as threads


class GrpcUser(Asker):
    """One channel."""

    host = "127.0.0.1:9000"

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        target = (environment.host or self.host).rstrip("/").rpartition("//")[2]
        self._client = Client(
            target,
            api_key=self.options.model_key or None,
            timeout_s=self.options.answer_timeout,
            ca_file=self.options.ca_file or None,
        )
        self._model = self.options.model

    def on_start(self) -> None:
        try:
            self._model = self._model or self._client.models()[0].name
        except (ErnieClusterError, LookupError) as e:
            self.environment.events.user_error.fire(user_instance=self, exception=e, tb=e.__traceback__)
            raise StopUser from e

    def on_stop(self) -> None:
        self._client.close()

    @property
    def model(self) -> str:
        return str(self._model)

    def ask(self, scenario: str, body: dict[str, Any]) -> Record:
        return ask(self._client, scenario, chat_request(body))
