"""A real Prometheus scrapes the application: every rule holds water and every panel has something to show."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from ernie_cluster.actors.environment import free_port
from ernie_cluster.render.text import yaml_text
from ernie_cluster.render.watch.outputs import BOARDS, prometheus_files
from tests.e2e.application import Application, eventually

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")

MODELS = ("tiny", "mixed")
TIMEOUT_S = 120.0


class Prometheus:
    """A Prometheus that reads one application every second, with our rules."""

    def __init__(self, folder: Path, target: str) -> None:
        files = {name: documents[0] for name, (_, documents) in prometheus_files().items()}
        config = yaml.safe_load(yaml_text(files["prometheus.yaml"]))
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yaml").write_text(yaml_text(config), encoding="utf-8")
        (folder / "rules.yaml").write_text(yaml_text(files["rules.yaml"]), encoding="utf-8")
        address = f"127.0.0.1:{free_port()}"
        self._url = f"http://{address}/api/v1/"
        self._log = (folder / "log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [
                *(
                    "prometheus",
                    f"--config.file={folder / 'prometheus.yaml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                ),
                f"--web.listen-address={address}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()

    def get(self, path: str, **parameters: str) -> Any:
        """What the API has under `data`; fails with its own words."""
        response = httpx.get(self._url + path, params=parameters, timeout=10)
        assert response.status_code == 200, f"{parameters}: {response.text}"
        return response.json()["data"]

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]

    def objection_to_scrape(self) -> str:
        """Why it has not read the application and judged all rules yet; "" if it has."""
        if self._process.poll() is not None:
            self._log.seek(0)
            raise AssertionError(f"prometheus ended: {self._log.read()[-2000:]}")
        try:
            targets = [(target["health"], target["lastError"]) for target in self.get("targets")["activeTargets"]]
            waiting = [rule["name"] for rule in self.rules() if rule["health"] == "unknown"]
        except (httpx.TransportError, AssertionError) as e:
            return f"it does not answer: {e}"
        return "" if targets == [("up", "")] and not waiting else f"{targets} {waiting}"


@pytest.fixture
def prometheus(app: Application, tmp_path: Path) -> Iterator[Prometheus]:
    server = Prometheus(tmp_path, f"127.0.0.1:{app.config.api.port}")
    try:
        eventually(server.objection_to_scrape, TIMEOUT_S)
        yield server
    finally:
        server.close()


def filled_in(expr: str) -> str:
    """As Grafana asks it: all models, and a window as long as the test."""
    return expr.replace("$model", ".*").replace("$__rate_interval", "2m")


def test_every_panel_shows_something_and_every_rule_can_be_judged(app: Application, prometheus: Prometheus) -> None:
    assert app.get("/metrics").status_code == 200
    asked = iter(range(10_000))

    def empty() -> str:
        """Panels with a query that has no data yet; a little more load each time."""
        for model in MODELS:
            app.ask(model, f"What is {next(asked)}?", picture=next(asked), max_tokens=8)
        without = [
            f"{board.uid}: {panel.title}: {query.expr}"
            for board in BOARDS
            for panel in board.panels
            for query in panel.queries
            if not prometheus.get("query", query=filled_in(query.expr))["result"]
        ]
        return "\n".join(without)

    eventually(empty, TIMEOUT_S)
    rules = prometheus.rules()
    assert {rule["name"]: rule["lastError"] for rule in rules if rule["health"] != "ok"} == {}
    pages = [r["name"] for r in rules if r["type"] == "alerting" and r["state"] == "firing"]
    assert pages == [], "all is well"
    for board in BOARDS:
        offered = prometheus.get("label/model/values", **{"match[]": board.models_of})
        assert set(MODELS) <= set(offered)
