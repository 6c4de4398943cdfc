"""Users of the OpenAI-compatible API, streaming. `locust -f loadtests/over_http.py --host http://127.0.0.1:8000`"""

from __future__ import annotations

from typing import Any

from locust.env import Environment
from locust.exception import StopUser

from ernie_cluster.bench.record import Record
from ernie_cluster.bench.sync_asking import Asker as Connection
from ernie_cluster.errors import ErnieClusterError
from loadtests.asker import Asker


class HttpUser(Asker):
    """One connection."""

    host = "http://127.0.0.1:8000"

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        headers = {"authorization": f"Bearer {self.options.model_key}"} if self.options.model_key else {}
        self._connection = Connection(
            environment.host or self.host, headers, self.options.answer_timeout, self.options.ca_file or None
        )
        self._model = self.options.model

    def on_start(self) -> None:
        try:
            self._model = self._model or str(self._connection.models()[0]["id"])
        except (ErnieClusterError, LookupError) as e:
            self.environment.events.user_error.fire(user_instance=self, exception=e, tb=e.__traceback__)
            raise StopUser from e

    def on_stop(self) -> None:
        self._connection.close()

    @property
    def model(self) -> str:
        return str(self._model)

    def ask(self, scenario: str, body: dict[str, Any]) -> Record:
        return self._connection.ask(scenario, body)
